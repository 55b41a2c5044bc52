"""The two losses of the three distillation stages (LinMU, arXiv 2601.01322).

Letters: B batch, L tokens, D model width, V vocabulary; s student, t teacher, τ temperature.

    hidden = mean_valid ‖s - t‖² / mean_valid ‖t‖²                                                        (1)
    logit  = τ² · mean_supervised Σ_v p_t(v) (log p_t(v) - log p_s(v))       KL(t ‖ s) in nats            (2)

Choice: both are means over the tokens that count, and (1) is relative to the teacher, so that layers weigh
alike. The alternatives, a plain squared error and `KLDivLoss("batchmean")`, grow with the layer and with the
sequence, and see padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import require, require_float, require_mask, require_one_device, require_shape
from .numerics import accumulation_dtype, without_autocast, zero_where_masked


@without_autocast
def hidden_loss(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Relative mean squared error over valid tokens; eq. (1) (LinMU, arXiv 2601.01322).

    Args:
        student: (B, L, D), any float dtype.
        teacher: (B, L, D), the target; no gradient flows to it.
        valid: (B, L) bool, True = counts; None = all. Where no token counts the loss is 0.
    Returns:
        Scalar, float32, or float64 if `student` is. 0 = equal, 1 = as far off as predicting zero.
    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    where = "hidden_loss"
    check_pair(where, student, teacher, "B, L, D")
    require_mask(where, "valid", valid, student.shape[:2], "B, L")
    require_one_device(where, student=student, valid=valid)
    student, teacher = as_accumulated(student, teacher)
    if valid is not None:  # before the square, whose gradient at NaN would be NaN however it is masked
        student, teacher = (zero_where_masked(tensor, valid[..., None]) for tensor in (student, teacher))
    error, size = (student - teacher).square().sum(-1), teacher.square().sum(-1)  # (B, L)
    return error.sum() / size.sum().clamp_min(torch.finfo(size.dtype).tiny)  # eq. (1): the two counts cancel


@without_autocast
def logit_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """KL(teacher ‖ student) in nats times τ², mean over supervised tokens; eq. (2) (LinMU, arXiv 2601.01322).

    Args:
        student: (B, L, V) logits, any float dtype.
        teacher: (B, L, V) logits, the target; no gradient flows to it.
        mask: (B, L) bool, True = supervised; None = all. Where no token is supervised the loss is 0.
        temperature: τ > 0, divides both logits.
    Returns:
        Scalar, float32, or float64 if `student` is.
    Raises:
        ValueError: for shapes, dtypes or devices that do not fit, or temperature <= 0.
    """
    where = "logit_loss"
    check_pair(where, student, teacher, "B, L, V")
    require_mask(where, "mask", mask, student.shape[:2], "B, L")
    require_one_device(where, student=student, mask=mask)
    require(temperature > 0, where, "temperature must be positive", temperature)
    chosen = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device) if mask is None else mask
    student, teacher = as_accumulated(student[chosen], teacher[chosen])  # (n, V)
    log_s = torch.log_softmax(student / temperature, dim=-1)
    log_t = torch.log_softmax(teacher / temperature, dim=-1)
    divergence = (log_t.exp() * (log_t - log_s)).sum()
    return temperature**2 * divergence / max(len(student), 1)  # eq. (2)


def as_accumulated(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both in the accumulation dtype of the student, the teacher detached."""
    dtype = accumulation_dtype(student.dtype)
    return student.to(dtype), teacher.detach().to(dtype)


def check_pair(where: str, student: Tensor, teacher: Tensor, letters: str) -> None:
    """Student and teacher must be float tensors of one three-axis shape on one device."""
    require_float(where, student=student, teacher=teacher)
    require_shape(where, "student", student, (None, None, None), letters)
    require_shape(where, "teacher", teacher, tuple(student.shape), letters)
