"""`sliding_window_attention`: softmax over the last valid tokens of a row, the token itself included."""

from __future__ import annotations

from functools import partial
from typing import Any

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
)
from ..harness.operator_cases import DTYPES, holds
from ..harness.operator_checks import operator_of
from ..harness.second_sliding_window import pairs_and_rest, sizes_of_gradients
from ..harness.second_sliding_window import sliding_window_attention as by_mask
from ..harness.sliding_window_cases import (
    STATE,
    SlidingWindowCase,
    row_of,
    sliding_window_cases,
    tokens_of,
)

sliding = partial(holds, "sliding_window_attention")
whole_rows = partial(sliding_window_cases, packed=False, initial_state=False)
MASKS = ("asks", "valid", "sequence", "present")


def check_matches(backend: Any, case: SlidingWindowCase, inputs: dict[str, Any], output: int | None) -> None:
    """All outputs, or one alone, and the gradient of every input, within the bounds of `assert_matches`."""

    def outputs_of(of: Any, given: dict[str, Any]) -> dict[str, torch.Tensor]:
        operator = operator_of(of, case)
        chosen = slice(None) if output is None else slice(output, output + 1)
        return evaluate(lambda **tensors: operator(**tensors)[chosen], given, gradients=True)

    truth, own = outputs_of(reference, in_float64(inputs)), outputs_of(reference, inputs)
    assert_matches(outputs_of(backend, inputs), truth, own, case, partial(sizes_of_gradients, inputs))


def seen_by(case: SlidingWindowCase, inputs: dict[str, Any]) -> torch.Tensor:
    """(B, L, L) bool: which tokens each token reads."""
    masks = [inputs.get(name) for name in MASKS]
    return pairs_and_rest(case.window, case.length, case.batch, *masks)[0][:, :, -case.length :]


def joined(backend: Any, case: SlidingWindowCase, cuts: list[int], **given: Any) -> tuple[torch.Tensor, ...]:
    """The operator piece by piece, each from the state of the one before."""
    operator = operator_of(backend, case)
    start = {name: given[name] for name in STATE if name in given}
    outputs = []
    for first, end in zip([0, *cuts], [*cuts, case.length], strict=True):
        o, *state = operator(**tokens_of(given, slice(first, end)), **start)
        start = dict(zip(STATE, state, strict=True))
        outputs.append(o)
    return (torch.cat(outputs, dim=1), *state)


@sliding(case=sliding_window_cases(DTYPES))
def test_attention_states_and_gradients_match_the_reference(backend, case: SlidingWindowCase):
    """Values, states and every gradient, the initial state's too, in every dtype."""
    check_matches(backend, case, case.inputs(), None)


@sliding(case=sliding_window_cases(), share=0.5)
def test_each_output_alone_has_the_gradients_of_the_reference(backend, case: SlidingWindowCase):
    """Training uses o alone, a chunk of a prompt the state alone."""
    for output in range(3):
        check_matches(backend, case, case.inputs(), output)


@sliding(case=sliding_window_cases())
def test_a_token_reads_the_last_tokens_of_its_row_and_nothing_else(backend, case: SlidingWindowCase):
    """By gradients: the window's end, the future, padding, sequences, rows; exactly zero elsewhere."""
    inputs, operator = case.inputs(), operator_of(backend, case)
    seen = seen_by(case, inputs)

    def total(t: int, **given: Any) -> torch.Tensor:
        return operator(**given)[0][:, t].sum((1, 2))  # whose heads' shares of a key cannot cancel

    for t in range(0, case.length, 3):
        found = evaluate(partial(total, t), inputs, gradients=True)
        for name in ("k", "v"):
            unseen = found[f"gradient of {name}"][~seen[:, t]]
            assert_zero(unseen, case, f"gradient from token {t} to unseen {name}")
        reached = found["gradient of v"].flatten(2).abs().amax(-1) > 0
        assert_exact(reached, seen[:, t], case, f"tokens that token {t} reads")


@sliding(case=sliding_window_cases())
def test_an_output_never_depends_on_later_tokens(backend, case: SlidingWindowCase):
    """Causality: whatever comes later, an output is what it was."""
    operator, inputs, others = operator_of(backend, case), case.inputs(), case.inputs(draw=1)
    before = operator(**inputs)[0]
    for cut in range(0, case.length, 5):
        later = (torch.arange(case.length) >= cut).expand(case.batch, -1)
        after = operator(**edited(inputs, others, later))[0]
        assert_same({"o": after[:, :cut]}, {"o": before[:, :cut]}, case)


@sliding(case=sliding_window_cases(packed=False))
def test_splitting_anywhere_changes_nothing(backend, case: SlidingWindowCase):
    """Two pieces, and their gradients, from any cut; the state between them is passed on."""
    inputs = case.inputs()
    wanted = evaluate(operator_of(backend, case), inputs, gradients=True)
    sizes = partial(sizes_of_gradients, inputs)
    for cut in range(1, case.length, 4):
        found = evaluate(partial(joined, backend, case, [cut]), inputs, gradients=True)
        assert_same(found, wanted, case, sizes=sizes)


@sliding(case=sliding_window_cases())
def test_one_token_at_a_time_equals_the_whole(backend, case: SlidingWindowCase):
    """Decoding: without gradients, from a state of any length, each step's state the next one's."""
    inputs = case.inputs()
    if case.packed:  # a piece that begins a sequence starts without a state
        inputs["sequence"] = inputs["sequence"] * 0
    every = list(range(1, case.length))
    with torch.no_grad():
        wanted = evaluate(operator_of(backend, case), inputs)
        assert_same(evaluate(partial(joined, backend, case, every), inputs), wanted, case)


@sliding(case=sliding_window_cases(length=1, packed=False))
def test_gradients_of_one_token_and_its_state_match_the_reference(backend, case: SlidingWindowCase):
    """A step with gradients: a prompt of one token behind another."""
    check_matches(backend, case, case.inputs(), None)


@sliding(case=sliding_window_cases(length=1))
def test_a_step_leaves_its_arguments_as_they_were(backend, case: SlidingWindowCase):
    """Also where no gradient is asked for and a state could be overwritten."""
    inputs = case.inputs()
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    with torch.no_grad():
        operator_of(backend, case)(**inputs)
    for name, copy in copies.items():
        assert_exact(tensors[name], copy, case, name)


@sliding(case=sliding_window_cases(DTYPES))
def test_the_state_is_the_last_valid_keys_and_values(backend, case: SlidingWindowCase):
    """Bit by bit, in the dtype of the keys; zeros for what is missing, before what is there."""
    inputs = case.inputs()
    before = {name: inputs.get(name) for name in STATE}
    start = None if before["present"] is None else reference.WindowState(*before.values())
    rest = {name: value for name, value in inputs.items() if name not in STATE}
    wanted = by_mask(**in_float64(rest), initial_state=start)[1]
    found = operator_of(backend, case)(**inputs)[1:]
    for name, got, want in zip(("k", "v", "present"), found, wanted, strict=True):
        assert_exact(got, want.to(got.dtype), case, f"the state's {name}")
        kind = torch.bool if name == "present" else inputs[name].dtype
        assert got.dtype == kind, f"the state's {name} must be {kind}, got {got.dtype}: {case!r}"


@sliding(case=sliding_window_cases(valid="some", packed=False))
def test_padding_anywhere_is_as_if_absent(backend, case: SlidingWindowCase):
    """Padding inside a row makes no window shorter: each row without it gives the same."""
    operator, inputs = operator_of(backend, case), case.inputs()
    together = operator(**inputs)
    for row in range(case.batch):
        there = inputs["valid"][row]
        if not there.any():
            continue
        one = row_of(inputs, row)
        alone = operator(**tokens_of(one, there), **{name: one[name] for name in STATE if name in one})
        wanted = (together[0][row : row + 1, there], *(part[row : row + 1] for part in together[1:]))
        named = (dict(zip(("o", "k", "v", "present"), results, strict=True)) for results in (alone, wanted))
        assert_same(*named, case)


@sliding(case=sliding_window_cases(DTYPES))
def test_who_does_not_ask_gives_zero_and_is_read_all_the_same(backend, case: SlidingWindowCase):
    """o and the gradient of q are exactly zero there; the others' o is what it is when all ask."""
    operator, inputs = operator_of(backend, case), case.inputs()
    asking = torch.ones(case.batch, case.length, dtype=torch.bool)
    for name in ("asks", "valid"):
        asking = asking if inputs[name] is None else asking & inputs[name]
    found = evaluate(operator, inputs, gradients=True)
    assert_zero(found["output 0"][~asking], case, "o where a token does not ask")
    assert_zero(found["gradient of q"][~asking], case, "gradient of q where a token does not ask")
    everyone = operator(**inputs | {"asks": None})[0]
    assert_same({"o": found["output 0"][asking]}, {"o": everyone[asking]}, case)


@sliding(case=sliding_window_cases())
def test_masked_tokens_may_hold_anything(backend, case: SlidingWindowCase):
    """NaN in padding, in what a state lacks, and in queries that nobody asks changes nothing, both ways."""
    operator, inputs = operator_of(backend, case), case.inputs()
    clean = evaluate(operator, inputs, gradients=True)
    there = torch.ones(case.batch, case.length, dtype=torch.bool)
    there = there if inputs["valid"] is None else inputs["valid"]
    asking = there if inputs["asks"] is None else there & inputs["asks"]
    where = {"q": asking, "k": there, "v": there} | dict.fromkeys(STATE[:2], inputs.get("present"))
    spoilt = {
        name: inputs[name].where(mask[..., None, None], float("nan"))
        for name, mask in where.items()
        if name in inputs
    }
    assert_same(evaluate(operator, inputs | spoilt, gradients=True), clean, case)
    with torch.no_grad():
        assert_same(evaluate(operator, inputs | spoilt), evaluate(operator, inputs), case)


@sliding(case=sliding_window_cases(packed=True, initial_state=False, valid="none"))
def test_a_packed_row_equals_its_samples_alone(backend, case: SlidingWindowCase):
    """Values, and the gradients that samples of one row share nothing of; the state is the last one's."""
    operator, inputs = operator_of(backend, case), case.inputs()
    packed = evaluate(lambda **given: operator(**given)[0], inputs, gradients=True)
    state = operator(**inputs)[1:]
    for row in range(case.batch):
        for number in inputs["sequence"][row].unique().tolist():
            own = inputs["sequence"][row] == number
            sample = tokens_of(row_of(inputs, row), own) | {"sequence": None}
            alone = operator(**sample)
            assert_same({"o": alone[0]}, {"o": packed["output 0"][row : row + 1, own]}, case)
        names = ("k", "v", "present")
        last = dict(zip(names, (part[row : row + 1] for part in state), strict=True))
        assert_same(dict(zip(names, alone[1:], strict=True)), last, case)


@sliding(case=sliding_window_cases(batch=3))
def test_permuting_the_rows_permutes_the_result(backend, case: SlidingWindowCase):
    """No row knows of another."""
    operator, inputs = operator_of(backend, case), case.inputs()
    order = torch.tensor([2, 0, 1])
    permuted = {k: v[order] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    wanted = {str(i): output[order] for i, output in enumerate(operator(**inputs))}
    found = {str(i): output for i, output in enumerate(operator(**permuted))}
    assert_same(found, wanted, case)
    for row in range(case.batch):
        alone = operator(**row_of(inputs, row))[0]
        assert_same({"o": alone}, {"o": operator(**inputs)[0][row : row + 1]}, case)


@sliding(case=whole_rows(window=1))
def test_a_window_of_one_gives_each_token_its_own_value(backend, case: SlidingWindowCase):
    """And no gradient to q and k, which decide nothing."""
    inputs = case.inputs() | {"asks": None, "valid": None}
    found = evaluate(operator_of(backend, case), inputs, gradients=True)
    values = inputs["v"].repeat_interleave(case.heads // case.groups, dim=2)
    assert_same({"o": found["output 0"]}, {"o": values}, case)
    for name in ("q", "k"):
        assert found[f"gradient of {name}"].abs().max() < 1e-5, f"gradient of {name} must be 0: {case!r}"


@sliding(case=whole_rows(window=1000))
def test_a_window_longer_than_the_row_is_causal_attention(backend, case: SlidingWindowCase):
    """As long as the row, longer by one, or by much."""
    inputs = case.inputs()
    wanted = {"o": operator_of(backend, case)(**inputs)[0]}
    for window in (case.length, case.length + 1, 3 * case.length):
        found = {"o": operator_of(backend, case)(**inputs | {"window": window})[0]}
        assert_same(found, wanted, case)


@sliding(case=sliding_window_cases(groups=2, heads=4))
def test_groups_equal_repeated_heads(backend, case: SlidingWindowCase):
    """Values, and gradients summed over the heads of a group."""
    operator, inputs = operator_of(backend, case), case.inputs()

    def repeated(**given: Any) -> torch.Tensor:
        shared = [name for name in ("k", "v", *STATE[:2]) if name in given]
        return operator(**given | {name: given[name].repeat_interleave(2, dim=2) for name in shared})[0]

    grouped = evaluate(lambda **given: operator(**given)[0], inputs, gradients=True)
    sizes = partial(sizes_of_gradients, inputs)
    assert_same(grouped, evaluate(repeated, inputs, gradients=True), case, sizes=sizes)


@sliding(case=sliding_window_cases(scale=None))
def test_the_default_scale_is_one_over_the_root_of_the_head_dim(backend, case: SlidingWindowCase):
    """And a scale multiplies the scores, nothing else."""
    operator, inputs = operator_of(backend, case), case.inputs()
    wanted = {"o": operator(**inputs)[0]}
    assert_same({"o": operator(**inputs | {"scale": case.state**-0.5})[0]}, wanted, case)
    by_hand = inputs | {"q": inputs["q"] * case.state**-0.5, "scale": 1.0}
    assert_same({"o": operator(**by_hand)[0]}, wanted, case)


@sliding(case=sliding_window_cases(DTYPES))
def test_large_scores_are_finite(backend, case: SlidingWindowCase):
    """Scores far beyond the range of exp, forward and backward, where the softmax picks one token."""
    inputs = case.inputs() | {"scale": 3000.0}
    for name, tensor in evaluate(operator_of(backend, case), inputs, gradients=True).items():
        assert torch.isfinite(tensor).all(), f"{name} must be finite: {case!r}"


@sliding(case=sliding_window_cases())
def test_attention_is_a_mean_of_the_values_it_sees(backend, case: SlidingWindowCase):
    """Equal values come out unchanged where a token asks."""
    operator, inputs = operator_of(backend, case), case.inputs()
    ones = {name: torch.ones_like(inputs[name]) for name in ("v", "initial_v") if name in inputs}
    o = operator(**inputs | ones)[0]
    asking = torch.ones(case.batch, case.length, dtype=torch.bool)
    for name in ("asks", "valid"):
        asking = asking if inputs[name] is None else asking & inputs[name]
    assert_same({"o": o}, {"o": torch.ones_like(o) * asking[..., None, None]}, case)


LARGE = {"batch": 1, "groups": 1, "heads": 2, "asks": "none", "valid": "none", "packed": False, "scale": None}


@sliding(
    case=sliding_window_cases(
        ["float32"],
        length=1500,
        state=128,
        head_dim=128,
        window=256,
        initial_state=True,
        **LARGE,
    ),
    share=0.05,
)
def test_sizes_of_a_model_match_attention_under_a_mask(backend, case: SlidingWindowCase):
    """What begins at a size: head dims of 128, a window of 256, many tokens; values and gradients."""
    inputs = case.inputs()

    def masked(**given: Any) -> tuple[torch.Tensor, ...]:
        return case.flat(by_mask)(**given)

    found = evaluate(operator_of(backend, case), inputs, gradients=True)
    truth, own = evaluate(masked, in_float64(inputs), True), evaluate(masked, inputs, True)
    assert_matches(found, truth, own, case, partial(sizes_of_gradients, inputs))


@st.composite
def long_cases(draw: st.DrawFn) -> SlidingWindowCase:
    sizes = {"batch": 2, "length": 700, "heads": 2, "groups": 2, "state": 3, "head_dim": 3}
    window = draw(st.sampled_from((64, 65, 127, 128, 129, 256)))
    return draw(sliding_window_cases(window=window, valid="some", packed=True, initial_state=True, **sizes))


@sliding(case=long_cases(), share=0.15)
def test_long_packed_rows_with_padding_match_attention_under_a_mask(backend, case: SlidingWindowCase):
    """Windows about the sizes of blocks, over padding and sequences of any length."""
    inputs = case.inputs()
    found = evaluate(operator_of(backend, case), inputs, gradients=True)
    wanted = evaluate(case.flat(by_mask), inputs, gradients=True)
    assert_same(found, wanted, case, sizes=partial(sizes_of_gradients, inputs))


@pytest.mark.needs("sliding_window_attention")
def test_an_endless_window_needs_no_memory_of_its_size(backend):
    """A state of W - 1 tokens is what a window costs, not more: no table of (L, W)."""
    q, k, v = (torch.randn(1, 3, 1, 2) for _ in range(3))
    o, state = backend.sliding_window_attention(q, k, v, 200_000)
    assert o.shape == (1, 3, 1, 2) and state.k.shape == (1, 199_999, 1, 2)
    assert int(state.present.sum()) == 3


def all_cases(*names: str) -> Any:
    return sliding(case=sliding_window_cases(names) if names else sliding_window_cases())


test_strides_do_not_matter = all_cases(*DTYPES)(operator_checks.check_strides_do_not_matter)
test_inputs_are_left_as_they_were = all_cases()(operator_checks.check_inputs_are_left_as_they_were)
test_autocast_changes_nothing = all_cases("bfloat16", "float32")(
    operator_checks.check_autocast_changes_nothing
)
test_one_gradient_alone_equals_its_share_of_all = all_cases()(
    operator_checks.check_one_gradient_alone_equals_its_share_of_all
)
test_uninitialised_memory_is_never_read = sliding(case=sliding_window_cases(), share=0.5)(
    operator_checks.check_uninitialised_memory_is_never_read
)
