"""Each bug that begins at a whole chunk is caught, and chunks of other sizes pass."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from linmu import reference

from ..harness.backends import Backend
from ..harness.large_cases import FORMULATIONS
from ..harness.long_rows import AROUND_A_GAP, STRONG_ENDS, check_long_row, formulation_of
from ..harness.rounding import check_small_writes_across_pieces
from ..properties.test_flex_ma import test_gaps_longer_than_a_chunk_are_crossed as check_flex_ma
from .bugs_in_long_rows import (
    AT_A_GAP,
    coarse,
    flex_ma_with,
    reverse_starts_anew,
    with_sums_of_a_row,
)


def notices(operator, call, cases) -> bool:
    """Whether an assertion fails for one of the cases."""
    for case in cases:
        try:
            check_long_row(SimpleNamespace(**{operator: partial(call, case)}), case)
        except AssertionError:
            return True
    return False


@pytest.mark.parametrize("size", (64, 256))
@pytest.mark.parametrize(
    ("operator", "bug"), [(operator, bug) for operator, bugs in AT_A_GAP.items() for bug in bugs]
)
def test_what_is_lost_behind_an_empty_chunk_is_noticed(operator, bug, size):
    """In values or gradients, with chunks of any usual size."""

    def call(case, **given):
        return bug(size, **given)

    assert notices(operator, call, AROUND_A_GAP[operator].values())


def test_flex_ma_that_forgets_behind_a_gap_is_noticed():
    """Whatever scan it has inside."""
    broken = Backend("FlexMA in chunks", reference, FlexMA=flex_ma_with(partial(reverse_starts_anew, 128)))
    with pytest.raises(AssertionError):
        check_flex_ma(broken, packed=True)


@pytest.mark.parametrize("operator", STRONG_ENDS)
def test_sums_over_a_row_are_noticed(operator):
    """In every case, packed ones too."""
    for case in STRONG_ENDS[operator].values():
        assert notices(operator, partial(with_sums_of_a_row, operator=operator), [case])


@pytest.mark.parametrize("chunk", (100, 256))
@pytest.mark.parametrize("operator", STRONG_ENDS)
def test_differences_of_sums_within_chunks_pass(operator, chunk):
    """In float32, wherever the chunks begin."""
    in_chunks = partial(FORMULATIONS[operator], chunk=chunk)
    for case in STRONG_ENDS[operator].values():
        check_long_row(SimpleNamespace(**{operator: in_chunks_of(case, operator, in_chunks)}), case)


def in_chunks_of(case, operator, in_chunks):
    """The operator on whole or packed rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FORMULATIONS, operator, in_chunks)
        return formulation_of(case)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("operator", STRONG_ENDS)
def test_a_state_rounded_between_pieces_is_noticed(operator, dtype):
    """It takes in nothing, or too much."""

    def rounded(x, *tensors, initial_state, **given):
        return getattr(reference, operator)(
            x, *tensors, initial_state=coarse(initial_state, x.dtype), **given
        )

    with pytest.raises(AssertionError):
        check_small_writes_across_pieces(
            rounded, dtype, **({"gate": 0.5} if operator.startswith("bi") else {})
        )
