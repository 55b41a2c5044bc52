"""The losses as registered operators, `linmu::logit_loss` and, for the hidden loss, `linmu::squared_errors`.

Letters: B batch, L tokens, D width, V vocabulary.
"""

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


class ErrorInputs(NamedTuple):
    """student and teacher (B, L, D); taken (B, L) bool, the tokens that count, None = all; engine None = by
    the tensors.
    """

    student: Tensor
    teacher: Tensor
    taken: Tensor | None
    engine: str | None = None


class ErrorOutputs(NamedTuple):
    """error, Σ_D (s - t)², and size, Σ_D t², of each token: (B, L) in the accumulation dtype, 0 where it does
    not count.
    """

    error: Tensor
    size: Tensor


class ErrorGrads(NamedTuple):
    """The gradient of the student, in its dtype."""

    student: Tensor


def error_outputs(inputs: ErrorInputs) -> ErrorOutputs:
    """Shapes and dtypes of the outputs."""
    student = inputs.student
    shape, dtype = student.shape[:2], accumulation_dtype(student.dtype)
    return ErrorOutputs(student.new_empty(shape, dtype=dtype), student.new_empty(shape, dtype=dtype))


squared_errors = Operator(
    "squared_errors",
    ErrorInputs,
    ErrorOutputs,
    forward=Engines(
        lazy(f"{__package__}.torch_engine", "errors"), lazy(f"{__package__}.kernels_hidden", "errors")
    ),
    fake=error_outputs,
)
squared_errors.has_gradient(
    ErrorGrads,
    Engines(
        lazy(f"{__package__}.torch_engine", "errors_backward"),
        lazy(f"{__package__}.kernels_hidden", "errors_backward"),
    ),
    of=("error",),
)
