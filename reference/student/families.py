"""The families of models that can be converted, and their entry in the Auto classes.

A student is an own architecture, `linmu_<family>`: its `config.json` is the teacher's with one entry more,

    "linmu": {"version": 1, "layers": [0, 1, ...], "options": {...}}

After `import linmu.reference` AutoConfig, the Auto class of the family's models and AutoProcessor open a
student's folder. `register_family` adds a family, from here or from outside; nothing else needs to know it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics3ForConditionalGeneration,
    InternVLForConditionalGeneration,
    LlamaForCausalLM,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2ForCausalLM,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
    SmolVLMForConditionalGeneration,
)

from ..checks import require
from ..prompts.layouts import (
    Idefics3Vision,
    InternVLVision,
    LlavaOnevisionVision,
    Qwen2Vision,
    Qwen3Vision,
    Vision,
)
from ..prompts.processors import PROCESSORS
from .model import LinMUModel, with_vision_layout
from .saved_folder import StudentConfig


@dataclass(frozen=True)
class Family:
    """A kind of teacher and what it becomes."""

    name: str
    teacher_class: type[PreTrainedModel]
    student_class: type[LinMUModel]

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        """The student's configuration."""
        return self.student_class.config_class


FAMILIES: list[Family] = []


def register_family(
    name: str,
    teacher_class: type[PreTrainedModel],
    vision: Vision | None,
    processor_class: type[ProcessorMixin] | None = None,
) -> Family:
    """Make a family known to convert(), load() and the Auto classes.

    The teacher must have `get_decoder().layers`, each with a `self_attn` that has q_proj, k_proj, v_proj,
    o_proj and, with a norm per head or without, rotates the two halves of a head by the cosines and sines it
    is called with; its forward must hand keywords that it does not know down to its layers.

    Args:
        name: of the family; the student's model_type is `linmu_<name>`.
        teacher_class: its Hugging Face class.
        vision: how its prompts show images and videos; None = a text decoder.
        processor_class: what AutoProcessor opens a student's folder with; None = what the folder names.
    Returns:
        the family, with the student's class, named after the teacher's.
    Raises:
        ValueError: if the name is taken.
    """
    taken = name in [family.name for family in FAMILIES]
    require(not taken, "register_family", "name must be new", name)
    family = Family(name, teacher_class, student_class(name, teacher_class, vision))
    auto_class = AutoModelForCausalLM if vision is None else AutoModelForImageTextToText
    AutoConfig.register(f"linmu_{name}", family.config_class)
    auto_class.register(family.config_class, family.student_class)
    if processor_class is not None:
        AutoProcessor.register(family.config_class, processor_class)
    FAMILIES.append(family)
    return family


def student_class(name: str, teacher_class: type[PreTrainedModel], vision: Vision | None) -> type[LinMUModel]:
    """Return the subclass of a teacher's class that holds M-MATE, and in it that of its configuration."""
    base = teacher_class.config_class
    settings = {"model_type": f"linmu_{name}", "linmu": None, "__annotations__": {"linmu": dict | None}}
    config_class = type(f"LinMU{base.__name__}", (StudentConfig, base), {"__module__": __name__, **settings})
    parts = {
        "config_class": config_class,
        "forward": with_vision_layout(teacher_class.forward),
        "vision": vision,
    }
    return type(
        f"LinMU{teacher_class.__name__}", (LinMUModel, teacher_class), {"__module__": __name__, **parts}
    )


def family_of(teacher: nn.Module) -> Family:
    """Return the family of a loaded teacher.

    Raises:
        ValueError: if it is a student already, or of no family here.
    """
    hint = "open a student's folder with load()"
    is_student = isinstance(teacher, LinMUModel)
    require(not is_student, "convert", "teacher must be a vanilla model", type(teacher).__name__, hint)
    family = next((family for family in FAMILIES if type(teacher) is family.teacher_class), None)
    supported = ", ".join(family.teacher_class.__name__ for family in FAMILIES)
    hint = "other families can be added with register_family()"
    must = f"teacher must be one of {supported}"
    require(family is not None, "convert", must, type(teacher).__name__, hint)
    return family


for _name, _teacher_class, _vision in (
    ("qwen2_5_vl", Qwen2_5_VLForConditionalGeneration, Qwen2Vision()),
    ("qwen2_vl", Qwen2VLForConditionalGeneration, Qwen2Vision()),
    ("qwen3_vl", Qwen3VLForConditionalGeneration, Qwen3Vision()),
    ("qwen3_vl_moe", Qwen3VLMoeForConditionalGeneration, Qwen3Vision()),
    ("llava_onevision", LlavaOnevisionForConditionalGeneration, LlavaOnevisionVision()),
    ("internvl", InternVLForConditionalGeneration, InternVLVision()),
    ("idefics3", Idefics3ForConditionalGeneration, Idefics3Vision()),
    ("smolvlm", SmolVLMForConditionalGeneration, Idefics3Vision()),
    ("qwen2", Qwen2ForCausalLM, None),
    ("llama", LlamaForCausalLM, None),
):
    register_family(_name, _teacher_class, _vision, PROCESSORS.get(_name))


def __getattr__(name: str) -> type:
    """Find the classes of the families by their names, as pickle does."""
    classes = [kind for family in FAMILIES for kind in (family.config_class, family.student_class)]
    found = next((kind for kind in classes if kind.__name__ == name), None)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
