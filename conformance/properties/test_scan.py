"""`selective_scan` and `scan_step`: what one direction of the scan must do, whoever computes it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import strategies as st

from linmu import reference

from ..harness import operator_checks
from ..harness.compare import (
    assert_exact,
    assert_matches,
    assert_same,
    assert_zero,
    edited,
    evaluate,
    in_float64,
    quarters,
)
from ..harness.operator_cases import DTYPES, EXACT, ScanCase, holds, scan_cases

LONG = (63, 64, 65, 97, 131)  # around and beyond the chunks that fast implementations work in
PER_TOKEN = ("x", "dt", "B", "C")
FORWARD = partial(scan_cases, reverse=False)
scan = partial(holds, "selective_scan")


def cut_points(length: int) -> list[int]:
    """A few places to split a sequence: near both ends and in the middle."""
    return sorted({1, length // 2, length - 1} & set(range(1, length)))


def tokens(inputs: dict, span: slice) -> dict:
    """The arguments of a part of the sequence."""
    per_token = {name: inputs[name][:, span] for name in PER_TOKEN}
    mask = inputs["mask"] if inputs["mask"] is None else inputs["mask"][:, span]
    return {**inputs, **per_token, "mask": mask}


@scan(case=scan_cases(DTYPES))
def test_scan_matches_the_reference_in_every_dtype(backend, case: ScanCase):
    """P17: values, states and their dtypes, float32 step sizes with bfloat16 inputs included."""
    operator_checks.check_matches_the_reference(backend, case, gradients=False)


@scan(case=scan_cases(DTYPES))
def test_scan_gradients_match_the_reference(backend, case: ScanCase):
    """P9: the gradient of every input, the initial state's and through the final state included."""
    operator_checks.check_matches_the_reference(backend, case)


@scan(case=st.sampled_from(LONG).flatmap(lambda length: scan_cases(length=length)), share=0.4)
def test_long_scans_match_the_reference(backend, case: ScanCase):
    """P2, P6: more tokens than a chunk, the last one ragged; values, state and gradients."""
    operator_checks.check_matches_the_reference(backend, case)


@scan(case=FORWARD())
def test_forward_scan_never_sees_the_future(backend, case: ScanCase):
    """P22: an edit of later tokens leaves every earlier output as it was."""
    inputs, others = case.inputs(), case.inputs(draw=1)
    before = evaluate(backend.selective_scan, inputs)["output 0"]
    for cut in cut_points(case.length):
        later = (torch.arange(case.length) >= cut).expand(case.batch, -1)
        after = evaluate(backend.selective_scan, edited(inputs, others, later))["output 0"]
        assert_same({"past": after[:, :cut]}, {"past": before[:, :cut]}, case)


@scan(case=scan_cases(reverse=True))
def test_reverse_scan_never_sees_the_past(backend, case: ScanCase):
    """P22: an edit of earlier tokens leaves every later output as it was."""
    inputs, others = case.inputs(), case.inputs(draw=1)
    before = evaluate(backend.selective_scan, inputs)["output 0"]
    for cut in cut_points(case.length):
        earlier = (torch.arange(case.length) < cut).expand(case.batch, -1)
        after = evaluate(backend.selective_scan, edited(inputs, others, earlier))["output 0"]
        assert_same({"rest": after[:, cut:]}, {"rest": before[:, cut:]}, case)


@scan(case=FORWARD())
def test_no_gradient_of_an_output_reaches_a_later_token(backend, case: ScanCase):
    """P22: causality of the backward pass, which is a scan of its own."""
    for cut in cut_points(case.length):
        found = evaluate(
            lambda cut=cut, **given: backend.selective_scan(**given)[0][:, :cut], case.inputs(), True
        )
        for name in PER_TOKEN:
            assert_zero(found[f"gradient of {name}"][:, cut:], case, f"gradient of later {name}")


@scan(case=scan_cases(mask="some"))
def test_masked_tokens_are_as_if_absent(backend, case: ScanCase):
    """P7: no decay, no write, no read: the valid tokens alone give the same outputs and the same state."""
    inputs = case.inputs()
    y, state = backend.selective_scan(**inputs)
    for row in range(case.batch):
        kept = inputs["mask"][row]
        if not kept.any():
            start = inputs["initial_state"]
            assert_exact(
                state[row], torch.zeros_like(state[row]) if start is None else start[row], case, "state"
            )
            continue
        alone = {name: inputs[name][row : row + 1, kept] for name in PER_TOKEN}
        start = None if inputs["initial_state"] is None else inputs["initial_state"][row : row + 1]
        short = {**inputs, **alone, "mask": None, "initial_state": start}
        wanted = evaluate(backend.selective_scan, short)
        assert_same({"output 0": y[row : row + 1, kept], "output 1": state[row : row + 1]}, wanted, case)


@scan(case=scan_cases(mask="some"))
def test_masked_tokens_give_zero_and_get_no_gradient(backend, case: ScanCase):
    """P7: exactly zero, both ways."""
    inputs = case.inputs()
    found = evaluate(backend.selective_scan, inputs, gradients=True)
    hidden = ~inputs["mask"]
    for name in ("output 0", *(f"gradient of {name}" for name in PER_TOKEN)):
        assert_zero(found[name][hidden], case, f"{name} on masked tokens")


@scan(case=scan_cases(mask="some"))
def test_masked_tokens_may_hold_anything(backend, case: ScanCase):
    """P7: not even NaN gets from a masked token into values, states or gradients."""
    inputs = case.inputs()
    clean = evaluate(backend.selective_scan, inputs, gradients=True)
    spoilt = {name: torch.full_like(inputs[name], float("nan")) for name in PER_TOKEN}
    found = evaluate(backend.selective_scan, edited(inputs, spoilt, ~inputs["mask"]), gradients=True)
    assert_same(found, clean, case)


@scan(case=FORWARD(), share=0.5)
def test_splitting_anywhere_changes_nothing(backend, case: ScanCase):
    """P9: outputs, state and gradients of two parts, the state handed over, are those of the whole."""
    inputs = case.inputs()
    whole = evaluate(backend.selective_scan, inputs, gradients=True)

    def in_two(cut: int, **given):
        first, state = backend.selective_scan(**tokens(given, slice(0, cut)))
        rest = tokens(given, slice(cut, None)) | {"initial_state": state}
        second, state = backend.selective_scan(**rest)
        return torch.cat([first, second], dim=1), state

    for cut in cut_points(case.length):
        assert_same(evaluate(partial(in_two, cut), inputs, gradients=True), whole, case)


@scan(case=scan_cases(groups=2, heads=4))
def test_groups_equal_repeated_heads(backend, case: ScanCase):
    """P11: values, and gradients summed over the heads of a group."""
    inputs = case.inputs()

    def repeated(x, B, **rest):
        return backend.selective_scan(
            x=x.repeat_interleave(2, dim=2), B=B.repeat_interleave(2, dim=2), **rest
        )

    grouped = evaluate(backend.selective_scan, inputs, gradients=True)
    assert_same(grouped, evaluate(repeated, inputs, gradients=True), case)


@scan(case=scan_cases())
def test_reversal_equals_flipping_the_sequence(backend, case: ScanCase):
    """P15, P22: right to left over a sequence is left to right over its mirror image, gradients too."""
    inputs = case.inputs()

    def mirrored(x, dt, B, C, mask, reverse, **rest):
        flipped = {"x": x.flip(1), "dt": dt.flip(1), "B": B.flip(1), "C": C.flip(1)}
        mask = None if mask is None else mask.flip(1)
        y, state = backend.selective_scan(**flipped, mask=mask, reverse=not reverse, **rest)
        return y.flip(1), state

    straight = evaluate(backend.selective_scan, inputs, gradients=True)
    assert_same(evaluate(mirrored, inputs, gradients=True), straight, case)


@scan(case=scan_cases(initial_state=False))
def test_scan_is_linear_in_its_input(backend, case: ScanCase):
    """P22: the scan of 2 x₁ - 3 x₂ is twice the one less three times the other."""
    inputs, others = case.inputs(), case.inputs(draw=1)
    pieces = [backend.selective_scan(**{**inputs, "x": x}) for x in (inputs["x"], others["x"])]
    combined = backend.selective_scan(**{**inputs, "x": 2 * inputs["x"] - 3 * others["x"]})
    for name, whole, one, other in zip(("y", "state"), combined, *pieces, strict=True):
        assert_same({name: whole}, {name: 2 * one - 3 * other}, case, factor=10)


@scan(case=scan_cases(mask="none"))
def test_a_scan_without_decay_is_a_running_sum(backend, case: ScanCase):
    """With A at almost 0 the state adds up everything that was written."""
    inputs = case.inputs() | {"initial_state": None, "reverse": False}
    inputs["A"] = torch.full_like(inputs["A"], -1e-30)
    ratio = case.heads // case.groups
    x, B = (inputs[name].repeat_interleave(ratio, dim=2) for name in ("x", "B"))
    writes = torch.einsum("blh,blhn,blhp->blhnp", inputs["dt"], B, x).cumsum(1)
    wanted = {"y": torch.einsum("blhn,blhnp->blhp", inputs["C"], writes), "state": writes[:, -1]}
    y, state = backend.selective_scan(**inputs)
    assert_same({"y": y, "state": state}, wanted, case)


@scan(case=scan_cases(DTYPES))
def test_strong_decay_is_finite_and_forgets_everything(backend, case: ScanCase):
    """P3, P4, P5: decay far below the smallest number leaves the token's own write, and finite gradients."""
    inputs = case.inputs() | {"initial_state": None}
    inputs["A"] = torch.full_like(inputs["A"], -30000.0)
    ratio = case.heads // case.groups
    found = evaluate(backend.selective_scan, inputs, gradients=True)
    wide = in_float64(inputs)
    x, B = (wide[name].repeat_interleave(ratio, dim=2) for name in ("x", "B"))
    alone = (wide["dt"] * (wide["C"] * B).sum(-1))[..., None] * x
    if inputs["mask"] is not None:
        alone = alone * inputs["mask"][..., None, None]
    for name, tensor in found.items():
        assert torch.isfinite(tensor).all(), f"{name} must be finite under strong decay: {case!r}"
    wanted = {"y": alone.to(inputs["x"].dtype)}
    assert_same({"y": found["output 0"]}, wanted, case)


@scan(case=scan_cases(EXACT, mask="none"))
def test_large_and_tiny_steps_are_finite(backend, case: ScanCase):
    """P4, P5: steps of 1e-6 and 1e4 side by side overflow nothing, forward or backward."""
    inputs = case.inputs()
    large = quarters(inputs["dt"], case.seed) > 0
    inputs["dt"] = torch.where(large, 1e4, 1e-6).to(inputs["dt"].dtype)
    truth = evaluate(reference.selective_scan, in_float64(inputs), gradients=True)
    own = evaluate(reference.selective_scan, inputs, gradients=True)
    assert_matches(evaluate(backend.selective_scan, inputs, gradients=True), truth, own, case)


@scan(case=scan_cases(batch=3))
def test_the_result_does_not_depend_on_the_batch(backend, case: ScanCase):
    """P16: every row alone gives what it gives among others."""
    inputs = case.inputs()
    together = evaluate(backend.selective_scan, inputs)
    for row in range(case.batch):
        one = {
            name: value if value is None or name in ("A", "reverse") else value[row : row + 1]
            for name, value in inputs.items()
        }
        alone = {name: result[row : row + 1] for name, result in together.items()}
        assert_same(evaluate(backend.selective_scan, one), alone, case)


@scan(case=scan_cases(heads=3, groups=3))
def test_permuting_the_heads_permutes_the_result(backend, case: ScanCase):
    """P22: no head knows its number."""
    inputs, order = case.inputs(), torch.tensor([2, 0, 1])
    per_head = {name: inputs[name][:, :, order] for name in PER_TOKEN}
    start = inputs["initial_state"]
    start = start if start is None else start[:, order]
    permuted = {**inputs, **per_head, "A": inputs["A"][order], "initial_state": start}
    y, state = backend.selective_scan(**inputs)
    wanted = {"output 0": y[:, :, order], "output 1": state[:, order]}
    assert_same(evaluate(backend.selective_scan, permuted), wanted, case)


@scan(case=scan_cases(mask="none", initial_state=False))
def test_absent_arguments_mean_their_neutral_values(backend, case: ScanCase):
    """P18: no mask is a mask of True, no initial state is a state of zeros."""
    inputs = case.inputs()
    y, state = backend.selective_scan(**inputs)
    neutral = {
        **inputs,
        "mask": torch.ones(y.shape[:2], dtype=torch.bool),
        "initial_state": torch.zeros_like(state),
    }
    assert_same(evaluate(backend.selective_scan, neutral), {"output 0": y, "output 1": state}, case)


@pytest.mark.needs("selective_scan")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_hundreds_of_small_writes_all_count(backend, dtype):
    """P17: a state kept in half precision stops growing; every one of 600 writes of ½ must count."""
    length, one = 600, torch.ones(1, 600, 1, 1, dtype=dtype)
    step, decay = torch.full((1, length, 1), 0.5, dtype=dtype), torch.tensor([-1e-12], dtype=torch.float32)
    y, state = backend.selective_scan(one, step, decay, one, one)
    assert state.item() == pytest.approx(length / 2, abs=1e-3)
    assert y[0, -1].item() == pytest.approx(length / 2, rel=0.005)


test_strides_do_not_matter = scan(case=scan_cases(DTYPES))(operator_checks.check_strides_do_not_matter)
test_inputs_are_left_as_they_were = scan(case=scan_cases())(
    operator_checks.check_inputs_are_left_as_they_were
)
test_autocast_changes_nothing = scan(case=scan_cases(("bfloat16", "float32")))(
    operator_checks.check_autocast_changes_nothing
)
test_one_gradient_alone_equals_its_share_of_all = scan(case=scan_cases())(
    operator_checks.check_one_gradient_alone_equals_its_share_of_all
)
test_uninitialised_memory_is_never_read = scan(case=scan_cases(), share=0.5)(
    operator_checks.check_uninitialised_memory_is_never_read
)
