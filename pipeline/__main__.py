"""`python -m pipeline …` is `diffalign …`; so is `torchrun -m pipeline …`, which needs a module."""

from pipeline.commands.app import main

if __name__ == "__main__":
    main()
