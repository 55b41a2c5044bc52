"""`bidirectional_scan`: forward over everything, in reverse inside each segment, mixed by the gate."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ..harness import large_cases, long_rows, operator_checks, packed_rows, rounding
from ..harness.compare import assert_exact, assert_negligible, assert_same, assert_zero, quarters
from ..harness.layouts import LONG_PROMPTS, Layout, Text, Vision
from ..harness.operator_cases import (
    DTYPES,
    BidirectionalCase,
    Numbers,
    bidirectional_cases,
    fed,
    gradients_of,
    property_of,
    run,
)

TOKENS = BidirectionalCase.tokens
NUMBERINGS = (  # of segments: large, sparse, equal modulo 2^32, equal as float32 or float64
    lambda i: 1000 - 7 * i,
    lambda i: 2**33 + i * 2**32,
    lambda i: 2**26 + i,
    lambda i: 2**63 - 1 - i,
)
ONE_WORD = Layout(((Text(1),),) * 2)
TWO_CELLS = Layout(((Vision(0, (1, 1, 2)),),))
both = partial(property_of, "bidirectional_scan")

globals().update(operator_checks.call_properties("bidirectional_scan", bidirectional_cases))
globals().update(
    packed_rows.packed_properties(
        "bidirectional_scan", bidirectional_cases, partial(bidirectional_cases, layout=LONG_PROMPTS)
    )
)
globals().update(long_rows.scan_properties("bidirectional_scan"))


def with_gate(case: BidirectionalCase, share: float):
    """The case with one share of the forward direction everywhere."""
    return case.changed(gate=torch.full_like(case.inputs()["gate"], share))


def forward_scan(backend, case) -> dict:
    """`selective_scan` over the valid tokens of the case."""
    given = case.inputs()
    scan = {name: given[name] for name in ("x", "dt", "A", "B", "C", "initial_state")}
    y, state = backend.selective_scan(**scan, mask=given["valid"])
    return {"y": y, "final_state": state}


@both(cases=bidirectional_cases(layout=LONG_PROMPTS), share=0.2)
def test_long_prompts_match_the_reference(backend, case: BidirectionalCase):
    """Spans that begin and end in the middle of a chunk, and one longer than a chunk."""
    operator_checks.check_matches_the_reference(backend, case)


@both(cases=bidirectional_cases())
def test_no_token_sees_past_the_end_of_its_block(backend, case: BidirectionalCase):
    """What follows a span changes nothing in it, nor in text outside spans before it."""
    before = run(backend, case)["y"]
    for cut in case.cuts():
        after = run(backend, case.with_other_tokens_from(cut))["y"]
        assert_same({"past": after[:, :cut]}, {"past": before[:, :cut]}, case)


@both(cases=bidirectional_cases())
def test_text_never_sees_later_tokens_here(backend, case: BidirectionalCase):
    """Text reads the forward scan only, also between the rows and frames of a segment."""
    before, length = run(backend, case)["y"], case.shape[1]
    for cut in range(1, length, max(1, length // 5)):
        after = run(backend, case.with_other_tokens_from(cut))["y"]
        text = (case.layout.segment[:, :cut] < 0)[..., None, None]
        assert_same({"text": after[:, :cut] * text}, {"text": before[:, :cut] * text}, case)


@both(cases=bidirectional_cases(["float64"]), share=0.5)
def test_gradients_reach_what_a_token_sees_and_nothing_else(backend, case: BidirectionalCase):
    """All earlier tokens, later ones of the own segment if it is vision, never padding."""
    segment, valid = case.layout.segment, case.layout.valid
    position = torch.arange(case.shape[1])
    for t in range(0, case.shape[1], 3):
        found = gradients_of(backend, case, lambda y, t=t: y[:, t])
        own_segment = (segment == segment[:, t : t + 1]) & (segment[:, t : t + 1] >= 0)
        seen = ((position <= t) | own_segment) & valid & valid[:, t : t + 1]
        reached = found["grad x"].flatten(2).abs().amax(-1) > 0
        assert_exact(reached & seen, seen, case, f"tokens that token {t} reads")
        for name in TOKENS:
            grad, what = found[f"grad {name}"], f"grad {name} of what token {t} cannot see"
            assert_negligible(grad[~seen], grad, case, what)
            assert_zero(grad[~valid], case, f"grad {name} of padding")


@both(cases=bidirectional_cases())
def test_the_reverse_part_sees_its_own_segment_only(backend, case: BidirectionalCase):
    """With the gate shut, vision depends on no text, no padding and no other segment."""
    shut = with_gate(case, 0.0)
    before = run(backend, shut)["y"]
    for segment in range(int(case.layout.segment.max()) + 1):
        outside = case.layout.segment != segment
        after = run(backend, with_gate(shut.with_other_tokens(outside), 0.0))["y"]
        inside = (~outside)[..., None, None]
        assert_same({"segment": after * inside}, {"segment": before * inside}, case)


@both("selective_scan", cases=bidirectional_cases())
def test_an_open_gate_gives_the_forward_scan_alone(backend, case: BidirectionalCase):
    """Gate 1 on vision is the forward scan; the skip comes on top."""
    given, wanted = case.inputs(), forward_scan(backend, case)
    if case.skip:
        x = given["x"].repeat_interleave(case.ratio, dim=2) * given["valid"][..., None, None]
        wanted["y"] = wanted["y"] + given["D"][:, None] * x
    assert_same(run(backend, with_gate(case, 1.0)), wanted, case)


@both("selective_scan", cases=bidirectional_cases(skip=False))
def test_a_shut_gate_gives_one_reverse_scan_per_segment(backend, case: BidirectionalCase):
    """Gate 0 is the sum of masked reverse scans, each from an empty state, token t itself included."""
    given, segment = case.inputs(), case.layout.segment
    scan = {name: given[name] for name in ("x", "dt", "A", "B", "C")}
    wanted = forward_scan(backend, case)["y"] * (segment < 0)[..., None, None]
    for number in range(int(segment.max()) + 1):
        wanted = wanted + backend.selective_scan(**scan, mask=segment == number, reverse=True)[0]
    assert_same({"y": run(backend, with_gate(case, 0.0))["y"]}, {"y": wanted}, case)


@both(cases=bidirectional_cases())
def test_the_gate_mixes_linearly_and_only_on_vision(backend, case: BidirectionalCase):
    """Per token and head; text and padding ignore it and send it no gradient."""
    shut, open_ = (run(backend, with_gate(case, share))["y"] for share in (0.0, 1.0))
    found = run(backend, case, gradients=True)
    gate = case.inputs()["gate"][..., None]
    assert_same({"y": found["y"]}, {"y": gate * open_ + (1 - gate) * shut}, case)
    text = case.layout.segment < 0
    assert_zero(found["grad gate"][text], case, "grad gate on text")
    assert_same({"text": shut * text[..., None, None]}, {"text": open_ * text[..., None, None]}, case)


@both("selective_scan", cases=bidirectional_cases())
def test_the_final_state_is_the_forward_one(backend, case: BidirectionalCase):
    """Nothing of the reverse scan reaches the cache."""
    wanted = forward_scan(backend, case)["final_state"]
    assert_same({"final_state": run(backend, case)["final_state"]}, {"final_state": wanted}, case)


@both(cases=bidirectional_cases())
def test_padding_gives_zero_and_gets_no_gradient(backend, case: BidirectionalCase):
    """Exactly zero, both ways, the skip included."""
    found = run(backend, case, gradients=True)
    for name in ("y", *(f"grad {name}" for name in TOKENS)):
        assert_zero(found[name][~case.layout.valid], case, f"{name} on padding")


@both(cases=bidirectional_cases())
def test_more_padding_changes_nothing(backend, case: BidirectionalCase):
    """Three tokens of padding on the left and five on the right."""
    given, layout, wider = case.inputs(), case.layout.padded(3, 5), {}
    for name in TOKENS:
        value = given[name]
        left, right = (value.new_full((value.shape[0], n, *value.shape[2:]), 0.7) for n in (3, 5))
        wider[name] = torch.cat([left, value, right], dim=1)
    padded = case.changed(**wider, segment=layout.segment, valid=layout.valid)
    found, length = run(backend, padded), case.shape[1]
    inner = {"y": found["y"][:, 3 : 3 + length], "final_state": found["final_state"]}
    assert_same(inner, run(backend, case), case)
    around = torch.cat([found["y"][:, :3], found["y"][:, 3 + length :]], dim=1)
    assert_zero(around, case, "y on the new padding")


@both(cases=bidirectional_cases())
def test_padding_with_a_segment_is_still_padding(backend, case: BidirectionalCase):
    """`valid` decides: a segment id on padding, also another one inside a segment, changes nothing."""
    for padded in (case, with_holes(case)):
        given, generator = padded.inputs(), Numbers(case.seed + 12).generator
        others = torch.randint(-1, 4, case.shape, generator=generator)
        wanted = run(backend, padded, gradients=True)
        for ids in (torch.zeros_like(others), others, torch.full_like(others, 2**63 - 1)):
            numbered = padded.changed(segment=torch.where(given["valid"], given["segment"], ids))
            assert_same(run(backend, numbered, gradients=True), wanted, numbered)


@both(cases=bidirectional_cases())
def test_padding_may_hold_anything(backend, case: BidirectionalCase):
    """Not even NaN gets from padding into values, the state or any gradient."""
    spoilt = case.with_nan_at(~case.layout.valid)
    assert_same(run(backend, spoilt, gradients=True), run(backend, case, gradients=True), case)


@both(cases=bidirectional_cases())
def test_the_result_does_not_depend_on_the_batch(backend, case: BidirectionalCase):
    """Every row alone gives what it gives among others, whose segments have the same ids."""
    together = run(backend, case)
    for row in range(case.shape[0]):
        wanted = {name: result[row : row + 1] for name, result in together.items()}
        assert_same(run(backend, case.row(row)), wanted, case)


@both(cases=bidirectional_cases())
def test_renumbering_the_segments_changes_nothing(backend, case: BidirectionalCase):
    """Ids only say what belongs together: any numbers, in any order, equal in their last or first bits."""
    wanted = run(backend, case, gradients=True)
    for number in NUMBERINGS:
        numbers = [number(i) for i in range(int(case.layout.segment.max()) + 1)]
        renamed = case.changed(segment=case.layout.renumbered(numbers).segment)
        found = run(backend, renamed, gradients=True)
        assert_same(of_segments(numbers, found), of_segments(numbers, wanted), case)


@both(cases=bidirectional_cases(("float64",)))
def test_segments_of_rows_whose_ids_differ_by_a_thousand_are_apart(backend, case: BidirectionalCase):
    """An id counts in its own row, whatever the rows beside it hold: no number joins row and id."""
    rows = torch.arange(case.shape[0])[:, None]
    segment = case.layout.segment
    wanted = run(backend, case)
    for stride in (1, 1000, 2**20):
        apart = torch.where(segment >= 0, segment + stride * (case.shape[0] - rows), segment)
        found, numbers = run(backend, case.changed(segment=apart)), apart.tolist()
        assert_same(of_segments(numbers, found), of_segments(numbers, wanted), case)


def of_segments(numbers: list, results: dict) -> dict:
    """The results under names that say which numbers the segments had."""
    return {f"{name} with segments {numbers}": result for name, result in results.items()}


@both(cases=bidirectional_cases(DTYPES))
def test_padding_inside_blocks_matches_the_reference(backend, case: BidirectionalCase):
    """`valid` may have holes anywhere, on vision tokens too, which keep their segment's id."""
    operator_checks.check_matches_the_reference(backend, with_holes(case))


@both(cases=bidirectional_cases())
def test_padding_inside_blocks_is_as_if_absent(backend, case: BidirectionalCase):
    """The valid tokens alone give the same outputs and the same state."""
    holed = with_holes(case)
    together = run(backend, holed)
    for row in range(case.shape[0]):
        alone = holed.row(row)
        given = alone.inputs()
        kept = given["valid"][0]
        if kept.any():
            names = (*TOKENS, "segment", "valid")
            short = alone.changed(**{name: given[name][:, kept] for name in names})
            found = {"y": together["y"][row : row + 1, kept]}
            found["final_state"] = together["final_state"][row : row + 1]
            assert_same(found, run(backend, short), case)


def with_holes(case: BidirectionalCase):
    """The case with three tokens in ten not valid, wherever they are."""
    holes = Numbers(case.seed + 11).some(*case.shape, share=0.7)
    return case.changed(valid=case.layout.valid & holes)


@both(cases=bidirectional_cases(("float64", "float32")))
def test_almost_no_decay_matches_the_reference(backend, case: BidirectionalCase):
    """|A| of 1e-7 and less, down to what float32 takes for none: gradients too, that of A included."""
    A = case.inputs()["A"]
    tiny = -(10.0 ** -torch.linspace(7, 30, len(A), dtype=torch.float64)).to(A)
    operator_checks.check_matches_the_reference(backend, case.changed(A=tiny))


@both(cases=bidirectional_cases())
def test_splitting_outside_blocks_changes_nothing(backend, case: BidirectionalCase):
    """Results and gradients of two parts, the state handed over, are those of the whole."""

    def in_two(cut: int, **given):
        whole = case.changed(**given)
        first, state = backend.bidirectional_scan(**whole.part(slice(0, cut)).inputs())
        rest = whole.part(slice(cut, None)).changed(initial_state=state)
        second, state = backend.bidirectional_scan(**rest.inputs())
        return torch.cat([first, second], dim=1), state

    whole, sizes = run(backend, case, gradients=True), partial(operator_checks.sizes_of_gradients, case)
    for cut in case.cuts()[::4]:
        assert_same(fed(partial(in_two, cut), case, gradients=True), whole, case, sizes=sizes)


@both(cases=bidirectional_cases(groups=2, heads=4))
def test_groups_equal_repeated_heads(backend, case: BidirectionalCase):
    """Values, and gradients summed over the heads of a group, the skip's included."""

    def repeated(x, B, **rest):
        x, B = (tensor.repeat_interleave(case.ratio, dim=2) for tensor in (x, B))
        return backend.bidirectional_scan(x=x, B=B, **rest)

    assert_same(run(backend, case, gradients=True), fed(repeated, case, gradients=True), case)


@both(cases=bidirectional_cases(layout=Layout(((Vision(0, (2, 2, 3)),),)), initial_state=False))
def test_mirroring_one_image_swaps_the_directions(backend, case: BidirectionalCase):
    """Flip the tokens and open the gate as far as it was shut."""
    given = case.inputs()
    mirrored = {name: given[name].flip(1) for name in TOKENS}
    mirrored["gate"] = 1 - mirrored["gate"]
    flipped = run(backend, case.changed(**mirrored))["y"].flip(1)
    assert_same({"y": flipped}, {"y": run(backend, case)["y"]}, case)


@both(cases=bidirectional_cases(initial_state=False))
def test_both_directions_are_linear_in_the_input(backend, case: BidirectionalCase):
    """The skip included."""
    one, other = case.inputs()["x"], case.inputs(draw=1)["x"]
    first, second = (run(backend, case.changed(x=x))["y"] for x in (one, other))
    combined = run(backend, case.changed(x=2 * one - 3 * other))["y"]
    assert_same({"y": combined}, {"y": 2 * first - 3 * second}, case, factor=10)


@both(cases=bidirectional_cases())
def test_the_skip_adds_d_times_x(backend, case: BidirectionalCase):
    """On text and vision alike, nothing on padding."""
    given = case.inputs()
    skip = torch.arange(1, case.heads + 1).to(given["dt"])
    plain = run(backend, case.changed(D=None))["y"]
    x = given["x"].repeat_interleave(case.ratio, dim=2) * given["valid"][..., None, None]
    assert_same({"y": run(backend, case.changed(D=skip))["y"]}, {"y": plain + skip[:, None] * x}, case)


@both(cases=bidirectional_cases())
def test_absent_arguments_mean_their_neutral_values(backend, case: BidirectionalCase):
    """No segment is all text, no valid is all valid, no state is zeros, no skip is a skip of zeros."""
    bare = case.changed(valid=None, D=None, initial_state=None)
    for segment in (case.layout.segment, None):
        wanted = run(backend, bare.changed(segment=segment))
        neutral = case.changed(
            segment=torch.full(case.shape, -1) if segment is None else segment,
            valid=torch.ones(case.shape, dtype=torch.bool),
            D=torch.zeros_like(case.inputs()["A"]),
            initial_state=torch.zeros_like(wanted["final_state"]),
        )
        assert_same(run(backend, neutral), wanted, case)
    operator_checks.check_matches_the_reference(backend, neutral)  # zeros have gradients
    text = case.changed(segment=torch.full(case.shape, -1))
    wanted = run(backend, text, gradients=True)
    assert_same(run(backend, case.changed(segment=None), gradients=True), wanted, case)


@both(cases=bidirectional_cases(rounding.HALVES, layout=ONE_WORD, initial_state=True), share=0.5)
def test_decays_are_formed_in_float32(backend, case: BidirectionalCase):
    """Neither dt, nor A, nor their product is rounded to the dtype of x."""
    rounding.check_decays(backend, case)


@both(cases=bidirectional_cases(rounding.HALVES), share=0.5)
def test_the_skip_is_added_in_float32(backend, case: BidirectionalCase):
    """D x is no more rounded than what it is added to, nor is D."""
    rounding.check_skip(backend, case)


@both(cases=bidirectional_cases(("mixed",), layout=TWO_CELLS, initial_state=False, skip=False), share=0.5)
def test_the_gate_mixes_in_float32(backend, case: BidirectionalCase):
    """The gate is not rounded to the dtype of x."""
    rounding.check_gate(backend, case)


@both(cases=bidirectional_cases(DTYPES))
def test_extreme_gates_and_decays_are_finite(backend, case: BidirectionalCase):
    """Gates of exactly 0 and 1, decay far below the smallest number: finite values and gradients."""
    given = case.inputs()
    gate, A = (given["gate"] > 0.5).to(given["gate"]), torch.full_like(given["A"], -30000.0)
    for name, tensor in run(backend, case.changed(gate=gate, A=A), gradients=True).items():
        assert torch.isfinite(tensor).all(), f"{name} must be finite: {case!r}"


@both(cases=bidirectional_cases(), share=0.3)
def test_gates_of_0_and_1_and_steps_of_0_match_the_reference(backend, case: BidirectionalCase):
    """Both are in their range: gradients of all, where a gate is shut, and where softplus gave 0."""
    given = case.inputs()
    gate = (given["gate"] > 0.5).to(given["gate"])
    dt = torch.where(quarters(given["dt"], case.seed) > 0.5, 0, given["dt"])
    operator_checks.check_matches_the_reference(backend, case.changed(gate=gate, dt=dt))


@both(cases=bidirectional_cases(("float16", "mixed"), initial_state=False), share=0.4)
def test_numbers_at_the_edge_of_half_precision_match_the_reference(backend, case: BidirectionalCase):
    """x of 2,000 and steps of 100: their product overflows float16, the result does not, in any direction."""
    given = case.inputs()
    x, small = quarters(given["x"], case.seed) * 1000, 2.0**-13
    edge = case.changed(x=x, dt=torch.full_like(given["dt"], 100), B=given["B"] * small, C=given["C"] * small)
    edge = edge.changed(D=None)
    operator_checks.check_matches_the_reference(backend, edge, gradients=False)
    operator_checks.check_matches_the_reference(backend, edge, of=("y",))  # the state's gradient overflows


@pytest.mark.needs("bidirectional_scan")
@pytest.mark.parametrize("gap", ("", "row", "frame"))
def test_one_vision_token_counts_itself_once_in_each_direction(backend, gap):
    """Both directions include the token itself: alone in its segment it reads the same both ways."""
    layout = Layout(((Vision(0, (1, 1, 1), gap),),))
    case = BidirectionalCase(layout, 2, 1, 3, 2, initial_state=False, skip=False, dtype="float64", seed=5)
    given = case.inputs()
    own_write = (given["dt"] * (given["C"] * given["B"]).sum(-1))[..., None] * given["x"]
    for share in (0.0, 0.25, 1.0):
        assert_same({"y": run(backend, with_gate(case, share))["y"]}, {"y": own_write}, case)


@pytest.mark.needs("bidirectional_scan")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_small_writes_count_across_pieces(backend, dtype):
    """A state is handed over as it is, not in the dtype of x."""
    rounding.check_small_writes_across_pieces(backend.bidirectional_scan, dtype, gate=0.5)


@both(cases=bidirectional_cases(rounding.HALVES, initial_state=True), share=0.3)
def test_a_state_is_handed_on_in_float32(backend, case: BidirectionalCase):
    """Neither it nor its gradient is rounded to the dtype of x."""
    rounding.check_state_is_kept(backend, case)


@pytest.mark.needs("bidirectional_scan")
def test_samples_may_begin_where_chunks_do(backend):
    """And be longer than these: no state is carried over their first token."""
    case = large_cases.both(((Text(1100),),) * 4, 2, 1, 3, 2, decay=-1e-3)
    packed_rows.check_samples_at_borders(backend, case)
