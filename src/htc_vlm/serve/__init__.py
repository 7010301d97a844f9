"""An OpenAI-compatible server over compressed images, and its page."""
