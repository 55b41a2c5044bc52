"""`logit_loss`: a divergence in nats over the tokens that count, whatever the length, batch or padding."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from ..harness.compare import assert_close, assert_same, quarters, report
from ..harness.loss_checks import loss_properties, mask_of
from ..harness.operator_cases import LogitLossCase, logit_loss_cases, property_of, run
from ..harness.operator_checks import call_properties, check_matches_the_reference

logit = partial(property_of, "logit_loss")

globals().update(call_properties("logit_loss", logit_loss_cases))
globals().update(loss_properties("logit_loss", logit_loss_cases))


@logit(cases=logit_loss_cases())
def test_the_logit_loss_ignores_a_shift_of_the_logits(backend, case: LogitLossCase):
    """Softmax does not see a constant per token, not even a large one."""
    shift = torch.linspace(-50, 50, case.length)[:, None]
    given = case.inputs()
    moved = case.changed(student=given["student"] + shift, teacher=given["teacher"] - shift)
    assert_same(run(backend, moved), run(backend, case), case, factor=20)


@logit(cases=logit_loss_cases(), share=0.5)
def test_a_small_logit_loss_of_large_logits_matches_the_reference(backend, case: LogitLossCase):
    """Logits hundreds away from 0, by another number for every token, and a student that is almost right;
    one that is right has no gradient."""
    teacher = (16 * case.inputs()["teacher"]).round() / 16
    student = teacher + quarters(teacher, case.seed) / 16
    shift = torch.linspace(-1, 1, case.length)[:, None].mul(200).round().to(teacher)
    close = case.changed(student=student + shift, teacher=teacher - shift)
    check_matches_the_reference(backend, close)
    equal = run(backend, case.changed(student=teacher + shift, teacher=teacher + shift), gradients=True)
    for name, tensor in equal.items():
        assert tensor.abs().max() < 1e-6, report(
            f"{name} of equals: must be 0, got {tensor.abs().max()}", case
        )


@logit(cases=logit_loss_cases(("bfloat16", "float16"), temperature=1.0), share=0.2)
def test_logits_at_both_ends_match_the_reference(backend, case: LogitLossCase):
    """All of them thousands above 0, and all below: e^z is neither infinite nor 0, in value and gradient."""
    numbers = {
        name: (4 * value).round().clamp(-16, 16)
        for name, value in case.inputs().items()
        if name in case.tokens
    }
    for shift in (1024.0, -1024.0):
        check_matches_the_reference(backend, case.changed(**{n: 8 * v + shift for n, v in numbers.items()}))


@logit(cases=logit_loss_cases(["float64"]))
def test_the_logit_loss_goes_from_teacher_to_student(backend, case: LogitLossCase):
    """KL(teacher ‖ student) in nats times temperature squared, spelt out for one token after another."""
    given, mask = case.inputs(), mask_of(case)
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, t in mask.nonzero().tolist():
        p, q = ((given[name][row, t] / case.temperature).softmax(-1) for name in ("teacher", "student"))
        total, count = total + (p * (p / q).log()).sum(), count + 1
    wanted = {"loss": case.temperature**2 * total / count}
    assert_close(run(backend, case), wanted, case, 1e-9)


@pytest.mark.needs("logit_loss")
def test_the_logit_loss_is_in_nats(backend):
    """A certain teacher and a student that knows nothing are log V apart."""
    student, teacher = torch.zeros(1, 1, 32), torch.full((1, 1, 32), -1e4)
    teacher[..., 3] = 0
    assert backend.logit_loss(student, teacher).item() == pytest.approx(math.log(32), rel=1e-6)


@pytest.mark.needs("logit_loss")
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32))
def test_the_logit_loss_is_summed_in_float32(backend, dtype):
    """1,000 nats must not lose their digits."""
    logits = torch.zeros(1, 64, 2, dtype=dtype)
    logits[..., 0] = 1000
    loss = backend.logit_loss(logits.flip(-1), logits)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(1000.0, rel=1e-4)


@pytest.mark.needs("logit_loss")
def test_the_loss_of_no_tokens_is_zero_with_zero_gradient(backend):
    """A batch in which nothing is supervised trains nothing, and poisons nothing with NaN."""
    student, nothing = torch.randn(1, 3, 5, requires_grad=True), torch.zeros(1, 3, dtype=torch.bool)
    loss = backend.logit_loss(student, torch.randn(1, 3, 5), nothing)
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.item() == 0 and gradient.abs().max().item() == 0
