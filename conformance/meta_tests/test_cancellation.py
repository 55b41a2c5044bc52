"""The size of the terms of a sum, which bounds errors in half precision, is what it says."""

from __future__ import annotations

from functools import partial

import torch

from linmu import reference
from linmu.reference import flex_ma

from ..harness.backends import Backend
from ..harness.cancellation import sizes_of_sums
from ..harness.compare import evaluate, quarters
from ..harness.layouts import Layout, Pad, Text, Vision
from ..harness.module_cases import ModuleCase
from ..harness.operator_cases import BidirectionalCase
from ..harness.operator_checks import check_matches_the_reference
from ..properties.test_flex_ma import test_steps_may_have_any_size as steps_of_any_size
from .bugs_at_edges import calling


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


def one_difference(*tensors, gate, segment=None, **given):
    """`bidirectional_scan` as y_r + gate (y_f - y_r): right, and its gate's gradient is rounded in another
    place than the reference's."""
    y_f, y_r = (
        reference.bidirectional_scan(*tensors, gate=torch.full_like(gate, share), segment=segment, **given)
        for share in (1.0, 0.0)
    )
    if segment is None:
        return y_f
    mixed = y_r[0] + gate[..., None] * (y_f[0] - y_r[0])
    return torch.where((segment >= 0)[..., None, None], mixed, y_f[0]), y_f[1]


def test_a_gate_is_measured_by_the_scans_that_it_is_between():
    """Steps that forget all before them leave little of their difference but the rounding of both."""
    layout = Layout(((Vision(0, (1, 2, 3)), Text(1)), (Vision(0, (1, 1, 2)), Pad(5))))
    sizes = {"heads": 4, "groups": 2, "state": 3, "head_dim": 5, "initial_state": True, "skip": False}
    case = BidirectionalCase(layout=layout, dtype="float64", seed=0, decay=-20.0, **sizes)
    given = case.inputs()
    large = case.changed(x=1e4 * given["x"], dt=1 + given["dt"])
    check_matches_the_reference(Backend("one", reference, bidirectional_scan=one_difference), large)


def test_the_parameters_of_a_gate_are_measured_by_the_scans_that_it_is_between():
    """The same, of what the gate is projected from."""
    layout = Layout(((Vision(0, (1, 1, 1)), Pad(5)), (Vision(0, (1, 2, 3)),)))
    options = {"heads": 2, "groups": 1, "head_dim": 2, "head_norm": False, "window_thw": (1, 2, 2)}
    config = reference.LinMUConfig(width=6, qkv_bias=False, text_window=0, **options)
    honest = calling((flex_ma, "bidirectional_scan", one_difference))(reference.FlexMA)
    backend = Backend("one", reference, FlexMA=honest)
    for seed in range(3):
        steps_of_any_size.check(backend, ModuleCase(layout, config, 0, "float64", seed))
