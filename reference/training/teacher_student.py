"""Teacher and student in one model, all weights but the mixers' in one copy.

Letters: B batch, L tokens, D width.

While a student is taught, every converted layer keeps the teacher's attention beside its M-MATE block, and a
switch says which of the two mixes. All other weights serve both; adapters are off for the teacher.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ..checks import require
from .safety.distributed_means import processes

Call = tuple[tuple, dict[str, Any]]  # a module's arguments, by position and by name


class TeacherStudentMixer(nn.Module):
    """A decoder layer's mixer during distillation: attention and M-MATE in one place, one of them in use.

    Args:
        attention: the teacher's attention.
        mixer: the student's M-MATE, called in the same way.

    Attributes:
        role: "teacher" or "student": which of the two mixes.
        call: what the last call as teacher was given.
        outputs: (B, L, D) by role, of the last calls.
    """

    def __init__(self, attention: nn.Module, mixer: nn.Module) -> None:
        super().__init__()
        self.attention, self.mixer = attention, mixer
        self.role = "student"
        self.call: Call | None = None
        self.outputs: dict[str, Tensor] = {}

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: without what the last calls left, which autograd may have recorded."""
        return vars(self) | {"call": None, "outputs": {}}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Mix as `role` says, and keep the output."""
        if self.role == "teacher":
            self.call = args, kwargs
            output = self.attention(*args, **kwargs)
        else:
            output = self.mix(*args, **kwargs)
        self.outputs[self.role] = output[0]
        return output

    def mix(self, *args: Any, **kwargs: Any) -> Any:
        """Run M-MATE."""
        output, *rest = self.mixer(*args, **kwargs)
        return (with_gradient_anchor(output, self.mixer) if processes() > 1 else output, *rest)

    def mix_teachers_input(self) -> None:
        """Run M-MATE on what the attention was given last; its output is kept as the student's."""
        args, kwargs = self.call
        self.outputs["student"] = self.mix(*args, **kwargs)[0]


def with_gradient_anchor(output: Tensor, module: nn.Module) -> Tensor:
    """Add 0 to a module's output so that all it trains gets a gradient: DDP waits for each one on every rank,
    and a batch of text alone has none for Local-Swin."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return (
        output + 0 * sum(parameter.flatten()[0] for parameter in trained).to(output.dtype)
        if trained
        else output
    )


def attach_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Put the teacher's attention beside every M-MATE of `student`, in place.

    Args:
        student: what `convert(teacher)` returned.
        teacher: the model it was converted from; it stays usable, and its attention is shared, not copied.
    Raises:
        ValueError: if no layer of the student is converted, or its teacher is attached already.
    """
    layers, teachers = student.get_decoder().layers, teacher.get_decoder().layers
    converted = [i for i, layer in enumerate(layers) if hasattr(layer.self_attn, "flex_ma")]
    require(bool(converted), "attach_teacher", "student must have M-MATE layers", "none", "convert it first")
    for i in converted:
        # same weights, but it must read the student's kind of mask
        attention = copy.copy(teachers[i].self_attn)
        attention.config = student.config.get_text_config(decoder=True)
        layers[i].self_attn = TeacherStudentMixer(attention, layers[i].self_attn)


def detach_teacher(student: nn.Module) -> None:
    """Undo `attach_teacher`: only the M-MATE blocks remain, and the student can be saved."""
    for layer in student.get_decoder().layers:
        if isinstance(layer.self_attn, TeacherStudentMixer):
            layer.self_attn = layer.self_attn.mixer


def set_adapters(model: nn.Module, enabled: bool) -> None:
    """Switch every peft adapter in `model`, and every tuned copy of a module, on or off. What is trained
    stays so: peft alone would freeze what it switches off."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
            module.enable_adapters(enabled)
            for parameter, is_trained in trained:
                parameter.requires_grad_(is_trained)
