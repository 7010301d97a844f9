"""A faster trainer of the tiny models: the library's loss on the library's weights, three times as many questions at a step.

`python -m study train-tiny study/experiments/tiny/tiny.yaml --out DIR`; docs/training.md says what it is for.
"""
