"""Stage 1: run an encoder over a manifest and write its features into a cache, on one process or many."""
