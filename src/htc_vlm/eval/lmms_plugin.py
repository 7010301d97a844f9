"""The lmms-eval plugin: `python -m lmms_eval eval --model htc_vlm --model_args pretrained=tiny --tasks ...`.

Source:  lmms-eval 0.7.3, api/model.py and models/registry_v2.py (entry-point group `lmms_eval.models`).
Differs: questions of one picture in a batch share one compressed picture; what cannot be answered faithfully (sampling,
         beams, several pictures in one question, log-likelihoods) is refused, where lmms-eval's own adapters drop it or log it.

lmms-eval finds `manifest` through the entry point in pyproject.toml. Nothing else imports this file, which needs lmms-eval.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm  # type: ignore[import-untyped]

from htc_vlm.eval.run import Ask
from htc_vlm.model.answering import Answerer
from htc_vlm.model.loading import load
from htc_vlm.model.stock_answering import StockAnswerer, is_stock
from htc_vlm.settings import budget as as_budget

DEFAULT_MAX_NEW_TOKENS = 128
# Generation settings that greedy decoding satisfies; any other value is refused.
GREEDY: dict[str, tuple[Any, ...]] = {
    "do_sample": (False, None), "temperature": (0, None), "num_beams": (1, None), "top_p": (None, 0, 1), "top_k": (None,),
}  # fmt: skip
KNOWN = {*GREEDY, "max_new_tokens", "until"}


def manifest() -> ModelManifest:
    """What the entry point hands to lmms-eval."""
    return ModelManifest(model_id="htc_vlm", chat_class_path="htc_vlm.eval.lmms_plugin.HtcVlm", aliases=("htc-vlm",))


@dataclass(frozen=True)
class Question:
    """One request, read: its picture, the text, and where to stop."""

    key: str  # of the picture's pixels: equal keys, equal pictures
    picture: Image.Image
    text: str
    max_new_tokens: int
    until: tuple[str, ...]

    def cut(self, answer: str) -> str:
        """The answer up to the first stop string."""
        for stop in self.until:
            answer = answer.split(stop)[0]
        return answer.strip()


def read_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[Image.Image, str]:
    """Chat messages -> the picture and the question; ValueError for anything but one user turn, picture first."""
    parts = [part for message in messages for part in message["content"]]
    kinds = [part["type"] for part in parts]
    if [message["role"] for message in messages] != ["user"] or kinds != ["image", "text"]:
        raise ValueError(
            f"htc_vlm answers one user turn with one picture before the text; got roles "
            f"{[message['role'] for message in messages]} with {kinds}. Use Answerer or generate(compressed=...) for more"
        )
    if not isinstance(parts[0]["url"], Image.Image):
        raise ValueError(f"a picture should be a PIL image, got {type(parts[0]['url']).__name__}")
    return parts[0]["url"].convert("RGB"), parts[1]["text"]


def check_greedy(settings: Mapping[str, Any]) -> None:
    """ValueError for generation settings that greedy decoding does not satisfy, or that are not known here."""
    wrong = {name: settings[name] for name, fine in GREEDY.items() if name in settings and settings[name] not in fine}
    wrong |= {name: value for name, value in settings.items() if name not in KNOWN}
    if wrong:
        raise ValueError(f"htc_vlm decodes greedily and does not follow {wrong}; override them with --gen_kwargs")


def read_request(request: Instance, task_dict: Mapping[str, Any]) -> Question:
    """A `generate_until` request of a chat model -> Question."""
    _, doc_to_messages, settings, doc_id, task, split = request.args
    check_greedy(settings)
    picture, text = read_messages(doc_to_messages(task_dict[task][split][doc_id]))
    until = settings.get("until") or ()
    return Question(
        key=hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).hexdigest(),
        picture=picture,
        text=text,
        max_new_tokens=int(settings.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)),
        until=(until,) if isinstance(until, str) else tuple(until),
    )


class HtcVlm(lmms):
    """pretrained: a shipped checkpoint's name or a folder; compressor: another method for these weights.

    method, budget: applied to the uncompressed model, in any family that `apply` knows; budget is a number of visual
    tokens or a share of them.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str = "tiny",
        compressor: str | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | str | None = None,
        method: str | None = None,
        budget: float | str | None = None,
    ) -> None:
        super().__init__()
        model, processor = load(pretrained, compressor=None if compressor is None else {"name": compressor})
        model.to(device or "cpu").eval()
        if method is None and budget is not None:
            raise ValueError("budget sets the settings of a method; name one, e.g. method=fastv")
        if method is not None or is_stock(model):
            applied: dict[str, Any] | None = None if method is None else {"name": method}
            if applied is not None and budget is not None:
                applied["budget"] = as_budget(str(budget))
            self.answerer: Any = StockAnswerer(model, processor, applied)
        else:
            self.answerer = Answerer(model, processor)
        self.batch_size = int(batch_size)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """Greedy answers, in the order of the requests."""
        out: list[GenerationResult] = []
        for start in tqdm(range(0, len(requests), self.batch_size), desc="htc_vlm", unit="batch"):
            out += self._batch([read_request(one, self.task_dict) for one in requests[start : start + self.batch_size]])
        return out

    def _batch(self, asked: Sequence[Question]) -> list[GenerationResult]:
        """Pictures that occur several times in the batch are compressed once."""
        groups: dict[tuple[int, str], list[int]] = {}
        for i, one in enumerate(asked):
            groups.setdefault((one.max_new_tokens, one.key), []).append(i)
        texts: dict[int, str] = {}
        for n_new in sorted({one.max_new_tokens for one in asked}):
            numbers = [rows for (limit, _), rows in groups.items() if limit == n_new]
            asks = [_ask([asked[i] for i in rows]) for rows in numbers]
            for rows, answers in zip(numbers, self.answerer.answer_batch(asks, n_new), strict=True):
                texts.update(zip(rows, answers, strict=True))
        return [GenerationResult(text=one.cut(texts[i])) for i, one in enumerate(asked)]

    def loglikelihood(self, requests: Sequence[Instance]) -> NoReturn:
        raise ValueError("htc_vlm answers by generation only; choose a task with output_type: generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> NoReturn:
        raise ValueError("htc_vlm answers one round; choose a task with output_type: generate_until")


def _ask(questions: Sequence[Question]) -> Ask:
    """Questions about one picture."""
    return Ask(questions[0].key, lambda: questions[0].picture, [one.text for one in questions])
