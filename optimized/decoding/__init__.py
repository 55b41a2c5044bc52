"""One token of text: `reference.scan_step`, and all of Flex-MA but its output projection.

`operator` has what is registered, `torch_engine` the equations, `kernels` the Triton engine.
"""

from __future__ import annotations

from torch import Tensor

from ...reference.scan import check_step
from . import operator
from .operator import StepInputs

__all__ = ["scan_step"]


def scan_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linmu.reference.scan_step`: arguments, result and errors are the same; `state` is left as it was."""
    check_step("scan_step", state, x, dt, A, B, C, D, valid)
    y, state = operator.scan_step(StepInputs(state, x, dt, A, B, C, D, valid))
    return y, state
