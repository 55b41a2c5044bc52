"""Cases: frozen dataclasses that hypothesis draws and torch fills with numbers; the repr reproduces a case.

Letters: B batch, L tokens, H query heads, G groups, N state size, P head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from .compare import Results, evaluate, report
from .layouts import Layout, layouts

DTYPES = {  # name -> (dtype of x, B, C, u, q, k, v; dtype of dt, A, gate, D, and of taps)
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "mixed": (torch.bfloat16, torch.float32),
}
EXACT = ("float64", "float32")  # where a broken invariant cannot hide behind rounding
SHOWN = 100  # numbers of a mask, or ids, in a message
LENGTHS = (1, 2, 3, 5, 7, 8, 11, 13, 16, 17, 19, 23, 24)


def property_of(*names: str, cases: st.SearchStrategy, share: float = 1.0) -> Callable:
    """Turn `check(backend, case)` into a test of these names of a backend, on cases that hypothesis draws.

    `share` scales the number of cases of the loaded profile. The bare check stays reachable as `.check`, for
    the snippet that reproduces a failure and for the planted bugs, its cases as `.cases`.
    """

    def make_test(check: Callable) -> Callable:
        examples, drawn = max(1, round(share * settings().max_examples)), all_new(cases)
        test = settings(max_examples=examples)(given(case=drawn)(explained(check)))
        test.check, test.cases, test.examples = check, drawn, examples
        return pytest.mark.needs(*names)(test)

    return make_test


def explained(check: Callable) -> Callable:
    """The check; what it raises says which case it was and how to run it again, if it does not yet."""

    @wraps(check)
    def run_check(backend: Any, case: Any) -> None:
        try:
            check(backend, case)
        except Exception as error:
            if "reproduce: " not in str(error):
                error.add_note(report("", case))
            raise

    return run_check


def all_new(case: st.SearchStrategy) -> st.SearchStrategy:
    """The same cases, in a unique list of one: hypothesis does not recombine parts of what is in there.

    Otherwise half of a short run would be parts of earlier cases.
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
    """A mask: "none" (no mask), "all", "some" (holes), "left" or "right" (ragged padding), "tail", "head".

    The last three in seven tokens of every row, and a few others, are missing in a tail; in a head the first
    four.
    """
    if kind == "none":
        return None
    if kind == "all":
        return torch.ones(batch, length, dtype=torch.bool)
    if kind == "some":
        return numbers.some(batch, length)
    if kind in ("tail", "head"):
        in_tail = torch.arange(length) >= length * 4 // 7
        return numbers.some(batch, length, share=0.9) & (in_tail if kind == "head" else ~in_tail)
    counts = torch.randint(0, length + 1, (batch, 1), generator=numbers.generator)
    position = torch.arange(length).expand(batch, length)
    return position >= length - counts if kind == "left" else position < counts


class Case:
    """Arguments of one operator, and ways to change them. Every change is a case again."""

    operator: ClassVar[str]
    results: ClassVar[tuple[str, ...]]  # names of what the operator returns
    tokens: ClassVar[tuple[str, ...]]  # names of the float arguments (B, L, ...)
    masks: ClassVar[tuple[str, ...]] = ()  # names of the bool and int64 arguments (B, L)
    rows: ClassVar[tuple[str, ...]] = ()  # names of the arguments (B, ...) without tokens

    def inputs(self, draw: int = 0) -> dict[str, Any]:
        """All arguments by name; another `draw` gives other numbers and the same masks."""
        raise NotImplementedError

    @staticmethod
    def flat(operator: Callable) -> Callable:
        """The operator with tensors for whatever it takes and gives as a state of several."""
        return operator

    @property
    def shape(self) -> tuple[int, int]:
        """(B, L)."""
        return tuple(self.inputs()[self.tokens[0]].shape[:2])

    @property
    def ratio(self) -> int:
        """How many heads share a group."""
        return self.heads // self.groups

    def cuts(self) -> list[int]:
        """A few places to split the sequence: near both ends and in the middle."""
        length = self.shape[1]
        return sorted({1, length // 2, length - 1} & set(range(1, length)))

    def changed(self, **changes: Any) -> ChangedCase:
        """The same case with these arguments instead."""
        return ChangedCase(self, changes)

    def with_other_tokens(self, where: Tensor) -> ChangedCase:
        """Other numbers at the tokens `where`, (B, L) bool."""
        return self._with_tokens(where, self.inputs(draw=1))

    def with_other_tokens_from(self, cut: int) -> ChangedCase:
        """Other numbers at token `cut` and after it."""
        return self.with_other_tokens((torch.arange(self.shape[1]) >= cut).expand(self.shape))

    def with_other_tokens_before(self, cut: int) -> ChangedCase:
        """Other numbers before token `cut`."""
        return self.with_other_tokens((torch.arange(self.shape[1]) < cut).expand(self.shape))

    def with_nan_at(self, where: Tensor) -> ChangedCase:
        """NaN at the tokens `where`, (B, L) bool."""
        given = self.inputs()
        return self._with_tokens(where, {n: torch.full_like(given[n], float("nan")) for n in self.tokens})

    def _with_tokens(self, where: Tensor, others: Mapping[str, Tensor]) -> ChangedCase:
        given = self.inputs()

        def pick(name: str) -> Tensor:
            return torch.where(
                where.view(*where.shape, *[1] * (given[name].ndim - 2)), others[name], given[name]
            )

        return self.changed(**{name: pick(name) for name in self.tokens})

    def part(self, span: slice) -> ChangedCase:
        """A part of the sequence, with the same initial state."""
        given = self.inputs()
        names = (*self.tokens, *self.masks)
        return self.changed(**{name: given[name][:, span] for name in names if given[name] is not None})

    def row(self, row: int) -> ChangedCase:
        """One row of the batch alone."""
        given = self.inputs()
        names = (*self.tokens, *self.masks, *self.rows)
        alone = {name: given[name][row : row + 1] for name in names if given[name] is not None}
        return self.changed(**alone)


class ChangedCase(Case):
    """A case with some arguments replaced; all else is as in the case it was made from."""

    def __init__(self, case: Case, changes: Mapping[str, Any]) -> None:
        self.case, self.changes = case, dict(changes)
        self.operator, self.results = case.operator, case.results
        self.tokens, self.masks, self.rows, self.flat = case.tokens, case.masks, case.rows, case.flat

    def inputs(self, draw: int = 0) -> dict[str, Any]:
        """The arguments of the case, then the changes."""
        return {**self.case.inputs(draw), **self.changes}

    def __getattr__(self, name: str) -> Any:
        return getattr(self.case, name)

    def __repr__(self) -> str:
        return f"{self.case!r} with other {', '.join(map(self.described, self.changes))}"

    def described(self, name: str) -> str:
        """The name of a change; of a small mask or of ids also the values."""
        value = self.changes[name]
        known = isinstance(value, Tensor) and not value.is_floating_point() and value.numel() <= SHOWN
        return (
            f"{name} = {value.int().tolist() if value.dtype == torch.bool else value.tolist()}"
            if known
            else name
        )


def operator_of(backend: Any, case: Case) -> Callable:
    """The operator that the case is for, on the case's arguments and with its results."""
    return case.flat(getattr(backend, case.operator))


def run(
    backend: Any,
    case: Case,
    gradients: bool = False,
    of: Sequence[str] | None = None,
    draw: int | None = None,
) -> Results:
    """Call the case's operator: its results by name and, with `gradients`, "grad NAME" of every float
    argument, for the results `of`, for all if None; `draw` as in `evaluate`."""
    return evaluate(
        operator_of(backend, case), case.inputs(), gradients, draw=draw, names=case.results, of=of
    )


def gradients_of(backend: Any, case: Case, pick: Callable[[Tensor], Tensor]) -> Results:
    """ "grad NAME" of every float argument, for a part of the first result that `pick` cuts out."""

    def part(**given: Any) -> Tensor:
        outputs = operator_of(backend, case)(**given)
        return pick(outputs[0] if isinstance(outputs, tuple) else outputs)

    found = evaluate(part, case.inputs(), gradients=True)
    return {name: gradient for name, gradient in found.items() if name.startswith("grad ")}


def fed(operator: Callable, case: Case, gradients: bool = False) -> Results:
    """`run` of any function that takes the case's arguments and gives the same results."""
    return evaluate(operator, case.inputs(), gradients, names=case.results)


@dataclass(frozen=True)
class ScanCase(Case):
    """Arguments of `selective_scan`."""

    operator: ClassVar[str] = "selective_scan"
    results: ClassVar[tuple[str, ...]] = ("y", "final_state")
    tokens: ClassVar[tuple[str, ...]] = ("x", "dt", "B", "C")
    masks: ClassVar[tuple[str, ...]] = ("mask",)
    rows: ClassVar[tuple[str, ...]] = ("initial_state",)
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
    decay: float | None = None  # the same for all heads, in the place of a drawn one

    def inputs(self, draw: int = 0) -> dict[str, Any]:
        """All arguments by name; another `draw` gives other numbers and the same mask."""
        scan = scan_tensors(self, self.batch, self.length, Numbers(self.seed + 7919 * draw))
        mask = row_mask(self.mask, self.batch, self.length, Numbers(self.seed + 1))
        return {**scan, "mask": mask, "reverse": self.reverse}


@dataclass(frozen=True)
class BidirectionalCase(Case):
    """Arguments of `bidirectional_scan`."""

    operator: ClassVar[str] = "bidirectional_scan"
    results: ClassVar[tuple[str, ...]] = ("y", "final_state")
    tokens: ClassVar[tuple[str, ...]] = ("x", "dt", "B", "C", "gate")
    masks: ClassVar[tuple[str, ...]] = ("segment", "valid")
    rows: ClassVar[tuple[str, ...]] = ("initial_state",)
    layout: Layout
    heads: int
    groups: int
    state: int
    head_dim: int
    initial_state: bool
    skip: bool
    dtype: str
    seed: int
    decay: float | None = None  # the same for all heads, in the place of a drawn one

    def inputs(self, draw: int = 0) -> dict[str, Any]:
        """All arguments by name; another `draw` gives other numbers and the same layout."""
        batch, length = self.layout.shape
        numbers = Numbers(self.seed + 7919 * draw)
        scan = scan_tensors(self, batch, length, numbers)
        step_dtype = DTYPES[self.dtype][1]
        gate = numbers.normal(batch, length, self.heads).mul(2).sigmoid().to(step_dtype)
        skip = numbers.normal(self.heads, dtype=step_dtype) if self.skip else None
        return {**scan, "gate": gate, "D": skip, "segment": self.layout.segment, "valid": self.layout.valid}

    def cuts(self) -> list[int]:
        """Places to split the sequence where no span is cut."""
        return self.layout.cuts()


def scan_tensors(
    sizes: Any, batch: int, length: int, numbers: Numbers, initial_state: bool | None = None
) -> dict[str, Any]:
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
    if getattr(sizes, "decay", None) is not None:
        tensors["A"] = torch.full_like(tensors["A"], sizes.decay)
    wanted = sizes.initial_state if initial_state is None else initial_state
    return {**tensors, "initial_state": state if wanted else None}


@dataclass(frozen=True)
class StepCase(Case):
    """Arguments of `scan_step`: one token, so what other operators have per token is per row here."""

    operator: ClassVar[str] = "scan_step"
    results: ClassVar[tuple[str, ...]] = ("y", "state")
    tokens: ClassVar[tuple[str, ...]] = ()
    rows: ClassVar[tuple[str, ...]] = ("state", "x", "dt", "B", "C", "valid")
    batch: int
    heads: int
    groups: int
    state: int
    head_dim: int
    skip: bool
    valid: bool
    dtype: str
    seed: int

    @property
    def shape(self) -> tuple[int, int]:
        """(B, 1)."""
        return self.batch, 1

    def inputs(self, draw: int = 0) -> dict[str, Any]:
        """All arguments by name; another `draw` gives other numbers and the same rows that take part."""
        scan = scan_tensors(self, self.batch, 1, Numbers(self.seed + 7919 * draw), initial_state=True)
        numbers = Numbers(self.seed + 7919 * draw + 3)
        return {
            "state": scan["initial_state"],
            **{name: scan[name][:, 0] for name in ("x", "dt", "B", "C")},
            "A": scan["A"],
            "D": numbers.normal(self.heads, dtype=DTYPES[self.dtype][1]) if self.skip else None,
            "valid": Numbers(self.seed + 1).some(self.batch) if self.valid else None,
        }


@dataclass(frozen=True)
class ConvCase(Case):
    """Arguments of `causal_conv`."""

    operator: ClassVar[str] = "causal_conv"
    results: ClassVar[tuple[str, ...]] = ("out", "final_state")
    tokens: ClassVar[tuple[str, ...]] = ("u",)
    masks: ClassVar[tuple[str, ...]] = ("mask",)
    rows: ClassVar[tuple[str, ...]] = ("initial_state",)
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
        numbers, (dtype, of_taps) = Numbers(self.seed + 7919 * draw), DTYPES[self.dtype]
        state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        u = numbers.normal(self.batch, self.length, self.channels, dtype=dtype)
        weight = numbers.normal(self.channels, self.taps, dtype=of_taps)
        bias = numbers.normal(self.channels, dtype=of_taps)
        state = numbers.normal(self.batch, self.taps - 1, self.channels, dtype=state_dtype)
        return {
            "u": u,
            "weight": weight,
            "bias": bias if self.bias else None,
            "mask": row_mask(self.mask, self.batch, self.length, Numbers(self.seed + 1)),
            "initial_state": state if self.initial_state else None,
        }


@dataclass(frozen=True)
class WindowCase(Case):
    """Arguments of `window_attention`: each token belongs to one of `windows` windows or to none."""

    operator: ClassVar[str] = "window_attention"
    results: ClassVar[tuple[str, ...]] = ("o",)
    tokens: ClassVar[tuple[str, ...]] = ("q", "k", "v")
    masks: ClassVar[tuple[str, ...]] = ("window_id",)
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
    everywhere: bool = False  # no token is outside of all windows

    def inputs(self, draw: int = 0) -> dict[str, Any]:
        """All arguments by name; another `draw` gives other numbers and the same windows."""
        numbers, dtype = Numbers(self.seed + 7919 * draw), DTYPES[self.dtype][0]
        tokens = (self.batch, self.length)
        lowest = 0 if self.everywhere else -1
        ids = torch.randint(lowest, self.windows, tokens, generator=Numbers(self.seed + 1).generator)
        return {
            "q": numbers.normal(*tokens, self.heads, self.state, dtype=dtype),
            "k": numbers.normal(*tokens, self.groups, self.state, dtype=dtype),
            "v": numbers.normal(*tokens, self.groups, self.head_dim, dtype=dtype),
            "window_id": ids,
            "scale": self.scale,
        }


@dataclass(frozen=True)
class LossCase(Case):
    """What `hidden_loss` (width = D) and `logit_loss` (width = V) share."""

    results: ClassVar[tuple[str, ...]] = ("loss",)
    tokens: ClassVar[tuple[str, ...]] = ("student", "teacher")
    masks: ClassVar[tuple[str, ...]] = ("mask",)
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


@dataclass(frozen=True)
class HiddenLossCase(LossCase):
    """Arguments of `hidden_loss`, whose mask is called `valid`."""

    operator: ClassVar[str] = "hidden_loss"
    masks: ClassVar[tuple[str, ...]] = ("valid",)

    def inputs(self, draw: int = 0) -> dict[str, Any]:
        """student, teacher and valid; another `draw` gives other numbers and the same mask."""
        given = super().inputs(draw)
        return {"student": given["student"], "teacher": given["teacher"], "valid": given["mask"]}


@dataclass(frozen=True)
class LogitLossCase(LossCase):
    """Arguments of `logit_loss`."""

    operator: ClassVar[str] = "logit_loss"

    def inputs(self, draw: int = 0) -> dict[str, Any]:
        """student, teacher, mask and temperature; another `draw` gives other numbers and the same mask."""
        return {**super().inputs(draw), "temperature": self.temperature}


SEEDS = st.integers(0, 2**16)
MASKS = st.sampled_from(("none", "all", "some", "left", "right", "tail"))
MANY_SHAPES = {
    "batch": (1, 2, 3),
    "length": LENGTHS,
    "size": (1, 2, 3, 5, 8),  # head dims and state sizes
    "heads": ((1, 1), (3, 1), (2, 2), (4, 2), (6, 2)),
    "taps": (1, 2, 3, 4, 5),
    "width": (1, 2, 7, 33),
    "text_window": (1, 2, 3, 4, 5, 8, 17, 40),
}
SHAPES_ON_A_GPU = {
    **MANY_SHAPES,
    "size": (3, 16),
    "heads": ((1, 1), (4, 2), (6, 2), (3, 1)),
    "text_window": (1, 3, 8, 40),
}
FEW_SHAPES = {
    "batch": (2,),
    "length": (24, 1),
    "size": (3,),
    "heads": ((6, 2),),
    "taps": (4,),
    "width": (33,),
    "text_window": (5,),
}
SHAPES = dict(SHAPES_ON_A_GPU if torch.cuda.is_available() else MANY_SHAPES)


def draw_few_shapes() -> None:
    """From now on draw few shapes, for backends that compile for every one."""
    SHAPES.update(FEW_SHAPES)


def sizes(name: str) -> st.SearchStrategy:
    """One of the sizes of this name."""
    return st.sampled_from(SHAPES[name])


def dtypes(names: Iterable[str]) -> st.SearchStrategy[str]:
    """One of the named dtypes, the first most often after shrinking."""
    return st.sampled_from(tuple(names))


@st.composite
def scan_cases(draw: st.DrawFn, names: Iterable[str] = EXACT, **fixed: Any) -> ScanCase:
    heads, groups = draw(sizes("heads"))
    drawn: Mapping[str, Any] = {
        "batch": draw(sizes("batch")),
        "length": draw(sizes("length")),
        "heads": heads,
        "groups": groups,
        "state": draw(sizes("size")),
        "head_dim": draw(sizes("size")),
        "mask": draw(MASKS),
        "initial_state": draw(st.booleans()),
        "reverse": draw(st.booleans()),
        "dtype": draw(dtypes(names)),
        "seed": draw(SEEDS),
    }
    return ScanCase(**{**drawn, **fixed})


@st.composite
def bidirectional_cases(draw: st.DrawFn, names: Iterable[str] = EXACT, **fixed: Any) -> BidirectionalCase:
    heads, groups = draw(sizes("heads"))
    drawn = {
        "layout": draw(layouts(few=SHAPES["batch"] == FEW_SHAPES["batch"])),
        "heads": heads,
        "groups": groups,
        "state": draw(sizes("size")),
        "head_dim": draw(sizes("size")),
        "initial_state": draw(st.booleans()),
        "skip": draw(st.booleans()),
        "dtype": draw(dtypes(names)),
        "seed": draw(SEEDS),
    }
    return BidirectionalCase(**{**drawn, **fixed})


@st.composite
def conv_cases(draw: st.DrawFn, names: Iterable[str] = EXACT, **fixed: Any) -> ConvCase:
    drawn = {
        "batch": draw(sizes("batch")),
        "length": draw(sizes("length")),
        "channels": draw(sizes("size")),
        "taps": draw(sizes("taps")),
        "bias": draw(st.booleans()),
        "mask": draw(MASKS),
        "initial_state": draw(st.booleans()),
        "dtype": draw(dtypes(names)),
        "seed": draw(SEEDS),
    }
    return ConvCase(**{**drawn, **fixed})


@st.composite
def window_cases(draw: st.DrawFn, names: Iterable[str] = EXACT, **fixed: Any) -> WindowCase:
    heads, groups = draw(sizes("heads"))
    drawn = {
        "batch": draw(sizes("batch")),
        "length": draw(sizes("length")),
        "heads": heads,
        "groups": groups,
        "state": draw(sizes("size")),
        "head_dim": draw(sizes("size")),
        "windows": draw(st.integers(0, 4)),
        "scale": draw(st.sampled_from((None, 0.3))),
        "dtype": draw(dtypes(names)),
        "seed": draw(SEEDS),
    }
    return WindowCase(**{**drawn, **fixed})


@st.composite
def step_cases(draw: st.DrawFn, names: Iterable[str] = EXACT, **fixed: Any) -> StepCase:
    heads, groups = draw(sizes("heads"))
    drawn = {
        "batch": draw(sizes("batch")),
        "heads": heads,
        "groups": groups,
        "state": draw(sizes("size")),
        "head_dim": draw(sizes("size")),
        "skip": draw(st.booleans()),
        "valid": draw(st.booleans()),
        "dtype": draw(dtypes(names)),
        "seed": draw(SEEDS),
    }
    return StepCase(**{**drawn, **fixed})


@st.composite
def loss_cases(draw: st.DrawFn, kind: type[LossCase], names: Iterable[str] = EXACT, **fixed: Any) -> LossCase:
    drawn = {
        "batch": draw(sizes("batch")),
        "length": draw(sizes("length")),
        "width": draw(sizes("width")),
        "mask": draw(MASKS),
        "temperature": draw(st.sampled_from((1.0, 3.0, 0.7))),  # not powers of 2, which no rounding shows
        "dtype": draw(dtypes(names)),
        "seed": draw(SEEDS),
    }
    return kind(**{**drawn, **fixed})


def hidden_loss_cases(names: Iterable[str] = EXACT, **fixed: Any) -> st.SearchStrategy[HiddenLossCase]:
    return loss_cases(HiddenLossCase, names, **fixed)


def logit_loss_cases(names: Iterable[str] = EXACT, **fixed: Any) -> st.SearchStrategy[LogitLossCase]:
    return loss_cases(LogitLossCase, names, **fixed)
