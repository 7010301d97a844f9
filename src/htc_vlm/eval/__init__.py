"""Benchmarks, scorers, retention and tables: the instrument that measures every method."""
