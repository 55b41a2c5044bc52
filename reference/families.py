"""The families of vision-language models that can be converted, and their entry in the Auto classes.

A student is an own architecture, `linmu_<family>`: its `config.json` is the teacher's with one entry more,

    "linmu": {"version": 1, "layers": [0, 1, ...], "options": {...}}

After `import linmu.reference` AutoConfig, AutoModelForImageTextToText and AutoProcessor open a student's
folder.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from .checks import require
from .hosting import LinMUModel, with_vision_layout
from .processing import PROCESSORS


class LinMUQwen2_5_VLConfig(Qwen2_5_VLConfig):  # noqa: N801 - the family's own spelling
    """Qwen2.5-VL's configuration, with the student's settings in `linmu`."""

    model_type = "linmu_qwen2_5_vl"
    linmu: dict | None = None


class LinMUQwen2_5_VLForConditionalGeneration(LinMUModel, Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """Qwen2.5-VL with M-MATE in its decoder."""

    config: LinMUQwen2_5_VLConfig
    config_class = LinMUQwen2_5_VLConfig
    forward = with_vision_layout(Qwen2_5_VLForConditionalGeneration.forward)


class LinMUQwen2VLConfig(Qwen2VLConfig):
    """Qwen2-VL's configuration, with the student's settings in `linmu`."""

    model_type = "linmu_qwen2_vl"
    linmu: dict | None = None


class LinMUQwen2VLForConditionalGeneration(LinMUModel, Qwen2VLForConditionalGeneration):
    """Qwen2-VL with M-MATE in its decoder."""

    config: LinMUQwen2VLConfig
    config_class = LinMUQwen2VLConfig
    forward = with_vision_layout(Qwen2VLForConditionalGeneration.forward)


@dataclass(frozen=True)
class Family:
    """A kind of teacher and what it becomes."""

    name: str
    teacher_class: type[nn.Module]
    student_class: type[LinMUModel]

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        """The student's configuration."""
        return self.student_class.config_class


FAMILIES = (
    Family("qwen2_5_vl", Qwen2_5_VLForConditionalGeneration, LinMUQwen2_5_VLForConditionalGeneration),
    Family("qwen2_vl", Qwen2VLForConditionalGeneration, LinMUQwen2VLForConditionalGeneration),
)


def family_of(teacher: nn.Module) -> Family:
    """Return the family of a loaded teacher.

    Raises:
        ValueError: if it is a student already, or of no family here.
    """
    hint = "open a student's folder with load()"
    is_student = isinstance(teacher, LinMUModel)
    require(not is_student, "convert", "teacher must be a vanilla model", type(teacher).__name__, hint)
    family = next((family for family in FAMILIES if isinstance(teacher, family.teacher_class)), None)
    supported = ", ".join(family.teacher_class.__name__ for family in FAMILIES)
    require(family is not None, "convert", f"teacher must be one of {supported}", type(teacher).__name__)
    return family


def register() -> None:
    """Tell the Auto classes about all families."""
    for family in FAMILIES:
        AutoConfig.register(family.config_class.model_type, family.config_class)
        AutoModelForImageTextToText.register(family.config_class, family.student_class)
        AutoProcessor.register(family.config_class, PROCESSORS[family.name])


register()
