"""Twin of `linmu.reference.lesson`: the same lessons with this backend's losses."""

from __future__ import annotations

from ..reference import lesson as reference
from ..reference.lesson import Objective, attach_teacher, detach_teacher
from .losses import hidden_loss, logit_loss

__all__ = ["Lesson", "Objective", "attach_teacher", "detach_teacher"]


class Lesson(reference.Lesson):
    """`linmu.reference.Lesson`; logits are compared in slabs of the vocabulary."""

    hidden_loss = staticmethod(hidden_loss)
    logit_loss = staticmethod(logit_loss)
