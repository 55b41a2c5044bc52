"""The memory of a stage: weights, what training them adds, what one pass keeps; and how to need less.

    peak = weights + trainable states + activations                                                     (1)
    trainable states = 3 times the trained tensors: gradient and AdamW's two moments, in their own dtype (2)
    activations      = the highest point of one forward and backward, above what was there before       (3)

(3) is measured, on a GPU by its allocator, on a CPU under Linux by the kernel's count of resident pages.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..lesson import Lesson

GIB = 2**30
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def recompute_layers(student: PreTrainedModel) -> None:
    """Let every layer keep its input only and run again in the backward pass, where something is trained."""
    student.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    leave_inputs_alone(student)


def leave_inputs_alone(student: PreTrainedModel) -> None:
    """Undo what transformers and peft do for recomputed layers: ask for the gradient of the embeddings and of
    the pixels. Only checkpoints of the old kind need it; here it would send gradients through the frozen
    vision tower and through the teacher's pass.
    """
    student.disable_input_require_grads()


@dataclass(frozen=True)
class Memory:
    """Bytes of eq. (1); activations are None where they cannot be measured."""

    weights: int
    states: int
    activations: int | None

    @property
    def total(self) -> int:
        """The peak."""
        return self.weights + self.states + (self.activations or 0)

    def __str__(self) -> str:
        parts = {"weights": self.weights, "states": self.states, "activations": self.activations}
        listing = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
        return f"{gib(self.total)} = {listing}"


def gib(size: int | None) -> str:
    """Bytes as text."""
    return "unknown" if size is None else f"{size / GIB:.3f} GiB"


def predict(lesson: Lesson, batch: dict[str, Tensor]) -> Memory:
    """Eq. (1) for a stage whose parameters are set free, from one pass over a batch like its largest."""
    trained = [parameter for parameter in lesson.parameters() if parameter.requires_grad]
    gradients = sum(map(bytes_of, trained))

    def one_pass() -> None:
        lesson(**batch)["loss"].backward()

    lesson.train()
    one_pass()  # the first one also loads what all later ones share
    lesson.zero_grad()
    above = peak_above(one_pass, next(lesson.parameters()).device)
    lesson.zero_grad()
    activations = None if above is None else max(0, above - gradients)
    return Memory(weights(lesson), 3 * gradients, activations)


def weights(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, those shared by teacher and student once."""
    storages = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return sum(storages.values())


def bytes_of(tensor: Tensor) -> int:
    """Bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def peak_above(work: Callable[[], None], device: torch.device) -> int | None:
    """Bytes that `work` needs at its highest point, above what is in use when it begins."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not CLEAR.exists():
        work()
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, or it would hide what is needed now
    CLEAR.write_text("5")  # the highest point starts anew
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(count: str) -> int:
    """Bytes of this process in memory, now ("VmRSS") or at the highest point ("VmHWM")."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(count))
    return int(line.split()[1]) * 1024
