"""The logit loss as one registered operator, `linmu::logit_loss`."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...reference.numerics import accumulation_dtype
from ..engine.operator import Engines, Operator, lazy


class LossInputs(NamedTuple):
    """student and teacher (B, L, V), mask (B, L) bool or None, and what divides both; engine None = by the
    tensors.
    """

    student: Tensor
    teacher: Tensor
    mask: Tensor | None
    temperature: float
    engine: str | None = None


class LossOutputs(NamedTuple):
    """loss: a scalar in the accumulation dtype."""

    loss: Tensor


class LossGrads(NamedTuple):
    """The gradient of the student, in its dtype."""

    student: Tensor


def loss_outputs(inputs: LossInputs) -> Tensor:
    """Shape and dtype of the loss."""
    return inputs.student.new_empty((), dtype=accumulation_dtype(inputs.student.dtype))


logit_loss = Operator(
    "logit_loss",
    LossInputs,
    LossOutputs,
    forward=Engines(
        lazy(f"{__package__}.torch_engine", "forward"), lazy(f"{__package__}.kernels", "forward")
    ),
    fake=loss_outputs,
)
logit_loss.has_gradient(
    LossGrads,
    Engines(lazy(f"{__package__}.torch_engine", "backward"), lazy(f"{__package__}.kernels", "backward")),
)
