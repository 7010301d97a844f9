"""Our own study of the methods on tiny models: `python -m study --help`; outside the wheel."""
