"""Image -> discrete codes, one file each."""
