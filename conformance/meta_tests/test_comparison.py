"""The one comparison of all tests: what it lets pass, and what it does not."""

from __future__ import annotations

import pytest
import torch

from ..harness.compare import FLOORS, carrying, check_errors

FLOOR = FLOORS[torch.bfloat16]


def test_where_one_element_is_the_whole_size_it_may_be_rounded_as_often_as_any_other():
    """Met in a right backend: two gradients in bfloat16, added in bfloat16, end one step of it away."""
    truth = torch.zeros(60, dtype=torch.float64)
    truth[7] = -32.741
    got = truth.bfloat16()
    got[7] = -33.0
    check_errors("grad x", got, truth, "case", floor=FLOOR, reference=truth.bfloat16())
    got[7] = -33.75
    with pytest.raises(AssertionError, match="RMS error"):
        check_errors("grad x", got, truth, "case", floor=FLOOR, reference=truth.bfloat16())


def test_a_small_error_everywhere_is_seen():
    truth = torch.randn(2000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check_errors("y", truth * (1 + FLOOR), truth, "case", floor=FLOOR)
    with pytest.raises(AssertionError, match="RMS error"):
        check_errors("y", truth * (1 + 1.3 * FLOOR), truth, "case", floor=FLOOR)


def test_one_wrong_element_is_seen():
    truth = torch.randn(200_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = truth.clone()
    got[5] += 5 * FLOOR * truth.abs().max()
    with pytest.raises(AssertionError, match=r"maximum error .* worst at \(5,\)"):
        check_errors("y", got, truth, "case", floor=FLOOR)


def test_elements_that_carry_the_mean_are_counted():
    assert carrying(torch.ones(4, 5)) == pytest.approx(20)
    assert carrying(torch.tensor([0.0, 3.0, 0.0])) == pytest.approx(1)
    assert carrying(torch.zeros(6)) == 6
