"""What a run says of its student: how every tensor started, what a stage trains, what it leaves alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import nn

from ...projections import COPIED_MODULES
from ..config import Config
from ..parameter_groups import ParameterGroup
from ..stages import Stage
from ..teacher_student import TeacherStudentMixer

STARTS = {
    "flex_ma.q_proj": "copied from the teacher's q_proj, makes C",
    "flex_ma.k_proj": "copied from the teacher's k_proj, makes B",
    "flex_ma.v_proj": "copied from the teacher's v_proj, makes x",
    "flex_ma.o_proj": "copied from the teacher's o_proj",
    "local_swin": "copied from the teacher",
    "flex_ma.dt_proj": "weight 0, bias so that dt = 1",
    "flex_ma.scan_gate_proj": "0: forward and reverse scan weigh the same",
    "flex_ma.A_log": "half-lives log-spaced over the heads",
    "flex_ma.D": "0: no skip",
    "flex_ma.conv": "identity",
    "flex_ma.norm_weight": "the teacher's head outputs, root mean square by channel",
    "flex_ma.z_proj": "weight 0, bias so that silu(z) = 1",
    "flex_ma.q_norm": "copied from the teacher",
    "flex_ma.k_norm": "copied from the teacher",
    "mix_proj": "0: both branches weigh the same",
}


def about_student(student: nn.Module, config: Config, device: torch.device) -> Iterator[str]:
    """How every kind of tensor in M-MATE started."""
    mixers = [module.mixer for module in student.modules() if isinstance(module, TeacherStudentMixer)]
    total = sum(parameter.numel() for parameter in student.parameters())
    taught = sum(parameter.numel() for mixer in mixers for parameter in mixer.parameters())
    yield (
        f"{config.teacher}: {len(mixers)} layers converted to linmu.{config.backend}'s M-MATE, "
        f"{taught:,} parameters beside the teacher's {total - taught:,}, on {device}"
    )
    for name, parameter in mixers[0].named_parameters():
        yield f"  {name:32} {tuple(parameter.shape)!s:12} {start_of(name, config)}"


def about_stage(student: nn.Module, stage: Stage) -> Iterator[str]:
    """What a stage trains, and what it leaves alone."""
    trained, frozen = defaultdict(int), defaultdict(int)
    for name, parameter in student.named_parameters():
        (trained if parameter.requires_grad else frozen)[part_of(name)] += parameter.numel()
    for verb, parts in (("trains", trained), ("freezes", frozen)):
        listing = ", ".join(f"{part} {count:,}" for part, count in sorted(parts.items()))
        yield f"stage {stage.name} {verb} {sum(parts.values()):,}: {listing}"


def start_of(name: str, config: Config) -> str:
    """How a tensor of M-MATE was initialised."""
    if config.student.branches != "both" and name.startswith("mix_proj"):
        return f"pinned: {config.student.branches} alone"
    if config.student.init == "random" and name.split(".")[-2] in COPIED_MODULES:
        return "at random"
    return next(start for prefix, start in STARTS.items() if name.startswith(prefix))


def part_of(name: str) -> str:
    """The part of the student that a tensor belongs to."""
    if ".mixer." in name:
        return name.split(".mixer.")[1].split(".")[0]
    parts = {
        ParameterGroup.ADAPTERS.value: "LoRA",
        ParameterGroup.TUNED_MLPS.value: "tuned MLPs",
        ".attention.": "teacher's attention",
        ".visual.": "vision tower",
        ".mlp.": "MLPs",
    }
    return next((part for key, part in parts.items() if key in name), "embeddings, norms and head")
