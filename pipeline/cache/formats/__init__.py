"""Formats of feature files. Each module has `write(path, features, samples)` and the context manager `read(path)`."""
