"""Generators of the media that every reader has to get right: valid, damaged and hostile files."""
