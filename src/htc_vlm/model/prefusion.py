"""Pre-fusion: before the language model, the words of a prompt read all patches in layers of the method's own.

Source:  LLaVA-Mini (arXiv:2501.03895; released code at 47da113): [patches; compressed tokens; all words], causal, also where
         words stand before the image in the prompt; positions count what takes part; answers and padding do not, and keep
         their embeddings; docs/specs/baselines.md section 8.
Differs: any batch, any number of images ([patches; tokens] of each, then all words), and packed questions, which
         read the picture and themselves only, and are numbered from the same place: each gets what it gets alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling

from htc_vlm.applied import hf_compat
from htc_vlm.ops import masks, rope
from htc_vlm.tokens import PADDING, TEXT, TokenLayout


@dataclass
class ImagesToFuse(BaseModelOutputWithPooling):
    """deepstack_features: [[(P, D) of each image]]. generate repeats a field of this name for beams, with the tokens."""

    deepstack_features: list[list[Tensor]] | None = None

    @property
    def patches(self) -> Tensor:
        """(I, P, D)"""
        if not self.deepstack_features:
            raise ValueError("pre-fusion needs the patches of the images beside their tokens; use get_image_features")
        return torch.stack(self.deepstack_features[0])


@dataclass(frozen=True)
class Spread:
    """Room for the patches. place (B, L): new column of each token; patch_place (I, P): through the flattened batch."""

    place: Tensor
    patch_place: Tensor
    length: int

    def tokens(self, x: Tensor, patches: Tensor | None = None) -> Tensor:
        """(B, L, ...) -> (B, length, ...), zeros where nothing goes; `patches` (I, P, ...) at their places."""
        index = self.place.view(*self.place.shape, *(1,) * (x.ndim - 2)).expand_as(x)
        out = x.new_zeros(x.shape[0], self.length, *x.shape[2:]).scatter(1, index, x)
        if patches is None:
            return out
        return out.flatten(0, 1).index_copy(0, self.patch_place.flatten(), patches.flatten(0, 1)).view_as(out)


def spread_out(is_visual: Tensor, n_visual: int, n_patches: int) -> Spread:
    """(B, L) bool, where n_visual tokens stand for each image -> the images in front, each its n_patches and its tokens.

    >>> spread = spread_out(torch.tensor([[False, True, False, True]]), n_visual=1, n_patches=2)
    >>> spread.place.tolist(), spread.patch_place.tolist(), spread.length
    ([[6, 2, 7, 5]], [[0, 1], [3, 4]], 8)
    """
    rank = is_visual.long().cumsum(dim=1) - 1  # (B, L)
    image, of_image = rank // n_visual, n_patches + n_visual
    n_images = image.amax(dim=1, keepdim=True) + 1  # (B, 1)
    token_place = image * of_image + n_patches + rank % n_visual
    word_place = n_images * of_image + (~is_visual).long().cumsum(dim=1) - 1
    length = is_visual.shape[1] + n_patches * int(n_images.max())
    sample, start = (is_visual & (rank % n_visual == 0)).nonzero(as_tuple=True)  # (I,), in the order of the images
    first = sample * length + image[sample, start] * of_image
    patch_place = first[:, None] + torch.arange(n_patches, device=is_visual.device)
    return Spread(torch.where(is_visual, token_place, word_place), patch_place, length)


def fuse(
    embeds: Tensor,
    layout: TokenLayout,
    patches: Tensor,
    n_visual: int,
    is_answer: Tensor | None,
    layers: Sequence[nn.Module],
    decoder: Any,
) -> Tensor:
    """embeds (B, L, D), compressed tokens in place, patches (I, P, D) -> (B, L, D), what the language model reads.

    Prompts with an image come out of `layers`; their answers (is_answer (B, L) bool), padding and prompts without an
    image stay as they are. `decoder`: the language model, whose rotary embedding and attention backend are used.
    """
    takes_part = ~layout.is_padding if is_answer is None else ~layout.is_padding & ~is_answer
    spread = spread_out(layout.is_visual, n_visual, patches.shape[1])
    states = spread.tokens(embeds, patches.to(embeds.dtype))
    part = spread.tokens(takes_part, torch.ones(patches.shape[:2], dtype=torch.bool, device=embeds.device))
    wide = TokenLayout.from_kind(torch.where(part, TEXT, PADDING), spread.tokens(layout.question))
    rotary = decoder.rotary_emb(states, position_ids=rope.position_ids(wide))
    mask = _mask(decoder, states, wide)
    for layer in layers:
        states = layer(states, attention_mask=mask, position_embeddings=rotary)
    fused = states.gather(1, spread.place[..., None].expand_as(embeds))
    changes = takes_part & layout.is_visual.any(dim=1, keepdim=True)
    return torch.where(changes[..., None], fused, embeds)


def _mask(decoder: Any, states: Tensor, layout: TokenLayout) -> Any:
    """Causal over what takes part. Only packed questions need a mask that flash attention cannot take."""
    part = (~layout.is_padding).long()
    if bool((layout.question > 0).any()):
        return hf_compat.ready_mask(decoder.config, states, part, masks.packed_causal(layout))
    return create_causal_mask(config=decoder.config, inputs_embeds=states, attention_mask=part, past_key_values=None)
