"""LinMU in plain PyTorch loops: the code to read, and the oracle that every faster backend must equal.

Read in this order:
    layout            where tokens sit: Rotary-Major Scan order, 3-D windows
    scan              the recurrence, both ways, one step, the short convolution
    window_attention  softmax inside each window
    sliding_window_attention  softmax over the last tokens of a row, for text
    flex_ma           the global branch
    local_swin        the local branch
    m_mate            the block: both branches, mixed per token
    losses            what the three distillation stages minimise
    grids             from a prompt's placeholder tokens to coordinates
    cache             what decoding keeps of a layer
    attention         softmax attention for the layers that keep it, under the mask that M-MATE reads
    hosted_mixer      the block as a decoder layer calls it, and which backend computes it
    hosting           a Hugging Face model whose decoder holds M-MATE: forward and generate()
    visions           where each family's prompts have vision
    families          the families of teachers, known to the Auto classes
    folder            what a student's folder says about itself
    describe          what converting would change
    convert           a teacher in, a student out; a student's folder opened again
    lesson            teacher and student in one model, and what each stage minimises
"""

import warnings

from .causal_conv import causal_conv
from .config import LinMUConfig
from .flex_ma import FlexMA, FlexMAState
from .layout import VisionLayout, inverse_order, scan_order, window_ids
from .local_swin import LocalSwin
from .losses import hidden_loss, logit_loss
from .m_mate import MMATE
from .scan import bidirectional_scan, scan_step, selective_scan
from .sliding_window_attention import WindowState, sliding_window_attention
from .student.convert import convert, load
from .training.calibration import calibrate_norms
from .training.teacher_student import Lesson, Objective, attach_teacher, detach_teacher
from .window_attention import window_attention

# `python -m linmu.reference.student.convert` runs a module that was imported already.
warnings.filterwarnings("ignore", "'linmu.reference.student.convert' found in sys.modules", RuntimeWarning)

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
    "hidden_loss",
    "inverse_order",
    "load",
    "logit_loss",
    "scan_order",
    "scan_step",
    "selective_scan",
    "sliding_window_attention",
    "window_attention",
    "window_ids",
]
