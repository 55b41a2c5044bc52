"""LinMU, fast: the public names of `linmu.reference`, the same results, less time.

m_mate, flex_ma, local_swin, projections    the reference's modules on the operators below
scan, causal_conv, window_attention, losses, layout    an operator each, under the reference's file name
decoding, elementwise    one token of text; RoPE and the mix of the branches
engine    Triton kernels or torch: which one runs, and how to force one
student, training, lesson_modules    a Hugging Face model on these modules, and its distillation
vision_tower    Qwen's towers, all windows of one length in one call
graphs    its forward, generate() and training steps from CUDA graphs

README.md says how an operator is called and how to add a kernel.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..reference.config import LinMUConfig
from .causal_conv import causal_conv
from .decoding import scan_step
from .engine import get_engine, set_engine
from .flex_ma import FlexMA, FlexMAState
from .layout import VisionLayout, inverse_order, scan_order, window_ids
from .local_swin import LocalSwin
from .losses import hidden_loss, logit_loss
from .m_mate import MMATE, MMATEState
from .scan import bidirectional_scan, selective_scan
from .sliding_window_attention import WindowState, sliding_window_attention
from .window_attention import window_attention

if TYPE_CHECKING:
    from ..reference.student.watching import watch
    from ..reference.training.calibration import calibrate_norms
    from .graphs import accelerate, unaccelerate
    from .student import convert, load
    from .training import Lesson, Objective, attach_teacher, detach_teacher

__all__ = [
    "MMATE",
    "FlexMA",
    "FlexMAState",
    "Lesson",
    "LinMUConfig",
    "LocalSwin",
    "MMATEState",
    "Objective",
    "VisionLayout",
    "WindowState",
    "accelerate",
    "attach_teacher",
    "bidirectional_scan",
    "calibrate_norms",
    "causal_conv",
    "convert",
    "detach_teacher",
    "get_engine",
    "hidden_loss",
    "inverse_order",
    "load",
    "logit_loss",
    "scan_order",
    "scan_step",
    "selective_scan",
    "set_engine",
    "sliding_window_attention",
    "unaccelerate",
    "watch",
    "window_attention",
    "window_ids",
]

# Imported when first asked for, since they import transformers, which takes seconds.
WITH_TRANSFORMERS = {
    "Lesson": ".training",
    "Objective": ".training",
    "accelerate": ".graphs",
    "attach_teacher": ".training",
    "calibrate_norms": "..reference.training.calibration",
    "convert": ".student",
    "detach_teacher": ".training",
    "load": ".student",
    "unaccelerate": ".graphs",
    "watch": "..reference.student.watching",
}


def __getattr__(name: str) -> Any:
    """Import a name of `WITH_TRANSFORMERS` (PEP 562)."""
    if name not in WITH_TRANSFORMERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(WITH_TRANSFORMERS[name], __name__), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
