"""The families of models that can be converted, and their entry in the Auto classes.

A student is an own architecture, `linmu_<family>`: its `config.json` is the teacher's with one entry more,

    "linmu": {"version": 2, "layers": [0, 1, ...], "options": {...}}

After `import linmu.reference` AutoConfig, the Auto class of the family's models and AutoProcessor open a
student's folder, and `transformers serve` answers for it. `register_family` adds a family, from here or from
outside; nothing else needs to know it.
"""

from __future__ import annotations

import sys

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
    Idefics3ForConditionalGeneration,
    InternVLForConditionalGeneration,
    LlamaForCausalLM,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    ProcessorMixin,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2ForCausalLM,
    Qwen2VLForConditionalGeneration,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeForConditionalGeneration,
    SmolVLMForConditionalGeneration,
)
from transformers.models.auto import modeling_auto

from ..checks import require
from ..prompts.idefics3_layout import Idefics3PromptLayout
from ..prompts.internvl_layout import InternVLPromptLayout
from ..prompts.layouts import PromptLayout
from ..prompts.llava_onevision_layout import LlavaOnevisionPromptLayout
from ..prompts.processors import PROCESSORS
from ..prompts.qwen_layout import Qwen2PromptLayout, Qwen3PromptLayout
from .model import LinMUModel, with_vision_layout
from .saved_folder import StudentConfig

FAMILIES: dict[type[PreTrainedModel], type[LinMUModel]] = {}  # a teacher's class, and its student's


def register_family(
    name: str,
    teacher_class: type[PreTrainedModel],
    prompt_layout: PromptLayout | None,
    processor_class: type[ProcessorMixin] | None = None,
) -> type[LinMUModel]:
    """Make a family known to convert(), load() and the Auto classes.

    The teacher must have `get_decoder().layers`, each with a `self_attn` that has q_proj, k_proj, v_proj,
    o_proj and, with a norm per head or without, rotates the two halves of a head by the cosines and sines it
    is called with; its forward must hand keywords that it does not know down to its layers.

    Args:
        name: of the family; the student's model_type is `linmu_<name>`.
        teacher_class: its Hugging Face class.
        prompt_layout: how its prompts show images and videos; None = a text decoder.
        processor_class: what AutoProcessor opens a student's folder with; None = what the folder names.
    Returns:
        the student's class, named after the teacher's.
    Raises:
        ValueError: if there is a family of that name.
    """
    is_new = f"linmu_{name}" not in [student.config_class.model_type for student in FAMILIES.values()]
    require(is_new, "register_family", "name must be new", name)
    student_class = make_student_class(name, teacher_class, prompt_layout)
    config_class = student_class.config_class
    multimodal = (AutoModelForImageTextToText, AutoModelForMultimodalLM)
    AutoConfig.register(f"linmu_{name}", config_class)
    for auto_class in (AutoModelForCausalLM,) if prompt_layout is None else multimodal:
        auto_class.register(config_class, student_class)
    if processor_class is not None:
        AutoProcessor.register(config_class, processor_class)
    name_for_server(student_class)
    FAMILIES[teacher_class] = student_class
    return student_class


def name_for_server(student_class: type[LinMUModel]) -> None:
    """Name a student's class where `transformers serve`, which does not ask the Auto classes, looks it up."""
    is_text = student_class.prompt_layout is None
    task = "CAUSAL_LM" if is_text else "IMAGE_TEXT_TO_TEXT"
    names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
    names[student_class.config_class.model_type] = student_class.__name__  # whether it takes images
    setattr(sys.modules["transformers"], student_class.__name__, student_class)  # of `architectures`


def make_student_class(
    name: str, teacher_class: type[PreTrainedModel], prompt_layout: PromptLayout | None
) -> type[LinMUModel]:
    """Return the subclass of a teacher's class that holds M-MATE, and in it that of its configuration."""
    base = teacher_class.config_class
    settings = {
        "model_type": f"linmu_{name}",
        "linmu": None,
        "__annotations__": {"linmu": dict | None},
        "__init__": StudentConfig.__init__,  # in the class itself, or Hugging Face generates one
    }
    config_class = type(f"LinMU{base.__name__}", (StudentConfig, base), {"__module__": __name__, **settings})
    parts = {
        "config_class": config_class,
        "forward": with_vision_layout(teacher_class.forward),
        "prompt_layout": prompt_layout,
    }
    return type(
        f"LinMU{teacher_class.__name__}", (LinMUModel, teacher_class), {"__module__": __name__, **parts}
    )


def student_class_of(teacher: nn.Module) -> type[LinMUModel]:
    """Return the class of a loaded teacher's student.

    Raises:
        ValueError: if it is a student already, or of no family here.
    """
    hint = "open a student's folder with load()"
    is_student = isinstance(teacher, LinMUModel)
    require(not is_student, "convert", "teacher must be a vanilla model", type(teacher).__name__, hint)
    hint = "other families can be added with register_family()"
    must = f"teacher must be one of {', '.join(kind.__name__ for kind in FAMILIES)}"
    require(type(teacher) in FAMILIES, "convert", must, type(teacher).__name__, hint)
    return FAMILIES[type(teacher)]


for _name, _teacher_class, _prompt_layout in (
    ("qwen2_5_vl", Qwen2_5_VLForConditionalGeneration, Qwen2PromptLayout()),
    ("qwen2_vl", Qwen2VLForConditionalGeneration, Qwen2PromptLayout()),
    ("qwen3_vl", Qwen3VLForConditionalGeneration, Qwen3PromptLayout()),
    ("qwen3_vl_moe", Qwen3VLMoeForConditionalGeneration, Qwen3PromptLayout()),
    ("llava_onevision", LlavaOnevisionForConditionalGeneration, LlavaOnevisionPromptLayout()),
    ("internvl", InternVLForConditionalGeneration, InternVLPromptLayout()),
    ("idefics3", Idefics3ForConditionalGeneration, Idefics3PromptLayout()),
    ("smolvlm", SmolVLMForConditionalGeneration, Idefics3PromptLayout()),
    ("qwen2", Qwen2ForCausalLM, None),
    ("llama", LlamaForCausalLM, None),
):
    register_family(_name, _teacher_class, _prompt_layout, PROCESSORS.get(_name))


def __getattr__(name: str) -> type:
    """Find the classes of the families by their names, as pickle does."""
    classes = [kind for student in FAMILIES.values() for kind in (student.config_class, student)]
    found = next((kind for kind in classes if kind.__name__ == name), None)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return found
