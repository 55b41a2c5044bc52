"""Tokens per second and memory of one optimizer step of each distillation stage.

A step is what `distill.py` does with a batch of one prompt: bfloat16 arithmetic on a GPU over float32 copies
of what is trained, layers recomputed in the backward pass, gradients clipped at 1, AdamW. The prompt comes
with its pixels, and its last tenth is supervised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from ...reference.training.safety.memory import leave_inputs_alone, recompute_layers
from ...reference.training.stages import Stage
from ..student import convert
from ..training import Lesson, Objective, attach_teacher
from .cases import Case, values_of
from .kernels import OURS, Setting
from .models import Pair, build_teacher, video_inputs
from .problems import prompt
from .timing import time_calls

FLEX, LOCAL, MIX = ".mixer.flex_ma.", ".mixer.local_swin.", ".mixer.mix_proj."
MLPS = r".*\.language_model\.layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj)"
RANK = 16
ANSWERED = 0.1  # share of the prompt's tokens that are supervised, at its end
UNSUPERVISED = -100
STAGES = {
    "stage i": Stage("i", (FLEX, MIX), (Objective(mixer=1.0, inputs="teacher"),), 1e-3, 2e-4),
    "stage ii, teacher's states": Stage(
        "ii", (FLEX, LOCAL, MIX), (Objective(mixer=1.0, block=0.5, inputs="teacher"),), 5e-4, 1e-4
    ),
    "stage ii, own states": Stage(
        "ii", (FLEX, LOCAL, MIX), (Objective(mixer=1.0, block=0.5, inputs="student"),), 5e-4, 1e-4
    ),
    "stage iii": Stage(
        "iii",
        (FLEX, LOCAL, MIX, "lora_"),
        (Objective(logits=1.0, block=0.3, end_to_end=True),),
        5e-5,
        5e-5,
        1e-4,
    ),
}


def training_cases(
    pair: Pair, lengths: Sequence[int], setting: Setting, priority: Callable[[str, int], int]
) -> Iterator[Case]:
    """A line per stage, route and length."""
    for name, stage in STAGES.items():
        for length in lengths:
            run = partial(measure_step, pair, stage, length, setting)
            yield Case("training", OURS, pair.size, name, length, run, priority(OURS, length))


def measure_step(pair: Pair, stage: Stage, length: int, setting: Setting) -> dict[str, Any]:
    """The values of one line; student and optimizer are made for it and dropped."""
    pair.forget()
    student = taught_student(pair, setting)
    if stage.lr_lora:
        get_peft_model(student, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=MLPS))
        leave_inputs_alone(student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(any(part in name for part in stage.trained))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    lesson = Lesson(student.train(), stage.routes[0])
    optimizer = torch.optim.AdamW(trained, lr=stage.lr_new, fused=setting.device.type == "cuda")
    batch = video_inputs(student, prompt(length), setting)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, : -round(ANSWERED * length)] = UNSUPERVISED
    call = partial(train_step, lesson, optimizer, trained, batch, setting)
    timing = time_calls([call], setting.device, seconds=setting.seconds, most=10)
    values = values_of(timing, tokens_per_second=length / timing.seconds)
    lesson.close()
    return values | {"trained": sum(part.numel() for part in trained), "memory": timing.peak}


def taught_student(pair: Pair, setting: Setting) -> nn.Module:
    """A student with its teacher attached, frozen, M-MATE in float32, layers recomputed when needed."""
    teacher = build_teacher(pair.name, pair.layers, setting)
    student = convert(teacher)
    attach_teacher(student, teacher)
    student.requires_grad_(False)
    for name, parameter in student.named_parameters():
        if ".mixer." in name:
            parameter.data = parameter.data.float()
    recompute_layers(student)
    return student


def train_step(lesson: Lesson, optimizer, trained: list[nn.Parameter], batch, setting: Setting) -> None:
    """Forward, backward, clip, update."""
    enabled = setting.dtype != torch.float32
    with torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=enabled):
        loss = lesson(**batch)["loss"]
    loss.backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
