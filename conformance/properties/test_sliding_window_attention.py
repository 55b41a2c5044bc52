"""`sliding_window_attention`: softmax over the last valid tokens of a row, the token itself included."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from linmu import reference

from ..harness import large_cases, long_rows, operator_checks, packed_rows, rounding
from ..harness.compare import assert_exact, assert_matches, assert_same, assert_zero, in_float64
from ..harness.operator_cases import DTYPES, EXACT, fed, gradients_of, operator_of, property_of, run
from ..harness.second_sliding_window import pairs_and_rest, sizes_in_window
from ..harness.second_sliding_window import sliding_window_attention as by_mask
from ..harness.sliding_window_cases import STATE, SlidingWindowCase, selected, sliding_window_cases

sliding = partial(property_of, "sliding_window_attention")

globals().update(operator_checks.call_properties("sliding_window_attention", sliding_window_cases))
globals().update(long_rows.gap_properties("sliding_window_attention"))


def masks_of(case: SlidingWindowCase) -> dict[str, torch.Tensor | None]:
    return {name: case.inputs()[name] for name in ("asks", "valid", "sequence", "present")}


def seen_by(case: SlidingWindowCase) -> torch.Tensor:
    """(B, L, L) bool: which tokens each token reads."""
    seen, _ = pairs_and_rest(case.window, case.length, case.batch, **masks_of(case))
    return seen[:, :, -case.length :]


def there_and_asking(case: SlidingWindowCase) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, L) bool twice: valid tokens, and those that have an output."""
    asks, valid = case.inputs()["asks"], case.inputs()["valid"]
    there = torch.ones(case.batch, case.length, dtype=torch.bool) if valid is None else valid
    return there, there if asks is None else there & asks


def sizes(case: SlidingWindowCase) -> Any:
    """What `assert_same` measures gradients by that cancel."""
    return lambda: sizes_in_window(**in_float64(case.inputs()))


def in_pieces(backend: Any, case: SlidingWindowCase, cuts: list[int], **given: Any) -> tuple:
    """The operator piece by piece, each behind the state of the one before."""
    operator, outputs = operator_of(backend, case), []
    start = {name: given[name] for name in STATE}
    for first, end in zip([0, *cuts], [*cuts, case.length], strict=True):
        piece = selected(case.changed(**given), slice(first, end)).inputs()
        o, *state = operator(**piece | start)
        start = dict(zip(STATE, state, strict=True))
        outputs.append(o)
    return (torch.cat(outputs, dim=1), *state)


@sliding(cases=sliding_window_cases())
def test_a_token_reads_the_last_tokens_of_its_row_and_nothing_else(backend, case: SlidingWindowCase):
    """By gradients: the window's end, the future, padding, sequences, rows; exactly zero elsewhere."""
    seen = seen_by(case)
    for t in range(0, case.length, 3):  # summed, so that the shares of a group's heads cannot cancel
        found = gradients_of(backend, case, lambda o, t=t: o[:, t].sum((1, 2)))
        for name in ("k", "v"):
            assert_zero(found[f"grad {name}"][~seen[:, t]], case, f"grad {name} of what token {t} cannot see")
        reached = found["grad v"].flatten(2).abs().amax(-1) > 0
        assert_exact(reached, seen[:, t], case, f"tokens that token {t} reads")


@sliding(cases=sliding_window_cases())
def test_an_output_never_depends_on_later_tokens(backend, case: SlidingWindowCase):
    """Causality: whatever comes later, an output is what it was."""
    before = run(backend, case)["o"]
    for cut in range(0, case.length, 5):
        after = run(backend, case.with_other_tokens_from(cut))["o"]
        assert_same({"o": after[:, :cut]}, {"o": before[:, :cut]}, case)


@sliding(cases=sliding_window_cases(packed=False))
def test_splitting_anywhere_changes_nothing(backend, case: SlidingWindowCase):
    """Two pieces, and their gradients, from any cut; the state between them is passed on."""
    wanted = run(backend, case, gradients=True)
    for cut in range(1, case.length, 4):
        found = fed(partial(in_pieces, backend, case, [cut]), case, gradients=True)
        assert_same(found, wanted, case, sizes=sizes(case))


@sliding(cases=sliding_window_cases(packed=False))
def test_one_token_at_a_time_equals_the_whole(backend, case: SlidingWindowCase):
    """Decoding: without gradients, from a state of any length, each step's state the next one's."""
    with torch.no_grad():
        found = fed(partial(in_pieces, backend, case, list(range(1, case.length))), case)
        assert_same(found, run(backend, case), case)


@sliding(cases=sliding_window_cases(DTYPES, length=1, initial_state=True))
def test_one_token_behind_a_state_matches_the_reference(backend, case: SlidingWindowCase):
    """A step of decoding, with its gradients and without."""
    operator_checks.check_matches_the_reference(backend, case)
    with torch.no_grad():
        operator_checks.check_matches_the_reference(backend, case, gradients=False)


@sliding(cases=sliding_window_cases(length=1, initial_state=True))
def test_a_step_leaves_its_arguments_as_they_were(backend, case: SlidingWindowCase):
    """Also where no gradient is asked for and a state could be overwritten."""
    operator_checks.check_arguments_are_left(backend, case)


@sliding(cases=sliding_window_cases(DTYPES))
def test_the_state_is_the_last_valid_keys_and_values(backend, case: SlidingWindowCase):
    """Bit by bit, in the dtype of the keys; zeros for what is missing, before what is there."""
    given = in_float64(case.inputs())
    wanted = dict(zip(case.results, case.flat(by_mask)(**given), strict=True))
    for name, got in run(backend, case).items():
        if name != "o":
            kind = torch.bool if name == "state present" else case.inputs()["k"].dtype
            assert_exact(got, wanted[name].to(kind), case, name)


@sliding(cases=sliding_window_cases(("bfloat16", "float16"), initial_state=True), share=0.3)
def test_a_state_of_another_dtype_is_taken_in_that_of_the_keys(backend, case: SlidingWindowCase):
    """A float32 state before half-precision tokens: the same numbers, and a state after in half precision."""
    given = case.inputs()
    wide = case.changed(**{name: given[name].float() for name in STATE[:2]})
    assert_same(run(backend, wide), run(backend, case), case)


@sliding(cases=sliding_window_cases(valid="some", packed=False))
def test_padding_anywhere_is_as_if_absent(backend, case: SlidingWindowCase):
    """Padding inside a row makes no window shorter: each row without it gives the same."""
    together = run(backend, case)
    for row in range(case.batch):
        there = case.inputs()["valid"][row]
        if there.any():
            alone = run(backend, selected(case.row(row), there))
            wanted = {name: result[row : row + 1] for name, result in together.items()}
            assert_same(alone, wanted | {"o": wanted["o"][:, there]}, case)


@sliding(cases=sliding_window_cases(DTYPES))
def test_who_does_not_ask_gives_zero_and_is_read_all_the_same(backend, case: SlidingWindowCase):
    """o and the gradient of q are exactly zero there; the others' o is what it is when all ask."""
    _, asking = there_and_asking(case)
    found = run(backend, case, gradients=True)
    assert_zero(found["o"][~asking], case, "o where a token does not ask")
    assert_zero(found["grad q"][~asking], case, "grad q where a token does not ask")
    everyone = run(backend, case.changed(asks=None))["o"]
    assert_same({"o": found["o"][asking]}, {"o": everyone[asking]}, case)


@sliding(cases=sliding_window_cases())
def test_masked_tokens_may_hold_anything(backend, case: SlidingWindowCase):
    """NaN in padding, in what a state lacks, and in queries that nobody asks changes nothing, both ways."""
    given, (there, asking) = case.inputs(), there_and_asking(case)
    where = {"q": asking, "k": there, "v": there}
    where |= dict.fromkeys(STATE[:2], given["present"]) if case.initial_state else {}
    spoilt = case.changed(
        **{name: given[name].where(mask[..., None, None], float("nan")) for name, mask in where.items()}
    )
    found, wanted = (run(backend, each, gradients=True) for each in (spoilt, case))
    assert_same(found, wanted, case, sizes=sizes(case))
    with torch.no_grad():
        assert_same(run(backend, spoilt), run(backend, case), case)


@sliding(cases=sliding_window_cases(packed=True, initial_state=False, valid="none"))
def test_a_packed_row_equals_its_samples_alone(backend, case: SlidingWindowCase):
    """Values, and gradients, of which samples share nothing; the state is the last one's."""
    packed = run(backend, case, gradients=True)
    for row in range(case.batch):
        ids = case.inputs()["sequence"][row]
        for number in dict.fromkeys(ids.tolist()):  # from the first sample to the last
            own = ids == number
            sample = selected(case.row(row), own).changed(sequence=None)
            alone = run(backend, sample)
            assert_same({"o": alone["o"]}, {"o": packed["o"][row : row + 1, own]}, case)
        last = {name: result[row : row + 1] for name, result in packed.items() if name in case.results[1:]}
        assert_same({name: alone[name] for name in last}, last, case)


@sliding(cases=sliding_window_cases(length=300, window=290, packed=False, **packed_rows.ONE_ROW), share=0.05)
def test_hundreds_of_samples_equal_as_many_rows(backend, case: SlidingWindowCase):
    """Samples of one token, more than a byte tells apart, all of them within the window."""
    packed_rows.check_hundreds_of_samples(backend, case)


@sliding(cases=sliding_window_cases(batch=3))
def test_permuting_the_rows_permutes_the_result(backend, case: SlidingWindowCase):
    """No row knows of another."""
    order, given, together = torch.tensor([2, 0, 1]), case.inputs(), run(backend, case)
    names = (name for name in (*case.tokens, *case.masks, *case.rows) if given[name] is not None)
    permuted = run(backend, case.changed(**{name: given[name][order] for name in names}))
    assert_same(permuted, {name: result[order] for name, result in together.items()}, case)
    for row in range(case.batch):
        wanted = {name: result[row : row + 1] for name, result in together.items()}
        assert_same(run(backend, case.row(row)), wanted, case)


@sliding(cases=sliding_window_cases(window=1, asks="none", valid="none"))
def test_a_window_of_one_gives_each_token_its_own_value(backend, case: SlidingWindowCase):
    """And no gradient to q and k, which decide nothing."""
    found = run(backend, case, gradients=True, of=("o",))
    assert_same({"o": found["o"]}, {"o": case.inputs()["v"].repeat_interleave(case.ratio, dim=2)}, case)
    for name in ("q", "k"):
        assert found[f"grad {name}"].abs().max() < 1e-5, f"grad {name} must be 0: {case!r}"


@sliding(cases=sliding_window_cases(window=1000, initial_state=False))
def test_a_window_longer_than_the_row_is_causal_attention(backend, case: SlidingWindowCase):
    """As long as the row, longer by one, or by much."""
    wanted = {"o": run(backend, case)["o"]}
    for window in (case.length, case.length + 1, 3 * case.length):
        assert_same({"o": run(backend, case.changed(window=window))["o"]}, wanted, case)


@sliding(cases=sliding_window_cases(groups=2, heads=4))
def test_groups_equal_repeated_heads(backend, case: SlidingWindowCase):
    """Values, and gradients summed over the heads of a group."""
    operator = operator_of(backend, case)

    def repeated(**given: Any) -> tuple:
        shared = [name for name in ("k", "v", *STATE[:2]) if given[name] is not None]
        return operator(**given | {name: given[name].repeat_interleave(2, dim=2) for name in shared})[:1]

    grouped = run(backend, case, gradients=True, of=("o",))
    wanted = fed(repeated, case, gradients=True)
    assert_same({name: grouped[name] for name in wanted}, wanted, case, sizes=sizes(case))


@sliding(cases=sliding_window_cases(scale=None))
def test_the_default_scale_is_one_over_the_root_of_the_head_dim(backend, case: SlidingWindowCase):
    """And a scale multiplies the scores, nothing else."""
    wanted = run(backend, case)
    assert_same(run(backend, case.changed(scale=case.state**-0.5)), wanted, case)
    by_hand = case.changed(q=case.inputs()["q"] * case.state**-0.5, scale=1.0)
    assert_same(run(backend, by_hand), wanted, case)


@sliding(cases=sliding_window_cases(DTYPES))
def test_large_scores_are_finite(backend, case: SlidingWindowCase):
    """Scores far beyond the range of exp, forward and backward, where the softmax picks one token."""
    for name, tensor in run(backend, case.changed(scale=3000.0), gradients=True).items():
        assert torch.isfinite(tensor).all(), f"{name} must be finite: {case!r}"


@sliding(cases=sliding_window_cases(EXACT), share=0.5)
def test_scores_may_all_be_low(backend, case: SlidingWindowCase):
    """Nothing that stands for a key out of the window competes with keys of scores down to -32,768."""
    rounding.check_low_scores(backend, case)


FEW_OF_MANY = (0, 1, 20, 257)  # tokens that a state of hundreds of places holds, one number for each row


@st.composite
def wide_windows(draw: st.DrawFn) -> SlidingWindowCase:
    """A step, or a prompt of a few tokens, in a window of several blocks."""
    length, behind = draw(st.sampled_from(((1, True), (1, True), (4, True), (4, False))))  # steps above all
    fixed = {"batch": len(FEW_OF_MANY), "length": length, "initial_state": behind, "groups": 1, "heads": 2}
    fixed |= {"window": draw(st.sampled_from((300, 600))), "packed": False}
    return draw(
        sliding_window_cases(EXACT, asks="none", valid=draw(st.sampled_from(("none", "some"))), **fixed)
    )


@sliding(cases=wide_windows(), share=0.25)
def test_scores_may_all_be_low_behind_a_state_that_is_mostly_absent(backend, case: SlidingWindowCase):
    """Blocks of places without a token stand for no score, not even for one of 0; without a state neither."""
    if case.initial_state:
        places = torch.arange(case.window - 1) - (case.window - 1)
        present = places >= -torch.tensor(FEW_OF_MANY)[:, None]
        values = case.inputs()["initial_v"].masked_fill(~present[..., None, None], 0)
        case = case.changed(present=present, initial_v=values)
    rounding.check_low_scores_of_all(backend, case)


@sliding(cases=sliding_window_cases(rounding.HALVES[1:], initial_state=False), share=0.5)
def test_large_scores_are_formed_in_float32(backend, case: SlidingWindowCase):
    """No score, and neither q nor k times the scale, is rounded to the dtype of q."""
    rounding.check_scores(backend, case)


@sliding(cases=sliding_window_cases())
def test_attention_is_a_mean_of_the_values_it_sees(backend, case: SlidingWindowCase):
    """Equal values come out unchanged where a token asks; a scale of 0 weighs all alike."""
    given, (_, asking) = case.inputs(), there_and_asking(case)
    ones = {name: torch.ones_like(given[name]) for name in ("v", "initial_v") if given[name] is not None}
    o = run(backend, case.changed(**ones))["o"]
    assert_same({"o": o}, {"o": torch.ones_like(o) * asking[..., None, None]}, case)
    level = case.changed(scale=0.0)
    assert_same({"o": run(backend, level)["o"]}, {"o": run(reference, level)["o"]}, case)


def check_matches_attention_under_a_mask(backend: Any, case: SlidingWindowCase) -> None:
    """What the reference, a loop, would take long for."""
    masked, wide = case.flat(by_mask), case.changed(**in_float64(case.inputs()))
    truth, own = fed(masked, wide, gradients=True), fed(masked, case, gradients=True)
    assert_matches(run(backend, case, gradients=True), truth, own, case, sizes(case))


@st.composite
def model_sizes(draw: st.DrawFn) -> SlidingWindowCase:
    sizes = {"batch": 1, "length": 600, "heads": 2, "groups": 1, "state": 128, "head_dim": 128}
    masks = {"asks": "none", "valid": "none", "packed": False, "initial_state": True}
    return draw(sliding_window_cases(["float32"], window=256, scale=None, **sizes, **masks))


@sliding(cases=model_sizes(), share=0.05)
def test_sizes_of_a_model_match_attention_under_a_mask(backend, case: SlidingWindowCase):
    """What begins at a size: head dims of 128, a window of 256, many tokens; values and gradients."""
    check_matches_attention_under_a_mask(backend, case)


@st.composite
def long_rows(draw: st.DrawFn) -> SlidingWindowCase:
    sizes = {"batch": 2, "length": 700, "heads": 2, "groups": 2, "state": 3, "head_dim": 3}
    window = draw(st.sampled_from((64, 65, 127, 128, 129, 256)))
    return draw(sliding_window_cases(window=window, valid="some", packed=True, initial_state=True, **sizes))


@sliding(cases=long_rows(), share=0.15)
def test_long_packed_rows_with_padding_match_attention_under_a_mask(backend, case: SlidingWindowCase):
    """Windows about the sizes of blocks, over padding and sequences of any length."""
    check_matches_attention_under_a_mask(backend, case)


@pytest.mark.needs("sliding_window_attention")
def test_samples_may_begin_where_blocks_do(backend):
    """Windows of a block or more, samples that begin at its borders and beside them."""
    case = large_cases.sliding(1100, 2, 1, 3, 150, batch=4)
    everyone = torch.ones(case.shape, dtype=torch.bool)
    sequence = packed_rows.ids_of(packed_rows.samples_at_borders(1100), everyone, seed=1, draw=1)
    check_matches_attention_under_a_mask(backend, case.changed(sequence=sequence))


@pytest.mark.needs("sliding_window_attention")
def test_a_wide_window_costs_its_state_alone(backend):
    """Nothing is as large as tokens times window."""
    q, k, v = (torch.randn(1, 3, 1, 2) for _ in range(3))
    o, state = backend.sliding_window_attention(q, k, v, 200_000)
    assert o.shape == (1, 3, 1, 2) and state.k.shape == (1, 199_999, 1, 2)
    assert int(state.present.sum()) == 3
