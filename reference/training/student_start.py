"""What a student starts as: both branches of M-MATE or one alone, from attention or at random.

It is an ordinary student in any case: a branch that is left out is pinned away by M-MATE's parameters.
"""

from __future__ import annotations

import torch
from torch import nn

from ..projections import COPIED_MODULES
from .config import StudentSettings
from .teacher_student import TeacherStudentMixer

PINNED = 30.0  # logit of a mixing weight that is 1 in float32


@torch.no_grad()
def start(student: nn.Module, settings: StudentSettings) -> None:
    """Start the branches from attention or at random, both or one alone."""
    for module in student.modules():
        if not isinstance(module, TeacherStudentMixer):
            continue
        mixer = module.mixer
        if settings.init == "random":
            for branch in (mixer.flex_ma, *([mixer.local_swin] if mixer.config.has_local_swin else [])):
                start_at_random(branch)
        if settings.branches != "both" and mixer.config.has_local_swin:
            mixer.mix_proj.weight.zero_()
            mixer.mix_proj.bias.fill_(PINNED if settings.branches == "flex" else -PINNED)
        if settings.branches == "local":  # text without a window has no other branch: the residual stream
            for tensor in mixer.flex_ma.o_proj.parameters():
                tensor.zero_()


def start_at_random(branch: nn.Module) -> None:
    """Forget what was copied from attention."""
    for name in COPIED_MODULES:
        module = getattr(branch, name, None)
        if isinstance(module, nn.Linear):
            module.reset_parameters()
