"""The losses: `reference/losses.py`, with a logit loss that never holds (B, L, V) in float32, and a hidden
loss that reads student and teacher once, for any number of groups of tokens.

`torch_engine` has the equations, `operator` what is registered, `kernels` and `kernels_hidden` the Triton
engine.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...reference.checks import require, require_mask, require_one_device
from ...reference.losses import check_pair
from ...reference.numerics import zero_where_masked
from . import operator
from .operator import ErrorInputs, LossInputs

__all__ = ["hidden_loss", "hidden_losses", "logit_loss"]


def hidden_loss(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """`linmu.reference.hidden_loss`: arguments, result and errors are the same."""
    where = "hidden_loss"
    check_pair(where, student, teacher, "B, L, D")
    require_mask(where, "valid", valid, student.shape[:2], "B, L")
    require_one_device(where, student=student, valid=valid)
    error, size = operator.squared_errors(ErrorInputs(student, teacher.detach(), valid))
    return error.sum() / size.detach().sum().clamp_min(torch.finfo(size.dtype).tiny)


def hidden_losses(pairs: Sequence[tuple[Tensor, Tensor]], groups: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """`hidden_loss` of every pair over every group of tokens, each pair read once.

    Args:
        pairs: student and teacher, (B, L, D) each.
        groups: masks (B, L) bool, True = counts; a token may be in several.
    Returns:
        (pairs, groups): the losses; and what they are relative to, the teacher's squares summed over a group,
        without gradients. In the accumulation dtype of the students.
    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    for student, teacher in pairs:
        check_pair("hidden_losses", student, teacher, "B, L, D")
        for group in groups:
            require_mask("hidden_losses", "groups", group, student.shape[:2], "B, L")
            require_one_device("hidden_losses", student=student, groups=group)
    taken = torch.stack(list(groups))  # (groups, B, L)
    some = taken.any(0)
    found = [operator.squared_errors(ErrorInputs(s, t.detach(), some)) for s, t in pairs]
    error, size = (torch.stack(each)[:, None] for each in zip(*found, strict=True))  # (pairs, 1, B, L)
    error, size = (zero_where_masked(each, taken).sum((-1, -2)) for each in (error, size.detach()))
    return error / size.clamp_min(torch.finfo(size.dtype).tiny), size


def logit_loss(
    student: Tensor, teacher: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """`linmu.reference.logit_loss`: arguments, result and errors are the same."""
    where = "logit_loss"
    check_pair(where, student, teacher, "B, L, V")
    require_mask(where, "mask", mask, student.shape[:2], "B, L")
    require_one_device(where, student=student, mask=mask)
    require(temperature > 0, where, "temperature must be positive", temperature)
    return operator.logit_loss(LossInputs(student, teacher.detach(), mask, float(temperature)))
