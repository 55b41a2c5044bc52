"""What the honest backends share: arguments as they compute with them, and operators made of one scan."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from linmu.reference.checks import require_int64
from linmu.reference.numerics import accumulation_dtype, without_autocast
from linmu.reference.scan import check_bidirectional, check_scan, check_step

Scan = Callable[..., tuple[Tensor, Tensor]]


def make_operators(scan: Scan) -> tuple[Callable, Callable, Callable]:
    """`selective_scan`, `bidirectional_scan` and `scan_step` of one forward scan without masks.

    Args:
        scan: (x (B, L, H, P), dt, A, B (B, L, H, N), C, state (B, H, N, P)), all in the accumulation dtype ->
            (y, final state).
    """

    @of_packed_rows("mask")
    @without_autocast
    def selective_scan(x, dt, A, B, C, *, mask=None, initial_state=None, reverse=False):
        check_scan("selective_scan", x, dt, A, B, C, mask=mask, initial_state=initial_state)
        y, state = masked_scan(scan, x, dt, A, B, C, mask, initial_state, reverse)
        return y.to(x.dtype), state

    @of_packed_rows("valid")
    @without_autocast
    def bidirectional_scan(x, dt, A, B, C, *, gate, segment=None, valid=None, D=None, initial_state=None):
        where = "bidirectional_scan"
        check_scan(where, x, dt, A, B, C, mask=valid, initial_state=initial_state, mask_name="valid")
        check_bidirectional(where, C, gate, segment, D)
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
        wide, narrow = accumulation_dtype(x.dtype), x.dtype
        # once: autograd adds the gradients of several casts in the narrow dtype
        x, dt, A, B, C = (tensor.to(wide) for tensor in (x, dt, A, B, C))
        y, state = masked_scan(scan, x, dt, A, B, C, valid, initial_state, False)
        if segment is not None:
            vision = (segment >= 0) & valid
            reverse = torch.zeros_like(y)
            for number in segment[vision].unique():
                own = vision & (segment == number)
                reverse = reverse + masked_scan(scan, x, dt, A, B, C, own, None, True)[0]
            share = torch.where(vision[..., None], gate.to(wide), 1.0)[..., None]
            y = share * y + (1 - share) * reverse
        if D is not None:
            x_per_head = per_head(x, C.shape[2])
            y = y + D.to(wide)[:, None] * torch.where(valid[..., None, None], x_per_head, 0.0)
        return y.to(narrow), state

    @without_autocast
    def scan_step(state, x, dt, A, B, C, *, D=None, valid=None):
        check_step("scan_step", state, x, dt, A, B, C, D, valid)
        x, dt, B, C = (tensor.unsqueeze(1) for tensor in (x, dt, B, C))
        valid = None if valid is None else valid[:, None]
        gate = torch.ones_like(dt)
        y, state = bidirectional_scan(x, dt, A, B, C, gate=gate, valid=valid, D=D, initial_state=state)
        return y[:, 0], state

    return selective_scan, bidirectional_scan, scan_step


def of_packed_rows(mask_name: str) -> Callable:
    """Give an operator of rows `sequence`: it runs once for each sample of a row, all other tokens masked."""

    def decorate(operator: Callable) -> Callable:
        @wraps(operator)
        def call(*tensors: Tensor, sequence=None, initial_state=None, **given: Any) -> tuple[Tensor, Tensor]:
            if sequence is None:
                return operator(*tensors, initial_state=initial_state, **given)
            tokens = (*tensors, given.get("x"), given.get("u"))
            shape = next(each for each in tokens if each is not None).shape[:2]
            require_int64(operator.__name__, "sequence", sequence, shape, "B, L")
            mask = given.get(mask_name)
            mask = torch.ones(shape, dtype=torch.bool, device=sequence.device) if mask is None else mask
            number, total, state = sample_numbers(sequence, mask, given.get("reverse", False)), 0, None
            for sample in range(int(number.max()) + 1 if len(number) else 1):
                own, start = mask & (number == sample), initial_state if sample == 0 else None
                y, end = operator(*tensors, initial_state=start, **given | {mask_name: own})
                there = own.any(1).view(-1, *(1,) * (end.ndim - 1))
                total, state = total + y, end if state is None else torch.where(there, end, state)
            return total, state

        return call

    return decorate


def sample_numbers(sequence: Tensor, mask: Tensor, reverse: bool) -> Tensor:
    """(B, L): the samples of each row numbered from 0 in the direction of the scan; ids of masked tokens say
    nothing."""
    number = torch.zeros_like(sequence)
    for row, kept in enumerate(mask):
        places = kept.nonzero().flatten().tolist()
        places = places[::-1] if reverse else places
        for before, place in pairwise(places):
            number[row, place] = number[row, before] + int(sequence[row, place] != sequence[row, before])
    return number


def masked_scan(scan: Scan, x, dt, A, B, C, mask, initial_state, reverse: bool) -> tuple[Tensor, Tensor]:
    """One scan of either direction over the tokens of a mask, y in the accumulation dtype."""
    wide, heads = accumulation_dtype(x.dtype), C.shape[2]
    x, dt, A, B, C = (tensor.to(wide) for tensor in (x, dt, A, B, C))
    if mask is not None:
        x, B, C = (torch.where(mask[..., None, None], tensor, 0.0) for tensor in (x, B, C))
        dt = torch.where(mask[..., None], dt, 0.0)
    if reverse:
        x, dt, B, C = (tensor.flip(1) for tensor in (x, dt, B, C))
    x, B = per_head(x, heads), per_head(B, heads)
    if initial_state is None:
        state = x.new_zeros(x.shape[0], heads, B.shape[3], x.shape[3])
    else:
        state = initial_state.to(wide)
    y, state = scan(x, dt, A, B, C, state)
    return (y.flip(1) if reverse else y), state


def per_head(tensor: Tensor, heads: int) -> Tensor:
    """(B, L, G, ·) -> (B, L, H, ·)."""
    return tensor.repeat_interleave(heads // tensor.shape[2], dim=2)
