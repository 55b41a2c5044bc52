"""`reference/student/` with the fast M-MATE in the decoder layers; folders are the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from ..reference.config import LinMUConfig
from ..reference.student import convert as reference
from ..reference.student.backend import Backend, register_backend
from ..reference.student.context_parallel import Operators
from ..reference.student.model import LinMUModel
from .causal_conv import causal_conv
from .layout import VisionLayout
from .m_mate import MMATE
from .scan import bidirectional_scan
from .sliding_window_attention import sliding_window_attention
from .training import Lesson
from .vision_tower import hasten_tower
from .window_attention import window_attention

__all__ = ["convert", "load"]

OPERATORS = Operators(causal_conv, bidirectional_scan, sliding_window_attention, window_attention)
BACKEND = register_backend(Backend("optimized", MMATE, VisionLayout, Lesson, hasten_tower, OPERATORS))


def convert(
    teacher: PreTrainedModel,
    config: LinMUConfig | dict[str, Any] | None = None,
    *,
    layers: Sequence[int] | None = None,
    backend: str | Backend | None = None,
) -> LinMUModel:
    """`linmu.reference.convert`: arguments, parameters and errors are the same, computed by this package."""
    return reference.convert(teacher, config, layers=layers, backend=backend or BACKEND)


def load(folder: str, **from_pretrained_kwargs: Any) -> LinMUModel:
    """`linmu.reference.load`: arguments and errors are the same, computed by this package."""
    return reference.load(folder, **{"linmu_backend": BACKEND} | from_pretrained_kwargs)
