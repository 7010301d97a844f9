"""The toy world: a small vision tower, three small data sets, cached features, packed questions."""
