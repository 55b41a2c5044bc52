"""What a student starts as, and what stage iii does with the decoder's MLPs, as the settings ask.

Every variant leaves an ordinary student: a branch that is left out is pinned away by M-MATE's parameters.
"""

from __future__ import annotations

import torch
from peft import LoraConfig
from peft.utils.constants import DUMMY_TARGET_MODULES  # peft's own word for none
from torch import nn

from ..projections import COPIED_MODULES
from .config import MLPSettings, StudentSettings
from .refusal import check
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


def peft_settings(student: nn.Module, settings: MLPSettings) -> LoraConfig:
    """What peft is to do with the decoder's MLPs: adapters, or tuned copies beside the teacher's own.

    Raises:
        RefusedError: if a layer has no linear projection of the names that adapters are asked for.
    """
    layers = [*student.get_decoder().layers]
    names = {id(module): name for name, module in student.named_modules()}
    if settings.tune == "full":
        mlps = [names[id(layer.mlp)] for layer in layers]
        return LoraConfig(target_modules=DUMMY_TARGET_MODULES, modules_to_save=mlps)
    targets = []
    for layer in layers:
        linear = [name for name, module in layer.mlp.named_modules() if isinstance(module, nn.Linear)]
        wanted = [name for name in linear if name.split(".")[-1] in settings.lora_targets]
        mlp = names[id(layer.mlp)]
        given = " ".join(settings.lora_targets)
        check(
            wanted,
            f"--lora_targets must be among the linear projections of {mlp}, {linear or 'which has none'}",
            given,
            "a mixture of experts takes --tune full or --tune none",
        )
        targets += [f"{mlp}.{name}" for name in wanted]
    return LoraConfig(r=settings.lora_rank, lora_alpha=settings.lora_rank, target_modules=targets)
