"""`python cli.py …` is `diffalign …`."""

from pipeline.commands.app import main

if __name__ == "__main__":
    main()
