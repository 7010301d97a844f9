"""The processors of other families than LLaVA, with placeholders for what a bottleneck compressor gives and for its tokens.

Source:  transformers 5.23, its processors' hook `replace_image_token`.
Differs: the tiles of a picture stand together, without the marks that SmolVLM and Idefics3 write between them; a picture ends
         with its bottleneck tokens; pictures without text are processed too. No video processor: it would need torchvision.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import ProcessorMixin

from htc_vlm import compressors
from htc_vlm.compressors import Compressor
from htc_vlm.model.processing import AsksQuestions

OF_TEXT = ("mm_token_type_ids", "token_type_ids")  # what processors say of text, and the model reads from the ids
MODULE = "htc_vlm.model.bottlenecks"  # where pickle finds the classes


class WritesBottlenecks(AsksQuestions):
    """Mixed in front of a family's processor. compressor: the model's, by which a picture's placeholders are counted."""

    compressor: dict[str, Any] | None

    @property
    def n_bottleneck(self) -> int:  # type: ignore[override]
        return self._method.n_bottleneck

    @property
    def _method(self) -> Compressor:
        return compressors.build(**(self.compressor or {"name": "none"}))

    def image_text(self) -> str:
        raise ValueError(
            f"how many tokens a picture is for {type(self).__name__} depends on the picture; call the processor with images "
            "and text, or ask about compressed images"
        )

    def bottleneck_text(self, n_entries: int | None = None) -> str:
        return self._marked(super().bottleneck_text(n_entries))

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        own: str = super().replace_image_token(image_inputs, image_idx, **kwargs)  # type: ignore[misc]
        n_visual = self._method.n_visual(own.count(self.image_token))
        return self._marked(self.image_token * n_visual + super().bottleneck_text())

    def _marked(self, image: str) -> str:
        """Between the marks that the family writes around a whole picture, if it does."""
        if hasattr(self, "start_image_token"):  # InternVL
            return f"{self.start_image_token}{image}{self.end_image_token}"  # type: ignore[attr-defined]
        if hasattr(self, "fake_image_token"):  # SmolVLM, Idefics3
            whole = getattr(self, "global_image_token", None) or self.global_image_tag  # type: ignore[attr-defined]
            return f"{self.fake_image_token}{whole}{image}{self.fake_image_token}"
        return image

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        """As the family's. Pictures without text: what `compress` takes, image_lengths included. Text without pictures may
        have the image token where a compressed image goes."""
        check_no_video(kwargs)
        if images is None or text is not None:
            return super().__call__(images=self._nested(images, text), text=text, **kwargs)
        pictures = make_flat_list_of_images(images)
        out = self(images=[[one] for one in pictures], text=[self.image_token] * len(pictures), padding=True, **kwargs)
        image, extra = self.tokenizer.convert_tokens_to_ids(self.image_token), extra_tokens(self._method)
        lengths = [sum(int(id) == image for id in row) - extra for row in out.pop("input_ids")]
        for name in ("attention_mask", *OF_TEXT):
            out.pop(name, None)
        out["image_lengths"] = torch.tensor(lengths) if kwargs.get("return_tensors") == "pt" else lengths
        return out

    def _nested(self, images: Any, text: Any) -> Any:
        """Pictures as the family wants them: a flat list, but for SmolVLM and Idefics3, which want one for each prompt.

        A list for each prompt would make LLaVA-OneVision read several pictures of a prompt without their tiles, so that what is
        kept of a picture would depend on its neighbours.
        """
        if images is None:
            return None
        pictures = make_flat_list_of_images(images)
        if not hasattr(self, "fake_image_token"):
            return pictures
        counts = [one.count(self.image_token) for one in ([text] if isinstance(text, str) else text)]
        if isinstance(images, list | tuple) and any(isinstance(one, list | tuple) for one in images) or not all(counts):
            return images
        rest = iter(pictures)
        return [list(itertools.islice(rest, n)) for n in counts]

    def for_training(self, pictures: Sequence[Any]) -> tuple[list[str], dict[str, Any]]:
        inputs, method = dict(self(images=list(pictures), return_tensors="pt")), self._method
        visual = [self.image_token * (n + extra_tokens(method)) for n in inputs["image_lengths"].tolist()]
        return [self._marked(one + super(WritesBottlenecks, self).bottleneck_text()) for one in visual], inputs

    def apply_chat_template(self, *args: Any, **kwargs: Any) -> Any:
        """As most processors'; SmolVLM's asks a video processor, which is not there."""
        return ProcessorMixin.apply_chat_template(self, *args, **kwargs)

    @classmethod
    def validate_init_kwargs(cls, processor_config: Any, valid_kwargs: Any) -> Any:
        """As transformers', which reads names from the code of __init__ where ours are in its signature."""
        names = list(inspect.signature(cls.__init__).parameters)[1:]
        return super().validate_init_kwargs(processor_config=processor_config, valid_kwargs=names)  # type: ignore[misc]

    def fitted_to(self, config: Any) -> Any:
        """The same processor, for the compressor of a model on the same tokenizer. ValueError for another tokenizer."""
        self.compressor = dict(config.compressor)
        for mark, id in ((self.image_token, config.image_token_id), (self.bottleneck_token, config.bottleneck_token_id)):
            found = self.tokenizer.convert_tokens_to_ids(mark)
            if found != id:
                raise ValueError(f"the tokenizer has {mark} as {found}, the model as {id}; take both from one checkpoint")
        return self


def processor_class(stock: str) -> Any:
    """The processor of a family with its mixin. stock: how transformers' class names begin."""
    base = getattr(transformers, stock + "Processor")
    own = inspect.signature(base.__init__)
    has_video = "video_processor" in own.parameters

    def __init__(
        self: Any,
        *args: Any,
        compressor: dict[str, Any] | None = None,
        bottleneck_token: str = "<voco>",
        prompt_style: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.compressor, self.bottleneck_token, self.prompt_style = compressor, bottleneck_token, prompt_style
        base.__init__(self, *args, **kwargs, **({"video_processor": None} if has_video else {}))

    # transformers reads from the signature what a processor consists of; a video processor would need torchvision
    ours = [one for one in inspect.signature(__init__).parameters.values() if one.kind is one.KEYWORD_ONLY]
    kept = [one for one in own.parameters.values() if one.name != "video_processor" and one.kind is not one.VAR_KEYWORD]
    __init__.__signature__ = own.replace(parameters=[*kept, *ours])  # type: ignore[attr-defined]
    return type(f"HtcVlm{stock}Processor", (WritesBottlenecks, base), {"__module__": MODULE, "__init__": __init__})


def extra_tokens(method: Compressor) -> int:
    """Visual tokens that a method adds to those of the picture (anchors)."""
    return method.n_visual(1) - 1


def check_no_video(kwargs: Mapping[str, Any]) -> None:
    """ValueError for frames: only pictures are compressed."""
    given = [name for name, value in kwargs.items() if "video" in name and value is not None]
    if given:
        raise ValueError(f"{given[0]}: a model with a bottleneck reads pictures, not videos; give frames as pictures")
