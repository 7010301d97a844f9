"""A faster trainer of the tiny models: the library's loss on the library's weights, in a third of the time on a CPU core.

`python -m study train-tiny study/experiments/tiny/tiny.yaml --out DIR`; docs/training.md says what it is for.
"""
