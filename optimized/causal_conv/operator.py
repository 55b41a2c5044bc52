"""The causal convolution as one registered operator, `linmu::causal_conv`, of some tensors side by side.

Letters: B batch, L tokens, K taps. `torch_engine` has the equations.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...reference.numerics import accumulation_dtype
from ..engine.operator import Engines, Operator, lazy


class ConvInputs(NamedTuple):
    """What the convolution reads.

    Weight, bias and states hold the channels of the parts one after the other. Side by side in one tensor, C
    scaled before, Flex-MA's three parts would be written and read once more: 32 KB per token of width 3584.

    Args:
        parts: tensors (B, L, ...) of one dtype, whose last axes are channels.
        scales: a factor on each of them: the state keeps the inputs times it.
        weight: (channels, K).
        bias: (channels,) or None.
        mask: (B, L) bool, True = takes part, in the order of the outputs; None = all.
        initial_state: (B, K-1, channels), the inputs before the first; zeros if None.
        order: (B, L) int64: place i of outputs and mask is token order[b, i] of the parts; None = the same.
        begins: (B, L) int32, `layout.samples.sample_begins`, of packed rows, in the order of the outputs;
            None = one sample a row.
        engine: "triton" or "torch"; None = by the tensors.
    """

    parts: list[Tensor]
    scales: list[float]
    weight: Tensor
    bias: Tensor | None = None
    mask: Tensor | None = None
    initial_state: Tensor | None = None
    order: Tensor | None = None
    begins: Tensor | None = None
    engine: str | None = None


class ConvOutputs(NamedTuple):
    """The parts convolved, in their shapes and dtype; the last K-1 valid inputs in the accumulation dtype."""

    parts: list[Tensor]
    final_state: Tensor


class ConvGrads(NamedTuple):
    """The gradients of the inputs of the same names."""

    parts: list[Tensor]
    weight: Tensor
    bias: Tensor | None
    initial_state: Tensor | None


def conv_outputs(inputs: ConvInputs) -> ConvOutputs:
    """Shapes and dtypes of the outputs."""
    first, (channels, taps) = inputs.parts[0], inputs.weight.shape
    state = first.new_empty(first.shape[0], taps - 1, channels, dtype=accumulation_dtype(first.dtype))
    return ConvOutputs([part.new_empty(part.shape) for part in inputs.parts], state)


causal_conv = Operator(
    "causal_conv",
    ConvInputs,
    ConvOutputs,
    forward=Engines(
        lazy(f"{__package__}.torch_engine", "forward"), lazy(f"{__package__}.kernels", "forward")
    ),
    fake=conv_outputs,
)
causal_conv.has_gradient(
    ConvGrads,
    Engines(
        lazy(f"{__package__}.torch_engine", "backward"), lazy(f"{__package__}.kernels_backward", "backward")
    ),
)
