"""Generation defaults of a checkpoint (generation_config.json) in a form that transformers saves again.

Source:  transformers 5.23, GenerationConfig.validate: what it calls ignored it refuses to save once the configuration was
         changed, and ours is changed (placeholders are suppressed). LLaVA's own folders hold `temperature` and `top_p`
         without `do_sample`, from the days when transformers took no notice.
"""

from __future__ import annotations

import os

from transformers import GenerationConfig

SAMPLING = ("temperature", "top_p", "top_k", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS = ("early_stopping", "length_penalty")


def drop_ignored(defaults: GenerationConfig) -> list[str]:
    """Unset the values that `generate` ignores beside the others; their names. Answers stay as they are.

    >>> defaults = GenerationConfig(temperature=0.9, top_p=0.6, max_length=4096)
    >>> drop_ignored(defaults), defaults.temperature, defaults.max_length
    (['temperature', 'top_p'], None, 4096)
    """
    ignored: list[str] = []
    if defaults.do_sample is not True:
        ignored += SAMPLING
    if defaults.num_beams in (None, 1):
        ignored += BEAMS
    if defaults.return_dict_in_generate is not True:
        ignored += defaults.extra_output_flags
    dropped = [name for name in ignored if getattr(defaults, name, None) is not None]
    for name in dropped:
        setattr(defaults, name, None)
    return dropped


def check_defaults(defaults: GenerationConfig, path: str | os.PathLike[str]) -> None:
    """Drop what is ignored; ValueError for what is left that transformers would not save, after hours of training say."""
    drop_ignored(defaults)
    try:
        defaults.validate(strict=True)
    except ValueError as error:
        raise ValueError(f"{path}: its generation_config.json cannot be kept; correct it: {error}") from error
