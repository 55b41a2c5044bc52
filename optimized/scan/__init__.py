"""The scan: `reference/scan.py`, as matrix products over chunks of tokens.

Letters as there: B batch, L tokens, H query heads, G groups, N state size, P head dim. `torch_engine` has the
equations, `operator` what is registered, `kernels` and `kernels_backward` the Triton engine.

Differs from the reference in one precondition: two segments of a sample must not interleave, as in every
layout. A tensor on the CPU is checked; on a GPU the check would wait for the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...reference.checks import require
from ...reference.scan import check_bidirectional, check_scan
from ..layout.samples import sample_begins, segments_of_samples
from ..layout.segments import interleaved_row
from . import operator
from .operator import ScanInputs

__all__ = ["ScanInputs", "bidirectional_scan", "scan", "selective_scan"]


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
    sequence: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linmu.reference.selective_scan`: one direction; arguments, result and errors are the same."""
    check_scan("selective_scan", x, dt, A, B, C, mask=mask, initial_state=initial_state, sequence=sequence)
    if reverse:
        x, dt, B, C = (tensor.flip(1) for tensor in (x, dt, B, C))
        mask, sequence = (None if tensor is None else tensor.flip(1) for tensor in (mask, sequence))
    begins = sample_begins(sequence, mask)
    inputs = ScanInputs(x, dt, A, B, C, valid=mask, initial_state=initial_state, begins=begins)
    y, final_state, _ = operator.scan(inputs)
    return y.flip(1) if reverse else y, final_state


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
    sequence: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`linmu.reference.bidirectional_scan`: arguments and result are the same, in any order of segments.

    Raises:
        ValueError: as the reference, and on a CPU if two segments interleave.
    """
    where = "bidirectional_scan"
    given = {"mask": valid, "initial_state": initial_state, "sequence": sequence}
    check_scan(where, x, dt, A, B, C, mask_name="valid", **given)
    check_bidirectional(where, C, gate, segment, D)
    begins = sample_begins(sequence, valid)
    if segment is None:
        gate = None
    elif segment.device.type == "cpu" and not torch.compiler.is_compiling():
        row = interleaved_row(segment, valid, begins)
        require(row is None, where, "two segments must never interleave", f"row {row}")
    if segment is not None and begins is not None:
        segment = segments_of_samples(segment, begins, valid)
    inputs = ScanInputs(x, dt, A, B, C, gate, segment, valid, D, initial_state, begins=begins)
    return operator.scan(inputs)[:2]


def scan(inputs: ScanInputs) -> tuple[Tensor, Tensor]:
    """`bidirectional_scan`, `rms_norm_per_head` and `permute_tokens` back, in one operator.

    Args:
        inputs: of a module that has made gate, segment and D itself; the others are checked.
    Returns:
        (B, L, H, P) in token order and the dtype of `x`; the forward state (B, H, N, P).
    Raises:
        ValueError: for shapes, dtypes or devices that do not fit.
    """
    start, valid = inputs.initial_state, inputs.valid
    check_scan("scan", *inputs[:5], mask=valid, initial_state=start, mask_name="valid")
    floats = (*inputs[:6], inputs.D, start, inputs.norm_weight)
    has_gradient = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in floats)
    return operator.scan(inputs._replace(save_y=has_gradient))[:2]
