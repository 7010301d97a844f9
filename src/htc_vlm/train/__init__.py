"""Training: stages as data, one loop, packed questions over cached features."""
