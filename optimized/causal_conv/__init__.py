"""The causal convolution: `reference/causal_conv.py`, of all tokens at once.

`torch_engine` has the equations, `operator` what is registered, `kernels` and `kernels_backward` the Triton
engine.
"""

from __future__ import annotations

from torch import Tensor

from ...reference.causal_conv import check_conv
from ..layout.samples import sample_begins
from . import operator
from .operator import ConvInputs

__all__ = ["ConvInputs", "causal_conv"]


def causal_conv(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    sequence: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linmu.reference.causal_conv`: arguments, result and errors are the same."""
    check_conv("causal_conv", u, weight, bias, mask, initial_state, sequence)
    begins = sample_begins(sequence, mask)
    inputs = ConvInputs([u], [1.0], weight, bias, mask, initial_state, begins=begins)
    (out,), state = operator.causal_conv(inputs)
    return out, state
