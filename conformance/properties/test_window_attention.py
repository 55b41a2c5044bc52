"""`window_attention`: softmax among the tokens of one row that share an id, and nobody else."""

from __future__ import annotations

from functools import partial

import torch

from ..harness import operator_checks
from ..harness.compare import assert_exact, assert_same, assert_zero, edited, evaluate
from ..harness.operator_cases import DTYPES, WindowCase, holds, window_cases

windows = partial(holds, "window_attention")


@windows(case=window_cases(DTYPES))
def test_attention_and_gradients_match_the_reference(backend, case: WindowCase):
    """P6, P17: values and every gradient, ragged windows, in every dtype."""
    operator_checks.check_matches_the_reference(backend, case)


@windows(case=window_cases())
def test_other_windows_do_not_matter(backend, case: WindowCase):
    """Locality: an edit of all other windows, and of tokens in none, leaves a window as it was."""
    inputs, others = case.inputs(), case.inputs(draw=1)
    before = backend.window_attention(**inputs)
    for window in range(case.windows):
        outside = inputs["window_id"] != window
        after = backend.window_attention(**edited(inputs, others, outside))
        inside = (~outside)[..., None, None]
        assert_same({"window": after * inside}, {"window": before * inside}, case)


@windows(case=window_cases(windows=2))
def test_a_token_sees_all_of_its_window_and_nothing_else(backend, case: WindowCase):
    """Gradients: later tokens of the window included, no causal mask; exactly zero elsewhere."""
    inputs = case.inputs()
    for t in range(0, case.length, 5):
        found = evaluate(lambda t=t, **given: backend.window_attention(**given)[:, t], inputs, gradients=True)
        seen = (inputs["window_id"] == inputs["window_id"][:, t : t + 1]) & (inputs["window_id"] >= 0)
        for name in ("k", "v"):
            assert_zero(
                found[f"gradient of {name}"][~seen], case, f"gradient from token {t} to unseen {name}"
            )
        reached = found["gradient of v"].flatten(2).abs().amax(-1) > 0
        assert_exact(reached, seen, case, f"tokens that token {t} reads")


@windows(case=window_cases())
def test_tokens_in_no_window_give_zero_and_get_no_gradient(backend, case: WindowCase):
    """Id -1 is text and padding: exactly zero, both ways, whatever stands there."""
    inputs = case.inputs()
    outside = inputs["window_id"] < 0
    clean = evaluate(backend.window_attention, inputs, gradients=True)
    for name, result in clean.items():
        assert_zero(result[outside], case, f"{name} outside windows")
    spoilt = {name: torch.full_like(inputs[name], float("nan")) for name in ("q", "k", "v")}
    dirty = evaluate(backend.window_attention, edited(inputs, spoilt, outside), gradients=True)
    assert_same(dirty, clean, case)


@windows(case=window_cases())
def test_permuting_the_tokens_permutes_the_result(backend, case: WindowCase):
    """P22: attention has no order; windows need not be contiguous."""
    inputs = case.inputs()
    order = torch.randperm(case.length, generator=torch.Generator().manual_seed(case.seed))
    permuted = {k: v[:, order] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    wanted = backend.window_attention(**inputs)[:, order]
    assert_same({"o": backend.window_attention(**permuted)}, {"o": wanted}, case)


@windows(case=window_cases())
def test_renumbering_the_windows_changes_nothing(backend, case: WindowCase):
    """Ids only say what belongs together in one row: large, sparse ids, other ones in every row."""
    inputs = case.inputs()
    ids = inputs["window_id"]
    sparse = torch.where(ids >= 0, 1_000_003 * (case.windows - ids) + torch.arange(case.batch)[:, None], ids)
    wanted = {"o": backend.window_attention(**inputs)}
    assert_same({"o": backend.window_attention(**{**inputs, "window_id": sparse})}, wanted, case)


@windows(case=window_cases())
def test_attention_is_a_mean_of_the_values_it_sees(backend, case: WindowCase):
    """Equal values come out unchanged, equal keys weigh all tokens of the window alike."""
    inputs = case.inputs()
    inside = (inputs["window_id"] >= 0)[..., None, None]
    constant = torch.ones_like(inputs["v"])
    ones = backend.window_attention(**{**inputs, "v": constant})
    assert_same({"o": ones}, {"o": torch.ones_like(ones) * inside}, case)
    ids = inputs["window_id"]
    mates = ((ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None]).to(inputs["v"])
    share = mates / mates.sum(-1, keepdim=True).clamp_min(1)
    mean = torch.einsum("bij,bjgp->bigp", share, inputs["v"]).repeat_interleave(
        case.heads // case.groups, dim=2
    )
    equal_keys = backend.window_attention(**{**inputs, "k": torch.ones_like(inputs["k"])})
    assert_same({"o": equal_keys}, {"o": mean}, case)


@windows(case=window_cases(groups=2, heads=4))
def test_groups_equal_repeated_heads(backend, case: WindowCase):
    """P11: values, and gradients summed over the heads of a group."""
    inputs = case.inputs()

    def repeated(k, v, **rest):
        return backend.window_attention(
            k=k.repeat_interleave(2, dim=2), v=v.repeat_interleave(2, dim=2), **rest
        )

    grouped = evaluate(backend.window_attention, inputs, gradients=True)
    assert_same(grouped, evaluate(repeated, inputs, gradients=True), case)


@windows(case=window_cases(scale=None))
def test_the_default_scale_is_one_over_the_root_of_the_head_dim(backend, case: WindowCase):
    """P20: and a scale multiplies the scores, nothing else."""
    inputs = case.inputs()
    wanted = {"o": backend.window_attention(**inputs)}
    explicit = {**inputs, "scale": case.state**-0.5}
    assert_same({"o": backend.window_attention(**explicit)}, wanted, case)
    by_hand = {**inputs, "q": inputs["q"] * case.state**-0.5, "scale": 1.0}
    assert_same({"o": backend.window_attention(**by_hand)}, wanted, case)


@windows(case=window_cases(DTYPES))
def test_large_scores_are_finite(backend, case: WindowCase):
    """P3, P4: scores far beyond the range of exp, forward and backward, where the softmax picks one token."""
    inputs = case.inputs()
    inputs["scale"] = 3000.0
    for name, tensor in evaluate(backend.window_attention, inputs, gradients=True).items():
        assert torch.isfinite(tensor).all(), f"{name} must be finite: {case!r}"


@windows(case=window_cases(batch=3))
def test_the_result_does_not_depend_on_the_batch(backend, case: WindowCase):
    """P16: the same id in another row is another window."""
    inputs = case.inputs()
    together = backend.window_attention(**inputs)
    for row in range(case.batch):
        one = {k: v[row : row + 1] if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        assert_same({"o": backend.window_attention(**one)}, {"o": together[row : row + 1]}, case)


@windows(case=window_cases(batch=2, windows=3))
def test_windows_changed_in_place_are_the_new_ones(backend, case: WindowCase):
    """Nothing about a tensor of ids is remembered from one call to the next."""
    inputs = case.inputs()
    backend.window_attention(**inputs)
    ids = inputs["window_id"]
    changed = ids.roll(1, 1) % 3
    wanted = backend.window_attention(**{**inputs, "window_id": changed})
    ids.copy_(changed)
    assert_same({"o": backend.window_attention(**inputs)}, {"o": wanted}, case)


test_strides_do_not_matter = windows(case=window_cases(DTYPES))(operator_checks.check_strides_do_not_matter)
test_inputs_are_left_as_they_were = windows(case=window_cases())(
    operator_checks.check_inputs_are_left_as_they_were
)
test_autocast_changes_nothing = windows(case=window_cases(("bfloat16", "float32")))(
    operator_checks.check_autocast_changes_nothing
)
test_one_gradient_alone_equals_its_share_of_all = windows(case=window_cases())(
    operator_checks.check_one_gradient_alone_equals_its_share_of_all
)
test_uninitialised_memory_is_never_read = windows(case=window_cases(), share=0.5)(
    operator_checks.check_uninitialised_memory_is_never_read
)
