"""`reference/student/` with the fast M-MATE in the decoder layers; folders are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from ..reference.config import LinMUConfig
from ..reference.student.convert import build_student, chosen_mixer, load_student
from ..reference.student.model import LinMUModel
from .m_mate import MMATE

__all__ = ["convert", "load"]


def convert(
    teacher: PreTrainedModel,
    config: LinMUConfig | dict[str, Any] | None = None,
    *,
    layers: Sequence[int] | None = None,
    backend: str | None = None,
) -> LinMUModel:
    """`linmu.reference.convert`: arguments, parameters and errors are the same, computed by
    `linmu.optimized`.
    """
    return build_student(teacher, config, layers, chosen_mixer(backend, MMATE))


def load(folder: str, **from_pretrained_kwargs: Any) -> LinMUModel:
    """`linmu.reference.load`: arguments and errors are the same, computed by `linmu.optimized`."""
    return load_student(folder, MMATE, **from_pretrained_kwargs)
