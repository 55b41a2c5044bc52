"""The losses: `reference/losses.py`, with a logit loss that never holds (B, L, V) in float32.

`torch_engine` has the equations, `operator` what is registered, `kernels` the Triton engine.
"""

from __future__ import annotations

from torch import Tensor

from ...reference.checks import require, require_mask, require_one_device
from ...reference.losses import check_pair, hidden_loss
from . import operator
from .operator import LossInputs

__all__ = ["hidden_loss", "logit_loss"]


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
