"""`reference/student/` with the fast M-MATE in the decoder layers; folders are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import PreTrainedModel

from ..reference.config import LinMUConfig
from ..reference.student import convert as reference
from ..reference.student.backend import Backend, register_backend
from ..reference.student.context_parallel import Operators
from ..reference.student.model import LinMUModel
from ..reference.window_attention import check_window_attention
from .causal_conv import causal_conv
from .context_parallel import m_mate
from .elementwise.operator import MixInputs, mix_branches
from .layout import VisionLayout, rows_where
from .layout.operator import WindowPlanInputs, window_plan
from .m_mate import MMATE
from .projections import apply_rope, narrow_products
from .scan import bidirectional_scan
from .sliding_window_attention import sliding_window_attention
from .training import Lesson
from .vision_tower import hasten_tower
from .window_attention import planned_attention

__all__ = ["convert", "load"]


def mix(y: Tensor, local: Tensor, logit: Tensor, mixes: Tensor | None) -> Tensor:
    """`mix_branches` as context parallel calls it."""
    return mix_branches(MixInputs(y, local, logit, rows_where(mixes, y)))


PLANS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of each tensor of window ids, while it lives


def planned_once(q: Tensor, k: Tensor, v: Tensor, window_id: Tensor, *, scale: float | None = None) -> Tensor:
    """`window_attention` as context parallel calls it: layers share their tensors of ids."""
    check_window_attention("window_attention", q, k, v, window_id)
    if window_id not in PLANS:
        PLANS[window_id] = window_plan(WindowPlanInputs(window_id))
    return planned_attention(q, k, v, window_id, PLANS[window_id], scale=scale)


OPERATORS = Operators(
    causal_conv,
    bidirectional_scan,
    sliding_window_attention,
    planned_once,
    apply_rope,
    narrow_products,
    mix,
    m_mate,
)
BACKEND = register_backend(Backend("optimized", MMATE, VisionLayout, Lesson, hasten_tower, OPERATORS))


def convert(
    teacher: PreTrainedModel,
    config: LinMUConfig | Mapping[str, Any] | None = None,
    *,
    layers: Sequence[int] | None = None,
    backend: str | Backend | None = None,
) -> LinMUModel:
    """`linmu.reference.convert`: arguments, parameters and errors are the same, computed by this package."""
    return reference.convert(teacher, config, layers=layers, backend=backend or BACKEND)


def load(folder: str, **from_pretrained_kwargs: Any) -> LinMUModel:
    """`linmu.reference.load`: arguments and errors are the same, computed by this package."""
    return reference.load(folder, **{"linmu_backend": BACKEND} | from_pretrained_kwargs)
