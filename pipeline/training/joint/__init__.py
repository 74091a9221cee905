"""Stage 3: train encoders together with a head, and extract the features of the tuned encoders."""
