"""The scan as one registered operator, `linmu::scan`: both directions, the norm of each head, the order.

Letters: B batch, L tokens, H query heads, G groups, N state size, P head dim. `torch_engine` has the
equations.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...reference.numerics import accumulation_dtype
from ..engine.operator import Engines, Operator, lazy


class ScanInputs(NamedTuple):
    """What the scan reads, all tokens in scan order.

    x (B, L, G, P), dt (B, L, H), A (H,), B (B, L, G, N), C (B, L, H, N), gate (B, L, H), segment (B, L)
    int64, valid (B, L) bool, D (H,) and initial_state (B, H, N, P) are those of
    `reference.bidirectional_scan`. Without `segment` there is one direction, and no gate.

    Args:
        order: (B, L) int64, the token at each place of the scan: outputs go back to it. None = they stay.
        openings: `layout.segments.openings` of segment and valid, which serve every layer; None = not known,
            and nothing follows these tokens.
        begins: (B, L) int32, `layout.samples.sample_begins`, of packed rows, where each segment lies in one
            sample; None = one sample a row.
        norm_weight: (H·P,), of the norm of each head; None = no norm.
        eps: added to the mean of squares.
        save_y: whether a gradient will be asked for, for which a norm needs y.
        engine: "triton" or "torch"; None = by the tensors.
    """

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    gate: Tensor | None = None
    segment: Tensor | None = None
    valid: Tensor | None = None
    D: Tensor | None = None
    initial_state: Tensor | None = None
    order: Tensor | None = None
    openings: Tensor | None = None
    begins: Tensor | None = None
    norm_weight: Tensor | None = None
    eps: float = 0.0
    save_y: bool = False
    engine: str | None = None


class ScanOutputs(NamedTuple):
    """What the scan gives.

    Args:
        y: (B, L, H, P) in the dtype of x, normed and in token order.
        final_state: (B, H, N, P) of the forward direction, in the accumulation dtype.
        y_before_norm: (B, L, H, P) in `norm_dtype` and scan order; empty unless it is saved.
    """

    y: Tensor
    final_state: Tensor
    y_before_norm: Tensor


class ScanGrads(NamedTuple):
    """The gradients of the inputs of the same names."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    gate: Tensor | None
    D: Tensor | None
    initial_state: Tensor | None
    norm_weight: Tensor | None


def norm_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of y before its norm, and of its gradient. The norm's gradient is nearly orthogonal to y; in
    float16 their dot product would be rounding noise.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def scan_outputs(inputs: ScanInputs) -> ScanOutputs:
    """Shapes and dtypes of the outputs."""
    x, (batch, length, heads, state) = inputs.x, inputs.C.shape
    y = x.new_empty(batch, length, heads, x.shape[3])
    saves = inputs.save_y and inputs.norm_weight is not None
    final_state = x.new_empty(batch, heads, state, x.shape[3], dtype=accumulation_dtype(x.dtype))
    return ScanOutputs(y, final_state, x.new_empty(y.shape if saves else 0, dtype=norm_dtype(x.dtype)))


scan = Operator(
    "scan",
    ScanInputs,
    ScanOutputs,
    forward=Engines(
        lazy(f"{__package__}.torch_engine.forward", "forward"), lazy(f"{__package__}.kernels", "forward")
    ),
    fake=scan_outputs,
    head_dims=lambda inputs: (inputs.B.shape[3], inputs.x.shape[3]),
)
scan.has_gradient(
    ScanGrads,
    Engines(
        lazy(f"{__package__}.torch_engine.backward", "backward"),
        lazy(f"{__package__}.kernels_backward", "backward"),
    ),
    of=("y", "final_state"),
    saved=("y_before_norm",),
)
