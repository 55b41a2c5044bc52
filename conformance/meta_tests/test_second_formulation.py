"""The reference on trial: each operator against a second formulation in float64, to 1e-10, and gradcheck.

The other files compare backends with the reference; this one shows that the reference may be compared with.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ..harness import second_formulation
from ..harness.compare import assert_close, evaluate, in_float64, is_float, report
from ..harness.layouts import Layout, Text, Vision
from ..harness.operator_cases import (
    BidirectionalCase,
    ConvCase,
    LossCase,
    ScanCase,
    WindowCase,
    bidirectional_cases,
    conv_cases,
    fed,
    logit_loss_cases,
    property_of,
    run,
    scan_cases,
    window_cases,
)
from ..harness.second_sliding_window import sliding_window_attention as by_mask
from ..harness.sliding_window_cases import SlidingWindowCase, sliding_window_cases

pytestmark = pytest.mark.trial_of_the_reference
HALF = ("bfloat16", "float16", "mixed")
SPACING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half a unit in the last place, relative


def check_second_formulation(operator, second, case) -> None:
    """Values, states and all gradients in float64."""
    inputs = case.inputs()
    wanted = evaluate(second, inputs, gradients=True)
    assert_close(evaluate(operator, inputs, gradients=True), wanted, case, 1e-10)


def check_one_rounding(operator, case, floor: float = 1e-5) -> None:
    """Half precision in, float32 inside: the float64 result rounded once, element by element."""
    inputs = case.inputs()
    got, truth = evaluate(operator, inputs), evaluate(operator, in_float64(inputs))
    for name, result in got.items():
        wanted = truth[name]
        if wanted.numel() == 0:
            continue
        allowed = SPACING.get(result.dtype, 0.0) * wanted.abs() + floor * wanted.abs().max() + 1e-7
        excess = ((result.double() - wanted).abs() - allowed).max().item()
        assert excess <= 0, report(f"{name}: more than one rounding away from float64, by {excess:.3e}", case)


def check_gradients_against_differences(operator, inputs) -> None:
    """torch.autograd.gradcheck over all float inputs and all outputs."""
    names = [name for name, value in inputs.items() if is_float(value)]

    def of_floats(*values):
        return operator(**{**inputs, **dict(zip(names, values, strict=True))})

    assert torch.autograd.gradcheck(
        of_floats, [inputs[name].requires_grad_() for name in names], fast_mode=True
    )


@property_of("selective_scan", cases=scan_cases(["float64"]))
def test_scan_equals_its_matrix(backend, case: ScanCase):
    """y = M x with the L × L matrix M of decays, reads and writes; final state and gradients too."""
    check_second_formulation(backend.selective_scan, second_formulation.selective_scan, case)


@property_of("bidirectional_scan", cases=bidirectional_cases(["float64"]))
def test_bidirectional_scan_equals_its_matrices(backend, case: BidirectionalCase):
    """A lower triangle over valid tokens, an upper one over pairs of one segment."""
    check_second_formulation(backend.bidirectional_scan, second_formulation.bidirectional_scan, case)


@property_of("window_attention", cases=window_cases(["float64"]))
def test_window_attention_equals_masked_attention(backend, case: WindowCase):
    """`scaled_dot_product_attention` over the whole row, under a mask of equal ids."""
    check_second_formulation(backend.window_attention, second_formulation.window_attention, case)


@property_of("sliding_window_attention", cases=sliding_window_cases(["float64"]))
def test_sliding_windows_equal_masked_attention(backend, case: SlidingWindowCase):
    """`scaled_dot_product_attention` over state and row, under a mask from lists of what a row has seen."""
    wanted = fed(case.flat(by_mask), case, gradients=True)
    assert_close(run(backend, case, gradients=True), wanted, case, 1e-10)


@property_of("causal_conv", cases=conv_cases(["float64"]))
def test_causal_conv_equals_conv1d_on_the_tokens_that_are_there(backend, case: ConvCase):
    """`F.conv1d` over each row's valid tokens, pushed together."""
    check_second_formulation(backend.causal_conv, second_formulation.causal_conv, case)


@property_of("hidden_loss", "logit_loss", cases=logit_loss_cases(["float64"]))
def test_losses_equal_their_definitions(backend, case: LossCase):
    """Token by token, the divergence by `torch.distributions`."""
    student = case.inputs()["student"]
    constant = {key: value for key, value in case.inputs().items() if key != "student"}
    logit = partial(second_formulation.logit_loss, temperature=case.temperature)
    pairs = (
        (partial(backend.logit_loss, temperature=case.temperature), logit),
        (backend.hidden_loss, second_formulation.hidden_loss),
    )
    for ours, definition in pairs:

        def call(loss, student):
            return loss(student, constant["teacher"], constant["mask"])

        wanted = evaluate(partial(call, definition), {"student": student}, gradients=True)
        assert_close(evaluate(partial(call, ours), {"student": student}, gradients=True), wanted, case, 1e-9)


@property_of("selective_scan", cases=scan_cases(["float64"], length=5), share=0.3)
def test_gradients_of_the_scan_are_slopes(backend, case: ScanCase):
    """gradcheck: x, dt, A, B, C and the initial state, through outputs and final state."""
    check_gradients_against_differences(backend.selective_scan, case.inputs())


SMALL = Layout(((Text(1), Vision(1, (2, 1, 2), "frame"), Text(1), Vision(0, (1, 1, 2))),))


@property_of("bidirectional_scan", cases=bidirectional_cases(["float64"], layout=SMALL), share=0.3)
def test_gradients_of_both_directions_are_slopes(backend, case: BidirectionalCase):
    """gradcheck: the gate and the skip too."""
    check_gradients_against_differences(backend.bidirectional_scan, case.inputs())


@property_of("window_attention", cases=window_cases(["float64"], length=7), share=0.3)
def test_gradients_of_window_attention_are_slopes(backend, case: WindowCase):
    """gradcheck: q, k and v."""
    check_gradients_against_differences(backend.window_attention, case.inputs())


@property_of("sliding_window_attention", cases=sliding_window_cases(["float64"], length=7), share=0.3)
def test_gradients_of_sliding_windows_are_slopes(backend, case: SlidingWindowCase):
    """gradcheck: q, k, v and the initial state, through outputs and final state."""
    operator = case.flat(backend.sliding_window_attention)

    def floats(**given):
        return operator(**given)[:3]

    check_gradients_against_differences(floats, case.inputs())


@property_of("causal_conv", cases=conv_cases(["float64"], length=7), share=0.3)
def test_gradients_of_causal_conv_are_slopes(backend, case: ConvCase):
    """gradcheck: input, weight, bias and initial state."""
    check_gradients_against_differences(backend.causal_conv, case.inputs())


@property_of("selective_scan", cases=scan_cases(HALF))
def test_scan_in_half_precision_rounds_once(backend, case: ScanCase):
    """Sums and states are float32 inside; only the output is rounded."""
    check_one_rounding(backend.selective_scan, case)


@property_of("bidirectional_scan", cases=bidirectional_cases(HALF))
def test_bidirectional_scan_in_half_precision_rounds_once(backend, case: BidirectionalCase):
    """The directions are mixed before rounding, not after."""
    check_one_rounding(backend.bidirectional_scan, case)


@property_of("window_attention", cases=window_cases(HALF[:2]))
def test_window_attention_in_half_precision_rounds_once(backend, case: WindowCase):
    """Softmax in float32."""
    check_one_rounding(backend.window_attention, case)


@property_of("sliding_window_attention", cases=sliding_window_cases(HALF[:2]))
def test_sliding_windows_in_half_precision_round_once(backend, case: SlidingWindowCase):
    """Softmax in float32."""

    def o(**given):
        return case.flat(backend.sliding_window_attention)(**given)[0]

    check_one_rounding(o, case)


@property_of("causal_conv", cases=conv_cases(HALF[:2]))
def test_causal_conv_in_half_precision_rounds_once(backend, case: ConvCase):
    """Taps are summed in float32."""
    check_one_rounding(backend.causal_conv, case)
