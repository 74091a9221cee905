"""Pretrained image, video and text networks, one file each, with the preprocessing that they were trained with."""
