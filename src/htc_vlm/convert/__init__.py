"""Reads checkpoints in the layouts of others: names and tensors in, names and tensors out."""
