"""What a run of the fast trainer is made of, read from a YAML file of study/experiments/tiny.

Source:  ours.
Differs: nothing known. An unknown key is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from htc_vlm.settings import check_keys, make, override, read_yaml

SETS = Path(__file__).parents[1] / "experiments" / "tiny"
# Settings that change no weight: a run may go on with others.
FREE = ("save_every", "compile", "title", "note")
WATCH_KEYS = ("task", "split", "images")
MIXTURE_KEYS = ("until", "kinds")


@dataclass(frozen=True)
class Part:
    """One data set. n_text: nodes of the question tree of a picture; n_answers: places in it where something is answered."""

    task: str
    images: int
    images_per_step: int = 16
    n_text: int = 104
    n_answers: int = 40


@dataclass(frozen=True)
class Run:
    """One training. note: what to know about it, kept in its report.

    start: a shipped name or a folder; None: a new model of `preset`, its words aligned with patches first. mgvq: the
    quantizer's folder, or a checkpoint that carries one. data: `Part`s; each other_every-th step is about one of those after
    the first, in turn. mixtures: {until: share of the run, kinds: {kind: weight}} of the first part's questions.
    constant_share: of the steps, at the full learning rate; then it falls linearly. loss_weights: of the answers, by kind of
    question, 1 where nothing is said; `end` is the token that ends an answer, taught after each end_every-th answer.
    lora: settings of an adapter (model/adapter.py::LoraSettings) that learns in place of the language model and the projector,
    and acts only while an image is read. turn_loss: weight of a second loss, that a linear layer reads the turn of a thing off
    its patches; 0: none.
    watch: name -> task, split, images: right answers by kind every measure_every steps.
    """

    title: str = ""
    note: str = ""
    compressor: dict[str, Any] = field(default_factory=lambda: {"name": "none"})
    preset: str = "tiny"
    start: str | None = None
    mgvq: str | None = None
    lora: dict[str, Any] | None = None
    data: tuple[dict[str, Any], ...] = ()
    other_every: int = 7
    mixtures: tuple[dict[str, Any], ...] = ()
    loss_weights: dict[str, float] = field(default_factory=dict)
    end_every: int = 8
    turn_loss: float = 0.0
    steps: int = 1000
    learning_rate: float = 1e-3
    min_learning_rate_share: float = 0.02
    constant_share: float = 0.5
    warmup_steps: int = 50
    weight_decay: float = 0.05
    beta2: float = 0.98
    clip: float = 1.0
    seed: int = 0
    compile: bool = True
    log_every: int = 20
    save_every: int = 200
    measure_every: int = 200
    watch: dict[str, Any] = field(default_factory=dict)

    @property
    def parts(self) -> list[Part]:
        """`data`, as what it means."""
        return [make(Part, part, where="data: ") for part in self.data]

    def learning_rate_at(self, step: int) -> float:
        """Rate of the step with this number, from 0: a short rise, the full rate, a linear fall.

        >>> run = Run(steps=100, learning_rate=1.0, warmup_steps=10, constant_share=0.5)
        >>> [round(run.learning_rate_at(step), 2) for step in (0, 9, 49, 75, 99)]
        [0.1, 1.0, 1.0, 0.5, 0.02]
        """
        progress = step / self.steps
        fall = (1 - progress) / (1 - self.constant_share) if progress > self.constant_share else 1.0
        return self.learning_rate * min(1.0, (step + 1) / max(1, self.warmup_steps)) * max(self.min_learning_rate_share, fall)

    def kinds_at(self, step: int) -> Mapping[str, float] | None:
        """Weights of the kinds of question at this step; None: all alike."""
        progress = step / self.steps
        return next((mixture["kinds"] for mixture in self.mixtures if progress < mixture["until"]), None)

    def binding(self) -> dict[str, Any]:
        """All settings that a run must keep when it goes on."""
        return {name: value for name, value in asdict(self).items() if name not in FREE}


def read_run(path: Path, overrides: Sequence[str] = ()) -> Run:
    """A YAML file with overrides like `steps=100` applied. ValueError names the file and what is wrong."""
    given = read_settings(path)
    for text in overrides:
        override(given, text, "steps=100")
    return make_run(given, path)


def read_settings(path: Path) -> dict[str, Any]:
    """The keys of a file; `like: OTHER.yaml`, beside it, gives those that it does not have."""
    given = read_yaml(path)
    return {**read_yaml(path.parent / given.pop("like")), **given} if "like" in given else given


def find_run(name: str) -> Path:
    """`rows` -> study/experiments/tiny/rows.yaml; a path is taken as it is."""
    return Path(name) if name.endswith((".yaml", ".yml")) else SETS / f"{name}.yaml"


def make_run(given: Mapping[str, Any], where: object) -> Run:
    """Settings -> a run, checked as far as it can be without data."""
    try:
        run = make(Run, given)
        parts = run.parts
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not parts:
        raise ValueError(f"{where}: no data; name at least one task with its number of images")
    for mixture in run.mixtures:
        check_keys(f"{where}: mixtures", mixture, MIXTURE_KEYS)
    for name, watched in run.watch.items():
        check_keys(f"{where}: watch: {name}", watched, WATCH_KEYS)
    positive = ("steps", "other_every", "end_every", "log_every", "save_every", "measure_every")
    wrong = [name for name in positive if getattr(run, name) < 1]
    if wrong:
        raise ValueError(f"{where}: {wrong[0]} is {getattr(run, wrong[0])}; give at least 1")
    if not 0 <= run.constant_share < 1:
        raise ValueError(f"{where}: constant_share is {run.constant_share}; give a share from 0 to below 1")
    return run
