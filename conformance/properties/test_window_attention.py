"""`window_attention`: softmax among the tokens of one row that share an id, and nobody else."""

from __future__ import annotations

from functools import partial

import torch

from ..harness import long_rows, operator_checks, rounding
from ..harness.compare import assert_exact, assert_same, assert_zero
from ..harness.operator_cases import (
    DTYPES,
    EXACT,
    WindowCase,
    fed,
    gradients_of,
    property_of,
    run,
    window_cases,
)

windows = partial(property_of, "window_attention")

globals().update(operator_checks.call_properties("window_attention", window_cases))
globals().update(long_rows.gap_properties("window_attention"))


@windows(cases=window_cases())
def test_other_windows_do_not_matter(backend, case: WindowCase):
    """Locality: an edit of all other windows, and of tokens in none, leaves a window as it was."""
    ids, before = case.inputs()["window_id"], run(backend, case)["o"]
    for window in range(case.windows):
        after = run(backend, case.with_other_tokens(ids != window))["o"]
        inside = (ids == window)[..., None, None]
        assert_same({"window": after * inside}, {"window": before * inside}, case)


@windows(cases=window_cases(windows=2))
def test_a_token_sees_all_of_its_window_and_nothing_else(backend, case: WindowCase):
    """Gradients: later tokens of the window included, no causal mask; exactly zero elsewhere."""
    ids = case.inputs()["window_id"]
    for t in range(0, case.length, 5):
        # a sum, so that weights, which are positive, cannot cancel over heads of one group
        found = gradients_of(backend, case, lambda o, t=t: o[:, t].sum((1, 2)))
        seen = (ids == ids[:, t : t + 1]) & (ids >= 0)
        for name in ("k", "v"):
            assert_zero(found[f"grad {name}"][~seen], case, f"grad {name} of what token {t} cannot see")
        reached = found["grad v"].flatten(2).abs().amax(-1) > 0
        assert_exact(reached, seen, case, f"tokens that token {t} reads")


@windows(cases=window_cases())
def test_tokens_in_no_window_give_zero_and_get_no_gradient(backend, case: WindowCase):
    """Id -1 is text and padding: exactly zero, both ways, whatever stands there."""
    outside = case.inputs()["window_id"] < 0
    clean = run(backend, case, gradients=True)
    for name, result in clean.items():
        assert_zero(result[outside], case, f"{name} outside windows")
    found = run(backend, case.with_nan_at(outside), gradients=True)
    assert_same(found, clean, case, sizes=partial(operator_checks.sizes_of_differences, case))


@windows(cases=window_cases())
def test_permuting_the_tokens_permutes_the_result(backend, case: WindowCase):
    """Attention has no order; windows need not be contiguous."""
    order = torch.randperm(case.length, generator=torch.Generator().manual_seed(case.seed))
    permuted = {name: case.inputs()[name][:, order] for name in (*case.tokens, *case.masks)}
    wanted = run(backend, case)["o"][:, order]
    assert_same(run(backend, case.changed(**permuted)), {"o": wanted}, case)


@windows(cases=window_cases())
def test_renumbering_the_windows_changes_nothing(backend, case: WindowCase):
    """Ids only say what belongs together in one row: large, sparse, equal in their last or first bits."""
    ids, wanted = case.inputs()["window_id"], run(backend, case)["o"]
    largest = 2**63 - 1 - case.windows
    for first, step in ((0, 1_000_003), (2**33, 2**32), (2**26, 1), (largest, 1)):
        renamed = torch.where(ids >= 0, first + step * (case.windows - ids), ids)
        found, name = run(backend, case.changed(window_id=renamed))["o"], f"o of ids {renamed.tolist()}"
        assert_same({name: found}, {name: wanted}, case)
    rows = torch.arange(case.batch)[:, None]
    for stride in (1, 1000, 2**20):  # no number joins row and id
        apart = torch.where(ids >= 0, ids + stride * (case.batch - rows), ids)
        found, name = run(backend, case.changed(window_id=apart))["o"], f"o of ids {apart.tolist()}"
        assert_same({name: found}, {name: wanted}, case)


@windows(cases=window_cases())
def test_attention_is_a_mean_of_the_values_it_sees(backend, case: WindowCase):
    """Equal values come out unchanged, equal keys, or a scale of 0, weigh all tokens of the window alike."""
    given = case.inputs()
    ids, inside = given["window_id"], (given["window_id"] >= 0)[..., None, None]
    ones = run(backend, case.changed(v=torch.ones_like(given["v"])))["o"]
    assert_same({"o": ones}, {"o": torch.ones_like(ones) * inside}, case)
    mates = ((ids[:, :, None] == ids[:, None, :]) & (ids >= 0)[:, :, None]).to(given["v"])
    share = mates / mates.sum(-1, keepdim=True).clamp_min(1)
    mean = torch.einsum("bij,bjgp->bigp", share, given["v"]).repeat_interleave(case.ratio, dim=2)
    for same in ({"k": torch.ones_like(given["k"])}, {"scale": 0.0}):
        assert_same(run(backend, case.changed(**same)), {"o": mean}, case)


@windows(cases=window_cases(groups=2, heads=4))
def test_groups_equal_repeated_heads(backend, case: WindowCase):
    """Values, and gradients summed over the heads of a group."""

    def repeated(k, v, **rest):
        k, v = (tensor.repeat_interleave(case.ratio, dim=2) for tensor in (k, v))
        return backend.window_attention(k=k, v=v, **rest)

    sizes = partial(operator_checks.sizes_of_gradients, case)
    found, wanted = run(backend, case, gradients=True), fed(repeated, case, gradients=True)
    assert_same(found, wanted, case, sizes=sizes)


@windows(cases=window_cases(scale=None))
def test_the_default_scale_is_one_over_the_root_of_the_head_dim(backend, case: WindowCase):
    """And a scale multiplies the scores, nothing else."""
    wanted, scale = run(backend, case), case.state**-0.5
    assert_same(run(backend, case.changed(scale=scale)), wanted, case)
    assert_same(run(backend, case.changed(q=case.inputs()["q"] * scale, scale=1.0)), wanted, case)


@windows(cases=window_cases(DTYPES))
def test_large_scores_are_finite(backend, case: WindowCase):
    """Scores far beyond the range of exp, forward and backward, where the softmax picks one token."""
    for name, tensor in run(backend, case.changed(scale=3000.0), gradients=True).items():
        assert torch.isfinite(tensor).all(), f"{name} must be finite: {case!r}"


@windows(cases=window_cases(EXACT), share=0.5)
def test_scores_may_all_be_low(backend, case: WindowCase):
    """Nothing that stands for a key out of the window competes with keys of scores down to -32,768."""
    rounding.check_low_scores(backend, case)


@windows(cases=window_cases(("float16", "bfloat16")))
def test_numbers_at_the_edge_of_half_precision_match_the_reference(backend, case: WindowCase):
    """q and k of 300: their products, and their sum, overflow float16; the softmax does not care."""
    given = case.inputs()
    edge = case.changed(q=given["q"] * 300, k=given["k"] * 300, scale=1e-5)
    operator_checks.check_matches_the_reference(backend, edge)


@windows(cases=window_cases(rounding.HALVES[1:]), share=0.5)
def test_large_scores_are_formed_in_float32(backend, case: WindowCase):
    """No score, and neither q nor k times the scale, is rounded to the dtype of q."""
    rounding.check_scores(backend, case)


@windows(cases=window_cases(batch=3))
def test_the_result_does_not_depend_on_the_batch(backend, case: WindowCase):
    """The same id in another row is another window."""
    together = run(backend, case)["o"]
    for row in range(case.batch):
        assert_same(run(backend, case.row(row)), {"o": together[row : row + 1]}, case)
