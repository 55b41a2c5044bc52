"""`reference/losses.py` with a logit loss that never holds (B, L, V) in float32.

Letters: B batch, L tokens, V vocabulary, τ temperature, p softmax of the logits divided by τ.

    logit = τ² / n · Σ_v p_t (log p_t - log p_s)        ∂logit/∂s = τ / n · (p_s - p_t)                    (1)

over n supervised tokens. Both passes go through slabs of tokens: what lives longer is the gradient, in the
dtype of the student.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...reference.losses import check_pair, hidden_loss
from ..checks import require, require_mask, require_one_device
from ..engine import choose_engine
from ..engine.operator import operator
from ..precision import accumulation_dtype, without_autocast
from ..scan.operator import kernels as kernels_of

__all__ = ["hidden_loss", "logit_loss"]

SLAB_ELEMENTS = {"cpu": 2**18, "cuda": 2**26}


@without_autocast
def logit_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """`linmu.reference.logit_loss`: arguments, result and errors are the same."""
    where = "logit_loss"
    check_pair(where, student, teacher, "B, L, V")
    require_mask(where, "mask", mask, student.shape[:2], "B, L")
    require_one_device(where, student=student, mask=mask)
    require(temperature > 0, where, "temperature must be positive", temperature)
    return loss_operator(student, teacher.detach(), mask, float(temperature))


@operator("logit_loss")
def loss_operator(student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
    """Eq. (1), a scalar in the accumulation dtype."""
    if choose_engine("logit_loss", student) == "triton":
        return kernels_of("losses.kernels").divergence(student, teacher, mask, temperature)
    return divergence(student, teacher, mask, temperature)


@loss_operator.register_fake
def _(student, teacher, mask, temperature):
    return student.new_empty((), dtype=accumulation_dtype(student.dtype))


@operator("logit_loss_backward")
def loss_backward_operator(
    loss_grad: Tensor, student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float
) -> Tensor:
    """The gradient of the student, in its dtype."""
    if choose_engine("logit_loss", student) == "triton":
        return kernels_of("losses.kernels").divergence_gradient(
            loss_grad, student, teacher, mask, temperature
        )
    return divergence_gradient(loss_grad, student, teacher, mask, temperature)


@loss_backward_operator.register_fake
def _(loss_grad, student, teacher, mask, temperature):
    return student.new_empty(student.shape)


def _save(ctx, inputs, output) -> None:
    student, teacher, mask, ctx.temperature = inputs
    ctx.save_for_backward(student, teacher, mask)


def _gradients(ctx, loss_grad: Tensor):
    return loss_backward_operator(loss_grad, *ctx.saved_tensors, ctx.temperature), None, None, None


loss_operator.register_autograd(_gradients, setup_context=_save)


@without_autocast
def divergence(student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float) -> Tensor:
    """Eq. (1), left, in torch."""
    total = student.new_zeros((), dtype=accumulation_dtype(student.dtype))
    rows = supervised_rows(student, mask)
    for some in slabs(rows, student):
        log_s, log_t = (log_softmax(tensor, some, student, temperature) for tensor in (student, teacher))
        total += (log_t.exp() * (log_t - log_s)).sum()
    return total * (temperature**2 / max(len(rows), 1))


@without_autocast
def divergence_gradient(
    loss_grad: Tensor, student: Tensor, teacher: Tensor, mask: Tensor | None, temperature: float
) -> Tensor:
    """Eq. (1), right, in torch."""
    grad = student.new_zeros(student.shape)
    rows = supervised_rows(student, mask)
    factor = loss_grad * (temperature / max(len(rows), 1))
    for some in slabs(rows, student):
        p_s, p_t = (log_softmax(tensor, some, student, temperature).exp_() for tensor in (student, teacher))
        grad.flatten(0, 1)[some] = (p_s.sub_(p_t) * factor).to(grad.dtype)
    return grad


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
