"""What each layer relies on, and how far it is from its teacher.

Letters: m the mixing weight of M-MATE, g the gate of its scans, both in [0, 1].

    forward = m g        backward = m (1 - g)        local = 1 - m      means over vision tokens and heads (1)
    error   = hidden_loss of the mixer's or the block's output, mean over groups of tokens                 (2)
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from ...numerics import full_precision_linear
from ..teacher_student import Lesson

WAYS = ("forward", "backward", "local")


class LayerWatch:
    """Listens to a lesson's layers while it is evaluated.

    Args:
        lesson: student with its teacher; `close` takes the hooks off.
    """

    def __init__(self, lesson: Lesson) -> None:
        self.lesson = lesson
        self.vision: Tensor | None = None
        self.sums: list[dict[str, float]] = [defaultdict(float) for _ in lesson.layers]
        self.batches, self.tokens = 0, 0.0
        self.hooks = [
            layer.self_attn.mixer.register_forward_pre_hook(self._listen(index), with_kwargs=True)
            for index, layer in enumerate(lesson.layers)
        ]

    def look_at(self, vision: Tensor) -> None:
        """Say which tokens (B, L) of the passes to come are vision."""
        self.vision = vision
        self.tokens += float(vision.sum())
        self.batches += 1

    def _listen(self, index: int):
        def hook(mixer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if self.lesson.role != "student":
                return
            u = (args[0] if args else kwargs["hidden_states"])[self.vision]  # (tokens, D)
            mix = torch.sigmoid(full_precision_linear(u, mixer.mix_proj))  # (tokens, 1)
            gate = torch.sigmoid(full_precision_linear(u, mixer.flex_ma.scan_gate_proj))  # (tokens, H)
            shares = mix * gate, mix * (1 - gate), 1 - mix  # eq. (1)
            for way, share in zip(WAYS, shares, strict=True):
                self.sums[index][way] += float(share.mean(-1).sum())

        return hook

    def add_errors(self, name: str, pairs: list[dict[str, Tensor]], groups: list[Tensor]) -> None:
        """Take eq. (2) of every layer from what the last passes left."""
        for index, pair in enumerate(pairs):
            losses = [self.lesson.hidden_loss(pair["student"], pair["teacher"], group) for group in groups]
            self.sums[index][name] += float(torch.stack(losses).mean())

    def close(self) -> list[dict[str, float]]:
        """Take the hooks off; the means by layer: errors over batches, shares over vision tokens."""
        for hook in self.hooks:
            hook.remove()
        return [self._means(layer, sums) for layer, sums in zip(self.lesson.layers, self.sums, strict=True)]

    def _means(self, layer: nn.Module, sums: dict[str, float]) -> dict[str, float]:
        means = {
            name: total / (self.tokens if name in WAYS else self.batches) for name, total in sums.items()
        }
        return {"layer": layer.self_attn.mixer.layer_index} | means
