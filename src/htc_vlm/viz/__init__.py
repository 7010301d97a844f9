"""Looking at what the models do."""
