"""Each bug that begins at a size is caught by the sizes that the default run tries."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

from linmu import optimized

from ..harness.backends import Backend
from ..harness.compare import assert_close, is_float
from ..harness.large_cases import FORMULATIONS, LARGE, both, check_large, scan
from ..harness.layouts import Text
from ..harness.operator_cases import ConvCase, bidirectional_cases, fed, property_of, run, scan_cases
from ..harness.packed_rows import check_samples_at_borders
from .bugs_by_size import BackendWithBug, bugs, cases_of, right
from .bugs_in_packed_rows import joined_at

BUGS = {str(bug): bug for bug in bugs()}


@pytest.mark.parametrize("name", BUGS)
def test_a_bug_that_begins_at_a_size_is_caught(name):
    """By an assertion, in one of the cases that are large enough."""
    bug = BUGS[name]
    for case in cases_of(bug):
        try:
            check_large(BackendWithBug(bug), case)
        except AssertionError:
            return
    pytest.fail(f"no large case notices: {bug}")


@pytest.mark.parametrize("size", (64, 128, 256))
def test_a_window_that_just_fills_a_block_is_tried(size):
    """Its last token is lost."""

    def attend(**given):
        ids = given["window_id"]
        full = (ids >= 0).sum(1, keepdim=True) == size
        lost = full & (torch.arange(ids.shape[1]) == ids.shape[1] - 1)
        return right("window_attention", given | {"window_id": ids.masked_fill(lost, -1)})

    with pytest.raises(AssertionError):
        check_large(
            SimpleNamespace(window_attention=attend),
            LARGE["window_attention"][f"{size} tokens in one window"],
        )


BETWEEN = [
    ("selective_scan", "B"),
    ("selective_scan", "x"),
    ("bidirectional_scan", "B"),
    ("scan_step", "state"),
    ("window_attention", "k"),
    ("window_attention", "v"),
    ("sliding_window_attention", "k"),
]


@pytest.mark.parametrize(("low", "high"), ((16, 32), (32, 64), (64, 96), (96, 128)))
@pytest.mark.parametrize(("operator", "name"), BETWEEN)
def test_head_dims_between_powers_of_two_are_tried(operator, name, low, high):
    """The last number of a head is lost for head dims above the one and below the other."""

    def compute(**given):
        whole = given[name]
        if low < whole.shape[-1] < high:
            given |= {name: torch.cat([whole[..., :-1], 0 * whole[..., -1:]], -1)}
        return right(operator, given)

    backend = SimpleNamespace(**{operator: compute})
    tried = [case for key, case in LARGE[operator].items() if key.startswith("N=P=")]
    with pytest.raises(AssertionError):
        for case in tried:
            check_large(backend, case)


@pytest.mark.parametrize(
    "operator", ("selective_scan", "bidirectional_scan", "sliding_window_attention", "causal_conv")
)
def test_a_look_back_over_a_thousand_masked_tokens_is_tried(operator):
    """What lies before a gap of 2,048 tokens is lost."""
    mask = {"bidirectional_scan": "valid", "sliding_window_attention": "valid"}.get(operator, "mask")

    def compute(**given):
        there = given[mask]
        gaps = there is not None and there.shape[1] > 2100 and not there[:, 100:2148].any()
        if gaps:
            given |= {mask: there & (torch.arange(there.shape[1]) > 2148)}
        return right(operator, given)

    with pytest.raises(AssertionError):
        for key, case in LARGE[operator].items():
            if "gap of 2,300" in key:
                check_large(SimpleNamespace(**{operator: compute}), case)


def scale_left_out(operator, given):
    """Of rows of more than 32 tokens."""
    return right(operator, given | {"scale": None} if given["q"].shape[1] > 32 else given)


def float64_in_float32(operator, given):
    """The same."""
    tokens = given["q" if "q" in given else "u"]
    if tokens.shape[1] <= 32 or tokens.dtype != torch.float64:
        return right(operator, given)
    rounded = {
        name: value + (value.float() - value).detach() for name, value in given.items() if is_float(value)
    }
    return right(operator, given | rounded)


def rows_taken_for_adjacent(operator, given):
    """The same."""
    name = {"selective_scan": "B", "window_attention": "k", "causal_conv": "u"}[operator]
    tensor = given[name]
    if tensor.shape[1] > 32:
        tensor = tensor.as_strided(tensor.shape, torch.empty(tensor.shape).stride())
    return right(operator, given | {name: tensor})


@pytest.mark.parametrize(
    ("operator", "bug"),
    (
        ("window_attention", scale_left_out),
        ("sliding_window_attention", scale_left_out),
        ("window_attention", float64_in_float32),
        ("causal_conv", float64_in_float32),
        ("selective_scan", rows_taken_for_adjacent),
        ("window_attention", rows_taken_for_adjacent),
        ("causal_conv", rows_taken_for_adjacent),
    ),
)
def test_what_is_wrong_in_long_rows_alone_is_caught(operator, bug):
    """Of what short rows try with all options, long ones try some each."""
    backend = SimpleNamespace(**{operator: lambda **given: bug(operator, given)})
    for case in sorted(LARGE[operator].values(), key=lambda case: case.length):
        try:
            check_large(backend, case)
        except AssertionError:
            return
    pytest.fail(f"no large case notices: {operator}, {bug.__name__}")


def test_there_are_enough_bugs_of_every_size():
    """Sixty at least, at every size, and for every operator, argument and result."""
    found = list(BUGS.values())
    assert len(found) >= 60
    assert {bug.start for bug in found} >= {16, 64, 128, 256, 2048, 65536}
    assert {bug.operator for bug in found} == set(LARGE)


@pytest.mark.parametrize("operator", LARGE)
def test_the_truth_passes_itself(operator):
    """A backend that has no bug passes large cases."""
    backend = SimpleNamespace(**{operator: lambda **given: right(operator, given)})
    for case in list(LARGE[operator].values())[:3]:  # our backends pass them all
        check_large(backend, case)


@pytest.mark.trial_of_the_reference
@property_of("selective_scan", cases=scan_cases(["float64"]))
def test_the_truth_of_large_scans_equals_the_reference(backend, case):
    """In chunks of five tokens."""
    wanted = run(backend, case, gradients=True)
    in_chunks = partial(FORMULATIONS["selective_scan"], chunk=5)
    assert_close(fed(in_chunks, case, gradients=True), wanted, case, 1e-10)


@pytest.mark.trial_of_the_reference
@property_of("bidirectional_scan", cases=bidirectional_cases(["float64"]))
def test_the_truth_of_large_prompts_equals_the_reference(backend, case):
    """In chunks of five tokens."""
    wanted = run(backend, case, gradients=True)
    in_chunks = partial(FORMULATIONS["bidirectional_scan"], chunk=5)
    assert_close(fed(in_chunks, case, gradients=True), wanted, case, 1e-10)


CASES_OF_SAMPLES = {
    "selective_scan": scan(220, 2, 1, 3, 2, batch=4, decay=-1e-3),
    "bidirectional_scan": both(((Text(220),),) * 4, 2, 1, 3, 2, decay=-1e-3),
    "causal_conv": ConvCase(4, 220, 2, 4, True, "none", True, "float32", 3),
}


@pytest.mark.parametrize("size", (48, 96, 100, 112, 128, 200))
@pytest.mark.parametrize("operator", CASES_OF_SAMPLES)
def test_a_sample_that_begins_with_a_chunk_of_any_size_is_tried(operator, size):
    """It goes on from the sample before, if it has more than one token."""
    change = partial(joined_at, size, getattr(optimized, operator))
    broken = Backend(f"{operator} in chunks of {size}", optimized, **{operator: change})
    with pytest.raises(AssertionError):
        check_samples_at_borders(broken, CASES_OF_SAMPLES[operator])
