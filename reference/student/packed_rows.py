"""Rows of several samples, as transformers tells of them: its padding-free batches.

Letters: B rows, L tokens. Two ways, of which each suffices, beside our own `linmu_sequence`:

    cu_seq_lens_q, cu_seq_lens_k   (samples + 1,): where each sample of the one row begins, and the last ends
    position_ids                   (B, L), or (4, B, L) of M-RoPE, whose first is the text's: a sample begins
                                   wherever they do not go on by 1

Choice: positions are asked where transformers asks them, without a cache and without padding, and beside a
mask of ones too, which collators add. Nothing is asked of them under torch.compile, whose graph cannot depend
on values: there `cu_seq_lens_*` are the way.
"""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..checks import require, require_int64, require_shape
from .cache import CACHE_NAME

EDGES = ("cu_seq_lens_q", "cu_seq_lens_k")


def take_samples(where: str, sequence: Tensor | None, kwargs: dict[str, Any]) -> Tensor | None:
    """Return which sample each token of a forward belongs to, (B, L) int64; None = one a row.

    Args:
        where: who asks, for errors.
        sequence: (B, L) int64 if the caller knows them; then rows may be padded.
        kwargs: the forward's arguments, changed in place: where rows are packed there is a mask of ones, for
            transformers' own sake, and no cache; `EDGES` are taken out.
    Raises:
        ValueError: for samples that do not fit the rows or are told twice, and for packed rows with a cache.
    """
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
    edges = {name: kwargs.pop(name) for name in EDGES if kwargs.get(name) is not None}
    if tokens is None:
        return None
    batch, length = tokens.shape[:2]
    if sequence is not None:
        require(not edges, where, "samples must be told once", f"linmu_sequence and {', '.join(edges)}")
        require_int64(where, "linmu_sequence", sequence, (batch, length), "B, L")
    elif edges:
        sequence = samples_between(where, edges, batch, length).to(tokens.device)
    else:
        sequence = samples_of_positions(kwargs, batch, length)
    if sequence is None:
        return None
    must, hint = "packed rows must have no cache", "use_cache=False"
    has_cache = kwargs.get(CACHE_NAME) is not None or bool(kwargs.get("use_cache"))
    require(not has_cache, where, must, "a cache, or use_cache=True", hint)
    kwargs["use_cache"] = False
    if kwargs.get("attention_mask") is None:
        kwargs["attention_mask"] = torch.ones(batch, length, dtype=torch.int64, device=tokens.device)
    require_shape(where, "attention_mask", kwargs["attention_mask"], (batch, length), "B, L")
    return sequence.to(tokens.device)


class SampleSpans:
    """Where the samples of packed rows stand: asked of the device once a forward, if some layer asks.

    Args:
        sequence: (B, L) int64; ids of invalid tokens say nothing.
        valid: (B, L), 0 = padding.
    """

    def __init__(self, sequence: Tensor, valid: Tensor) -> None:
        self.sequence, self.valid = sequence, valid

    @cached_property
    def places(self) -> list[list[slice]] | None:
        """The samples of each row, one after the other; None where padding lies inside of one."""
        ids, valid = torch.stack([self.sequence, self.valid.to(self.sequence.dtype)]).cpu()
        rows = []
        for own, kept in zip(ids, valid.bool(), strict=True):
            places = kept.nonzero().flatten()
            ends = own[places].diff() != 0  # of a sample, before the next
            if bool(((places.diff() != 1) & ~ends).any()):
                return None
            last = torch.cat([ends, ends.new_ones(min(1, len(places)))]).nonzero().flatten()
            first = torch.cat([last.new_zeros(1), last + 1])[:-1]
            edges = zip(places[first].tolist(), places[last].tolist(), strict=True)
            rows.append([slice(start, stop + 1) for start, stop in edges])
        return rows


def started_anew(positions: Tensor, sequence: Tensor, valid: Tensor) -> Tensor:
    """Return positions (..., B, L) less that of the first valid token of each one's sample.

    Differences are all that RoPE is to tell, but float32 tells those of small angles best.

    Args:
        sequence: (B, L) int64; ids of invalid tokens say nothing.
        valid: (B, L) bool.
    """
    place = torch.arange(valid.shape[1], device=valid.device)
    last = torch.where(valid, place, -1).cummax(1).values  # the valid token up to each
    first = valid.int().argmax(1, keepdim=True)
    own = sequence.gather(1, torch.where(last < 0, first, last))
    begins = torch.nn.functional.pad(own.diff(dim=1) != 0, (1, 0))
    begin = torch.where(begins, place, first).cummax(1).values
    return positions - positions.gather(-1, begin.expand(positions.shape))


def samples_between(where: str, edges: dict[str, Tensor], batch: int, length: int) -> Tensor:
    """Return the samples of the one row of L tokens, (1, L) int64, from where they begin and end."""
    name, first = next(iter(edges.items()))
    require(batch == 1, where, f"with {name} there must be one row", batch, "or tell by position_ids")
    for other in edges.values():
        require_shape(where, name, other, (None,), "samples + 1")
        if torch.compiler.is_compiling():
            continue
        numbers = other.tolist()
        rises = all(a <= b for a, b in pairwise(numbers))
        fits = len(numbers) > 1 and rises and (numbers[0], numbers[-1]) == (0, length)
        require(fits, where, f"{name} must rise from 0 to the {length} tokens of the row", numbers[:8])
        same = numbers == first.tolist()
        require(same, where, "cu_seq_lens_q and cu_seq_lens_k must be the same", numbers[:8])
    place = torch.arange(length, device=first.device)
    return torch.searchsorted(first[1:].long().contiguous(), place, right=True)[None]


def samples_of_positions(kwargs: dict[str, Any], batch: int, length: int) -> Tensor | None:
    """Return the samples (B, L) int64 that position ids tell of, None if they tell of one a row."""
    positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
    if positions is None or length == 1 or torch.compiler.is_compiling():
        return None
    if positions.ndim == 3 and len(positions) == 4:
        positions = positions[0]  # the text's, before those of M-RoPE
    plain = mask is None or (isinstance(mask, Tensor) and mask.ndim == 2)
    if positions.ndim != 2 or not plain or kwargs.get(CACHE_NAME) is not None:
        return None
    if mask is not None and not bool(mask.all()):
        return None
    begins = positions.diff(dim=1) != 1
    if not bool(begins.any()):
        return None
    return torch.nn.functional.pad(begins.cumsum(1), (1, 0)).expand(batch, length)
