"""`selective_scan`: what one direction of the scan must do, whoever computes it."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import strategies as st

from linmu import reference

from ..harness import large_cases, long_rows, operator_checks, packed_rows, rounding
from ..harness.compare import (
    FLOORS,
    Results,
    assert_exact,
    assert_matches,
    assert_negligible,
    assert_same,
    assert_zero,
    check_form,
    quarters,
)
from ..harness.operator_cases import (
    DTYPES,
    EXACT,
    ScanCase,
    fed,
    gradients_of,
    property_of,
    run,
    scan_cases,
)

LONG = (63, 64, 65, 97, 131)  # around and beyond the chunks that fast implementations work in
TOKENS = ScanCase.tokens
scan = partial(property_of, "selective_scan")


def long_cases(names):
    """More tokens than a chunk, the last one ragged."""
    return st.sampled_from(LONG).flatmap(lambda length: scan_cases(names, length=length))


globals().update(operator_checks.call_properties("selective_scan", scan_cases))
globals().update(packed_rows.packed_properties("selective_scan", scan_cases, long_cases))
globals().update(long_rows.scan_properties("selective_scan"))


@scan(cases=long_cases(EXACT), share=0.4)
def test_long_scans_match_the_reference(backend, case: ScanCase):
    """More tokens than a chunk, the last one ragged; values, state and gradients."""
    operator_checks.check_matches_the_reference(backend, case)


@scan(cases=scan_cases(reverse=False))
def test_forward_scan_never_sees_the_future(backend, case: ScanCase):
    """An edit of later tokens leaves every earlier output as it was."""
    before = run(backend, case)["y"]
    for cut in case.cuts():
        after = run(backend, case.with_other_tokens_from(cut))["y"]
        assert_same({"past": after[:, :cut]}, {"past": before[:, :cut]}, case)


@scan(cases=scan_cases(reverse=True))
def test_reverse_scan_never_sees_the_past(backend, case: ScanCase):
    """An edit of earlier tokens leaves every later output as it was."""
    before = run(backend, case)["y"]
    for cut in case.cuts():
        after = run(backend, case.with_other_tokens_before(cut))["y"]
        assert_same({"rest": after[:, cut:]}, {"rest": before[:, cut:]}, case)


@scan(cases=scan_cases(reverse=False))
def test_no_gradient_of_an_output_reaches_a_later_token(backend, case: ScanCase):
    """Causality of the backward pass, which is a scan of its own."""
    for cut in case.cuts():
        found = gradients_of(backend, case, lambda y, cut=cut: y[:, :cut])
        for name in TOKENS:
            grad = found[f"grad {name}"]
            assert_negligible(grad[:, cut:], grad, case, f"grad {name} of later tokens")


@scan(cases=scan_cases(mask="some"))
def test_masked_tokens_are_as_if_absent(backend, case: ScanCase):
    """No decay, no write, no read: the valid tokens alone give the same outputs and the same state."""
    together = run(backend, case)
    for row in range(case.batch):
        alone = case.row(row)
        kept, start = alone.inputs()["mask"][0], alone.inputs()["initial_state"]
        state = together["final_state"][row : row + 1]
        if not kept.any():
            assert_exact(state, torch.zeros_like(state) if start is None else start, case, "final_state")
            continue
        short = alone.changed(**{name: alone.inputs()[name][:, kept] for name in TOKENS}, mask=None)
        assert_same(
            {"y": together["y"][row : row + 1, kept], "final_state": state}, run(backend, short), case
        )


@scan(cases=scan_cases(mask="some"))
def test_masked_tokens_give_zero_and_get_no_gradient(backend, case: ScanCase):
    """Exactly zero, both ways."""
    found = run(backend, case, gradients=True)
    for name in ("y", *(f"grad {name}" for name in TOKENS)):
        assert_zero(found[name][~case.inputs()["mask"]], case, f"{name} on masked tokens")


@scan(cases=scan_cases(mask="some"))
def test_masked_tokens_may_hold_anything(backend, case: ScanCase):
    """Not even NaN gets from a masked token into values, states or gradients."""
    spoilt = case.with_nan_at(~case.inputs()["mask"])
    assert_same(run(backend, spoilt, gradients=True), run(backend, case, gradients=True), case)


@scan(cases=scan_cases(reverse=False), share=0.5)
def test_splitting_anywhere_changes_nothing(backend, case: ScanCase):
    """Results and gradients of two parts, the state handed over, are those of the whole."""

    def in_two(cut: int, **given):
        whole = case.changed(**given)
        first, state = backend.selective_scan(**whole.part(slice(0, cut)).inputs())
        rest = whole.part(slice(cut, None)).changed(initial_state=state)
        second, state = backend.selective_scan(**rest.inputs())
        return torch.cat([first, second], dim=1), state

    whole = run(backend, case, gradients=True)
    for cut in case.cuts():
        assert_same(fed(partial(in_two, cut), case, gradients=True), whole, case)


@scan(cases=scan_cases(groups=2, heads=4))
def test_groups_equal_repeated_heads(backend, case: ScanCase):
    """Values, and gradients summed over the heads of a group."""

    def repeated(x, B, **rest):
        x, B = (tensor.repeat_interleave(case.ratio, dim=2) for tensor in (x, B))
        return backend.selective_scan(x=x, B=B, **rest)

    assert_same(run(backend, case, gradients=True), fed(repeated, case, gradients=True), case)


@scan(cases=scan_cases())
def test_reversal_equals_flipping_the_sequence(backend, case: ScanCase):
    """Right to left over a sequence is left to right over its mirror image, gradients too."""

    def mirrored(x, dt, B, C, mask, reverse, **rest):
        flipped = {"x": x.flip(1), "dt": dt.flip(1), "B": B.flip(1), "C": C.flip(1)}
        mask = None if mask is None else mask.flip(1)
        y, state = backend.selective_scan(**flipped, mask=mask, reverse=not reverse, **rest)
        return y.flip(1), state

    assert_same(fed(mirrored, case, gradients=True), run(backend, case, gradients=True), case)


@scan(cases=scan_cases(initial_state=False))
def test_scan_is_linear_in_its_input(backend, case: ScanCase):
    """The scan of 2 x₁ - 3 x₂ is twice the one less three times the other."""
    one, other = case.inputs()["x"], case.inputs(draw=1)["x"]
    first, second = run(backend, case), run(backend, case.changed(x=other))
    combined = run(backend, case.changed(x=2 * one - 3 * other))
    for name, whole in combined.items():
        assert_same({name: whole}, {name: 2 * first[name] - 3 * second[name]}, case, factor=10)


@scan(cases=scan_cases(mask="none", initial_state=False, reverse=False))
def test_a_scan_without_decay_is_a_running_sum(backend, case: ScanCase):
    """With A at almost 0 the state adds up everything that was written."""
    given = case.inputs()
    x, B = (given[name].repeat_interleave(case.ratio, dim=2) for name in ("x", "B"))
    writes = torch.einsum("blh,blhn,blhp->blhnp", given["dt"], B, x).cumsum(1)
    wanted = {"y": torch.einsum("blhn,blhnp->blhp", given["C"], writes), "final_state": writes[:, -1]}
    undecayed = case.changed(A=torch.full_like(given["A"], -1e-30))
    assert_same(run(backend, undecayed), wanted, case)


@scan(cases=scan_cases(DTYPES, initial_state=False))
def test_strong_decay_is_finite_and_forgets_everything(backend, case: ScanCase):
    """Decay far below the smallest number leaves the token's own write, and finite gradients."""
    strong = case.changed(A=torch.full_like(case.inputs()["A"], -30000.0))
    found = run(backend, strong, gradients=True)
    for name, tensor in found.items():
        assert torch.isfinite(tensor).all(), f"{name} must be finite under strong decay: {case!r}"
    wide = operator_checks.widened(case).inputs()
    x, B = (wide[name].repeat_interleave(case.ratio, dim=2) for name in ("x", "B"))
    own_write = (wide["dt"] * (wide["C"] * B).sum(-1))[..., None] * x
    if wide["mask"] is not None:
        own_write = own_write * wide["mask"][..., None, None]
    assert_same({"y": found["y"]}, {"y": own_write.to(found["y"].dtype)}, case)


@scan(cases=scan_cases(EXACT))
def test_almost_no_decay_matches_the_reference(backend, case: ScanCase):
    """|A| of 1e-7 and less, down to what float32 takes for none: gradients too, that of A included."""
    A = case.inputs()["A"]
    tiny = -(10.0 ** -torch.linspace(7, 30, len(A), dtype=torch.float64)).to(A)
    operator_checks.check_matches_the_reference(backend, case.changed(A=tiny))


@scan(cases=scan_cases(("float16", "mixed"), initial_state=False))
def test_numbers_at_the_edge_of_half_precision_match_the_reference(backend, case: ScanCase):
    """x of 2,000 and steps of 100: their product overflows float16, the result does not."""
    given = case.inputs()
    x, small = quarters(given["x"], case.seed) * 1000, 2.0**-13
    edge = case.changed(x=x, dt=torch.full_like(given["dt"], 100), B=given["B"] * small, C=given["C"] * small)
    operator_checks.check_matches_the_reference(backend, edge, gradients=False)
    operator_checks.check_matches_the_reference(backend, edge, of=("y",))  # the state's gradient overflows


@scan(cases=scan_cases(rounding.HALVES, length=1, mask="none", initial_state=True), share=0.5)
def test_decays_are_formed_in_float32(backend, case: ScanCase):
    """Neither dt, nor A, nor their product is rounded to the dtype of x."""
    rounding.check_decays(backend, case)


@scan(cases=scan_cases(EXACT, mask="none"), share=0.4)
def test_large_and_tiny_steps_are_finite(backend, case: ScanCase):
    """Steps of 1e-6 and 1e4 side by side overflow nothing, both ways; tiny ones alone, and 0, are kept.

    All match the reference. Differences of sums of logarithms are right, too: in one chunk with large steps
    they lose what is as small as the rounding of these sums, and the gradient of A, which multiplies by 1e4
    what cancels there, need only be finite.
    """
    given = case.inputs()
    dt = given["dt"]
    uneven = case.changed(dt=torch.where(quarters(dt, case.seed) > 0, 1e4, 1e-6).to(dt.dtype))
    truth = run(reference, operator_checks.widened(uneven), gradients=True)
    wanted = {name: tensor.to(dt.dtype) for name, tensor in truth.items()}
    logs = (uneven.inputs()["dt"] * given["A"]).abs().sum(1).max().item()
    of_sums = logs * torch.finfo(dt.dtype).eps / FLOORS[dt.dtype]
    found, sizes = run(backend, uneven, gradients=True), partial(sizes_through_differences, uneven, truth)
    check_form("grad A", found.pop("grad A"), wanted.pop("grad A"), case)
    assert_same(found, wanted, case, 1 + of_sums, sizes, "linmu.reference")
    some_are_0 = case.changed(dt=torch.where(quarters(dt, case.seed) > 0.5, 0, dt))
    for changed in (case.changed(dt=1e-5 * dt, initial_state=None), some_are_0):
        truth = run(reference, operator_checks.widened(changed), gradients=True)
        in_own_dtype = run(reference, changed, gradients=True)
        sizes = partial(sizes_through_differences, changed, truth)
        assert_matches(run(backend, changed, gradients=True), truth, in_own_dtype, case, sizes)


def sizes_through_differences(case, truth: Results) -> Results:
    """Where decays are differences of sums, each token's write sends a gradient to A twice, and these cancel:
    dt times the gradient of dt."""
    sizes = operator_checks.sizes_of_gradients(case)
    twice = (case.inputs()["dt"].double() * truth["grad dt"]).square().sum((0, 1)).sqrt()
    return sizes | {"grad A": torch.maximum(sizes["grad A"], twice)}


@scan(cases=scan_cases(batch=3))
def test_the_result_does_not_depend_on_the_batch(backend, case: ScanCase):
    """Every row alone gives what it gives among others."""
    together = run(backend, case)
    for row in range(case.batch):
        wanted = {name: result[row : row + 1] for name, result in together.items()}
        assert_same(run(backend, case.row(row)), wanted, case)


@scan(cases=scan_cases(heads=3, groups=3))
def test_permuting_the_heads_permutes_the_result(backend, case: ScanCase):
    """No head knows its number."""
    given, order = case.inputs(), torch.tensor([2, 0, 1])
    permuted = {name: given[name][:, :, order] for name in TOKENS} | {"A": given["A"][order]}
    if case.initial_state:
        permuted["initial_state"] = given["initial_state"][:, order]
    plain = run(backend, case)
    wanted = {"y": plain["y"][:, :, order], "final_state": plain["final_state"][:, order]}
    assert_same(run(backend, case.changed(**permuted)), wanted, case)


@scan(cases=scan_cases(mask="none", initial_state=False), share=0.5)
def test_absent_arguments_mean_their_neutral_values(backend, case: ScanCase):
    """No mask is a mask of True, no initial state is a state of zeros."""
    wanted = run(backend, case)
    zeros = torch.zeros_like(wanted["final_state"])
    neutral = case.changed(mask=torch.ones(case.shape, dtype=torch.bool), initial_state=zeros)
    assert_same(run(backend, neutral), wanted, case)
    operator_checks.check_matches_the_reference(backend, neutral)  # zeros have gradients


@pytest.mark.needs("selective_scan")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_hundreds_of_small_writes_all_count(backend, dtype):
    """A state kept or returned in half precision stops growing; every one of 601 writes of ½ must count."""
    length, one = 601, torch.ones(1, 601, 1, 1, dtype=dtype)
    step, decay = torch.full((1, length, 1), 0.5, dtype=dtype), torch.tensor([-1e-12], dtype=torch.float32)
    for start in (0, 4096):  # where bfloat16 counts by 32, float16 by 4
        before = torch.full((1, 1, 1, 1), float(start))
        y, state = backend.selective_scan(one, step, decay, one, one, initial_state=before)
        assert state.item() == pytest.approx(start + length / 2, abs=1e-2)
        assert y[0, -1].item() == pytest.approx(start + length / 2, rel=0.005)


@pytest.mark.needs("selective_scan")
@pytest.mark.parametrize("reverse", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_small_writes_count_across_pieces(backend, dtype, reverse):
    """A state is handed over as it is, not in the dtype of x."""
    scan_this_way = partial(backend.selective_scan, reverse=reverse)
    rounding.check_small_writes_across_pieces(scan_this_way, dtype, last=0 if reverse else -1)


@scan(cases=scan_cases(rounding.HALVES, initial_state=True), share=0.3)
def test_a_state_is_handed_on_in_float32(backend, case: ScanCase):
    """Neither it nor its gradient is rounded to the dtype of x."""
    rounding.check_state_is_kept(backend, case)


@pytest.mark.needs("selective_scan")
@pytest.mark.parametrize("reverse", (False, True))
def test_samples_may_begin_where_chunks_do(backend, reverse):
    """And be longer than these: no state is carried over their first token."""
    case = large_cases.scan(1100, 2, 1, 3, 2, batch=4, reverse=reverse, decay=-1e-3)
    packed_rows.check_samples_at_borders(backend, case)
