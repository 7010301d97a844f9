"""Tensors in, tensors out: masks, selection, merging, clustering, rotary positions and costs."""
