"""What the torch engine's scan promises beyond the reference's precision: steps of any size side by side.

A step so large that nothing outlives it multiplies whatever its gradient holds, so what does not span such a
step must not only be small: it must not be in the sum at all.
"""

from __future__ import annotations

import pytest
import torch

from linmu import optimized, reference

from ...harness.compare import assert_matches, evaluate, in_float64
from ...harness.operator_cases import Numbers


@pytest.fixture(autouse=True)
def torch_engine():
    optimized.set_engine("torch")
    yield
    optimized.set_engine(None)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("vision", [True, False])
def test_gradients_hold_beside_steps_that_forget_everything(seed, vision):
    dtype = torch.float32
    batch, length, heads, groups, state, head_dim = 2, 200, 4, 2, 16, 8
    numbers = Numbers(seed)
    large = numbers.some(batch, length, heads, share=0.1)
    segment = torch.full((batch, length), -1)
    segment[:, 20:90], segment[:, 95:170] = 0, 1
    inputs = {
        "x": numbers.normal(batch, length, groups, head_dim, dtype=dtype),
        "dt": torch.where(large, 1e5, 1.0).to(dtype)
        * numbers.uniform(batch, length, heads, low=0.1, high=1, dtype=dtype),
        "A": -torch.linspace(0.01, 1, heads, dtype=dtype),
        "B": numbers.normal(batch, length, groups, state, dtype=dtype),
        "C": numbers.normal(batch, length, heads, state, dtype=dtype),
        "gate": numbers.uniform(batch, length, heads, low=0, high=1, dtype=dtype),
        "segment": segment if vision else None,
    }
    case = {"seed": seed, "vision": vision}
    got, own = (evaluate(scan.bidirectional_scan, inputs, gradients=True) for scan in (optimized, reference))
    truth = evaluate(reference.bidirectional_scan, in_float64(inputs), gradients=True)
    assert_matches(got, truth, own, case)
