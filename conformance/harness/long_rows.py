"""Rows that are longer than a chunk, and what a chunk may lose: what lies before a gap, and digits.

Chunks of up to 256 tokens are meant, wherever they begin. The truth is that of `large_cases`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from linmu import reference

from .cancellation import is_summed, sizes_of_sums
from .compare import Results, assert_matches, evaluate, in_float64
from .large_cases import FORMULATIONS, both, rounded, scan, sliding, windows
from .layouts import Text
from .operator_cases import Case, ConvCase, Numbers, run
from .operator_checks import sizes_of_differences
from .packed_rows import PackedCase, sample_by_sample

LENGTH = 768
GAPS = (slice(230, 530), slice(253, 515))  # of two rows; both hold tokens 256 to 511, and so do their mirrors
SAMPLES = [[slice(0, 40), slice(40, 700), slice(700, LENGTH)]] * len(GAPS)
SLOW = -1e-3

EDGE, QUIET, WEAK = 128, 256, 256  # tokens
STRONG_STEP = 100.0
HALF = EDGE + QUIET + WEAK // 2


def outside_gaps() -> Tensor:
    """(B, L) bool, False in the gap of each row."""
    outside = torch.ones(len(GAPS), LENGTH, dtype=torch.bool)
    for row, gap in enumerate(GAPS):
        outside[row, gap] = False
    return outside


def split_by_a_gap(reverse: bool = False) -> Case:
    """A scan whose rows have no valid token for a whole chunk."""
    case = scan(LENGTH, 2, 1, 3, 2, batch=len(GAPS), reverse=reverse, decay=SLOW)
    return case.changed(mask=outside_gaps())


def picture_around_a_gap(*kinds: str) -> Case:
    """Both directions over a picture in each row, with a gap of this kind: text, or padding without or with
    the picture's id."""
    case = both(((Text(LENGTH),),) * len(GAPS), 2, 1, 3, 2, decay=SLOW)
    place, outside = torch.arange(LENGTH), outside_gaps()
    picture = ((place >= 150) & (place < 640)).expand(outside.shape)
    named, there = (
        torch.tensor([[kind == each] for kind in kinds]) for each in ("padding with its id", "text")
    )
    return case.changed(segment=(picture & (outside | named)).long() - 1, valid=outside | there)


def convolved_around_a_gap() -> Case:
    case = ConvCase(len(GAPS), LENGTH, 2, 4, True, "none", True, "float32", 3)
    return case.changed(mask=outside_gaps())


def attended_around_a_gap(window: int, name: str) -> Case:
    """A sliding window over rows where a whole block is padding, or does not ask."""
    return sliding(LENGTH, 2, 1, 3, window, batch=len(GAPS)).changed(**{name: outside_gaps()})


def window_around_a_gap(inside: int) -> Case:
    """One window at both ends of a row, another or none between."""
    ids = torch.where(outside_gaps(), 0, inside)
    return windows(LENGTH, 2, 1, 3, 1, batch=len(GAPS)).changed(window_id=ids)


def packed(case: Case) -> PackedCase:
    """The case in the second of three samples."""
    return PackedCase(case, samples=SAMPLES)


def packed_window(case: Case) -> Case:
    """The same of a sliding window, whose truth takes ids."""
    return case.changed(sequence=packed(case).inputs()["sequence"])


AROUND_A_GAP: dict[str, dict[str, Case]] = {
    "selective_scan": {
        "forward": split_by_a_gap(),
        "reverse": split_by_a_gap(reverse=True),
        "forward, packed": packed(split_by_a_gap()),
        "reverse, packed": packed(split_by_a_gap(reverse=True)),
    },
    "bidirectional_scan": {
        "text": picture_around_a_gap("text", "text"),
        "padding": picture_around_a_gap("padding", "padding with its id"),
        "packed": packed(picture_around_a_gap("text", "padding")),
    },
    "causal_conv": {
        "padding": convolved_around_a_gap(),
        "padding, packed": packed(convolved_around_a_gap()),
    },
    "window_attention": {
        "no window": window_around_a_gap(-1),
        "another window": window_around_a_gap(1),
    },
    "sliding_window_attention": {
        "padding": attended_around_a_gap(5, "valid"),
        "padding, packed": packed_window(attended_around_a_gap(5, "valid")),
        "nobody asks": attended_around_a_gap(400, "asks"),
    },
}


def with_strong_ends(case: Case) -> Case:
    """Steps that decay the state by e^-100 each at both ends of the rows, steps of about 0.01 in the middle,
    and between them a chunk of steps of 0: no chunk has strong and weak ones.

    The ends write nothing: a gradient of A that multiplies large steps by what cancels is right, too.
    """
    given = case.inputs()
    weak = Numbers(case.seed + 4).uniform(len(given["dt"]), WEAK, case.heads, low=1e-3, high=2e-2)
    strong, none = (torch.full_like(weak[:, :1], step) for step in (STRONG_STEP, 0.0))
    left = [strong.expand(-1, EDGE, -1), none.expand(-1, QUIET, -1)]
    dt = torch.cat([*left, weak, *left[::-1]], dim=1)
    writes = (dt[:, :, :1] != STRONG_STEP)[..., None]
    return case.changed(
        dt=dt.to(given["dt"]),
        A=-torch.linspace(1, 1.5, case.heads).to(given["A"]),
        **{name: given[name] * writes for name in ("x", "B")},
    )


def in_two_samples(case: Case) -> PackedCase:
    """Strong steps first in the one sample, last in the other."""
    return PackedCase(case, samples=[[slice(0, HALF), slice(HALF, 2 * HALF)]])


STRONG_SCAN = {
    reverse: with_strong_ends(scan(2 * HALF, 2, 1, 3, 2, reverse=reverse)) for reverse in (False, True)
}
STRONG_TEXT = with_strong_ends(both(((Text(2 * HALF),),), 2, 1, 3, 2, skip=False))
STRONG_PICTURE = STRONG_TEXT.changed(segment=torch.zeros(1, 2 * HALF, dtype=torch.int64))
STRONG_ENDS: dict[str, dict[str, Case]] = {
    "selective_scan": {
        "forward": STRONG_SCAN[False],
        "reverse": STRONG_SCAN[True],
        "forward, packed": in_two_samples(STRONG_SCAN[False]),
    },
    "bidirectional_scan": {
        "one picture": STRONG_PICTURE,
        "a picture in each sample": in_two_samples(
            STRONG_TEXT.changed(segment=(torch.arange(2 * HALF) // HALF)[None])
        ),
    },
}


def formulation_of(case: Case) -> Callable:
    """The second formulation of the case's operator, of packed rows sample by sample."""
    formulation = FORMULATIONS[case.operator]
    if not isinstance(case, PackedCase):
        return case.flat(formulation)

    def alone(*, sequence: None, **given: Any) -> Any:
        return formulation(**given)

    return partial(sample_by_sample, alone, case)


def check_long_row(backend: Any, case: Case) -> None:
    """Values and gradients against the second formulation in float64; of the reference, which has one way
    back, values."""
    own = getattr(backend, case.operator) is getattr(reference, case.operator)
    expected = {k: v for k, v in truth_of(case).items() if not (own and k.startswith("grad "))}
    found = run(backend, case, gradients=not own)
    assert_matches(found, expected, rounded(case, expected), case, partial(sizes_of_terms, case))


@cache
def truth_of(case: Case, draw: int | None = None) -> Results:
    """Results and gradients of the second formulation."""
    wide = in_float64(case.inputs())
    return evaluate(formulation_of(case), wide, gradients=True, draw=draw, names=case.results)


@cache
def sizes_of_terms(case: Case) -> Results:
    """As `operator_checks.sizes_of_gradients`, of the second formulation."""
    summed = any(is_summed(f"grad {name}") for name in case.inputs())
    sizes = sizes_of_sums(partial(truth_of.__wrapped__, case)) if summed else {}
    return sizes | sizes_of_differences(case)


def cases_by_name(operator: str, cases: dict[str, dict[str, Case]], says: str) -> Callable:
    """One test for each of the operator's cases."""

    def check(backend: Any, name: str) -> None:
        check_long_row(backend, cases[operator][name])

    check.__doc__ = says
    return pytest.mark.needs(operator)(pytest.mark.parametrize("name", cases[operator])(check))


def gap_properties(operator: str) -> dict[str, Callable]:
    """The test of this file that every operator on rows has, by name."""
    says = "A whole chunk inside a row that takes no part: what lies before it reaches what comes after."
    return {"test_gaps_longer_than_a_chunk_are_crossed": cases_by_name(operator, AROUND_A_GAP, says)}


def scan_properties(operator: str) -> dict[str, Callable]:
    """Those of a scan, by name."""
    says = (
        "Logarithms of decays are summed anew in each chunk: sums over a row lose the digits of small steps."
    )
    strong = cases_by_name(operator, STRONG_ENDS, says)
    return gap_properties(operator) | {"test_strong_steps_far_away_leave_small_ones_their_digits": strong}
