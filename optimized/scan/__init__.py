"""The operators of `reference/scan.py`, fast: one registered operator per pass, on the engine of the tensors.

Letters as there: B batch, L tokens, H query heads, G groups, N state size, P head dim, K conv taps. The scan
runs in chunks of tokens, as matrix products: `chunked_scan.py` has the equations and the torch engine.

Differs from the reference in one precondition: two segments of a row must not interleave, as in every layout.
A tensor on the CPU is checked; on a GPU the check would wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference.causal_conv import check_conv
from ...reference.scan import check_bidirectional, check_scan, check_step
from ..causal_conv import operator as conv_operators
from ..checks import require
from ..layout.segments import interleaved_row
from ..precision import without_autocast
from . import operator as operators


@without_autocast
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    mask: Tensor | None = None,
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`linmu.reference.selective_scan`: one direction; arguments, result and errors are the same."""
    check_scan("selective_scan", x, dt, A, B, C, mask=mask, initial_state=initial_state)
    if reverse:
        x, dt, B, C = (tensor.flip(1) for tensor in (x, dt, B, C))
        mask = None if mask is None else mask.flip(1)
    y, final_state = operators.scan(x, dt, A, B, C, None, None, mask, None, initial_state)
    return y.flip(1) if reverse else y, final_state


@without_autocast
def bidirectional_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    gate: Tensor,
    segment: Tensor | None = None,
    valid: Tensor | None = None,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linmu.reference.bidirectional_scan`: arguments and result are the same, in any order of segments.

    Raises:
        ValueError: as the reference, and on a CPU if two segments interleave.
    """
    where = "bidirectional_scan"
    check_scan(where, x, dt, A, B, C, mask=valid, initial_state=initial_state, mask_name="valid")
    check_bidirectional(where, C, gate, segment, D)
    if segment is None:
        gate = None
    elif segment.device.type == "cpu" and not torch.compiler.is_compiling():
        row = interleaved_row(segment, valid)
        require(row is None, where, "two segments must never interleave", f"row {row}")
    return operators.scan(x, dt, A, B, C, gate, segment, valid, D, initial_state)


@without_autocast
def scan_heads(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    gate: Tensor,
    segment: Tensor | None,
    valid: Tensor | None,
    D: Tensor | None,
    initial_state: Tensor | None,
    order: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    openings: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`bidirectional_scan`, `rms_norm_per_head` and `permute_tokens` back, in one operator.

    Args:
        x, dt, A, B, C, gate, segment, valid, D, initial_state: as for `bidirectional_scan`, in scan order.
        order: (B, L) int64, the token at each place of the scan; None = they stand in their order.
        norm_weight: (H·P,); None = no norm.
        eps: added to the mean of squares.
        openings: `scan_masks.openings` of segment and valid, which serve every layer; None = not known.
    Returns:
        (B, L, H, P) in token order and the dtype of `x`; the forward state (B, H, N, P).
    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    where = "scan_heads"
    check_scan(where, x, dt, A, B, C, mask=valid, initial_state=initial_state, mask_name="valid")
    check_bidirectional(where, C, gate, segment, D)
    gate = None if segment is None else gate
    floats = (x, dt, A, B, C, gate, D, initial_state, norm_weight)
    keep = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in floats)
    scanned = (x, dt, A, B, C, gate, segment, valid, D, initial_state)
    return operators.scan_heads(*scanned, order, norm_weight, eps, keep, openings)[:2]


@without_autocast
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
    return operators.scan_step(state, x, dt, A, B, C, D, valid)


@without_autocast
def causal_conv(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linmu.reference.causal_conv`: arguments, result and errors are the same."""
    check_conv("causal_conv", u, weight, bias, mask, initial_state)
    return conv_operators.causal_conv(u, weight, bias, mask, initial_state, None, 1.0)
