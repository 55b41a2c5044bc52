"""Flex-MA's norms set to the scale of the heads that they stand in for.

Letters: H heads, P head dim.

    weight = sqrt(mean over tokens of (the teacher's head output)²)        per channel, (H·P,)            (1)

LinMU, arXiv 2601.01322, is silent on the scale of the first output. Choice: Flex-MA normalises every head, so
its output would otherwise start at a scale of its own.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..checks import require
from .lesson import Lesson


@torch.no_grad()
def calibrate_norms(lesson: Lesson, batches: Iterable[dict[str, Tensor]]) -> None:
    """Set each `norm_weight` to the root mean square of the teacher's own head outputs; eq. (1).

    Args:
        lesson: student with teacher attached.
        batches: a few batches of model inputs, `attention_mask` among them.
    Raises:
        ValueError: if no batch is given.
    """
    sums: dict[int, Tensor] = {}
    tokens = 0.0
    valid = None

    def listen(index: int):
        def hook(module: nn.Module, args: tuple) -> None:
            heads = args[0].float()[valid]  # (tokens, H·P)
            sums[index] = sums.get(index, 0) + heads.square().sum(0)

        return hook

    mixers = [layer.self_attn for layer in lesson.layers]
    hooks = [mixer.attention.o_proj.register_forward_pre_hook(listen(i)) for i, mixer in enumerate(mixers)]
    for batch in batches:
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        valid = inputs["attention_mask"].bool()
        tokens += float(valid.sum())
        lesson.run("teacher", inputs)
    for hook in hooks:
        hook.remove()
    lesson.set_role("student")
    require(tokens > 0, "calibrate_norms", "batches must hold at least one token", tokens)
    for index, mixer in enumerate(mixers):
        if mixer.mixer.config.head_norm:
            weight = mixer.mixer.flex_ma.norm_weight
            weight.copy_((sums[index] / tokens).sqrt().to(weight))  # eq. (1)
