"""`causal_conv`: a depthwise convolution over the valid tokens, as if the others were not there."""

from __future__ import annotations

from functools import partial

import torch

from ..harness import operator_checks
from ..harness.compare import assert_exact, assert_same, assert_zero, edited, evaluate
from ..harness.operator_cases import DTYPES, ConvCase, conv_cases, holds

conv = partial(holds, "causal_conv")


@conv(case=conv_cases(DTYPES))
def test_convolution_and_gradients_match_the_reference(backend, case: ConvCase):
    """P9, P17: values, state and every gradient, in every dtype."""
    operator_checks.check_matches_the_reference(backend, case)


@conv(case=conv_cases())
def test_convolution_never_sees_the_future(backend, case: ConvCase):
    """Values and gradients."""
    inputs, others = case.inputs(), case.inputs(draw=1)
    before, _ = backend.causal_conv(**inputs)
    for cut in range(1, case.length, 4):
        later = (torch.arange(case.length) >= cut).expand(case.batch, -1)
        after, _ = backend.causal_conv(**edited(inputs, others, later))
        assert_same({"past": after[:, :cut]}, {"past": before[:, :cut]}, case)
        found = evaluate(lambda cut=cut, **given: backend.causal_conv(**given)[0][:, :cut], inputs, True)
        assert_zero(found["gradient of u"][:, cut:], case, "gradient of later inputs")


@conv(case=conv_cases(mask="some"))
def test_masked_tokens_are_as_if_absent(backend, case: ConvCase):
    """P7: skipped, not taken for zeros: the valid tokens alone give the same outputs and the same state."""
    inputs = case.inputs()
    out, state = backend.causal_conv(**inputs)
    for row in range(case.batch):
        kept, one = inputs["mask"][row], slice(row, row + 1)
        if kept.any():
            start = (
                inputs["initial_state"] if inputs["initial_state"] is None else inputs["initial_state"][one]
            )
            alone = {**inputs, "u": inputs["u"][one, kept], "mask": None, "initial_state": start}
            wanted = evaluate(backend.causal_conv, alone)
            assert_same({"output 0": out[one, kept], "output 1": state[one]}, wanted, case)


@conv(case=conv_cases(mask="some"))
def test_masked_tokens_give_zero_get_no_gradient_and_may_hold_anything(backend, case: ConvCase):
    """P7: zero without the bias, and not even NaN comes out of them."""
    inputs = case.inputs()
    clean = evaluate(backend.causal_conv, inputs, gradients=True)
    hidden = ~inputs["mask"]
    for name in ("output 0", "gradient of u"):
        assert_zero(clean[name][hidden], case, f"{name} on masked tokens")
    spoilt = edited(inputs, {"u": torch.full_like(inputs["u"], float("nan"))}, hidden)
    assert_same(evaluate(backend.causal_conv, spoilt, gradients=True), clean, case)


@conv(case=conv_cases(DTYPES))
def test_the_state_is_the_last_valid_inputs(backend, case: ConvCase):
    """P10: bit by bit, oldest first, before the start zeros or the initial state; float32 or better."""
    inputs = case.inputs()
    _, state = backend.causal_conv(**inputs)
    wide = torch.float64 if case.dtype == "float64" else torch.float32
    for row in range(case.batch):
        kept = slice(None) if inputs["mask"] is None else inputs["mask"][row]
        seen = inputs["u"][row, kept].to(wide)
        start = torch.zeros(case.taps - 1, case.channels, dtype=wide)
        start = start if inputs["initial_state"] is None else inputs["initial_state"][row]
        assert_exact(state[row], torch.cat([start, seen])[len(seen) :], case, f"state of row {row}")


@conv(case=conv_cases(DTYPES, bias=False))
def test_a_last_tap_of_one_is_the_identity(backend, case: ConvCase):
    """The last tap meets the current token: with it alone, what goes in comes out, bit by bit."""
    inputs = case.inputs()
    inputs["weight"] = torch.zeros_like(inputs["weight"])
    inputs["weight"][:, -1] = 1
    out, _ = backend.causal_conv(**inputs)
    kept = torch.ones(out.shape[:2], dtype=torch.bool) if inputs["mask"] is None else inputs["mask"]
    assert_exact(out, inputs["u"] * kept[..., None], case, "output")


@conv(case=conv_cases())
def test_splitting_anywhere_changes_nothing(backend, case: ConvCase):
    """P9, P10: also where a part is shorter than the taps; gradients through the state included."""
    inputs = case.inputs()
    whole = evaluate(backend.causal_conv, inputs, gradients=True)

    def in_two(cut: int, u, mask, initial_state, **rest):
        masks = (None, None) if mask is None else (mask[:, :cut], mask[:, cut:])
        first, state = backend.causal_conv(u=u[:, :cut], mask=masks[0], initial_state=initial_state, **rest)
        second, state = backend.causal_conv(u=u[:, cut:], mask=masks[1], initial_state=state, **rest)
        return torch.cat([first, second], dim=1), state

    for cut in sorted({1, case.length // 2, case.length - 1} & set(range(1, case.length))):
        assert_same(evaluate(partial(in_two, cut), inputs, gradients=True), whole, case)


@conv(case=conv_cases(channels=5))
def test_channels_do_not_mix(backend, case: ConvCase):
    """Depthwise: permuting the channels permutes the result."""
    inputs, order = case.inputs(), torch.tensor([3, 0, 4, 1, 2])
    per_channel = ("u", "initial_state")
    permuted = {k: v[..., order] if k in per_channel and v is not None else v for k, v in inputs.items()}
    permuted["weight"] = inputs["weight"][order]
    permuted["bias"] = inputs["bias"] if inputs["bias"] is None else inputs["bias"][order]
    wanted = {name: result[..., order] for name, result in evaluate(backend.causal_conv, inputs).items()}
    assert_same(evaluate(backend.causal_conv, permuted), wanted, case)


@conv(case=conv_cases(batch=3))
def test_the_result_does_not_depend_on_the_batch(backend, case: ConvCase):
    """P16: every row alone gives what it gives among others."""
    inputs = case.inputs()
    together = evaluate(backend.causal_conv, inputs)
    for row in range(case.batch):
        one = {k: v if v is None or k in ("weight", "bias") else v[row : row + 1] for k, v in inputs.items()}
        wanted = {name: result[row : row + 1] for name, result in together.items()}
        assert_same(evaluate(backend.causal_conv, one), wanted, case)


@conv(case=conv_cases(mask="none", initial_state=False, bias=False))
def test_absent_arguments_mean_their_neutral_values(backend, case: ConvCase):
    """P18: no mask is all valid, no state is zeros, no bias is a bias of zeros."""
    inputs = case.inputs()
    out, state = backend.causal_conv(**inputs)
    neutral = {
        "mask": torch.ones(out.shape[:2], dtype=torch.bool),
        "initial_state": torch.zeros_like(state),
        "bias": torch.zeros_like(inputs["weight"][:, 0]),
    }
    found = evaluate(backend.causal_conv, inputs | neutral)
    assert_same(found, {"output 0": out, "output 1": state}, case)


test_strides_do_not_matter = conv(case=conv_cases(DTYPES))(operator_checks.check_strides_do_not_matter)
test_inputs_are_left_as_they_were = conv(case=conv_cases())(
    operator_checks.check_inputs_are_left_as_they_were
)
test_autocast_changes_nothing = conv(case=conv_cases(("bfloat16", "float32")))(
    operator_checks.check_autocast_changes_nothing
)
test_one_gradient_alone_equals_its_share_of_all = conv(case=conv_cases())(
    operator_checks.check_one_gradient_alone_equals_its_share_of_all
)
test_uninitialised_memory_is_never_read = conv(case=conv_cases(), share=0.5)(
    operator_checks.check_uninitialised_memory_is_never_read
)
