"""The operators around a block's scan: `linmu::rotate`, `linmu::mix_branches`, `linmu::narrow_product`, and
without gradients `linmu::scale_heads`; and around the block itself `linmu::frozen_norm`,
`linmu::gate_product`, and without gradients `linmu::add_norm`.

Letters: B batch, L tokens, D width, N head dim, n columns.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...reference.numerics import accumulation_dtype
from ..engine.operator import Engines, Operator, lazy


class NarrowInputs(NamedTuple):
    """u (B, L, D), weight (n, D), bias (n,), and the columns of each of the products put together."""

    u: Tensor
    weight: Tensor
    bias: Tensor
    sizes: list[int]


class NarrowOutputs(NamedTuple):
    """product: u Wᵀ + b, (B, L, n) in the accumulation dtype."""

    product: Tensor


class NarrowGrads(NamedTuple):
    """The gradients of the inputs of the same names."""

    u: Tensor
    weight: Tensor
    bias: Tensor


def narrow_outputs(inputs: NarrowInputs) -> Tensor:
    """Shape and dtype of the product."""
    u = inputs.u
    return u.new_empty(*u.shape[:2], inputs.weight.shape[0], dtype=accumulation_dtype(u.dtype))


narrow_product = Operator(
    "narrow_product",
    NarrowInputs,
    NarrowOutputs,
    forward=lazy(f"{__package__}.narrow_product", "forward"),
    fake=narrow_outputs,
)
narrow_product.has_gradient(NarrowGrads, lazy(f"{__package__}.narrow_product", "backward"))


class MixInputs(NamedTuple):
    """What the mix of the branches reads.

    Args:
        flex: (B, L, D), Flex-MA's output.
        local: (..., D), a row of Local-Swin's for each vision token.
        logit: (B, L, 1), before the sigmoid.
        row: (B, L) int64, each token's row of `local`, -1 on text.
        engine: "triton" or "torch"; None = by the tensors.
    """

    flex: Tensor
    local: Tensor
    logit: Tensor
    row: Tensor
    engine: str | None = None


class MixOutputs(NamedTuple):
    """y: (B, L, D), mixed on vision, Flex-MA's on text."""

    y: Tensor


class MixGrads(NamedTuple):
    """The gradients of the inputs of the same names."""

    flex: Tensor
    local: Tensor
    logit: Tensor


mix_branches = Operator(
    "mix_branches",
    MixInputs,
    MixOutputs,
    forward=Engines(lazy(f"{__package__}.torch_engine", "mix"), lazy(f"{__package__}.kernels", "mix")),
    fake=lambda inputs: inputs.flex.new_empty(inputs.flex.shape),
)
mix_branches.has_gradient(
    MixGrads,
    Engines(
        lazy(f"{__package__}.torch_engine", "mix_backward"), lazy(f"{__package__}.kernels", "mix_backward")
    ),
)


class HeadsInputs(NamedTuple):
    """One token of both branches before their output projections. There is no gradient.

    Args:
        flex, local: (B, n), Flex-MA's heads and Local-Swin's.
        logit: (B, 1), the mix before its sigmoid.
        row: (B,) int64, -1 where only Flex-MA has a say.
        engine: "triton" or "torch"; None = by the tensors.
    """

    flex: Tensor
    local: Tensor
    logit: Tensor
    row: Tensor
    engine: str | None = None


class HeadsOutputs(NamedTuple):
    """heads: [m f, (1 - m) l], (B, 2n) in the dtype of f; [f, 0] where only Flex-MA has a say."""

    heads: Tensor


scale_heads = Operator(
    "scale_heads",
    HeadsInputs,
    HeadsOutputs,
    forward=Engines(
        lazy(f"{__package__}.torch_engine", "scale_heads"), lazy(f"{__package__}.kernels", "scale_heads")
    ),
    fake=lambda inputs: inputs.flex.new_empty(len(inputs.flex), 2 * inputs.flex.shape[1]),
)


class RotateInputs(NamedTuple):
    """What RoPE reads; the angles have no gradient.

    Args:
        x: (B, L, heads, N).
        cos, sin: (B or 1, L, N).
        token: (n,) int64; x is (1, n, heads, N) then, the tokens at these places of a flattened batch, and
            the angles are those of its rows. None = x has all tokens.
        backward: x is a gradient of the rotated tensor; rotate it back.
        engine: "triton" or "torch"; None = by the tensors.
    """

    x: Tensor
    cos: Tensor
    sin: Tensor
    token: Tensor | None = None
    backward: bool = False
    engine: str | None = None


class RotateOutputs(NamedTuple):
    """y: as x."""

    y: Tensor


class RotateGrads(NamedTuple):
    """The gradient of x."""

    x: Tensor


rotate = Operator(
    "rotate",
    RotateInputs,
    RotateOutputs,
    forward=Engines(lazy(f"{__package__}.torch_engine", "rotate"), lazy(f"{__package__}.kernels", "rotate")),
    fake=lambda inputs: inputs.x.new_empty(inputs.x.shape),
)
rotate.has_gradient(
    RotateGrads,
    Engines(
        lazy(f"{__package__}.torch_engine", "rotate_backward"),
        lazy(f"{__package__}.kernels", "rotate_backward"),
    ),
    unread=("x",),  # the gradient of y stands there
)


class AddNormInputs(NamedTuple):
    """What a layer's norm reads. There is no gradient.

    Args:
        x: (..., D).
        more: as x, added before the norm; None = nothing.
        weight: (D,) in the dtype of x.
        eps: added to the mean square.
        engine: "triton" or "torch"; None = by the tensors.
    """

    x: Tensor
    more: Tensor | None
    weight: Tensor
    eps: float
    engine: str | None = None


class AddNormOutputs(NamedTuple):
    """total: x + more, nothing without `more`; normed: its RMS norm, times the weight. Both as x."""

    total: Tensor
    normed: Tensor


def add_norm_outputs(inputs: AddNormInputs) -> AddNormOutputs:
    """Shapes and dtypes of the outputs."""
    x = inputs.x
    return AddNormOutputs(x.new_empty(0 if inputs.more is None else x.shape), x.new_empty(x.shape))


add_norm = Operator(
    "add_norm",
    AddNormInputs,
    AddNormOutputs,
    forward=Engines(
        lazy(f"{__package__}.torch_engine", "add_norm"), lazy(f"{__package__}.kernels_layer", "add_norm")
    ),
    fake=add_norm_outputs,
)


class NormInputs(NamedTuple):
    """What a norm reads whose weight is frozen: it has no gradient.

    Args:
        x: (..., D).
        weight: (D,) in the dtype of x.
        eps: added to the mean square.
        engine: "triton" or "torch"; None = by the tensors.
    """

    x: Tensor
    weight: Tensor
    eps: float
    engine: str | None = None


class NormOutputs(NamedTuple):
    """y: the RMS norm of x, times the weight, as x."""

    y: Tensor


class NormGrads(NamedTuple):
    """The gradient of x."""

    x: Tensor


frozen_norm = Operator(
    "frozen_norm",
    NormInputs,
    NormOutputs,
    forward=Engines(
        lazy(f"{__package__}.torch_engine", "norm"), lazy(f"{__package__}.kernels_layer", "norm")
    ),
    fake=lambda inputs: inputs.x.new_empty(inputs.x.shape),
)
frozen_norm.has_gradient(
    NormGrads,
    Engines(
        lazy(f"{__package__}.torch_engine", "norm_backward"),
        lazy(f"{__package__}.kernels_layer", "norm_backward"),
    ),
)


class GateInputs(NamedTuple):
    """gate and up (..., F), and the engine, as elsewhere."""

    gate: Tensor
    up: Tensor
    engine: str | None = None


class GateOutputs(NamedTuple):
    """y: silu(gate) · up, as they are."""

    y: Tensor


gate_product = Operator(
    "gate_product",
    GateInputs,
    GateOutputs,
    forward=Engines(
        lazy(f"{__package__}.torch_engine", "gate_product"),
        lazy(f"{__package__}.kernels_layer", "gate_product"),
    ),
    fake=lambda inputs: inputs.gate.new_empty(inputs.gate.shape),
)


class GateGrads(NamedTuple):
    """The gradients of gate and up."""

    gate: Tensor
    up: Tensor


gate_product.has_gradient(
    GateGrads,
    Engines(
        lazy(f"{__package__}.torch_engine", "gate_product_backward"),
        lazy(f"{__package__}.kernels_layer", "gate_product_backward"),
    ),
)
