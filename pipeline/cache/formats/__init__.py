"""Formats of feature files: each module has `write(path, features, samples)` and the context manager `read(path)`."""
