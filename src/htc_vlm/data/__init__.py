"""Pictures, conversations and small real data sets: from files on disk to batches."""
