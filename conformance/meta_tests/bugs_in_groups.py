"""Groups found by shifting bits: right where the heads of a group are a power of 2, wrong where they are 3.

A bug receives the reference's operator first, then the arguments of a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..properties import test_bidirectional_scan as both
from ..properties import test_scan as one
from ..properties import test_scan_step as step
from ..properties import test_sliding_window_attention as sliding
from ..properties import test_window_attention as windows
from .planting import planted


def shifted(tensor: Tensor, heads: int, axis: int = 2) -> Tensor:
    """What each head reads, along the axis of groups."""
    groups = tensor.shape[axis]
    group = torch.arange(heads) >> ((heads // groups).bit_length() - 1)
    return tensor.index_select(axis, group.clamp(max=groups - 1))


@planted("selective_scan", one.test_values_match_the_reference, one.test_gradients_match_the_reference)
def heads_of_a_scan_shift_bits(reference, x, dt, A, B, C, **rest):
    return reference(shifted(x, C.shape[2]), dt, A, shifted(B, C.shape[2]), C, **rest)


@planted("bidirectional_scan", both.test_values_match_the_reference)
def heads_of_both_scans_shift_bits(reference, x, dt, A, B, C, **rest):
    return reference(shifted(x, C.shape[2]), dt, A, shifted(B, C.shape[2]), C, **rest)


@planted("scan_step", step.test_values_match_the_reference)
def heads_of_a_step_shift_bits(reference, state, x, dt, A, B, C, **rest):
    heads = C.shape[1]
    return reference(state, shifted(x, heads, 1), dt, A, shifted(B, heads, 1), C, **rest)


@planted("window_attention", windows.test_values_match_the_reference)
def heads_of_windows_shift_bits(reference, q, k, v, window_id, **rest):
    return reference(q, shifted(k, q.shape[2]), shifted(v, q.shape[2]), window_id, **rest)


@planted("sliding_window_attention", sliding.test_values_match_the_reference)
def heads_of_a_sliding_window_shift_bits(reference, q, k, v, window, *, initial_state=None, **rest):
    heads = q.shape[2]
    before = initial_state
    if before is not None:
        before = before._replace(k=shifted(before.k, heads), v=shifted(before.v, heads))
    o, _ = reference(q, shifted(k, heads), shifted(v, heads), window, initial_state=before, **rest)
    return o, reference(q, k, v, window, initial_state=initial_state, **rest)[1]
