"""Align image features with text that exists only in training, with diffusion as the bridge.

The pipeline has three stages and one direction: encoders turn official files into a feature cache that can be trusted
(`extract`), light heads train on the cached vectors in seconds (`train-head`), and the joint stage (`finetune`) tunes the
encoders and gives them back to the first stage.
"""
