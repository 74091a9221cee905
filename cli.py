"""The entry point of `python cli.py …`, the same as `diffalign …`."""

from pipeline.commands.app import main

if __name__ == "__main__":
    main()
