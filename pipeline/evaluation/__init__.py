"""Predictions, metrics and statistics of finished runs."""
