"""Bugs that begin at a size: everything is right up to it. Made from a table of arguments, axes and sizes.

Letters of axes: B batch, L tokens, H heads, G groups, N state or head size of q and k, P head dim, K taps, W
channels, width or vocabulary; "elements" counts the elements of the whole tensor, "tokens" those of all rows,
"heads of a group" begins anew with each group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from linmu.reference import WindowState

from ..harness import second_sliding_window
from ..harness.compare import in_float64
from ..harness.large_cases import FORMULATIONS, LARGE, inputs_of
from ..harness.operator_cases import Case
from .planting import grow

SCAN = {"x": "BLGP", "dt": "BLH", "A": "H", "B": "BLGN", "C": "BLHN", "initial_state": "BHNP"}
SCANNED = {"y": "BLHP", "final_state": "BHNP"}
AXES: dict[str, dict[str, str]] = {
    "selective_scan": {**SCAN, "mask": "BL", **SCANNED},
    "bidirectional_scan": {**SCAN, "gate": "BLH", "D": "H", "segment": "BL", "valid": "BL", **SCANNED},
    "scan_step": {
        "state": "BHNP", "x": "BGP", "dt": "BH", "A": "H", "B": "BGN", "C": "BHN", "D": "H", "valid": "B",
        "y": "BHP", "new state": "BHNP",
    },
    "window_attention": {"q": "BLHN", "k": "BLGN", "v": "BLGP", "window_id": "BL", "o": "BLHP"},
    "sliding_window_attention": {
        "q": "BLHN", "k": "BLGN", "v": "BLGP", "asks": "BL", "valid": "BL", "sequence": "BL", "o": "BLHP",
    },
    "causal_conv": {
        "u": "BLW", "weight": "WK", "bias": "W", "mask": "BL", "initial_state": "BKW", "out": "BLW",
        "final_state": "BKW",
    },
    "hidden_loss": {"student": "BLW", "teacher": "BLW", "valid": "BL"},
    "logit_loss": {"student": "BLW", "teacher": "BLW", "mask": "BL"},
}  # fmt: skip

# operator, argument or result, axis, sizes at which bugs begin, what happens there
TABLE: tuple[tuple[str, str, str, tuple[int, ...], tuple[str, ...]], ...] = (
    ("selective_scan", "x", "P", (16, 64, 128, 160, 192, 256), ("lost", "without gradient")),
    ("selective_scan", "x", "L", (256, 2048), ("without gradient",)),
    ("selective_scan", "dt", "L", (16, 256, 2048), ("without gradient",)),
    ("selective_scan", "dt", "H", (64, 256), ("with twice the gradient",)),
    ("selective_scan", "A", "H", (128, 256), ("lost", "without gradient")),
    ("selective_scan", "B", "N", (16, 64, 128, 160), ("lost", "without gradient")),
    ("selective_scan", "C", "N", (16, 64, 128), ("lost", "with twice the gradient")),
    ("selective_scan", "C", "elements", (65536,), ("without gradient",)),
    ("selective_scan", "initial_state", "N", (64, 128), ("lost", "without gradient")),
    ("selective_scan", "initial_state", "B", (256,), ("lost",)),
    ("selective_scan", "mask", "L", (64, 256, 2048), ("ignored",)),
    ("selective_scan", "y", "L", (256, 2048, 32768), ("lost", "without gradient")),
    ("selective_scan", "y", "elements", (65536,), ("lost", "without gradient")),
    ("selective_scan", "final_state", "P", (64, 128), ("lost", "without gradient")),
    ("selective_scan", "memory", "L", (16, 64, 256, 2048), ("lost",)),
    ("bidirectional_scan", "x", "P", (16, 64, 128, 192), ("lost", "without gradient")),
    ("bidirectional_scan", "dt", "L", (64, 256, 2048), ("without gradient",)),
    ("bidirectional_scan", "A", "H", (16, 256), ("without gradient",)),
    ("bidirectional_scan", "B", "N", (64, 128), ("lost", "without gradient")),
    ("bidirectional_scan", "C", "N", (16, 128, 160), ("lost", "without gradient")),
    ("bidirectional_scan", "gate", "L", (256, 2048), ("lost", "without gradient")),
    ("bidirectional_scan", "gate", "H", (64, 256), ("without gradient",)),
    ("bidirectional_scan", "D", "H", (16, 256), ("lost", "without gradient")),
    ("bidirectional_scan", "segment", "L", (256, 2048), ("lost",)),
    ("bidirectional_scan", "segment", "B", (256,), ("lost",)),
    ("bidirectional_scan", "valid", "L", (256,), ("ignored",)),
    ("bidirectional_scan", "initial_state", "P", (64, 128), ("lost", "without gradient")),
    ("bidirectional_scan", "y", "L", (256, 2048, 16384), ("lost", "without gradient")),
    ("bidirectional_scan", "y", "elements", (65536,), ("lost",)),
    ("bidirectional_scan", "final_state", "N", (64, 128), ("lost", "without gradient")),
    ("bidirectional_scan", "memory", "L", (256, 2048), ("lost",)),
    ("scan_step", "state", "N", (16, 64, 128, 160), ("lost", "without gradient")),
    ("scan_step", "state", "elements", (65536,), ("lost", "without gradient")),
    ("scan_step", "x", "P", (64, 128, 160, 256), ("lost", "without gradient")),
    ("scan_step", "dt", "B", (16, 256, 2048), ("lost", "without gradient")),
    ("scan_step", "B", "N", (64, 128), ("without gradient",)),
    ("scan_step", "C", "N", (64, 128), ("lost", "without gradient")),
    ("scan_step", "D", "H", (256,), ("lost", "without gradient")),
    ("scan_step", "valid", "B", (256,), ("ignored",)),
    ("scan_step", "y", "P", (64, 128), ("lost", "without gradient")),
    ("scan_step", "new state", "P", (64, 128), ("lost", "without gradient")),
    ("window_attention", "q", "N", (16, 64, 128, 192), ("lost", "without gradient")),
    ("window_attention", "k", "N", (64, 128), ("lost", "without gradient")),
    ("window_attention", "k", "elements", (65536,), ("without gradient",)),
    ("window_attention", "v", "P", (64, 128, 160, 256), ("lost", "without gradient")),
    ("window_attention", "v", "L", (256, 2048), ("lost", "without gradient")),
    ("window_attention", "window_id", "L", (256, 2048), ("lost",)),
    ("window_attention", "window_id", "B", (256,), ("lost",)),
    ("window_attention", "window", "L", (64, 256, 2048), ("lost",)),
    ("window_attention", "o", "H", (16, 256), ("lost", "without gradient")),
    ("window_attention", "o", "elements", (65536,), ("lost", "without gradient")),
    ("sliding_window_attention", "q", "N", (16, 64, 128, 192), ("lost", "without gradient")),
    ("sliding_window_attention", "k", "N", (64, 128), ("lost", "without gradient")),
    ("sliding_window_attention", "k", "L", (256, 2048), ("without gradient",)),
    ("sliding_window_attention", "v", "P", (64, 128, 160), ("lost", "without gradient")),
    ("sliding_window_attention", "v", "L", (256, 2048), ("lost", "without gradient")),
    ("sliding_window_attention", "asks", "L", (64,), ("ignored",)),
    ("sliding_window_attention", "valid", "L", (256, 2048), ("ignored",)),
    ("sliding_window_attention", "o", "H", (16, 256), ("lost", "without gradient")),
    ("sliding_window_attention", "o", "L", (256, 2048), ("lost", "without gradient")),
    ("causal_conv", "u", "W", (16, 64, 256, 2048), ("lost", "without gradient")),
    ("causal_conv", "u", "L", (256, 2048, 8192, 32768), ("without gradient",)),
    ("causal_conv", "u", "elements", (65536,), ("without gradient",)),
    ("causal_conv", "weight", "W", (128, 2048), ("lost", "without gradient")),
    ("causal_conv", "bias", "W", (256, 2048), ("lost", "without gradient")),
    ("causal_conv", "mask", "L", (64, 256, 2048), ("ignored",)),
    ("causal_conv", "initial_state", "W", (2048,), ("lost", "without gradient")),
    ("causal_conv", "initial_state", "B", (256,), ("lost", "without gradient")),
    ("causal_conv", "out", "L", (256, 2048), ("lost", "without gradient")),
    ("causal_conv", "out", "elements", (65536,), ("lost",)),
    ("causal_conv", "final_state", "W", (256, 2048), ("lost", "without gradient")),
    ("hidden_loss", "student", "W", (16, 256, 2048), ("lost", "without gradient")),
    ("hidden_loss", "student", "elements", (65536,), ("without gradient",)),
    ("hidden_loss", "teacher", "L", (256, 2048), ("lost",)),
    ("hidden_loss", "valid", "L", (256, 2048), ("ignored",)),
    ("hidden_loss", "valid", "B", (256,), ("ignored",)),
    ("logit_loss", "student", "W", (16, 2048, 65536), ("lost", "without gradient")),
    ("logit_loss", "student", "L", (256, 2048, 32768), ("lost", "without gradient")),
    ("logit_loss", "teacher", "W", (65536,), ("lost",)),
    ("logit_loss", "mask", "L", (256, 2048), ("ignored",)),
    ("logit_loss", "mask", "B", (256,), ("ignored",)),
    ("selective_scan", "x", "heads of a group", (4, 8), ("lost", "without gradient")),
    ("selective_scan", "B", "heads of a group", (4, 8), ("without gradient",)),
    ("selective_scan", "y", "heads of a group", (4, 8), ("lost",)),
    ("bidirectional_scan", "x", "heads of a group", (4, 8), ("without gradient",)),
    ("bidirectional_scan", "B", "heads of a group", (4, 8), ("lost", "without gradient")),
    ("bidirectional_scan", "gate", "heads of a group", (4, 8), ("lost",)),
    ("scan_step", "x", "heads of a group", (4, 8), ("without gradient",)),
    ("scan_step", "B", "heads of a group", (4, 8), ("lost", "without gradient")),
    ("window_attention", "q", "heads of a group", (4, 8), ("lost", "without gradient")),
    ("window_attention", "k", "heads of a group", (4, 8), ("without gradient",)),
    ("window_attention", "v", "heads of a group", (4, 8), ("lost", "without gradient")),
    ("sliding_window_attention", "q", "heads of a group", (4, 8), ("lost",)),
    ("sliding_window_attention", "k", "heads of a group", (4, 8), ("lost", "without gradient")),
    ("sliding_window_attention", "v", "heads of a group", (4, 8), ("without gradient",)),
    ("window_attention", "k", "tokens", (65536,), ("lost",)),
    ("window_attention", "window_id", "tokens", (65536,), ("lost",)),
    ("window_attention", "o", "tokens", (65536,), ("lost", "without gradient")),
    ("sliding_window_attention", "o", "tokens", (65536,), ("lost",)),
    ("sliding_window_attention", "window", "window", (256, 1024), ("cut short",)),
    ("sliding_window_attention", "sequence", "L", (128,), ("ignored far to the left",)),
    ("causal_conv", "weight", "K", (8, 16), ("lost", "without gradient")),
    ("causal_conv", "initial_state", "K", (8,), ("lost", "without gradient")),
    ("selective_scan", "y", "L", (32, 256), ("lost at the end of whole chunks",)),
    ("selective_scan", "dt", "L", (64, 256), ("lost at the end of whole chunks",)),
    ("bidirectional_scan", "y", "L", (64, 256), ("lost at the end of whole chunks",)),
    ("window_attention", "o", "L", (64, 256), ("lost at the end of whole chunks",)),
    ("causal_conv", "out", "L", (64, 256), ("lost at the end of whole chunks",)),
    ("causal_conv", "out", "W", (64, 256), ("lost at the end of whole chunks",)),
    ("hidden_loss", "student", "L", (64,), ("lost at the end of whole chunks",)),
    ("hidden_loss", "student", "W", (256,), ("lost at the end of whole chunks",)),
    ("logit_loss", "student", "L", (64,), ("lost at the end of whole chunks",)),
    ("logit_loss", "student", "W", (256,), ("lost at the end of whole chunks",)),
)  # fmt: skip


@dataclass(frozen=True)
class SizeBug:
    """One argument or result of an operator that goes wrong from an index on."""

    operator: str
    tensor: str
    axis: str
    start: int
    how: str

    def __str__(self) -> str:
        return f"{self.operator}: {self.tensor} {self.how} from {self.axis} = {self.start} on"

    @property
    def whole(self) -> bool:
        """Whether it shows where a size is a multiple of `start`, where no chunk is cut short."""
        return "whole" in self.how

    def bites(self, case: Case) -> bool:
        """Whether the case is large enough."""
        given, letters = inputs_of(case), AXES[self.operator]
        sizes: dict[str, int] = {}
        for name, axes in letters.items():
            if isinstance(given.get(name), Tensor):
                sizes |= dict(zip(axes, given[name].shape, strict=True))
        if self.axis == "elements":
            return math.prod(sizes[letter] for letter in letters[self.tensor]) > self.start
        if self.axis == "tokens":
            return sizes["B"] * sizes["L"] > self.start
        if self.axis == "heads of a group":
            return sizes["H"] // sizes["G"] > self.start
        if self.axis == "window":
            return given["window"] > self.start
        if self.whole:
            return sizes[self.axis] % self.start == 0
        absent = self.tensor in given and given[self.tensor] is None
        return not absent and sizes.get(self.axis, 0) > self.start

    def change(self, tensor: Tensor, ratio: int = 1) -> Tensor:
        """The tensor as the bug has it; `ratio` heads share a group."""
        if self.axis == "elements":
            keep = (torch.arange(tensor.numel()) < self.start).view(tensor.shape)
        elif self.axis == "tokens":
            tokens = tensor.shape[:2]
            keep = torch.arange(math.prod(tokens)).view(*tokens, *[1] * (tensor.ndim - 2)) < self.start
        elif self.axis == "heads of a group":  # of a tensor whose groups are written out as heads
            axis = AXES[self.operator][self.tensor].translate({ord("G"): "H"}).index("H")
            place = torch.arange(tensor.shape[axis]) % ratio
            keep = (place < self.start).view(-1, *[1] * (tensor.ndim - 1 - axis))
        else:
            axis = AXES[self.operator][self.tensor].index(self.axis)
            size = tensor.shape[axis]
            end = size - (size % self.start == 0) if self.whole else self.start
            keep = torch.arange(size) < end
            keep = keep.view(-1, *[1] * (tensor.ndim - 1 - axis))
        if self.how == "without gradient":
            return torch.where(keep, tensor, tensor.detach())
        if self.how == "with twice the gradient":
            return torch.where(keep, tensor, grow(tensor, 2))
        lost = {torch.bool: True, torch.int64: -1}.get(tensor.dtype, 0)  # a mask that is ignored is True
        return torch.where(keep, tensor, torch.full_like(tensor, lost))


class BackendWithBug:
    """The second formulation of one operator with one bug in it."""

    def __init__(self, bug: SizeBug) -> None:
        self.bug = bug
        setattr(self, bug.operator, self.call)

    def call(self, **given: Any) -> Any:
        """The operator, its arguments and results changed."""
        bug = self.bug
        if bug.tensor == "sequence" and bug.operator == "sliding_window_attention":
            return reads_across(bug.start, given)
        if bug.axis == "window":
            return with_a_short_window(bug.start, given)
        ratio, original = 1, given
        if bug.axis == "heads of a group":
            given, ratio = with_groups_as_heads(bug.operator, given)
        if isinstance(given.get(bug.tensor), Tensor):
            given[bug.tensor] = bug.change(given[bug.tensor], ratio)
        if bug.tensor == "memory":
            return self.forgetful(**given)
        if bug.tensor == "window":
            given["window_id"] = first_of_each_window(given["window_id"], bug.start)
        outputs = right(bug.operator, given)
        if ratio > 1 and bug.operator == "sliding_window_attention":  # whose state holds groups
            outputs = outputs[0], right(bug.operator, original)[1]
        names = {"y": 0, "o": 0, "out": 0, "final_state": 1, "new state": 1}
        if bug.tensor not in names:
            return outputs
        if not isinstance(outputs, tuple):
            return bug.change(outputs, ratio)
        place = names[bug.tensor]
        return tuple(bug.change(tensor, ratio) if i == place else tensor for i, tensor in enumerate(outputs))

    def forgetful(self, **given: Any) -> Any:
        """A scan whose state is lost after some tokens, as it is where chunks are not joined."""
        shared = {"A", "D", "initial_state", "reverse"}
        cut, reverse = self.bug.start, given.get("reverse", False)
        tokens = {name for name, value in given.items() if name not in shared and value is not None}
        parts = [
            {name: value[:, span] if name in tokens else value for name, value in given.items()}
            for span in (slice(0, cut), slice(cut, None))
        ]
        parts[0 if reverse else 1]["initial_state"] = None
        (first, state), (second, other) = (right(self.bug.operator, part) for part in parts)
        return torch.cat([first, second], dim=1), state if reverse else other


def right(operator: str, given: dict[str, Any]) -> Any:
    """The second formulation, inside in float64, its results in the dtypes of the operator."""
    wide = in_float64(given)
    outputs = FORMULATIONS[operator](**wide)
    tokens = next(given[name] for name in ("x", "q", "u", "student") if name in given)
    state = torch.float64 if tokens.dtype == torch.float64 else torch.float32
    if operator == "sliding_window_attention":  # its state holds keys and values in their own dtypes
        k, v, present = outputs[1]
        after = WindowState(k.to(given["k"].dtype), v.to(given["v"].dtype), present)
        return outputs[0].to(tokens.dtype), after
    if isinstance(outputs, tuple):
        return outputs[0].to(tokens.dtype), outputs[1].to(state)
    return outputs.to(state if operator.endswith("loss") else tokens.dtype)


def with_groups_as_heads(operator: str, given: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """The arguments with a group for every head, and how many heads shared one."""
    heads, shared, ratio = 0, {}, 1
    for name, axes in AXES[operator].items():
        if "H" in axes and isinstance(given.get(name), Tensor):
            heads = given[name].shape[axes.index("H")]
    for name, axes in AXES[operator].items():
        if "G" in axes:
            ratio = heads // given[name].shape[axes.index("G")]
            shared[name] = given[name].repeat_interleave(ratio, dim=axes.index("G"))
    state = given.get("initial_state")
    if isinstance(state, WindowState):
        k, v = (part.repeat_interleave(ratio, dim=2) for part in state[:2])
        shared["initial_state"] = WindowState(k, v, state.present)
    return given | shared, ratio


def with_a_short_window(longest: int, given: dict[str, Any]) -> Any:
    """Outputs of a window of `longest` tokens at most, and the right state."""
    state, window = given["initial_state"], min(given["window"], longest)
    last = (
        None if state is None else WindowState(*(part[:, part.shape[1] - (window - 1) :] for part in state))
    )
    outputs = right("sliding_window_attention", given)
    return right("sliding_window_attention", given | {"window": window, "initial_state": last})[0], outputs[1]


def reads_across(distance: int, given: dict[str, Any]) -> Any:
    """Tokens read whatever sample a key is of that is further than `distance` to the left."""
    sound = second_sliding_window.pairs_and_rest

    def broken(window, length, batch, asks, valid, sequence, present):
        seen, left = sound(window, length, batch, asks, valid, sequence, present)
        across, _ = sound(window, length, batch, asks, valid, None, present)
        place = torch.arange(seen.shape[2])
        far = place[-length:, None] - place > distance
        return seen | (across & far), left

    with mock.patch.object(second_sliding_window, "pairs_and_rest", broken):
        return right("sliding_window_attention", given)


def first_of_each_window(ids: Tensor, size: int) -> Tensor:
    """Ids where a window has room for `size` tokens only; what comes later is in none."""
    kept = ids.clone()
    for row in kept:
        for number in row.unique():
            row[(row == number).nonzero().squeeze(-1)[size:]] = -1
    return kept


def bugs() -> Iterator[SizeBug]:
    """Every line of the table, written out."""
    for operator, tensor, axis, starts, hows in TABLE:
        for start in starts:
            for how in hows:
                yield SizeBug(operator, tensor, axis, start, how)


def cases_of(bug: SizeBug) -> Iterator[Case]:
    """The large cases that can show it."""
    return (case for case in LARGE[bug.operator].values() if bug.bites(case))
