"""The one comparison of all tests: what it lets pass, and what it does not."""

from __future__ import annotations

import pytest
import torch

from ..harness.compare import FLOORS, check_errors

FLOOR = FLOORS[torch.bfloat16]


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


def test_gradients_added_in_bfloat16_are_not_sums_in_float32():
    """-32.741 and -33.0 are one step of bfloat16 apart: one rounding ends half a step away at most."""
    truth = torch.zeros(60, dtype=torch.float64)
    truth[7] = -32.741
    got = truth.bfloat16()
    check_errors("grad x", got, truth, "case", floor=FLOOR, reference=truth.bfloat16())
    got[7] = -33.0
    with pytest.raises(AssertionError, match="RMS error"):
        check_errors("grad x", got, truth, "case", floor=FLOOR, reference=truth.bfloat16())
