"""Window attention as one registered operator, `linmu::window_attention`.

Letters: B batch, L tokens, H query heads, G groups, N head dim of q and k, P head dim of v. `torch_engine`
has the equations.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...reference.numerics import accumulation_dtype
from ..engine.operator import Engines, Operator, lazy


class AttentionInputs(NamedTuple):
    """What the attention reads.

    Args:
        q, k, v: (B, L, H, N), (B, L, G, N), (B, L, G, P).
        window_id: (B, L), the same number in a window, -1 in none.
        places, blocks: its `layout.plan.window_plan`.
        scale: factor on q·k.
        engine: "triton" or "torch"; None = by the tensors.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    window_id: Tensor
    places: Tensor
    blocks: Tensor
    scale: float
    engine: str | None = None


class AttentionOutputs(NamedTuple):
    """o (B, L, H, P) in the dtype of q; lse (B, L, H), the logarithm of softmax's denominator: natural from
    the torch engine, to the base 2 from the kernels.
    """

    o: Tensor
    lse: Tensor


class AttentionGrads(NamedTuple):
    """The gradients of the inputs of the same names."""

    q: Tensor
    k: Tensor
    v: Tensor


def attention_outputs(inputs: AttentionInputs) -> AttentionOutputs:
    """Shapes and dtypes of the outputs."""
    q = inputs.q
    o = q.new_empty(*q.shape[:3], inputs.v.shape[3])
    return AttentionOutputs(o, q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype)))


window_attention = Operator(
    "window_attention",
    AttentionInputs,
    AttentionOutputs,
    forward=Engines(
        lazy(f"{__package__}.torch_engine", "forward"), lazy(f"{__package__}.kernels", "forward")
    ),
    fake=attention_outputs,
    head_dims=lambda inputs: (inputs.q.shape[3], inputs.v.shape[3]),
)
window_attention.has_gradient(
    AttentionGrads,
    Engines(
        lazy(f"{__package__}.torch_engine", "backward"), lazy(f"{__package__}.kernels_backward", "backward")
    ),
    of=("o",),
    saved=("o", "lse"),
)
