"""`causal_conv`: a depthwise convolution over the valid tokens, as if the others were not there."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ..harness import long_rows, operator_checks, packed_rows, rounding
from ..harness.compare import assert_exact, assert_same, assert_zero
from ..harness.operator_cases import (
    DTYPES,
    ConvCase,
    conv_cases,
    fed,
    gradients_of,
    property_of,
    run,
)

conv = partial(property_of, "causal_conv")

globals().update(operator_checks.call_properties("causal_conv", conv_cases))
globals().update(packed_rows.packed_properties("causal_conv", conv_cases))
globals().update(long_rows.gap_properties("causal_conv"))


@conv(cases=conv_cases())
def test_convolution_never_sees_the_future(backend, case: ConvCase):
    """Values and gradients."""
    before = run(backend, case)["out"]
    for cut in range(1, case.length, 4):
        after = run(backend, case.with_other_tokens_from(cut))["out"]
        assert_same({"past": after[:, :cut]}, {"past": before[:, :cut]}, case)
        found = gradients_of(backend, case, lambda out, cut=cut: out[:, :cut])
        assert_zero(found["grad u"][:, cut:], case, "grad u of later tokens")


@conv(cases=conv_cases(mask="some"))
def test_masked_tokens_are_as_if_absent(backend, case: ConvCase):
    """Skipped, not treated as zeros: the valid tokens alone give the same outputs and the same state."""
    together = run(backend, case)
    for row in range(case.batch):
        alone = case.row(row)
        kept = alone.inputs()["mask"][0]
        if kept.any():
            found = {"out": together["out"][row : row + 1, kept]}
            found["final_state"] = together["final_state"][row : row + 1]
            short = alone.changed(u=alone.inputs()["u"][:, kept], mask=None)
            assert_same(found, run(backend, short), case)


@conv(cases=conv_cases(mask="some"))
def test_masked_tokens_give_zero_get_no_gradient_and_may_hold_anything(backend, case: ConvCase):
    """Zero without the bias, and not even NaN comes out of them."""
    clean, hidden = run(backend, case, gradients=True), ~case.inputs()["mask"]
    for name in ("out", "grad u"):
        assert_zero(clean[name][hidden], case, f"{name} on masked tokens")
    assert_same(run(backend, case.with_nan_at(hidden), gradients=True), clean, case)


@conv(cases=conv_cases(DTYPES))
def test_the_state_is_the_last_valid_inputs(backend, case: ConvCase):
    """Bit by bit, oldest first, before the start zeros or the initial state; float32 or better."""
    wide = torch.float64 if case.dtype == "float64" else torch.float32
    for some in (case, case.part(slice(0, 1))):  # after one token most of the initial state is still there
        state = run(backend, some)["final_state"]
        for row in range(case.batch):
            given = some.row(row).inputs()
            kept = slice(None) if given["mask"] is None else given["mask"][0]
            start = torch.zeros(case.taps - 1, case.channels, dtype=wide)
            start = start if given["initial_state"] is None else given["initial_state"][0]
            seen = torch.cat([start, given["u"][0, kept].to(wide)])
            assert_exact(state[row], seen[len(seen) - (case.taps - 1) :], case, f"final_state of row {row}")


@conv(cases=conv_cases(DTYPES, bias=False))
def test_a_last_tap_of_one_is_the_identity(backend, case: ConvCase):
    """The last tap meets the current token: with it alone, what goes in comes out, bit by bit."""
    given = case.inputs()
    weight = torch.zeros_like(given["weight"])
    weight[:, -1] = 1
    kept = torch.ones(case.shape, dtype=torch.bool) if given["mask"] is None else given["mask"]
    out = run(backend, case.changed(weight=weight))["out"]
    assert_exact(out, given["u"] * kept[..., None], case, "out")


@conv(cases=conv_cases())
def test_splitting_anywhere_changes_nothing(backend, case: ConvCase):
    """Also where a part is shorter than the taps; gradients through the state included."""

    def in_two(cut: int, **given):
        whole = case.changed(**given)
        first, state = backend.causal_conv(**whole.part(slice(0, cut)).inputs())
        rest = whole.part(slice(cut, None)).changed(initial_state=state)
        second, state = backend.causal_conv(**rest.inputs())
        return torch.cat([first, second], dim=1), state

    whole = run(backend, case, gradients=True)
    for cut in case.cuts():
        assert_same(fed(partial(in_two, cut), case, gradients=True), whole, case)


@conv(cases=conv_cases(("float16",), taps=3, bias=False))
def test_numbers_at_the_edge_of_half_precision_match_the_reference(backend, case: ConvCase):
    """40,000 + 40,000 - 40,000: a partial sum overflows float16, the result does not."""
    u = torch.full_like(case.inputs()["u"], 40_000)
    weight = torch.tensor([1.0, -1.0, 1.0]).to(u).expand(case.channels, 3)
    operator_checks.check_matches_the_reference(backend, case.changed(u=u, weight=weight), gradients=False)


@conv(cases=conv_cases(channels=5))
def test_channels_do_not_mix(backend, case: ConvCase):
    """Depthwise: permuting the channels permutes the result."""
    given, order = case.inputs(), torch.tensor([3, 0, 4, 1, 2])
    names = [name for name in ("u", "bias", "initial_state") if given[name] is not None]
    permuted = {name: given[name][..., order] for name in names} | {"weight": given["weight"][order]}
    wanted = {name: result[..., order] for name, result in run(backend, case).items()}
    assert_same(run(backend, case.changed(**permuted)), wanted, case)


@conv(cases=conv_cases(batch=3))
def test_the_result_does_not_depend_on_the_batch(backend, case: ConvCase):
    """Every row alone gives what it gives among others."""
    together = run(backend, case)
    for row in range(case.batch):
        wanted = {name: result[row : row + 1] for name, result in together.items()}
        assert_same(run(backend, case.row(row)), wanted, case)


@conv(cases=conv_cases(mask="none", initial_state=False, bias=False))
def test_absent_arguments_mean_their_neutral_values(backend, case: ConvCase):
    """No mask is all valid, no state is zeros, no bias is a bias of zeros."""
    wanted = run(backend, case)
    neutral = case.changed(
        mask=torch.ones(case.shape, dtype=torch.bool),
        initial_state=torch.zeros_like(wanted["final_state"]),
        bias=torch.zeros_like(case.inputs()["weight"][:, 0]),
    )
    assert_same(run(backend, neutral), wanted, case)
    operator_checks.check_matches_the_reference(backend, neutral)  # zeros have gradients


@conv(cases=conv_cases(length=3, taps=5, initial_state=True), share=0.5)
def test_the_state_before_is_the_first_samples_in_a_row_shorter_than_the_taps(backend, case: ConvCase):
    """The last sample never meets it: neither its outputs nor the state after, of fewer than K-1 inputs."""
    packed_rows.check_equals_samples_alone(backend, case)


@conv(cases=conv_cases(rounding.HALVES[1:], taps=4, bias=False, initial_state=True), share=0.5)
def test_taps_that_cancel_are_summed_in_float32(backend, case: ConvCase):
    """No product of a tap, and no sum of some, is rounded to the dtype of u."""
    rounding.check_taps(backend, case)


@conv(cases=conv_cases(("mixed",), bias=True, mask="none"), share=0.2)
def test_taps_are_not_rounded_to_the_dtype_of_u(backend, case: ConvCase):
    """Nor is the bias: both are float32 beside half-precision tokens."""
    rounding.check_taps_are_kept(backend, case)


@conv(cases=conv_cases(rounding.HALVES, length=2, taps=5, initial_state=True), share=0.3)
def test_a_state_is_handed_on_in_float32(backend, case: ConvCase):
    """Neither it nor its gradient is rounded to the dtype of u."""
    rounding.check_state_is_kept(backend, case)


@conv(cases=conv_cases(rounding.HALVES, taps=4, mask="none", bias=False, initial_state=True), share=0.3)
def test_a_state_is_read_in_float32(backend, case: ConvCase):
    """Numbers that half precision cannot hold reach the outputs."""
    rounding.check_state_is_read_in_float32(backend, case)


@pytest.mark.needs("causal_conv")
def test_samples_may_begin_where_blocks_do(backend):
    """And be longer than these, with padding between: no input is carried over their first token."""
    case = ConvCase(4, 1100, 2, 4, True, "none", True, "float32", 3)
    packed_rows.check_samples_at_borders(backend, case)
