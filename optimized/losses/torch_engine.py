"""The torch engine of the losses; the logit loss goes in slabs of tokens.

Letters: B batch, L tokens, V vocabulary, τ temperature, p softmax of the logits divided by τ.

    logit = τ² / n · Σ_v p_t (log p_t - log p_s)        ∂logit/∂s = τ / n · (p_s - p_t)                    (1)

over n supervised tokens. What outlives a slab is the gradient, in the dtype of the student.

The hidden loss is a ratio of sums over tokens, of e = Σ_D (s - t)² and of Σ_D t²:

    ∂e/∂s = 2 (s - t)                                                                                      (2)
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...reference.losses import as_accumulated
from ...reference.numerics import accumulation_dtype, zero_where_masked
from .operator import (
    ErrorGrads,
    ErrorInputs,
    ErrorOutputs,
    LossGrads,
    LossInputs,
    LossOutputs,
    loss_outputs,
)

SLAB_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}


def forward(inputs: LossInputs) -> Tensor:
    """Eq. (1), left."""
    student, teacher, mask, temperature, _ = inputs
    total, rows = loss_outputs(inputs).zero_(), supervised_rows(student, mask)
    for some in slabs(rows, student):
        log_s, log_t = (log_softmax(tensor, some, student, temperature) for tensor in (student, teacher))
        total += (log_t.exp() * (log_t - log_s)).sum()
    return total * (temperature**2 / max(len(rows), 1))


def backward(inputs: LossInputs, outputs: LossOutputs, grads: LossOutputs) -> LossGrads:
    """Eq. (1), right."""
    student, teacher, mask, temperature, _ = inputs
    grad, rows = student.new_zeros(student.shape), supervised_rows(student, mask)
    factor = grads.loss * (temperature / max(len(rows), 1))
    for some in slabs(rows, student):
        p_s, p_t = (log_softmax(tensor, some, student, temperature).exp_() for tensor in (student, teacher))
        grad.flatten(0, 1)[some] = (p_s.sub_(p_t) * factor).to(grad.dtype)
    return LossGrads(grad)


def supervised_rows(student: Tensor, mask: Tensor | None) -> Tensor:
    """Indices (n,) of the supervised tokens among the B·L."""
    if mask is None:
        return torch.arange(student.shape[0] * student.shape[1], device=student.device)
    return mask.flatten().nonzero().squeeze(1)


def slabs(rows: Tensor, student: Tensor) -> Iterator[Tensor]:
    """`rows` in parts of at most SLAB_ELEMENTS logits."""
    size = SLAB_ELEMENTS.get(student.device.type, 2**20)
    return iter(rows.split(max(1, size // max(student.shape[2], 1)))) if len(rows) else iter(())


def log_softmax(logits: Tensor, rows: Tensor, student: Tensor, temperature: float) -> Tensor:
    """log p of some rows, (n, V), in the accumulation dtype of the student."""
    chosen = logits.flatten(0, 1)[rows].to(accumulation_dtype(student.dtype))
    return torch.log_softmax(chosen / temperature, dim=-1)


def errors(inputs: ErrorInputs) -> ErrorOutputs:
    """Eq. (2)."""
    student, teacher = counted(inputs)
    return ErrorOutputs((student - teacher).square().sum(-1), teacher.square().sum(-1))


def errors_backward(inputs: ErrorInputs, outputs: ErrorOutputs, grads: ErrorOutputs) -> ErrorGrads:
    """The gradient of eq. (2)."""
    student, teacher = counted(inputs)
    return ErrorGrads(2 * grads.error[..., None] * (student - teacher))


def counted(inputs: ErrorInputs) -> tuple[Tensor, Tensor]:
    """Student and teacher in the accumulation dtype, 0 where a token does not count, whatever stood there."""
    pair = as_accumulated(inputs.student, inputs.teacher)
    if inputs.taken is None:
        return pair
    return tuple(zero_where_masked(tensor, inputs.taken[..., None]) for tensor in pair)
