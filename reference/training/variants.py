"""What can be changed about a distillation without changing its code: losses, branches, starts, tuning.

Every variant leaves an ordinary student: a branch that is left out is pinned away by M-MATE's parameters.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig
from torch import nn

from ..projections import COPIED_MODULES
from .commands.command_line import RefusedError
from .stages import Stage
from .teacher_student import TeacherStudentMixer

if TYPE_CHECKING:
    from distill import Config

FLEX, LOCAL, MIX, LORA, COPY = (
    ".mixer.flex_ma.",
    ".mixer.local_swin.",
    ".mixer.mix_proj.",
    "lora_",
    "modules_to_save",
)
PINNED = 30.0  # logit of a mixing weight that is 1 in float32


def apply_variant(stage: Stage, config: Config) -> Stage:
    """A stage with the losses, branches and tuning that the flags ask for.

    Raises:
        RefusedError: for an objective that cannot be.
    """
    changes = config.objective_changes.get(stage.name, {})
    try:
        routes = tuple(dict.fromkeys(replace(route, **changes) for route in stage.routes))
    except (TypeError, ValueError) as error:
        raise RefusedError(
            f"distill: --objectives must fit stage {stage.name}, got {changes}; {error}"
        ) from None
    stage = replace(stage, routes=routes, trained=branches_of(stage.trained, config.branches))
    if LORA not in stage.trained or config.tune == "lora":
        return stage
    others = tuple(part for part in stage.trained if part != LORA)
    if config.tune == "none":
        return replace(stage, trained=others, lr_lora=0.0)
    return replace(stage, trained=(*others, COPY))


def branches_of(trained: tuple[str, ...], branches: str) -> tuple[str, ...]:
    """The parts that a stage trains where one branch is left out. Choice: Local-Swin alone starts in i."""
    if branches == "both":
        return trained
    kept, gone = (FLEX, LOCAL) if branches == "flex" else (LOCAL, FLEX)
    if kept not in trained:
        trained = (kept, *trained)
    return tuple(part for part in trained if part not in (gone, MIX))


@torch.no_grad()
def start(student: nn.Module, config: Config) -> None:
    """Start the branches as the flags ask: from attention or at random, both or one alone."""
    for module in student.modules():
        if not isinstance(module, TeacherStudentMixer):
            continue
        mixer = module.mixer
        if config.init == "random":
            for branch in (mixer.flex_ma, mixer.local_swin):
                start_at_random(branch)
        if config.branches != "both":
            mixer.mix_proj.weight.zero_()
            mixer.mix_proj.bias.fill_(PINNED if config.branches == "flex" else -PINNED)
        if config.branches == "local":  # text has no other branch: it is left to the residual stream
            for tensor in mixer.flex_ma.o_proj.parameters():
                tensor.zero_()


def start_at_random(branch: nn.Module) -> None:
    """Forget what was copied from attention."""
    for name in COPIED_MODULES:
        module = getattr(branch, name, None)
        if isinstance(module, nn.Linear):
            module.reset_parameters()


def tuner(student: nn.Module, config: Config) -> LoraConfig:
    """What peft is to do with the decoder's MLPs: adapters, or tuned copies beside the teacher's own."""
    layers = [*student.get_decoder().layers]
    names = {id(module): name for name, module in student.named_modules()}
    mlps = [names[id(layer.mlp)] for layer in layers]
    if config.tune == "full":
        return LoraConfig(target_modules="dummy-target-modules", modules_to_save=mlps)
    wanted = config.lora_targets.split(",")
    inside = [
        (names[id(layer)], name) for layer in layers for name, module in layer.named_modules() if name
        and isinstance(module, nn.Linear) and name.split(".")[-1] in wanted and "self_attn" not in name
    ]  # fmt: skip
    if not inside:
        raise RefusedError(
            f"distill: --lora_targets must be among the projections of {mlps[0]}, got {config.lora_targets}"
        )
    targets: Any = [f"{layer}.{name}" for layer, name in inside]
    return LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=targets)
