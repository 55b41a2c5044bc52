"""`hidden_loss` and `logit_loss`: means over the tokens that count, whatever the length, batch or padding."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from linmu import reference

from ..harness.compare import assert_close, assert_matches, assert_same, assert_zero, evaluate, in_float64
from ..harness.operator_cases import DTYPES, LossCase, holds, loss_cases

LOSSES = ("hidden_loss", "logit_loss")
hidden = partial(holds, "hidden_loss")
logit = partial(holds, "logit_loss")
both = partial(holds, *LOSSES)


def losses_of(backend, case: LossCase) -> dict:
    """Both losses as functions of (student, teacher, mask)."""
    return {
        "hidden": lambda student, teacher, mask: backend.hidden_loss(student, teacher, mask),
        "logit": lambda student, teacher, mask: backend.logit_loss(student, teacher, mask, case.temperature),
    }


@both(case=loss_cases(DTYPES))
def test_losses_and_gradients_match_the_reference(backend, case: LossCase):
    """P17: the scalar in at least float32, the student's gradient in its dtype."""
    inputs, ours, theirs = case.inputs(), losses_of(backend, case), losses_of(reference, case)
    for name in ours:
        truth = evaluate(theirs[name], in_float64(inputs), gradients=True)
        own = evaluate(theirs[name], inputs, gradients=True)
        assert_matches(evaluate(ours[name], inputs, gradients=True), truth, own, case)


@both(case=loss_cases())
def test_tokens_that_do_not_count_change_nothing(backend, case: LossCase):
    """Their content, and how many there are: neither values nor gradients."""
    inputs, others = case.inputs(), case.inputs(draw=1)
    mask = torch.ones(case.batch, case.length, dtype=torch.bool) if inputs["mask"] is None else inputs["mask"]
    where = mask[..., None]
    for loss in losses_of(backend, case).values():
        wanted = evaluate(loss, {**inputs, "mask": mask}, gradients=True)
        swapped = {k: torch.where(where, inputs[k], others[k]) for k in ("student", "teacher")}
        assert_same(evaluate(loss, {**swapped, "mask": mask}, gradients=True), wanted, case)
        longer = {k: torch.cat([others[k], inputs[k], others[k]], dim=1) for k in ("student", "teacher")}
        padding = torch.zeros_like(mask)
        found = loss(**longer, mask=torch.cat([padding, mask, padding], dim=1))
        assert_same({"output 0": found}, {"output 0": wanted["output 0"]}, case)
        assert_zero(wanted["gradient of student"][~mask], case, "gradient where no token counts")


@both(case=loss_cases())
def test_saying_everything_twice_changes_nothing(backend, case: LossCase):
    """A mean over tokens does not grow with the length or the batch: the trap of KLDivLoss(batchmean)."""
    inputs = case.inputs()
    for loss in losses_of(backend, case).values():
        wanted = {"loss": loss(**inputs)}
        for axis in (0, 1):
            twice = {k: None if v is None else torch.cat([v, v], dim=axis) for k, v in inputs.items()}
            assert_same({"loss": loss(**twice)}, wanted, case)


@both(case=loss_cases())
def test_losses_are_zero_for_equals_and_positive_otherwise(backend, case: LossCase):
    """With a zero gradient at the optimum; a relative error and a divergence are never negative."""
    inputs = case.inputs()
    for name, loss in losses_of(backend, case).items():
        assert loss(**inputs).item() > 0 or (name == "logit" and case.width == 1), (
            f"{name} must be > 0: {case!r}"
        )
        same = evaluate(loss, {**inputs, "student": inputs["teacher"].clone()}, gradients=True)
        assert abs(same["output 0"].item()) < 1e-6, f"{name} of equals must be 0: {case!r}"
        assert same["gradient of student"].abs().max() < 1e-6, (
            f"{name}'s gradient of equals must be 0: {case!r}"
        )


@both(case=loss_cases())
def test_no_gradient_reaches_the_teacher(backend, case: LossCase):
    """The teacher is the target, also where it shares weights with the student."""
    inputs = case.inputs()
    for loss in losses_of(backend, case).values():
        found = evaluate(loss, inputs, gradients=True)
        assert_zero(found["gradient of teacher"], case, "gradient of the teacher")


@both(case=loss_cases(("bfloat16", "float16")))
def test_losses_of_half_precision_inputs_are_exact_to_float32(backend, case: LossCase):
    """P17: only the inputs were rounded; nothing inside is."""
    inputs, ours, theirs = case.inputs(), losses_of(backend, case), losses_of(reference, case)
    for name in ours:
        truth = theirs[name](**in_float64(inputs)).item()
        assert ours[name](**inputs).item() == pytest.approx(truth, rel=1e-4, abs=1e-5), f"{name}: {case!r}"


@hidden(case=loss_cases())
def test_hidden_loss_is_relative(backend, case: LossCase):
    """Predicting zero costs 1, doubling both changes nothing, doubling the error costs four times as much."""
    inputs = case.inputs()
    student, teacher, mask = inputs["student"], inputs["teacher"], inputs["mask"]
    loss = backend.hidden_loss(student, teacher, mask)
    assert backend.hidden_loss(torch.zeros_like(teacher), teacher, mask).item() == pytest.approx(
        1.0, rel=1e-5
    )
    assert_same({"loss": backend.hidden_loss(8 * student, 8 * teacher, mask)}, {"loss": loss}, case)
    further = teacher + 2 * (student - teacher)
    assert_same({"loss": backend.hidden_loss(further, teacher, mask)}, {"loss": 4 * loss}, case)


@logit(case=loss_cases())
def test_logit_loss_ignores_a_shift_of_the_logits(backend, case: LossCase):
    """Softmax does not see a constant per token, not even a large one."""
    inputs = case.inputs()
    shift = torch.linspace(-50, 50, case.length)[:, None]
    moved = {**inputs, "student": inputs["student"] + shift, "teacher": inputs["teacher"] - shift}
    loss = losses_of(backend, case)["logit"]
    assert_same({"loss": loss(**moved)}, {"loss": loss(**inputs)}, case, factor=20)


@logit(case=loss_cases(["float64"]))
def test_logit_loss_goes_from_teacher_to_student(backend, case: LossCase):
    """KL(teacher ‖ student) in nats times temperature squared, spelt out for one token after another."""
    inputs = case.inputs()
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row in range(case.batch):
        for t in range(case.length):
            if inputs["mask"] is None or inputs["mask"][row, t]:
                p, q = ((inputs[k][row, t] / case.temperature).softmax(-1) for k in ("teacher", "student"))
                total, count = total + (p * (p / q).log()).sum(), count + 1
    wanted = {"loss": case.temperature**2 * total / count}
    assert_close({"loss": losses_of(backend, case)["logit"](**inputs)}, wanted, case, 1e-9)


@pytest.mark.needs("logit_loss")
def test_logit_loss_is_in_nats(backend):
    """A certain teacher and a student that knows nothing are log V apart."""
    student, teacher = torch.zeros(1, 1, 32), torch.full((1, 1, 32), -1e4)
    teacher[..., 3] = 0
    assert backend.logit_loss(student, teacher).item() == pytest.approx(math.log(32), rel=1e-6)


@pytest.mark.needs(*LOSSES)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_losses_of_half_precision_are_float32(backend, dtype):
    """P17: summed in float32: 4096 errors of 1 must not stop at 256, nor 1000 nats lose their digits."""
    ones = torch.ones(1, 64, 64, dtype=dtype)
    relative = backend.hidden_loss(2 * ones, ones)
    assert relative.dtype == torch.float32 and relative.item() == pytest.approx(1.0, abs=1e-6)
    logits = torch.zeros(1, 64, 2, dtype=dtype)
    logits[..., 0] = 1000
    divergence = backend.logit_loss(logits.flip(-1), logits)
    assert divergence.dtype == torch.float32 and divergence.item() == pytest.approx(1000.0, rel=1e-4)


@pytest.mark.needs(*LOSSES)
def test_losses_of_no_tokens_are_zero_with_zero_gradient(backend):
    """A batch in which nothing is supervised trains nothing, and poisons nothing with NaN."""
    student = torch.randn(1, 3, 5, requires_grad=True)
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    for loss in (backend.hidden_loss, backend.logit_loss):
        value = loss(student, torch.randn(1, 3, 5), nothing)
        (gradient,) = torch.autograd.grad(value, student)
        assert value.item() == 0 and gradient.abs().max().item() == 0
