"""The command line: options, and one file per group of commands."""
