"""`reference/training/`: the same distillation with this backend's losses."""

from __future__ import annotations

from ..reference.training import teacher_student as reference
from ..reference.training.teacher_student import Objective, attach_teacher, detach_teacher
from .losses import hidden_loss, logit_loss

__all__ = ["Lesson", "Objective", "attach_teacher", "detach_teacher"]


class Lesson(reference.Lesson):
    """`linmu.reference.Lesson`; logits are compared in slabs of the vocabulary."""

    hidden_loss = staticmethod(hidden_loss)
    logit_loss = staticmethod(logit_loss)
