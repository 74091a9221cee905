"""Generators of valid, damaged and hostile media files, each with its expected pixels or the reason in the failure list."""
