"""Datasets, one file each: build a manifest from the official files of a dataset."""
