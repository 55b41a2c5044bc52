"""Asked late whether numbers are finite, a run stops with its weights as they were, and names what was
not."""

from __future__ import annotations

import pytest
import torch

from linmu.reference import Lesson, Objective, attach_teacher, convert
from linmu.reference.training.parameter_groups import MIXER, belongs
from linmu.reference.training.safety.guards import TrainingStoppedError
from linmu.reference.training.safety.late_questions import EVERY, LateQuestions, heeds_marks

from ..student.tiny_checkpoint import shake_mixers
from ..student.tiny_families import text_decoder

BAD = 1  # the step that is not finite


@pytest.fixture(scope="module")
def lesson() -> Lesson:
    teacher = text_decoder().teacher
    student = shake_mixers(convert(teacher, {"text_window": 4}))
    attach_teacher(student, teacher)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(belongs(name, MIXER))
    return Lesson(student.train(), Objective(mixer=1.0))


def weights(lesson: Lesson) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in lesson.parameters() if p.requires_grad])


@pytest.mark.parametrize("kind", ["output", "gradient"])
def test_a_number_that_is_none_is_named_late_and_moves_nothing(lesson, kind):
    trained = [p for p in lesson.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, fused=True)
    assert heeds_marks(optimizer)
    assert not heeds_marks(torch.optim.SGD(trained, lr=1e-3))
    questions = LateQuestions(lesson, optimizer, lambda: "the last one")
    mixer = lesson.layers[1].self_attn.mixer

    def spoil(module, args, kwargs, output):
        """Spoils a batch's second row, known by its padding."""
        if kwargs["attention_mask"] is None:
            return None
        if kind == "gradient":
            output[0].register_hook(lambda gradient: gradient * float("nan"))
            return None
        rows = torch.zeros(len(output[0]), 1, 1)
        rows[1] = float("inf")
        return output[0] + rows, *output[1:]

    hook, seen = mixer.register_forward_hook(spoil, with_kwargs=True), []
    says = r"step 1: the loss must be finite, got (inf|nan); first in layer 1, the student's mixer, samples b"
    if kind == "gradient":
        says = r"step 1: gradients must be finite, got nan or inf in student.*\.mixer\..*, samples a, b"
    try:
        with pytest.raises(TrainingStoppedError, match=says + "; the last one"):
            for number in range(EVERY):
                ids = torch.randint(3, 20, (2, 9), generator=torch.Generator().manual_seed(number))
                mask = torch.ones_like(ids)
                mask[0, -1] = number != BAD
                batch = {"input_ids": ids, "attention_mask": mask}
                loss = lesson(**batch)["loss"]
                loss.backward()
                seen.append(weights(lesson))
                questions.add(batch, loss, f"step {number}", ["a", "b"])
                optimizer.step()
                optimizer.zero_grad()
    finally:
        hook.remove()
    assert len(seen) == EVERY
    assert not torch.equal(seen[BAD - 1], seen[BAD])
    assert all(torch.equal(after, seen[BAD]) for after in (*seen[BAD:], weights(lesson)))


def test_finite_steps_are_asked_once_in_a_while(lesson):
    optimizer = torch.optim.AdamW([p for p in lesson.parameters() if p.requires_grad], lr=0.0, fused=True)
    questions = LateQuestions(lesson, optimizer, lambda: "")
    lesson.zero_grad()
    next(p for p in lesson.parameters() if p.requires_grad).sum().backward()
    for number in range(EVERY):
        assert len(questions.steps) == number
        questions.add({}, torch.zeros(()), "", [])
    assert not questions.steps
    questions.ask()
