"""What every operator must do: agree with the reference, and not depend on how it is called.

`call_properties` turns the checks into the tests of one operator. Each check takes a backend and a case.
"""

from __future__ import annotations

import sys
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from linmu import reference

from .cancellation import sizes_in_attention, sizes_in_divergence, sizes_of_gate, sizes_of_sums
from .compare import (
    Results,
    assert_exact,
    assert_matches,
    assert_same,
    check_form,
    cotangent,
    evaluate,
    in_float64,
    is_float,
    report,
)
from .large_cases import LARGE, check_large
from .operator_cases import DTYPES, EXACT, Case, ChangedCase, fed, operator_of, property_of, run
from .second_sliding_window import sizes_in_window
from .strides import cut_from_wider_rows, oddly_strided

SIZES = {  # of terms that cancel
    "bidirectional_scan": sizes_of_gate,
    "window_attention": sizes_in_attention,
    "sliding_window_attention": sizes_in_window,
    "logit_loss": sizes_in_divergence,
}
HALF_AND_SINGLE = ("bfloat16", "float32")
HARNESS, PYTHON = str(Path(__file__).parent), sysconfig.get_path("stdlib")
INSTALLED = ("site-packages", "dist-packages", "<")  # what has these in its path, or has none
LOCKED = 0.3  # seconds after which a call in another thread is taken to wait for a lock
MAY_MIX = ("selective_scan", "bidirectional_scan", "scan_step", "causal_conv")
MAY_HAVE_NO_TOKENS = ("window_attention", "hidden_loss", "logit_loss")
MIXED = "test_each_argument_may_have_a_dtype_of_its_own"
MAY_BE_ABSENT = {
    "mask",
    "valid",
    "asks",
    "segment",
    "sequence",
    "initial_state",
    "initial_k",
    "initial_v",
    "present",
}


def call_properties(operator: str, cases: Callable) -> dict[str, Callable]:
    """The tests of this file for one operator, by name; `cases(dtypes)` draws its arguments.

    A file of properties adds them to its own: `globals().update(call_properties(...))`.
    """
    test = partial(property_of, operator)
    in_every_dtype, exact, single = cases(DTYPES), cases(EXACT), cases(("float32",))
    return {
        "test_values_match_the_reference": test(cases=in_every_dtype)(check_values_match),
        "test_gradients_match_the_reference": test(cases=in_every_dtype)(check_gradients_match),
        "test_the_gradient_of_each_result_alone_matches_the_reference": test(cases=exact, share=0.5)(
            check_gradients_of_each_result_match
        ),
        "test_one_gradient_alone_equals_its_share_of_all": test(cases=exact)(check_one_gradient_alone),
        "test_results_do_not_depend_on_grad_mode": test(cases=exact, share=0.5)(check_grad_mode),
        "test_strides_do_not_matter": test(cases=in_every_dtype)(check_strides),
        "test_arguments_may_be_expanded": test(cases=exact, share=0.2)(check_expanded),
        "test_arguments_are_left_as_they_were": test(cases=exact)(check_arguments_are_left),
        "test_results_share_no_memory_with_arguments": test(cases=exact, share=0.5)(check_results_are_new),
        "test_autocast_changes_nothing": test(cases=cases(HALF_AND_SINGLE))(check_autocast),
        "test_uninitialised_memory_is_never_read": test(cases=exact, share=0.5)(check_uninitialised_memory),
        "test_sizes_that_people_run": large_cases_of(operator),
        "test_nothing_is_remembered_between_calls": test(cases=exact, share=0.5)(check_nothing_is_remembered),
        "test_calls_may_interrupt_each_other": test(cases=exact, share=0.15)(check_interruptions),
        "test_backward_passes_may_come_late_and_twice": test(cases=exact, share=0.3)(check_backward_passes),
        "test_there_may_be_no_rows": test(cases=exact, share=0.15)(check_no_rows),
        "test_rows_may_be_padding_at_the_head_the_tail_or_throughout": test(cases=exact, share=0.3)(
            check_padded_rows
        ),
        "test_the_default_dtype_does_not_matter": test(cases=single, share=0.15)(check_default_dtype),
    } | ({MIXED: test(cases=exact, share=0.3)(check_mixed_dtypes)} if operator in MAY_MIX else {})


def large_cases_of(operator: str) -> Callable:
    """One test for each case of a size that people run."""

    def check(backend: Any, case: Case) -> None:
        check_large(backend, case)

    cases = [pytest.param(case, id=name) for name, case in LARGE[operator].items()]
    return pytest.mark.needs(operator)(pytest.mark.parametrize("case", cases)(check))


def check_values_match(backend: Any, case: Case) -> None:
    """Values, states and their dtypes, in every dtype, float32 steps with bfloat16 tokens included."""
    check_matches_the_reference(backend, case, gradients=False)


def check_gradients_match(backend: Any, case: Case) -> None:
    """The gradient of every argument, all results having one, in every dtype."""
    check_matches_the_reference(backend, case)


def check_matches_the_reference(
    backend: Any, case: Case, gradients: bool = True, of: tuple[str, ...] | None = None
) -> None:
    """Within the bounds of `assert_matches`; gradients are those of the results `of`, of all if None.

    The reference itself can only be finite.
    """
    if getattr(backend, case.operator) is getattr(reference, case.operator):
        for name, result in run(backend, case, gradients, of).items():
            check_form(name, result, result, case)
        return
    truth = run(reference, widened(case), gradients, of)
    in_own_dtypes = run(reference, case, gradients, of)
    sizes = partial(sizes_of_gradients, case, of)
    assert_matches(run(backend, case, gradients, of), truth, in_own_dtypes, case, sizes)


def widened(case: Case) -> ChangedCase:
    """The same numbers, as they were rounded, in float64."""
    return case.changed(**in_float64(case.inputs()))


def sizes_of_gradients(case: Case, of: tuple[str, ...] | None = None) -> Results:
    """The sizes of the terms that gradients, and the divergence, sum over, where these may cancel."""
    wide = widened(case)
    sizes = sizes_of_sums(lambda draw: run(reference, wide, True, of, draw))
    return sizes | sizes_of_differences(case)


def sizes_of_differences(case: Case) -> Results:
    """The part of these that a softmax brings: all that cancels between runs that add up tokens alike."""
    return SIZES[case.operator](**widened(case).inputs()) if case.operator in SIZES else {}


def check_gradients_of_each_result_match(backend: Any, case: Case) -> None:
    """Training asks for the gradient of y alone, a chunk of prefill for that of the state too."""
    for name in case.results:
        check_matches_the_reference(backend, case, of=(name,))


def check_one_gradient_alone(backend: Any, case: Case) -> None:
    """One argument's gradient, of one result, is what asking for all arguments gives."""
    given = case.inputs()
    floats = [name for name, value in given.items() if is_float(value)]
    for index, result in enumerate(case.results):
        name = floats[(case.seed + index) % len(floats)]
        together = run(backend, case, gradients=True, of=(result,))

        def call(**one: Tensor) -> Any:
            return operator_of(backend, case)(**{**given, **one})

        alone = evaluate(call, {name: given[name]}, gradients=True, names=case.results, of=(result,))
        key = f"grad {name}"
        of_terms = partial(sizes_of_differences, case)
        assert_same({key: alone[key]}, {key: together[key]}, case, sizes=of_terms)


def check_grad_mode(backend: Any, case: Case) -> None:
    """Under `no_grad` and `inference_mode`, and where nothing needs a gradient, the values are the same."""
    wanted = {
        name: value for name, value in run(backend, case, gradients=True).items() if name in case.results
    }
    assert_same(run(backend, case), wanted, case)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert_same(run(backend, case), wanted, case)


def check_strides(backend: Any, case: Case) -> None:
    """Arguments with gaps, masks and ids too: with their last axis first in memory, and as slices of wider
    rows whose middle axes are swapped; gradients that are expanded, and that are transposed.
    """
    plain = run(backend, case), gradients_of_the_sum(backend, case)
    of_terms = partial(sizes_of_differences, case)
    for layout in (oddly_strided, cut_from_wider_rows):
        strided = case.changed(**{name: layout(value) for name, value in case.inputs().items()})
        assert_same(run(backend, strided), plain[0], case)
        assert_same(gradients_of_the_sum(backend, strided), plain[1], case, sizes=of_terms)
    contiguous = gradients_of_the_sum(backend, case, expanded=False)
    assert_same(plain[1], contiguous, case, sizes=of_terms)
    transposed, contiguous = (gradients_of_products(backend, case, swapped) for swapped in (True, False))
    assert_same(transposed, contiguous, case, sizes=of_terms)


def check_expanded(backend: Any, case: Case) -> None:
    """One row that stands for two, one mask for both, one number for a whole parameter: strides of 0."""
    given = case.inputs()
    names = [name for name in (*case.tokens, *case.masks, *case.rows) if given[name] is not None]
    expanded = {name: given[name][:1].expand(2, *given[name].shape[1:]) for name in names}
    shared = [name for name, value in given.items() if is_float(value) and name not in names]
    expanded |= {name: given[name].flatten()[:1].expand(given[name].shape) for name in shared}
    copied = case.changed(**{name: value.contiguous() for name, value in expanded.items()})
    found = run(backend, case.changed(**expanded), gradients=True)
    wanted = run(backend, copied, gradients=True)
    assert_same(found, wanted, case, sizes=partial(sizes_of_differences, copied))


def gradients_of_products(backend: Any, case: Case, swapped: bool) -> Results:
    """Gradients of the sum of all results times fixed numbers, taken from each result with its middle axes
    `swapped`, as a caller's (B, H, L, P) is, or as it comes: autograd hands on the same numbers, transposed
    or contiguous.
    """

    def total(**given: Any) -> Tensor:
        outputs = operator_of(backend, case)(**given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return sum(product(output) for output in outputs if output.is_floating_point())

    def product(output: Tensor) -> Tensor:
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device)
        weights = swap(weights.view(swap(output).shape))
        taken = swap(output) * swap(weights) if swapped else output * weights.contiguous()
        return taken.to(torch.promote_types(output.dtype, torch.float32)).sum()

    results = evaluate(total, case.inputs(), gradients=True, names=("sum",))
    return {name: value for name, value in results.items() if name != "sum"}  # whose order of adding differs


def swap(tensor: Tensor) -> Tensor:
    """The two axes before the last one exchanged, or the only two."""
    return tensor.transpose(1, 2) if tensor.ndim > 2 else tensor.transpose(0, -1) if tensor.ndim else tensor


def gradients_of_the_sum(backend: Any, case: Case, expanded: bool = True) -> Results:
    """Gradients of the sum of all results, which autograd hands to the operator as `expanded` tensors, or as
    contiguous ones."""

    def total(**given: Any) -> Tensor:
        outputs = operator_of(backend, case)(**given)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs = outputs if expanded else [output * torch.ones_like(output) for output in outputs]
        return sum(output.to(torch.promote_types(output.dtype, torch.float32)).sum() for output in outputs)

    return evaluate(total, case.inputs(), gradients=True, names=("sum",))


def check_arguments_are_left(backend: Any, case: Case) -> None:
    """No argument is written to, forward or backward, with a gradient or without, states and masks too."""
    given = case.inputs()
    copies = {name: value.clone() for name, value in given.items() if isinstance(value, Tensor)}
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            operator_of(backend, case)(**given)
    fixed = case.changed(**given)
    run(backend, fixed, gradients=True)
    for name, copy in copies.items():
        assert_exact(given[name], copy, case, f"{name} after the call")


def check_results_are_new(backend: Any, case: Case) -> None:
    """A result is a new tensor: whoever writes to it, or to an argument, changes nothing else.

    Also without masks and states, and where all is masked: there are the shortcuts.
    """
    given = case.inputs()
    bare = given | dict.fromkeys(MAY_BE_ABSENT & given.keys())
    masks = {name: value for name, value in given.items() if is_mask(value) and name != "present"}
    nobody = given | {name: torch.zeros_like(mask) for name, mask in masks.items()}
    for arguments, gradients in ((given, False), (given, True), (bare, False), (nobody, False)):
        floats = {name: value for name, value in arguments.items() if is_float(value)}
        leaves = {name: value.detach().requires_grad_(gradients) for name, value in floats.items()}
        outputs = operator_of(backend, case)(**arguments | leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        for result, output in zip(case.results, outputs, strict=True):
            for name, value in arguments.items():
                shared = (
                    isinstance(value, Tensor) and output.numel() and memory_of(output) == memory_of(value)
                )
                assert not shared, report(f"{result}: must be a new tensor, got a view of {name}", case)


def is_mask(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype == torch.bool


def memory_of(tensor: Tensor) -> int:
    """Where its numbers, or those it is a view of, begin."""
    return tensor.untyped_storage().data_ptr()


def check_autocast(backend: Any, case: Case) -> None:
    """The operator chooses its own dtypes, whatever the training loop asks for: values and gradients."""
    gpu = torch.cuda.is_available()

    def under_autocast(**given: Any) -> Any:  # the forward pass alone, as torch wants it
        with torch.autocast("cpu", torch.bfloat16), torch.autocast("cuda", torch.bfloat16, enabled=gpu):
            return operator_of(backend, case)(**given)

    found, wanted = fed(under_autocast, case, gradients=True), run(backend, case, gradients=True)
    assert_same(found, wanted, case, sizes=partial(sizes_of_differences, case))


def check_nothing_is_remembered(backend: Any, case: Case) -> None:
    """Results outlive the next call; other numbers and masks in the same memory have their own results."""
    first, others = case.inputs(), case.changed(**case.inputs(draw=1))
    fixed = case.changed(**first)
    for gradients in (False, True):
        found = run(backend, fixed, gradients)
        wanted = {name: tensor.clone() for name, tensor in found.items()}
        wanted_of_others = run(backend, others, gradients)
        for name, tensor in found.items():
            assert_exact(tensor, wanted[name], case, f"{name} after another call")
    assert_same(run(backend, fixed, gradients=True), wanted, case)
    for name, value in first.items():
        if is_float(value):
            value.data.copy_(others.inputs()[name])  # as numpy's arrays change: torch does not count it
    assert_same(run(backend, fixed, gradients=True), wanted_of_others, case)
    for name, value in first.items():
        if isinstance(value, Tensor) and not is_float(value):  # masks and ids, (B, L), of a step (B,)
            # samples that are mirrored without their tokens might cut a segment in two: these become one
            mirrored = torch.zeros_like(value) if name == "sequence" else value.flip(-1)
            wanted = run(backend, fixed.changed(**{name: mirrored}))
            value.data.copy_(mirrored)
            assert_same(run(backend, fixed), wanted, case)


def check_no_rows(backend: Any, case: Case) -> None:
    """A batch of 0 gives results without rows, and zeros for what all rows share; so do rows without tokens
    where they are no error.
    """
    given = case.inputs()
    names = [name for name in (*case.tokens, *case.masks, *case.rows) if given[name] is not None]
    empty = [case.changed(**{name: given[name][:0] for name in names})]
    if case.operator in MAY_HAVE_NO_TOKENS:
        empty.append(case.part(slice(0, 0)))
    for none in empty:
        assert_same(run(backend, none, gradients=True), run(reference, none, gradients=True), case)


def check_padded_rows(backend: Any, case: Case) -> None:
    """In one row the first half is missing, in one the last, in one all: values, states and gradients."""
    given, (batch, length) = case.inputs(), case.shape
    for turn in range(3 if batch < 3 else 1):
        kind = (torch.arange(batch)[:, None] + case.seed + turn) % 3
        first = torch.arange(length) < (length + 1) // 2
        there = torch.where(kind == 0, ~first, (kind == 1) & first)
        masks = {name: there for name in ("mask", "valid") if name in given}
        if given.get("sequence") is not None:  # ids of what was padding may be anybody's
            masks["sequence"] = torch.zeros_like(given["sequence"])
        if case.operator == "scan_step":
            masks = {"valid": there[:, 0]}
        if case.operator == "window_attention":
            masks = {"window_id": given["window_id"].where(there, -1)}
        check_matches_the_reference(backend, case.changed(**masks))


def check_default_dtype(backend: Any, case: Case) -> None:
    """The dtypes of the arguments decide, not the one that torch gives to new tensors, which stays what it
    is."""
    case = case.changed(**case.inputs())  # drawn before
    wanted, before = run(backend, case, gradients=True), torch.get_default_dtype()
    for default in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(default)
        try:
            found, after = run(backend, case, gradients=True), torch.get_default_dtype()
        finally:
            torch.set_default_dtype(before)
        assert after == default, report(f"torch's default dtype must stay {default}, got {after}", case)
        assert_same(found, wanted, case)


def check_mixed_dtypes(backend: Any, case: Case) -> None:
    """One argument at a time in a wider and in a narrower dtype: y is in that of the tokens all the same, and
    a state in the one that they are accumulated in.
    """
    floats = {name: value for name, value in case.inputs().items() if is_float(value)}
    for place, (name, value) in enumerate(floats.items()):
        dtype = (torch.float64, torch.bfloat16)[(case.seed + place) % 2]
        check_matches_the_reference(backend, case.changed(**{name: value.to(dtype)}), gradients=False)


def check_backward_passes(backend: Any, case: Case) -> None:
    """After another forward pass, and a second time, a backward pass gives what it gives at once. Neither it
    nor the other writes to a result, or to a gradient that is handed to it."""
    others = case.changed(**case.inputs(draw=1))
    wanted = [run(backend, each, gradients=True) for each in (case, others)]
    passes = [forward_pass(backend, each) for each in (case, others)]
    for which, time in ((0, "late"), (1, "after another's"), (0, "twice")):
        leaves, outputs, cotangents = passes[which]
        copies = [tensor.detach().clone() for tensor in (*outputs.values(), *cotangents)]
        asked = [outputs[name] for name in outputs if outputs[name].requires_grad]
        found = torch.autograd.grad(
            asked, list(leaves.values()), cotangents, allow_unused=True, retain_graph=True
        )
        for (name, leaf), gradient in zip(leaves.items(), found, strict=True):
            gradient = torch.zeros_like(leaf) if gradient is None else gradient
            key = f"grad {name}, {time}"
            assert_same({key: gradient}, {key: wanted[which][f"grad {name}"]}, case)
        handed = (f"the gradient of {name} handed in" for name in outputs if outputs[name].requires_grad)
        names = (*outputs, *handed)
        for name, tensor, copy in zip(names, (*outputs.values(), *cotangents), copies, strict=True):
            assert_exact(tensor.detach(), copy, case, f"{name} after a backward pass")


def check_interruptions(backend: Any, case: Case) -> None:
    """Before any line of the backend's code a call of another thread may run: no workspace is shared."""
    others = case.changed(**case.inputs(draw=1))
    wanted = run(backend, case, gradients=True)
    with interruptions(backend, lambda: run(backend, others, gradients=True)):
        found = run(backend, case, gradients=True)
    assert_same(found, wanted, case)


@contextmanager
def interruptions(backend: Any, other: Callable) -> Iterator[None]:
    """Call `other` in another thread before each line that runs for the first time: of the backend and of
    files beside it, not of Python's and installed packages, such as torch, nor of this suite's harness.

    A line waits for that call. One that takes longer, as behind a lock that the backend holds, runs beside
    the lines that follow, and no other is begun until it has ended.
    """
    file = getattr(getattr(backend, "module", None), "__file__", None)
    own = str(Path(file).parent) if file is not None else ""
    own = "" if own.endswith(INSTALLED[:2]) else own
    seen: set[tuple[str, int]] = set()
    calls: list[Future] = []

    def is_left_out(file: str) -> bool:
        if own and file.startswith(own):
            return False
        return file.startswith((HARNESS, PYTHON)) or any(part in file for part in INSTALLED)

    def trace(frame: Any, event: str, _: Any) -> Callable | None:
        if is_left_out(frame.f_code.co_filename) or frame.f_code.co_name == "<module>":
            return None  # what is being imported is not called by two
        line = frame.f_code.co_filename, frame.f_lineno
        if event == "line" and line not in seen and all(call.done() for call in calls[-1:]):
            seen.add(line)
            calls.append(threads.submit(other))
            wait(calls[-1:], LOCKED)
        return trace

    before = sys.gettrace()
    with ThreadPoolExecutor(1) as threads:
        sys.settrace(trace)
        try:
            yield
        finally:
            sys.settrace(before)
        for call in calls:
            call.result()


def forward_pass(backend: Any, case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor], list[Tensor]]:
    """The float arguments by name, the results by name, and what `evaluate` hands to the backward pass."""
    given = case.inputs()
    leaves = {name: value.detach().requires_grad_() for name, value in given.items() if is_float(value)}
    outputs = operator_of(backend, case)(**given | leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    named = dict(zip(case.results, outputs, strict=True))
    cotangents = [cotangent(output, i) for i, output in enumerate(outputs) if output.requires_grad]
    return leaves, named, cotangents


def check_uninitialised_memory(backend: Any, case: Case) -> None:
    """The same results whatever `torch.empty` finds in memory: NaN, or a large number."""
    wanted = run(backend, case, gradients=True)
    for garbage in (float("nan"), 1e30):
        with poisoned_memory(garbage):
            found = run(backend, case, gradients=True)
        assert_same(found, wanted, case)


@contextmanager
def poisoned_memory(garbage: float) -> Iterator[None]:
    """Fill every tensor that is born without values with `garbage`, integers with their largest number."""

    def filling(create: Callable) -> Callable:
        def create_filled(*args: Any, **kwargs: Any) -> Tensor:
            tensor = create(*args, **kwargs)
            with torch.no_grad():
                if tensor.is_floating_point():
                    tensor.fill_(garbage)
                elif not tensor.is_complex():
                    tensor.fill_(True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)
            return tensor

        return create_filled

    makers = [(torch, name) for name in ("empty", "empty_like", "empty_strided", "empty_permuted")]
    makers += [(Tensor, name) for name in ("new_empty", "new_empty_strided")]
    with ExitStack() as stack:
        for owner, name in makers:
            stack.enter_context(mock.patch.object(owner, name, filling(getattr(owner, name))))
        yield
