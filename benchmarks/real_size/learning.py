"""Part (f): one LoRA step of the compress stage: the masked pass, its gradients and the optimizer.

Source:  the paper's compress stage (plain LM loss over the answer, Eq. 9); LoRA of LLaVA-1.5 (rank 128, alpha 256, all linear
         layers of the decoder); projector and anchor MLP learn in full.
Differs: random tokens; the frozen towers run within the step, as they do on conversations.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from htc_vlm.ops.cost import flop_counter
from real_size.bench import Bench
from real_size.clock import Journal, entry, time_in_turn
from real_size.floors import Work

TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"
BACKENDS = ("sdpa", "flex_attention")


def measure(bench: Bench, journal: Journal) -> None:
    """parts.train. Changes the model (adapters, what learns), so this part is the last one."""
    step: list[Step] = []

    def set_up() -> dict[str, Any]:
        step.append(Step(bench))
        return step[0].about

    if journal.attempt("train", "setting", set_up) is None:
        return
    for backend in BACKENDS:
        if backend == "flex_attention" and bench.device.type != "cuda":
            journal.skip(f"train/{backend}", "flex attention has no backward pass on the CPU")
            continue
        journal.attempt("train", backend, lambda backend=backend: measure_step(bench, step[0], backend))


class Step:
    """A model with adapters, an optimizer, and one batch of images with one question and answer each."""

    def __init__(self, bench: Bench) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        self.bench, shape, self.model = bench, bench.shape, bench.model
        lora = LoraConfig(r=shape.lora_rank, lora_alpha=2 * shape.lora_rank, target_modules=TARGETS)
        inject_adapter_in_model(lora, self.model)
        compressor = self.model.model.compressor
        for name, weight in self.model.named_parameters():
            weight.requires_grad_("lora_" in name)
        for module in (self.model.model.multi_modal_projector, compressor.to_anchors):
            module.requires_grad_(True)
        learning = [weight for weight in self.model.parameters() if weight.requires_grad]
        for weight in learning:
            weight.data = weight.data.float()  # as in our loop: float32 weights, bfloat16 products by autocast
        if shape.checkpointing:
            self.model.activation_checkpointing_enable()
        self.model.train()
        self.optimizer = torch.optim.AdamW(learning, lr=1e-4)
        self.batch = self._batch()
        n_tokens = self.batch["input_ids"].numel()
        self.about = {
            "images": shape.train_images,
            "tokens": n_tokens,
            "answer_tokens": int((self.batch["labels"] != -100).sum()),
            "trainable_parameters": sum(weight.numel() for weight in learning),
            "gradient_checkpointing": shape.checkpointing,
            "lora_rank": shape.lora_rank,
        }

    def _batch(self) -> dict[str, Tensor]:
        """[visual placeholders; bottleneck; text], the second half of the text supervised."""
        bench, n_images, n_text = self.bench, self.bench.shape.train_images, self.bench.shape.train_text
        config, size = self.model.config, self.model.config.vision_config.image_size
        text = torch.randint(3, min(config.image_token_index, bench.decoder.n_vocabulary) - 3, (n_images, n_text))
        visual = torch.full((n_images, bench.n_visual), config.image_token_index)
        bottleneck = torch.full((n_images, bench.n_bottleneck), config.bottleneck_token_id)
        ids = torch.cat((visual, bottleneck, text), dim=1).to(bench.device)
        labels = ids.clone()
        labels[:, : -(n_text // 2)] = -100
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "labels": labels,
            "pixel_values": bench.random(n_images, 3, size, size),
        }

    def __call__(self) -> Tensor:
        """-> the loss"""
        device = self.bench.device.type
        mixed = torch.autocast(device, torch.bfloat16) if self.bench.dtype == torch.bfloat16 else nullcontext()
        self.optimizer.zero_grad(set_to_none=True)
        with mixed:
            loss: Tensor = self.model(**self.batch).loss
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def measure_step(bench: Bench, step: Step, backend: str) -> dict[str, Any]:
    """Milliseconds, tokens/s and peak memory of a step with one attention backend."""
    is_cuda = bench.device.type == "cuda"
    bench.model.set_attn_implementation({"text_config": "sdpa"})
    if "flops" not in step.about:  # of the dense work; a compiled kernel (flex) hides its own from the counter
        with flop_counter() as counter:
            step()
        step.about["flops"] = int(counter.get_total_flops())
    bench.model.set_attn_implementation({"text_config": backend})
    first_loss = float(step())
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    times = time_in_turn({"step": step}, bench.device, warmup=2, repeats=max(3, bench.shape.repeats // 2))["step"]
    loss = float(step())
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}: nothing is measured by timing it")
    one = entry(times, Work(step.about["flops"]), bench.ceilings)
    return {
        **one,
        "tokens_per_s": 1000 * step.about["tokens"] / one["ms"],
        "images_per_s": 1000 * step.about["images"] / one["ms"],
        "peak_bytes": torch.cuda.max_memory_allocated() if is_cuda else None,
        "loss_first_and_last": [first_loss, loss],
    }
