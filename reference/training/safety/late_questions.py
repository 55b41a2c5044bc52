"""Whether numbers are finite, asked of a GPU once every few steps: each question waits until all is computed.

Until it is asked nothing must be lost. So the device itself keeps a mark, set by the first loss or gradient
that is not finite, which tells the optimizer to leave the weights alone from then on. When it is asked, the
weights are those with which the bad step was computed, and running it again shows what was not finite.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..lesson import Lesson, Objective
from .guards import TrainingStoppedError, local, refuse_infinite_gradients, refuse_infinite_loss

EVERY = 4  # steps; each keeps its batch until then


class Step(NamedTuple):
    """A batch that was taught, and whether its loss and all gradients after it are finite, on the device."""

    inputs: dict[str, Any]
    objective: Objective
    where: str
    names: Sequence[str]
    is_finite: Tensor


class LateQuestions:
    """Asks of several steps at once.

    Args:
        lesson: what is taught.
        optimizer: whose kernels heed `found_inf`; see `heeds_marks`.
        last_good: what to say of the last checkpoint.
    """

    def __init__(
        self, lesson: Lesson, optimizer: torch.optim.Optimizer, last_good: Callable[[], str]
    ) -> None:
        self.lesson, self.optimizer, self.last_good = lesson, optimizer, last_good
        self.steps: list[Step] = []
        self.mark: Tensor | None = None

    def add(self, inputs: dict[str, Any], loss: Tensor, where: str, names: Sequence[str]) -> None:
        """Look at a step after its backward, and ask of all since the last question if they are many.

        Raises:
            TrainingStoppedError: as `ask`.
        """
        gradients = [local(p.grad) for p in self.lesson.parameters() if p.grad is not None]
        norms = [norm.float() for norm in torch._foreach_norm(gradients)]
        is_finite = torch.stack([loss.detach().float(), *norms]).isfinite().all()
        bad = (~is_finite).float()
        self.mark = bad if self.mark is None else torch.maximum(self.mark, bad)
        self.optimizer.found_inf = self.mark
        self.steps.append(Step(inputs, self.lesson.objective, where, names, is_finite))
        if len(self.steps) >= EVERY:
            self.ask()

    def ask(self) -> None:
        """Wait for all steps that were added.

        Raises:
            TrainingStoppedError: if one was not finite; names the first layer and the samples that are not.
        """
        steps, self.steps = self.steps, []
        if not steps:
            return
        answers = torch.stack([step.is_finite for step in steps]).tolist()
        for step, is_finite in zip(steps, answers, strict=True):
            if not is_finite:
                self.run_again(step)

    def run_again(self, step: Step) -> None:
        """Raise of a step what it was that is not finite."""
        lesson, last = self.lesson, self.last_good()
        lesson.graphs = None  # whose steps leave nothing of what is within
        lesson.objective = step.objective
        lesson.zero_grad()
        loss = lesson(**step.inputs)["loss"]
        refuse_infinite_loss(lesson, loss, step.where, step.names, last)
        loss.backward()
        refuse_infinite_gradients(lesson.named_parameters(), step.where, step.names, last)
        names = ", ".join(step.names)
        must, got = "loss and gradients must be finite", "some that are not, and finite ones when run again"
        raise TrainingStoppedError(f"{step.where}: {must}, got {got}, samples {names}; {last}")


def heeds_marks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer leaves weights alone where its `found_inf` is 1: torch's fused ones do."""
    fused = all(group.get("fused") for group in optimizer.param_groups)
    return fused and bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def plain(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer within what accelerate wraps around it."""
    return getattr(optimizer, "optimizer", optimizer)


def is_on_gpu(model: nn.Module) -> bool:
    """Whether a question to a model's device waits."""
    return next(model.parameters()).is_cuda
