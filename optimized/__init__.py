"""LinMU, fast: the public names of `linmu.reference`, the same results, less time.

engine            Triton kernels or torch: which one runs, and how to force one
scan              chunks of tokens as matrix products, both directions from one C Bᵀ
window_attention  windows batched, or gathered by the kernel
layout, losses    no loop over tokens, no float32 logits
flex_ma, local_swin, m_mate, student, training    the reference's modules on these operators
"""

from .calibration import calibrate_norms
from .config import LinMUConfig
from .engine import get_engine, set_engine
from .flex_ma import FlexMA, FlexMAState
from .layout import VisionLayout, inverse_order, scan_order, window_ids
from .local_swin import LocalSwin
from .losses import hidden_loss, logit_loss
from .m_mate import MMATE
from .scan import bidirectional_scan, causal_conv, scan_step, selective_scan
from .sliding_window_attention import WindowState, sliding_window_attention
from .student import convert, load
from .training import Lesson, Objective, attach_teacher, detach_teacher
from .window_attention import window_attention

__all__ = [
    "MMATE",
    "FlexMA",
    "FlexMAState",
    "Lesson",
    "LinMUConfig",
    "LocalSwin",
    "Objective",
    "VisionLayout",
    "WindowState",
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
    "window_attention",
    "window_ids",
]
