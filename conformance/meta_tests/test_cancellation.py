"""The size of the terms of a sum, which bounds errors in half precision, is what it says."""

from __future__ import annotations

from functools import partial

import torch

from ..harness.cancellation import sizes_of_sums
from ..harness.compare import evaluate, quarters


def test_sizes_are_those_of_the_terms_and_not_of_their_sum():
    """The gradient of a weight on tokens is a sum of token times cotangent; here one that cancels."""
    x = torch.randn(4, 250, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    asked = quarters(x, 0)
    x[:, 125:] = -(x[:, :125] * asked[:, :125]) / asked[:, 125:]
    weight = torch.ones(3, dtype=torch.float64)
    run = partial(evaluate, lambda x, weight: x * weight, {"x": x, "weight": weight}, True)
    assert run()["grad weight"].abs().max() < 1e-9
    sizes = sizes_of_sums(lambda draw: run(draw=draw))
    assert set(sizes) == {"grad weight"}  # that of x has tokens of its own
    terms = (x * asked).square().sum((0, 1)).sqrt()
    assert ((sizes["grad weight"] / (2 * terms) - 1).abs() < 0.7).all()
