"""`bidirectional_scan`: forward over everything, backward inside each segment, mixed by the gate."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ..harness import operator_checks
from ..harness.compare import assert_exact, assert_same, assert_zero, edited, evaluate
from ..harness.layouts import LONG_PROMPTS, Layout, Vision
from ..harness.operator_cases import DTYPES, BidirectionalCase, bidirectional_cases, holds

PER_TOKEN = ("x", "dt", "B", "C", "gate")
both = partial(holds, "bidirectional_scan")


def rows(inputs: dict, row: int) -> dict:
    """The arguments of one row of the batch."""
    shared = ("A", "D")
    return {k: v if v is None or k in shared else v[row : row + 1] for k, v in inputs.items()}


def span(inputs: dict, part: slice) -> dict:
    """The arguments of a part of the sequence."""
    per_token = (*PER_TOKEN, "segment", "valid")
    return {k: v[:, part] if k in per_token and v is not None else v for k, v in inputs.items()}


@both(case=bidirectional_cases(DTYPES))
def test_both_directions_match_the_reference_in_every_dtype(backend, case: BidirectionalCase):
    """P17: values and the forward state, float32 gates with bfloat16 inputs included."""
    operator_checks.check_matches_the_reference(backend, case, gradients=False)


@both(case=bidirectional_cases(DTYPES))
def test_gradients_of_both_directions_match_the_reference(backend, case: BidirectionalCase):
    """P9, P15: every input's gradient, gate, skip and initial state included."""
    operator_checks.check_matches_the_reference(backend, case)


@both(case=bidirectional_cases(layout=LONG_PROMPTS), share=0.2)
def test_long_prompts_match_the_reference(backend, case: BidirectionalCase):
    """P2, P6: blocks that begin and end in the middle of a chunk, and one longer than a chunk."""
    operator_checks.check_matches_the_reference(backend, case)


@both(case=bidirectional_cases())
def test_no_token_sees_past_the_end_of_its_block(backend, case: BidirectionalCase):
    """P16, P22: what follows a block changes nothing in it, nor in text outside blocks before it."""
    inputs, others = case.inputs(), case.inputs(draw=1)
    before = evaluate(backend.bidirectional_scan, inputs)["output 0"]
    for cut in case.layout.cuts():
        later = (torch.arange(case.layout.shape[1]) >= cut).expand(case.layout.shape)
        after = evaluate(backend.bidirectional_scan, edited(inputs, others, later))["output 0"]
        assert_same({"past": after[:, :cut]}, {"past": before[:, :cut]}, case)


@both(case=bidirectional_cases())
def test_text_never_sees_later_tokens_here(backend, case: BidirectionalCase):
    """Text reads the forward scan only, also between the rows and frames of a segment."""
    inputs, others = case.inputs(), case.inputs(draw=1)
    before = evaluate(backend.bidirectional_scan, inputs)["output 0"]
    length = case.layout.shape[1]
    for cut in range(1, length, max(1, length // 5)):
        later = (torch.arange(length) >= cut).expand(case.layout.shape)
        after = evaluate(backend.bidirectional_scan, edited(inputs, others, later))["output 0"]
        text = (case.layout.segment[:, :cut] < 0)[..., None, None]
        assert_same({"text": after[:, :cut] * text}, {"text": before[:, :cut] * text}, case)


@both(case=bidirectional_cases(["float64"]), share=0.5)
def test_gradients_reach_what_a_token_sees_and_nothing_else(backend, case: BidirectionalCase):
    """P16, P22: all earlier tokens, later ones of the own segment if it is vision, never padding."""
    segment, valid = case.layout.segment, case.layout.valid
    position = torch.arange(case.layout.shape[1])
    for t in range(0, case.layout.shape[1], 3):
        found = evaluate(partial(output_at, backend, t), case.inputs(), gradients=True)
        own_segment = (segment == segment[:, t : t + 1]) & (segment[:, t : t + 1] >= 0)
        seen = ((position <= t) | own_segment) & valid & valid[:, t : t + 1]
        reached = found["gradient of x"].flatten(2).abs().amax(-1) > 0
        assert_exact(reached, seen, case, f"tokens that token {t} reads")
        for name in PER_TOKEN:
            assert_zero(
                found[f"gradient of {name}"][~seen], case, f"gradient from token {t} to unseen {name}"
            )


def output_at(backend, t: int, **given):
    """The output of one position."""
    return backend.bidirectional_scan(**given)[0][:, t]


@both(case=bidirectional_cases())
def test_the_backward_part_sees_its_own_segment_only(backend, case: BidirectionalCase):
    """P16: with the gate shut, vision depends on no text, no padding and no other segment."""
    gate_shut = {"gate": torch.zeros_like(case.inputs()["gate"])}
    inputs, others = case.inputs() | gate_shut, case.inputs(draw=1) | gate_shut
    before = evaluate(backend.bidirectional_scan, inputs)["output 0"]
    for segment in range(int(case.layout.segment.max()) + 1):
        outside = case.layout.segment != segment
        after = evaluate(backend.bidirectional_scan, edited(inputs, others, outside))["output 0"]
        inside = (~outside)[..., None, None]
        assert_same({"segment": after * inside}, {"segment": before * inside}, case)


@both("selective_scan", case=bidirectional_cases())
def test_an_open_gate_gives_the_forward_scan_alone(backend, case: BidirectionalCase):
    """P22: gate 1 on vision is the forward scan; the skip comes on top."""
    inputs = case.inputs()
    inputs["gate"] = torch.ones_like(inputs["gate"])
    scan = {name: inputs[name] for name in ("x", "dt", "A", "B", "C", "initial_state")}
    y, state = backend.selective_scan(**scan, mask=inputs["valid"])
    if case.skip:
        x = inputs["x"].repeat_interleave(case.heads // case.groups, dim=2)
        y = y + inputs["D"][:, None] * x * inputs["valid"][..., None, None]
    assert_same(evaluate(backend.bidirectional_scan, inputs), {"output 0": y, "output 1": state}, case)


@both("selective_scan", case=bidirectional_cases(skip=False))
def test_a_shut_gate_gives_one_reverse_scan_per_segment(backend, case: BidirectionalCase):
    """P16: gate 0 is the sum of masked reverse scans, each from an empty state, token t itself included."""
    inputs = case.inputs()
    inputs["gate"] = torch.zeros_like(inputs["gate"])
    scan = {name: inputs[name] for name in ("x", "dt", "A", "B", "C")}
    forward, _ = backend.selective_scan(**scan, mask=case.layout.valid, initial_state=inputs["initial_state"])
    wanted = forward * (case.layout.segment < 0)[..., None, None]
    for segment in range(int(case.layout.segment.max()) + 1):
        wanted = wanted + backend.selective_scan(**scan, mask=case.layout.segment == segment, reverse=True)[0]
    y, _ = backend.bidirectional_scan(**inputs)
    assert_same({"y": y}, {"y": wanted}, case)


@both(case=bidirectional_cases())
def test_the_gate_mixes_linearly_and_only_on_vision(backend, case: BidirectionalCase):
    """Per token and head; text and padding ignore it and send it no gradient."""
    inputs = case.inputs()
    ends = {
        share: backend.bidirectional_scan(**{**inputs, "gate": torch.full_like(inputs["gate"], share)})[0]
        for share in (0.0, 1.0)
    }
    found = evaluate(backend.bidirectional_scan, inputs, gradients=True)
    gate = inputs["gate"][..., None]
    assert_same({"y": found["output 0"]}, {"y": gate * ends[1.0] + (1 - gate) * ends[0.0]}, case)
    text = case.layout.segment < 0
    assert_zero(found["gradient of gate"][text], case, "gradient of the gate on text")
    assert_same(
        {"text": ends[0.0] * text[..., None, None]}, {"text": ends[1.0] * text[..., None, None]}, case
    )


@both("selective_scan", case=bidirectional_cases())
def test_the_final_state_is_the_forward_one(backend, case: BidirectionalCase):
    """Nothing of the backward scan reaches the cache."""
    inputs = case.inputs()
    scan = {name: inputs[name] for name in ("x", "dt", "A", "B", "C", "initial_state")}
    _, wanted = backend.selective_scan(**scan, mask=inputs["valid"])
    _, state = backend.bidirectional_scan(**inputs)
    assert_same({"state": state}, {"state": wanted}, case)


@both(case=bidirectional_cases())
def test_padding_gives_zero_and_gets_no_gradient(backend, case: BidirectionalCase):
    """P7: exactly zero, both ways, the skip included."""
    found = evaluate(backend.bidirectional_scan, case.inputs(), gradients=True)
    for name in ("output 0", *(f"gradient of {name}" for name in PER_TOKEN)):
        assert_zero(found[name][~case.layout.valid], case, f"{name} on padding")


@both(case=bidirectional_cases())
def test_more_padding_changes_nothing(backend, case: BidirectionalCase):
    """P6, P7: three tokens of padding on the left and five on the right."""
    inputs = case.inputs()
    wider = dict(inputs)
    for name in PER_TOKEN:
        value = inputs[name]
        left, right = (value.new_full((value.shape[0], n, *value.shape[2:]), 0.7) for n in (3, 5))
        wider[name] = torch.cat([left, value, right], dim=1)
    layout = case.layout.padded(3, 5)
    wider |= {"segment": layout.segment, "valid": layout.valid}
    y, state = backend.bidirectional_scan(**wider)
    length = case.layout.shape[1]
    wanted = evaluate(backend.bidirectional_scan, inputs)
    assert_same({"output 0": y[:, 3 : 3 + length], "output 1": state}, wanted, case)
    assert_zero(torch.cat([y[:, :3], y[:, 3 + length :]], dim=1), case, "output on the new padding")


@both(case=bidirectional_cases())
def test_padding_with_a_segment_is_still_padding(backend, case: BidirectionalCase):
    """`valid` decides: a segment id on padding changes nothing."""
    inputs = case.inputs()
    wanted = evaluate(backend.bidirectional_scan, inputs)
    numbered = torch.where(case.layout.valid, case.layout.segment, 0)
    assert_same(evaluate(backend.bidirectional_scan, {**inputs, "segment": numbered}), wanted, case)


@both(case=bidirectional_cases())
def test_padding_may_hold_anything(backend, case: BidirectionalCase):
    """P7: not even NaN gets from padding into values, the state or any gradient."""
    inputs = case.inputs()
    spoilt = {name: torch.full_like(inputs[name], float("nan")) for name in PER_TOKEN}
    dirty = edited(inputs, spoilt, ~case.layout.valid)
    found, wanted = (evaluate(backend.bidirectional_scan, given, gradients=True) for given in (dirty, inputs))
    assert_same(found, wanted, case)


@both(case=bidirectional_cases())
def test_the_result_does_not_depend_on_the_batch(backend, case: BidirectionalCase):
    """P16: every row alone gives what it gives among others, whose segments have the same ids."""
    inputs = case.inputs()
    together = evaluate(backend.bidirectional_scan, inputs)
    for row in range(case.layout.shape[0]):
        wanted = {name: result[row : row + 1] for name, result in together.items()}
        assert_same(evaluate(backend.bidirectional_scan, rows(inputs, row)), wanted, case)


@both(case=bidirectional_cases())
def test_renumbering_the_segments_changes_nothing(backend, case: BidirectionalCase):
    """Ids only say what belongs together: any numbers, in any order."""
    inputs = case.inputs()
    numbers = [1000 - 7 * i for i in range(int(case.layout.segment.max()) + 1)]
    renamed = {**inputs, "segment": case.layout.renumbered(numbers).segment}
    assert_same(
        evaluate(backend.bidirectional_scan, renamed), evaluate(backend.bidirectional_scan, inputs), case
    )


@both(case=bidirectional_cases())
def test_splitting_outside_blocks_changes_nothing(backend, case: BidirectionalCase):
    """P9: outputs, state and gradients of two parts, the state handed over, are those of the whole."""
    inputs = case.inputs()
    whole = evaluate(backend.bidirectional_scan, inputs, gradients=True)

    def in_two(cut: int, **given):
        first, state = backend.bidirectional_scan(**span(given, slice(0, cut)))
        rest = span(given, slice(cut, None)) | {"initial_state": state}
        second, state = backend.bidirectional_scan(**rest)
        return torch.cat([first, second], dim=1), state

    sizes = partial(operator_checks.sizes_of_gradients, case, inputs)
    for cut in case.layout.cuts()[::4]:
        assert_same(evaluate(partial(in_two, cut), inputs, gradients=True), whole, case, sizes=sizes)


@both(case=bidirectional_cases(groups=2, heads=4))
def test_groups_equal_repeated_heads(backend, case: BidirectionalCase):
    """P11: values, and gradients summed over the heads of a group, the skip's included."""
    inputs = case.inputs()

    def repeated(x, B, **rest):
        return backend.bidirectional_scan(
            x=x.repeat_interleave(2, dim=2), B=B.repeat_interleave(2, dim=2), **rest
        )

    grouped = evaluate(backend.bidirectional_scan, inputs, gradients=True)
    assert_same(grouped, evaluate(repeated, inputs, gradients=True), case)


@both(case=bidirectional_cases(layout=Layout(((Vision(0, (2, 2, 3)),),)), initial_state=False))
def test_mirroring_one_image_swaps_the_directions(backend, case: BidirectionalCase):
    """P22: flip the tokens and open the gate as far as it was shut."""
    inputs = case.inputs()
    mirrored = {name: inputs[name].flip(1) for name in PER_TOKEN}
    mirrored["gate"] = 1 - mirrored["gate"]
    y, _ = backend.bidirectional_scan(**inputs)
    flipped, _ = backend.bidirectional_scan(**{**inputs, **mirrored})
    assert_same({"y": flipped.flip(1)}, {"y": y}, case)


@both(case=bidirectional_cases(initial_state=False))
def test_both_directions_are_linear_in_the_input(backend, case: BidirectionalCase):
    """P22: skip included."""
    inputs, others = case.inputs(), case.inputs(draw=1)
    pieces = [backend.bidirectional_scan(**{**inputs, "x": x})[0] for x in (inputs["x"], others["x"])]
    combined = backend.bidirectional_scan(**{**inputs, "x": 2 * inputs["x"] - 3 * others["x"]})[0]
    assert_same({"y": combined}, {"y": 2 * pieces[0] - 3 * pieces[1]}, case, factor=10)


@both(case=bidirectional_cases())
def test_the_skip_adds_d_times_x(backend, case: BidirectionalCase):
    """On text and vision alike, nothing on padding."""
    inputs = case.inputs()
    skip = torch.arange(1, case.heads + 1).to(inputs["dt"])
    plain, _ = backend.bidirectional_scan(**{**inputs, "D": None})
    y, _ = backend.bidirectional_scan(**{**inputs, "D": skip})
    x = inputs["x"].repeat_interleave(case.heads // case.groups, dim=2)
    assert_same({"y": y}, {"y": plain + skip[:, None] * x * inputs["valid"][..., None, None]}, case)


@both(case=bidirectional_cases())
def test_absent_arguments_mean_their_neutral_values(backend, case: BidirectionalCase):
    """P18: no segment is all text, no valid is all valid, no state is zeros, no skip is a skip of zeros."""
    inputs = case.inputs() | {"valid": None, "D": None, "initial_state": None}
    for segment in (inputs["segment"], None):
        y, state = backend.bidirectional_scan(**inputs | {"segment": segment})
        neutral = {
            "segment": torch.full(case.layout.shape, -1) if segment is None else segment,
            "valid": torch.ones(case.layout.shape, dtype=torch.bool),
            "D": torch.zeros_like(inputs["A"]),
            "initial_state": torch.zeros_like(state),
        }
        found = evaluate(backend.bidirectional_scan, inputs | neutral)
        assert_same(found, {"output 0": y, "output 1": state}, case)


@both(case=bidirectional_cases(DTYPES))
def test_extreme_gates_and_decays_are_finite(backend, case: BidirectionalCase):
    """P3, P5: gates of exactly 0 and 1, decay far below the smallest number: finite values and gradients."""
    inputs = case.inputs()
    inputs["gate"] = (inputs["gate"] > 0.5).to(inputs["gate"])
    inputs["A"] = torch.full_like(inputs["A"], -30000.0)
    for name, tensor in evaluate(backend.bidirectional_scan, inputs, gradients=True).items():
        assert torch.isfinite(tensor).all(), f"{name} must be finite: {case!r}"


@pytest.mark.needs("bidirectional_scan")
@pytest.mark.parametrize("gap", ("", "row", "frame"))
def test_one_vision_token_counts_itself_once_in_each_direction(backend, gap):
    """Both directions include the token itself: alone in its segment it reads the same both ways."""
    layout = Layout(((Vision(0, (1, 1, 1), gap),),))
    case = BidirectionalCase(layout, 2, 1, 3, 2, initial_state=False, skip=False, dtype="float64", seed=5)
    inputs = case.inputs()
    own = (inputs["dt"] * (inputs["C"] * inputs["B"]).sum(-1))[..., None] * inputs["x"]
    for share in (0.0, 0.25, 1.0):
        y, _ = backend.bidirectional_scan(**{**inputs, "gate": torch.full_like(inputs["gate"], share)})
        assert_same({"y": y}, {"y": own}, case)


test_strides_do_not_matter = both(case=bidirectional_cases(DTYPES))(
    operator_checks.check_strides_do_not_matter
)
test_inputs_are_left_as_they_were = both(case=bidirectional_cases())(
    operator_checks.check_inputs_are_left_as_they_were
)
test_autocast_changes_nothing = both(case=bidirectional_cases(("bfloat16", "float32")))(
    operator_checks.check_autocast_changes_nothing
)
test_one_gradient_alone_equals_its_share_of_all = both(case=bidirectional_cases())(
    operator_checks.check_one_gradient_alone_equals_its_share_of_all
)
test_uninitialised_memory_is_never_read = both(case=bidirectional_cases(), share=0.5)(
    operator_checks.check_uninitialised_memory_is_never_read
)
