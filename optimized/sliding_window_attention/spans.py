"""Which tokens read which: once for a batch of prompts, whatever the layer.

Letters: B batch, L tokens, W window; M = S + L keys, the S = W - 1 of the state, if there is one, before
those of the tokens. Places count the keys of a row from 0; token t stands at place S + t.

A token reads the valid keys from its `low` to its own place. Where every key is there, low is W - 1 places
before; padding in between and a sequence's start move it. low never falls along a row, so that the readers of
a key are neighbours too. Nothing is asked from the device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..engine.once import once_a_forward


class Spans(NamedTuple):
    """What of a prompt says which keys are read; None where it follows from places alone.

    Args:
        asks: (B, L) bool, tokens that ask and are valid; None = all.
        valid: (B, M) bool; None = every key is there.
        low: (B, M) int32, the first place that the token of a place reads.
        high: (B, M) int32, the place after the last that reads a key.
        last: (B, W-1) int64, places of the state after the row, -1 = missing; None = the last ones.
    """

    asks: Tensor | None
    valid: Tensor | None
    low: Tensor | None
    high: Tensor | None
    last: Tensor | None


def find_spans(
    window: int,
    length: int,
    asks: Tensor | None,
    valid: Tensor | None,
    sequence: Tensor | None,
    present: Tensor | None,
) -> Spans:
    """Spans of L = `length` tokens behind the state's, `present` (B, S) bool; None = there is no state."""
    if valid is not None:
        asks = valid if asks is None else asks & valid
    if valid is None and sequence is None:  # what a state lacks comes first: no key is further than its place
        there = None if present is None else F.pad(present, (0, length), value=True)
        return Spans(asks, there, None, None, None)
    there = torch.ones_like(sequence, dtype=torch.bool) if valid is None else valid
    if sequence is not None:
        sequence = sequence_of_keys(present, there, sequence)
    there = there if present is None else torch.cat([present, there], dim=1)
    place = torch.arange(there.shape[1], dtype=torch.int32, device=there.device).expand_as(there)
    rank = there.cumsum(1, dtype=torch.int32)  # how many keys there are up to each
    low = place_of_rank(rank, (rank - (window - 1)).clamp_min(1))
    begin = None if sequence is None else beginnings(there, sequence, place)
    if begin is not None:
        low = torch.maximum(low, begin)
    high = torch.searchsorted(low, place.contiguous(), right=True, out_int32=True)
    step = torch.arange(2 - window, 1, dtype=torch.int32, device=there.device)
    wanted = rank[:, -1:] + step  # (B, W-1)
    last = place_of_rank(rank, wanted.clamp_min(1))
    missing = wanted < 1 if begin is None else (wanted < 1) | (last < begin[:, -1:])
    needed = None if valid is None and present is None else there
    return Spans(asks, needed, low, high, last.long().masked_fill_(missing, -1))


def spans_of_layer(
    window: int,
    length: int,
    is_vision: Tensor | None,
    valid: Tensor | None,
    sequence: Tensor | None,
    present: Tensor | None,
) -> Spans:
    """`find_spans` of a layer in which text asks: is_vision (B, L) bool; None = all text."""

    def make() -> Spans:
        asks = None if is_vision is None else ~is_vision
        return find_spans(window, length, asks, valid, sequence, present)

    # of one forward, a student's text asks, and a teacher's every token
    return once_a_forward(("spans", window, is_vision is None), make)


def sequence_of_keys(present: Tensor | None, valid: Tensor, sequence: Tensor) -> Tensor:
    """The sequences of all keys, (B, M): a state's tokens belong to that of the row's first valid token."""
    if present is None:
        return sequence
    first = sequence.gather(1, valid.int().argmax(1, keepdim=True))
    return torch.cat([first.expand_as(present), sequence], dim=1)


def place_of_rank(rank: Tensor, wanted: Tensor) -> Tensor:
    """(B, ·) int32: the place of the key with so many up to it; M if there are fewer."""
    return torch.searchsorted(rank, wanted.contiguous(), out_int32=True)


def beginnings(there: Tensor, sequence: Tensor, place: Tensor) -> Tensor:
    """(B, M) int32: for each place, where the sequence of the last valid key up to it begins."""
    valid_place = torch.where(there, place, 0).cummax(1).values.long()
    own = sequence.gather(1, valid_place)  # invalid tokens say nothing of theirs
    starts = torch.zeros_like(there)
    starts[:, 1:] = own[:, 1:] != own[:, :-1]
    return torch.where(starts, place, 0).cummax(1).values
