"""Stage 2: train classifier heads on cached features, one head alone or many heads as one model."""
