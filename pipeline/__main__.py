"""The entry point of `python -m pipeline …`, the same as `diffalign …`. `torchrun -m pipeline …` needs it too."""

from pipeline.commands.app import main

if __name__ == "__main__":
    main()
