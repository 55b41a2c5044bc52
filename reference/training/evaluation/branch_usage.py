"""What each layer relies on, and how far it is from its teacher.

Letters: m the mixing weight of M-MATE, g the gate of its scans, both in [0, 1].

    forward = m g        reverse = m (1 - g)        local = 1 - m       means over vision tokens and heads (1)
    error   = Σ ‖student - teacher‖² / Σ ‖teacher‖²    of the mixer's or the layer's output                (2)

The sums of (2) run over all held-out tokens of a group, vision, text or answering; its mean over groups is
given. So the number does not depend on how conversations fall into batches.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...numerics import full_precision_linear
from ..lesson import Lesson
from ..safety.distributed_means import energies
from .scores import add_up

WAYS = ("forward", "reverse", "local")
ERRORS = ("mixer_error", "layer_error")


class LayerWatch:
    """Adds up what a lesson's layers do while it is evaluated.

    Args:
        lesson: student with its teacher.
    """

    def __init__(self, lesson: Lesson) -> None:
        self.lesson = lesson
        self.sums: dict[tuple, float] = defaultdict(float)

    @contextmanager
    def usage(self, vision: Tensor) -> Iterator[None]:
        """Within, take eq. (1) from the student's pass; `vision` (B, L) bool says which tokens count."""
        shares: dict[int, Tensor] = {}
        layers = enumerate(self.lesson.layers)
        hooks = [
            layer.self_attn.mixer.register_forward_pre_hook(listen(index, vision, shares), with_kwargs=True)
            for index, layer in layers
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        self.sums["vision",] += float(vision.sum())
        for index, of_layer in zip(
            shares, torch.stack([*shares.values()]).tolist() if shares else (), strict=True
        ):
            for way, share in zip(WAYS, of_layer, strict=True):
                self.sums[way, index] += share

    def add_errors(self, name: str, outputs: list[dict[str, Tensor]], masks: dict[str, Tensor]) -> None:
        """Add the sums of eq. (2), of every layer, from what the last passes left."""
        measured = []
        for output in outputs:
            student, teacher = output["student"], output["teacher"]
            errors = [self.lesson.hidden_loss(student, teacher, mask) for mask in masks.values()]
            measured.append(
                torch.stack([energies([teacher], [*masks.values()]), torch.stack(errors)]).double()
            )
        # one question to the device: each waits for all that it has to do, and for other processes' work
        for index, of_layer in enumerate(torch.stack(measured).tolist()):
            for group, size, error in zip(masks, *of_layer, strict=True):
                self.sums["size", name, index, group] += size
                self.sums["error", name, index, group] += error * size

    def layers(self) -> list[dict[str, float]]:
        """Each layer's index, its errors, and its shares if there were vision tokens, over all processes."""
        sums = add_up(self.sums)
        return [self._of_layer(index, layer, sums) for index, layer in enumerate(self.lesson.layers)]

    def _of_layer(self, index: int, layer: nn.Module, sums: dict[tuple, float]) -> dict[str, float]:
        row: dict[str, float] = {"layer": layer.self_attn.mixer.layer_index}
        for name in ERRORS:
            groups = [key[3] for key in sums if key[:3] == ("size", name, index) and sums[key] > 0]
            errors = [
                sums["error", name, index, group] / sums["size", name, index, group] for group in groups
            ]
            row[name] = sum(errors) / max(len(errors), 1)
        if tokens := sums["vision",]:
            row |= {way: sums[way, index] / tokens for way in WAYS}
        return row


def listen(index: int, vision: Tensor, shares: dict[int, Tensor]):
    """A hook before layer `index`'s M-MATE that puts the sums of eq. (1) over the tokens of `vision` (B, L)
    into `shares`: (3,), in the order of `WAYS`."""

    def hook(mixer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if mixer.config.text_only:
            return  # it has no gate, and there is no vision
        u = (args[0] if args else kwargs["hidden_states"])[vision]  # (tokens, D)
        mix = torch.sigmoid(full_precision_linear(u, mixer.mix_proj))  # (tokens, 1)
        gate = torch.sigmoid(full_precision_linear(u, mixer.flex_ma.scan_gate_proj))  # (tokens, H)
        ways = mix * gate, mix * (1 - gate), 1 - mix  # eq. (1)
        shares[index] = torch.stack([share.mean(-1).sum() for share in ways])

    return hook
