"""The methods, one file each: a head on image features that learns from text in training."""
