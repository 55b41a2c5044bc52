"""`reference/training/`: the same distillation with this backend's losses."""

from __future__ import annotations

from torch import Tensor, nn

from ..reference.training import teacher_student as reference
from ..reference.training.safety.distributed_means import share
from ..reference.training.teacher_student import Objective, attach_teacher, detach_teacher
from .lesson_modules import replace_methods, restore_methods
from .losses import hidden_loss, hidden_losses, logit_loss
from .sliding_window_attention import one_forward

__all__ = ["Lesson", "Objective", "attach_teacher", "detach_teacher"]


class Lesson(reference.Lesson):
    """`linmu.reference.Lesson` in fewer kernels: `lesson_modules`, and losses that read their inputs once."""

    hidden_loss = staticmethod(hidden_loss)
    logit_loss = staticmethod(logit_loss)

    def __init__(self, student: nn.Module, objective: Objective) -> None:
        super().__init__(student, objective)
        self.replaced = replace_methods(student.get_decoder())

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        """`linmu.reference.Lesson.forward`; all layers read the same spans of keys, found once."""
        with one_forward():
            return super().forward(labels, **inputs)

    def close(self) -> nn.Module:
        """Take hooks and faster methods off and give the student back, its teacher still attached."""
        restore_methods(self.replaced)
        return super().close()

    def _mean_loss(self, outputs: list[dict[str, Tensor]], groups: list[Tensor]) -> Tensor:
        """Mean of the hidden loss over layers and groups of tokens."""
        losses, sizes = hidden_losses([(each["student"], each["teacher"]) for each in outputs], groups)
        return (losses * share(sizes).to(losses)).mean()
