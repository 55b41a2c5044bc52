"""Cases: frozen dataclasses that hypothesis draws and torch fills with numbers; the repr reproduces a case.

Letters: B batch, L tokens, H query heads, G groups, N state size, P head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .layouts import Layout, layouts

DTYPES = {  # name -> (dtype of x, B, C, u, q, k, v; dtype of dt, A, gate, D)
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
}
EXACT = ("float64", "float32")  # where a broken invariant cannot hide behind rounding
LENGTHS = (1, 2, 3, 5, 7, 8, 11, 13, 16, 17, 19, 23, 24)


def holds(*needs: str, case: st.SearchStrategy, share: float = 1.0) -> Callable:
    """Turn `property(backend, case)` into a test; `needs` names what it uses of the backend.

    `share` scales the number of examples of the loaded profile. The bare property stays reachable as
    `.check`, for the snippet that reproduces a failure and for the planted bugs, its cases as `.cases`.
    """

    def make_test(check: Callable) -> Callable:
        examples, cases = max(1, round(share * settings().max_examples)), all_new(case)
        test = settings(max_examples=examples)(given(case=cases)(check))
        test.check, test.cases, test.examples = check, cases, examples
        return pytest.mark.needs(*needs)(test)

    return make_test


def all_new(case: st.SearchStrategy) -> st.SearchStrategy:
    """The same cases, without hypothesis copying parts of one into another, half of a short run otherwise.

    It leaves what is inside a unique collection alone.
    """
    return st.lists(case, min_size=1, max_size=1, unique=True).map(lambda cases: cases[0])


class Numbers:
    """Random numbers in float64, rounded to a dtype on the way out, so that all dtypes see the same draw."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(dtype)

    def uniform(self, *shape: int, low: float, high: float, dtype: torch.dtype = torch.float64) -> Tensor:
        share = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        return (low + (high - low) * share).to(dtype)

    def some(self, *shape: int, share: float = 0.6) -> Tensor:
        """A bool mask, True with probability `share`."""
        return torch.rand(shape, generator=self.generator) < share


def row_mask(kind: str, batch: int, length: int, numbers: Numbers) -> Tensor | None:
    """A mask: "none" (no mask), "all", "some" (holes anywhere), "left" or "right" (ragged padding)."""
    if kind == "none":
        return None
    if kind == "all":
        return torch.ones(batch, length, dtype=torch.bool)
    if kind == "some":
        return numbers.some(batch, length)
    counts = torch.randint(0, length + 1, (batch, 1), generator=numbers.generator)
    position = torch.arange(length).expand(batch, length)
    return position >= length - counts if kind == "left" else position < counts


@dataclass(frozen=True)
class ScanCase:
    """Arguments of `selective_scan`."""

    operator: ClassVar[str] = "selective_scan"
    batch: int
    length: int
    heads: int
    groups: int
    state: int
    head_dim: int
    mask: str
    initial_state: bool
    reverse: bool
    dtype: str
    seed: int

    def inputs(self, draw: int = 0) -> dict[str, Any]:
        """All arguments by name; another `draw` gives other numbers and the same mask."""
        scan = scan_tensors(self, self.batch, self.length, Numbers(self.seed + 7919 * draw))
        mask = row_mask(self.mask, self.batch, self.length, Numbers(self.seed + 1))
        return {**scan, "mask": mask, "reverse": self.reverse}


@dataclass(frozen=True)
class BidirectionalCase:
    """Arguments of `bidirectional_scan`."""

    operator: ClassVar[str] = "bidirectional_scan"
    layout: Layout
    heads: int
    groups: int
    state: int
    head_dim: int
    initial_state: bool
    skip: bool
    dtype: str
    seed: int

    def inputs(self, draw: int = 0) -> dict[str, Any]:
        """All arguments by name; another `draw` gives other numbers and the same layout."""
        batch, length = self.layout.shape
        numbers = Numbers(self.seed + 7919 * draw)
        scan = scan_tensors(self, batch, length, numbers)
        step_dtype = DTYPES[self.dtype][1]
        gate = numbers.normal(batch, length, self.heads).mul(2).sigmoid().to(step_dtype)
        skip = numbers.normal(self.heads, dtype=step_dtype) if self.skip else None
        return {**scan, "gate": gate, "D": skip, "segment": self.layout.segment, "valid": self.layout.valid}


def scan_tensors(sizes: Any, batch: int, length: int, numbers: Numbers) -> dict[str, Any]:
    """x, dt, A, B, C and initial_state with decays from almost none to almost all of the state per token."""
    dtype, step_dtype = DTYPES[sizes.dtype]
    tensors = {
        "x": numbers.normal(batch, length, sizes.groups, sizes.head_dim, dtype=dtype),
        "dt": numbers.uniform(batch, length, sizes.heads, low=-3, high=1).exp().to(step_dtype),
        "A": -numbers.uniform(sizes.heads, low=-4, high=1).exp().to(step_dtype),
        "B": numbers.normal(batch, length, sizes.groups, sizes.state, dtype=dtype),
        "C": numbers.normal(batch, length, sizes.heads, sizes.state, dtype=dtype),
    }
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    state = numbers.normal(batch, sizes.heads, sizes.state, sizes.head_dim, dtype=state_dtype)
    return {**tensors, "initial_state": state if sizes.initial_state else None}


@dataclass(frozen=True)
class ConvCase:
    """Arguments of `causal_conv`."""

    operator: ClassVar[str] = "causal_conv"
    batch: int
    length: int
    channels: int
    taps: int
    bias: bool
    mask: str
    initial_state: bool
    dtype: str
    seed: int

    def inputs(self, draw: int = 0) -> dict[str, Any]:
        """All arguments by name; another `draw` gives other numbers and the same mask."""
        numbers, dtype = Numbers(self.seed + 7919 * draw), DTYPES[self.dtype][0]
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        u = numbers.normal(self.batch, self.length, self.channels, dtype=dtype)
        weight = numbers.normal(self.channels, self.taps, dtype=dtype)
        bias = numbers.normal(self.channels, dtype=dtype)
        state = numbers.normal(self.batch, self.taps - 1, self.channels, dtype=dtype).to(state_dtype)
        return {
            "u": u,
            "weight": weight,
            "bias": bias if self.bias else None,
            "mask": row_mask(self.mask, self.batch, self.length, Numbers(self.seed + 1)),
            "initial_state": state if self.initial_state else None,
        }


@dataclass(frozen=True)
class WindowCase:
    """Arguments of `window_attention`: each token belongs to one of `windows` windows or to none."""

    operator: ClassVar[str] = "window_attention"
    batch: int
    length: int
    heads: int
    groups: int
    state: int
    head_dim: int
    windows: int
    scale: float | None
    dtype: str
    seed: int

    def inputs(self, draw: int = 0) -> dict[str, Any]:
        """All arguments by name; another `draw` gives other numbers and the same windows."""
        numbers, dtype = Numbers(self.seed + 7919 * draw), DTYPES[self.dtype][0]
        tokens = (self.batch, self.length)
        ids = torch.randint(-1, self.windows, tokens, generator=Numbers(self.seed + 1).generator)
        return {
            "q": numbers.normal(*tokens, self.heads, self.state, dtype=dtype),
            "k": numbers.normal(*tokens, self.groups, self.state, dtype=dtype),
            "v": numbers.normal(*tokens, self.groups, self.head_dim, dtype=dtype),
            "window_id": ids,
            "scale": self.scale,
        }


@dataclass(frozen=True)
class LossCase:
    """Arguments of `hidden_loss` (width = D) and `logit_loss` (width = V)."""

    batch: int
    length: int
    width: int
    mask: str
    temperature: float
    dtype: str
    seed: int

    def inputs(self, draw: int = 0) -> dict[str, Any]:
        """student, teacher and mask; another `draw` gives other numbers and the same mask."""
        numbers, dtype = Numbers(self.seed + 7919 * draw), DTYPES[self.dtype][0]
        shape = (self.batch, self.length, self.width)
        student, teacher = (numbers.normal(*shape).mul(2).to(dtype) for _ in range(2))
        mask = row_mask(self.mask, self.batch, self.length, Numbers(self.seed + 1))
        if mask is not None:
            mask[0, 0] = True  # at least one token counts; the empty mask has a test of its own
        return {"student": student, "teacher": teacher, "mask": mask}


SEEDS = st.integers(0, 2**16)
MASKS = st.sampled_from(("none", "all", "some", "left", "right"))
BATCHES = st.integers(1, 3)
COMPILED = torch.cuda.is_available()  # every size is another kernel to compile: fewer of them
SMALL = st.sampled_from((3, 16) if COMPILED else (1, 2, 3, 5, 8))  # head dims and state sizes
HEADS_GROUPS = st.sampled_from(
    ((1, 1), (4, 2), (3, 1)) if COMPILED else ((1, 1), (2, 1), (3, 1), (2, 2), (4, 2), (3, 3))
)


def dtypes(names: Iterable[str]) -> st.SearchStrategy[str]:
    """One of the named dtypes, the first most often after shrinking."""
    return st.sampled_from(tuple(names))


@st.composite
def scan_cases(draw: st.DrawFn, names: Iterable[str] = EXACT, **fixed: Any) -> ScanCase:
    heads, groups = draw(HEADS_GROUPS)
    drawn: Mapping[str, Any] = {
        "batch": draw(BATCHES),
        "length": draw(st.sampled_from(LENGTHS)),
        "heads": heads,
        "groups": groups,
        "state": draw(SMALL),
        "head_dim": draw(SMALL),
        "mask": draw(MASKS),
        "initial_state": draw(st.booleans()),
        "reverse": draw(st.booleans()),
        "dtype": draw(dtypes(names)),
        "seed": draw(SEEDS),
    }
    return ScanCase(**{**drawn, **fixed})


@st.composite
def bidirectional_cases(draw: st.DrawFn, names: Iterable[str] = EXACT, **fixed: Any) -> BidirectionalCase:
    heads, groups = draw(HEADS_GROUPS)
    drawn = {
        "layout": draw(layouts()),
        "heads": heads,
        "groups": groups,
        "state": draw(SMALL),
        "head_dim": draw(SMALL),
        "initial_state": draw(st.booleans()),
        "skip": draw(st.booleans()),
        "dtype": draw(dtypes(names)),
        "seed": draw(SEEDS),
    }
    return BidirectionalCase(**{**drawn, **fixed})


@st.composite
def conv_cases(draw: st.DrawFn, names: Iterable[str] = EXACT, **fixed: Any) -> ConvCase:
    drawn = {
        "batch": draw(BATCHES),
        "length": draw(st.sampled_from(LENGTHS)),
        "channels": draw(SMALL),
        "taps": draw(st.integers(1, 5)),
        "bias": draw(st.booleans()),
        "mask": draw(MASKS),
        "initial_state": draw(st.booleans()),
        "dtype": draw(dtypes(names)),
        "seed": draw(SEEDS),
    }
    return ConvCase(**{**drawn, **fixed})


@st.composite
def window_cases(draw: st.DrawFn, names: Iterable[str] = EXACT, **fixed: Any) -> WindowCase:
    heads, groups = draw(HEADS_GROUPS)
    drawn = {
        "batch": draw(BATCHES),
        "length": draw(st.sampled_from(LENGTHS)),
        "heads": heads,
        "groups": groups,
        "state": draw(SMALL),
        "head_dim": draw(SMALL),
        "windows": draw(st.integers(0, 4)),
        "scale": draw(st.sampled_from((None, 0.3))),
        "dtype": draw(dtypes(names)),
        "seed": draw(SEEDS),
    }
    return WindowCase(**{**drawn, **fixed})


@st.composite
def loss_cases(draw: st.DrawFn, names: Iterable[str] = EXACT, **fixed: Any) -> LossCase:
    drawn = {
        "batch": draw(BATCHES),
        "length": draw(st.sampled_from(LENGTHS)),
        "width": draw(st.sampled_from((1, 2, 7, 33))),
        "mask": draw(MASKS),
        "temperature": draw(st.sampled_from((1.0, 2.0, 0.5))),
        "dtype": draw(dtypes(names)),
        "seed": draw(SEEDS),
    }
    return LossCase(**{**drawn, **fixed})
