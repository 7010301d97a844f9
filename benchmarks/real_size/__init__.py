"""The parts of benchmarks/real_size.py: shapes, clock, and one file per part of what is measured."""
