"""Official files of a data set -> a checked manifest: readers, splits, media decoding; one file per data set in datasets/."""
