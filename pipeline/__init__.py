"""Train image classifiers on cached features, with the help of texts that exist only for training images.

The pipeline has three stages. Stage 1 (`extract`) runs encoders over the official files of a dataset and stores the features in
a verified cache. Stage 2 (`train-head`) trains light heads on the cached features in seconds; some methods align the image
features with the text features by diffusion. Stage 3 (`finetune`) trains the encoders together with a head, and stage 1 can
extract the features of the tuned encoders again.
"""
