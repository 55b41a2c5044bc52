"""What both losses must do: they are means over the tokens that count. `loss_properties` makes the tests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from linmu import reference

from .compare import FLOORS, assert_same, assert_zero, check_form, in_float64, report
from .operator_cases import LossCase, property_of, run
from .operator_checks import widened


def loss_properties(operator: str, cases: Callable) -> dict[str, Callable]:
    """The tests of this file for one loss, by name; `cases(dtypes)` draws its arguments."""
    test = partial(property_of, operator)
    return {
        "test_tokens_that_do_not_count_change_nothing": test(cases=cases())(check_uncounted_tokens),
        "test_tokens_that_do_not_count_may_hold_anything": test(cases=cases(mask="some"))(check_nan),
        "test_saying_everything_twice_changes_nothing": test(cases=cases())(check_repetition),
        "test_the_loss_is_zero_for_equals_and_positive_otherwise": test(cases=cases())(check_sign),
        "test_no_gradient_reaches_the_teacher": test(cases=cases())(check_teacher_gets_no_gradient),
        "test_half_precision_inputs_are_exact_to_float32": test(cases=cases(("bfloat16", "float16")))(
            check_inside_is_float32
        ),
        "test_the_student_says_the_dtype_of_the_loss": test(cases=cases(("bfloat16", "float32")), share=0.3)(
            check_dtype_is_the_students
        ),
        "test_the_gradient_of_a_scaled_loss_is_as_exact_as_its_dtype": test(
            cases=scaled_cases(cases), share=0.25
        )(check_scaled_loss),
    }


def mask_of(case: LossCase) -> torch.Tensor:
    """(B, L) bool: which tokens count."""
    mask = case.inputs()[case.masks[0]]
    return torch.ones(case.shape, dtype=torch.bool) if mask is None else mask


def check_uncounted_tokens(backend: Any, case: LossCase) -> None:
    """Their content, and how many there are: neither values nor gradients."""
    mask, name = mask_of(case), case.masks[0]
    wanted = run(backend, case.changed(**{name: mask}), gradients=True)
    edited = case.with_other_tokens(~mask).changed(**{name: mask})
    assert_same(run(backend, edited, gradients=True), wanted, case)
    given, others, padding = case.inputs(), case.inputs(draw=1), torch.zeros_like(mask)
    longer = {k: torch.cat([others[k], given[k], others[k]], dim=1) for k in case.tokens}
    longer[name] = torch.cat([padding, mask, padding], dim=1)
    assert_same(run(backend, case.changed(**longer)), {"loss": wanted["loss"]}, case)
    assert_zero(wanted["grad student"][~mask], case, "grad student where no token counts")


def check_nan(backend: Any, case: LossCase) -> None:
    """Not even NaN gets from a token that does not count into the loss or a gradient."""
    spoilt = case.with_nan_at(~mask_of(case))
    assert_same(run(backend, spoilt, gradients=True), run(backend, case, gradients=True), case)


def check_repetition(backend: Any, case: LossCase) -> None:
    """A mean over tokens does not grow with the length or the batch: the trap of KLDivLoss(batchmean)."""
    given = case.inputs()
    tensors = [name for name, value in given.items() if isinstance(value, torch.Tensor)]
    for axis in (0, 1):
        twice = {name: torch.cat([given[name], given[name]], dim=axis) for name in tensors}
        assert_same(run(backend, case.changed(**twice)), run(backend, case), case)


def check_sign(backend: Any, case: LossCase) -> None:
    """With a zero gradient at the optimum; a relative error and a divergence are never negative."""
    if case.operator == "hidden_loss" or case.width > 1:  # there is one distribution over one word only
        assert run(backend, case)["loss"].item() > 0, f"the loss must be > 0: {case!r}"
    same = run(backend, case.changed(student=case.inputs()["teacher"]), gradients=True)
    assert abs(same["loss"].item()) < 1e-6, f"the loss of equals must be 0: {case!r}"
    assert same["grad student"].abs().max() < 1e-6, f"grad student of equals must be 0: {case!r}"


def check_teacher_gets_no_gradient(backend: Any, case: LossCase) -> None:
    """The teacher is the target, also where it shares weights with the student."""
    found = run(backend, case, gradients=True)
    assert_zero(found["grad teacher"], case, "grad teacher")


def check_dtype_is_the_students(backend: Any, case: LossCase) -> None:
    """A teacher of another dtype is compared as it is, and changes no dtype."""
    given = case.inputs()
    mixed = case.changed(teacher=given["teacher"].double())
    wanted = run(reference, case, gradients=True)
    found = run(backend, mixed, gradients=True)
    found.pop("grad teacher")
    wanted.pop("grad teacher")
    assert_same(found, wanted, case, factor=2.0)


def check_inside_is_float32(backend: Any, case: LossCase) -> None:
    """Only the arguments were rounded; nothing inside is, nor is a float32 teacher beside a student in half
    precision, nor hidden states whose squares are none of float16's numbers."""
    fine = case.inputs(draw=1)["teacher"].float() * (1 + 2**-10)
    cases = [case, case.changed(teacher=fine)]
    if case.operator == "hidden_loss":
        for size in (512, 1 / 512):
            cases.append(case.changed(**{name: size * case.inputs()[name] for name in case.tokens}))
    for each in cases:
        truth = run(reference, widened(each))["loss"].item()
        found = run(backend, each)["loss"].item()
        line = f"loss: must be that of the rounded arguments in float64, got {found!r}, expected {truth!r}"
        assert found == pytest.approx(truth, rel=1e-4, abs=1e-5), report(line, each)


SCALE = 2.0**16  # what a loss is multiplied by where gradients would be too small for float16


@st.composite
def scaled_cases(draw: st.DrawFn, cases: Callable) -> LossCase:
    """So many numbers that their share of a mean is subnormal in float16."""
    length, width = draw(st.sampled_from(((4096, 32), (512, 500))))
    sizes = {"batch": 1, "length": length, "width": width, "mask": draw(st.sampled_from(("none", "some")))}
    return draw(cases(("float16", "bfloat16"), **sizes))


def check_scaled_loss(backend: Any, case: LossCase) -> None:
    """The gradient is rounded once, after it was multiplied by the one that comes in: each of its numbers to
    a unit in the last place, and float32's floor of the largest."""
    given = case.inputs()
    student, wide = given["student"].requires_grad_(), given["student"].detach().double().requires_grad_()
    (found,) = torch.autograd.grad(SCALE * getattr(backend, case.operator)(**given), student)
    truth = in_float64(given) | {"student": wide}
    (wanted,) = torch.autograd.grad(SCALE * getattr(reference, case.operator)(**truth), wide)
    check_form("grad student", found, student, case)
    wanted, kind = wanted.cpu(), student.dtype
    bound = torch.finfo(kind).eps * wanted.abs() + FLOORS[torch.float32] * wanted.abs().max()
    beyond = (found.double().cpu() - wanted).abs() - bound
    if not (beyond <= 0).all():
        index = tuple(int(i) for i in torch.unravel_index(beyond.argmax(), beyond.shape))
        values = f"at {index} got {found[index].item()!r}, expected {wanted[index].item()!r}"
        line = f"grad student of {SCALE:.0f} times the loss: must be rounded to {kind} once, {values}"
        raise AssertionError(report(line, case))
