"""`hidden_loss`: a relative error over the tokens that count, whatever the length, batch or padding."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from ..harness.compare import assert_same, assert_zero, quarters
from ..harness.loss_checks import loss_properties
from ..harness.operator_cases import HiddenLossCase, hidden_loss_cases, property_of, run
from ..harness.operator_checks import call_properties, check_matches_the_reference

hidden = partial(property_of, "hidden_loss")

globals().update(call_properties("hidden_loss", hidden_loss_cases))
globals().update(loss_properties("hidden_loss", hidden_loss_cases))


@hidden(cases=hidden_loss_cases())
def test_the_hidden_loss_is_relative(backend, case: HiddenLossCase):
    """Predicting zero costs 1, larger or smaller numbers change nothing, twice the error costs four times as
    much."""
    student, teacher = case.inputs()["student"], case.inputs()["teacher"]
    loss = run(backend, case)["loss"]
    of_zero = run(backend, case.changed(student=torch.zeros_like(teacher)))["loss"]
    assert of_zero.item() == pytest.approx(1.0, rel=1e-5), f"predicting zero must cost 1: {case!r}"
    for factor in (8, 2.0**-56):
        scaled = case.changed(student=factor * student, teacher=factor * teacher)
        assert_same(run(backend, scaled), {"loss": loss}, case)
    further = case.changed(student=teacher + 2 * (student - teacher))
    assert_same(run(backend, further), {"loss": 4 * loss}, case)


@hidden(cases=hidden_loss_cases(), share=0.3)
def test_hidden_states_may_be_zero(backend, case: HiddenLossCase):
    """Of one token, the student's or the teacher's; of all, which makes them equal, with zero gradient."""
    given = case.inputs()
    for name in ("student", "teacher"):
        states = torch.cat([given[name], torch.zeros_like(given[name][:, :1])], dim=1)
        others = {n: torch.cat([given[n], given[n][:, :1]], dim=1) for n in case.tokens if n != name}
        check_matches_the_reference(backend, case.changed(valid=None, **{name: states}, **others))
    nothing = torch.zeros_like(given["student"])
    found = run(backend, case.changed(student=nothing, teacher=nothing), gradients=True)
    for name, tensor in found.items():
        assert_zero(tensor, case, f"{name} of zeros")


@hidden(cases=hidden_loss_cases(), share=0.3)
def test_a_small_hidden_loss_keeps_its_digits(backend, case: HiddenLossCase):
    """A student that is almost right: no difference of squares that are a million times as large."""
    teacher = case.inputs()["teacher"]
    close = case.changed(student=teacher * (1 + 2.0**-12 * quarters(teacher, case.seed)))
    check_matches_the_reference(backend, close)


@pytest.mark.needs("hidden_loss")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_the_hidden_loss_is_summed_in_float32(backend, dtype):
    """4,096 errors of 1 must not stop at 256."""
    ones = torch.ones(1, 64, 64, dtype=dtype)
    loss = backend.hidden_loss(2 * ones, ones)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(1.0, abs=1e-6)


@pytest.mark.needs("hidden_loss")
def test_the_loss_of_no_tokens_is_zero_with_zero_gradient(backend):
    """A batch in which nothing is supervised trains nothing, and poisons nothing with NaN."""
    student, nothing = torch.randn(1, 3, 5, requires_grad=True), torch.zeros(1, 3, dtype=torch.bool)
    loss = backend.hidden_loss(student, torch.randn(1, 3, 5), nothing)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0 and gradient.abs().max().item() == 0
