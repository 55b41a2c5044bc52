"""`reference/training/`: the same distillation with this backend's losses, and steps from CUDA graphs."""

from __future__ import annotations

from torch import Tensor, nn

from ..reference.checks import require
from ..reference.training import lesson as reference
from ..reference.training.lesson import Objective
from ..reference.training.safety.distributed_means import share
from ..reference.training.teacher_student import attach_teacher, detach_teacher
from .engine import get_engine
from .engine.once import one_forward
from .graphs.capture import CudaCapture
from .graphs.training_step import LIMITS, TrainingGraphs
from .lesson_modules import replace_methods, restore_methods
from .losses import hidden_loss, hidden_losses, logit_loss

__all__ = ["Lesson", "Objective", "attach_teacher", "detach_teacher"]


class Lesson(reference.Lesson):
    """`linmu.reference.Lesson` in fewer kernels: `lesson_modules`, and losses that read their inputs once."""

    hidden_loss = staticmethod(hidden_loss)
    logit_loss = staticmethod(logit_loss)

    def __init__(self, student: nn.Module, objective: Objective) -> None:
        super().__init__(student, objective)
        self.replaced: list[tuple[nn.Module, str]] = []

    def accelerate(self) -> Lesson:
        """Let losses with gradients come from CUDA graphs, forward and backward in one; returns the lesson.

        The first batch of a shape runs as before, the second is captured, which takes seconds; later ones are
        copied into its buffers. Then "loss" alone has a gradient, and its backward must come before the next
        batch's forward. Whatever graphs cannot do runs as before, and the reason is said once on stderr:
        several processes, hooks, sharded or quantised weights, packed rows of a model that sees, other
        decoders than Qwen2's, Llama's, Qwen2-VL's and Qwen2.5-VL's. Gradients are kept twice, and all graphs
        share one pool of memory, as large as the largest step's activations.

        Raises:
            ValueError: for a student that is not on a GPU.
        """
        device = self.student.get_decoder().embed_tokens.weight.device
        require(device.type == "cuda", "Lesson.accelerate", "student must be on a GPU", device)
        self.graphs = TrainingGraphs(self, LIMITS, CudaCapture)
        return self

    def close(self) -> nn.Module:
        """Free the graphs, take hooks and faster forwards off and give the student back, its teacher still
        attached."""
        self.graphs = None
        restore_methods(self.replaced)
        return super().close()

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        """As the reference's; `facts` among the inputs, of `batch_facts`, spare graphs a question."""
        facts = inputs.pop("facts", None)
        device = next(self.layers[0].parameters()).device
        if not self.replaced and get_engine(device) == "triton":  # few kernels are no gain to a CPU
            self.replaced = replace_methods(self.student.get_decoder())
        terms = None if self.graphs is None else self.graphs(labels, inputs, facts)
        if terms is not None:
            return terms
        with one_forward():  # all layers read the same spans of keys, found once
            return super().forward(labels, **inputs)

    def _mean_loss(self, outputs: list[dict[str, Tensor]], groups: list[Tensor]) -> Tensor:
        """Mean of the hidden loss over layers and groups of tokens."""
        losses, sizes = hidden_losses([(each["student"], each["teacher"]) for each in outputs], groups)
        return (losses * share(sizes).to(losses)).mean()
