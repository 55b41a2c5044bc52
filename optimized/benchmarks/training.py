"""Tokens per second, busy time and memory of one optimizer step of each distillation stage.

A step is what `distill.py` does with a batch: bfloat16 arithmetic on a GPU over float32 copies of what is
trained, gradients clipped at 1, AdamW; on a GPU the losses and their gradients come from CUDA graphs, and
from the lesson as it is. Two kinds of batches: one prompt with its pixels, or a row of several, of which the
last tenth is supervised, layers recomputed in the backward pass; and rows of text, all of it supervised,
padded or packed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from ...reference.training.config import Config
from ...reference.training.parameter_groups import MIXER, belongs
from ...reference.training.presets import PRESETS
from ...reference.training.safety.memory import leave_inputs_alone, recompute_layers
from ...reference.training.stages import Stage, stage_of
from ..student import convert
from ..training import Lesson, attach_teacher
from .cases import Case, values_of
from .graphs import EAGER
from .kernels import OURS, Setting
from .models import Pair, build_teacher, video_inputs
from .problems import SHORTEST, prompt
from .timing import wall_and_busy

MLPS = r".*layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj)"
ANSWERED = 0.1  # share of the prompt's tokens that are supervised, at its end
SAMPLES = 4  # in a packed row of prompts
UNSUPERVISED = -100
LINES = {  # stage, and which of its objectives
    "stage i": ("i", 0),
    "stage ii, teacher's states": ("ii", 0),
    "stage ii, own states": ("ii", 1),
    "stage iii": ("iii", 0),
}
CAPTURES = 2  # steps before graphs are replayed: one as it is, and one that is captured

TEXT_MODELS: dict[str, dict[str, Any]] = {
    # config.json of HuggingFaceTB/SmolLM2-135M
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    },
    # a size for a CPU
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },
}


@dataclass(frozen=True)
class Rows:
    """A batch of text: rows, tokens of a row, and whether each row holds several samples."""

    rows: int
    tokens: int
    packed: bool

    def __str__(self) -> str:
        return f"{self.rows} {'packed ' if self.packed else ''}row{'s' if self.rows > 1 else ''}"


ROWS = (
    Rows(16, 1024, False),
    Rows(32, 1024, False),
    Rows(32, 1024, True),
    Rows(8, 4096, True),
    Rows(2, 16384, True),
)


def training_cases(
    pair: Pair, lengths: Sequence[int], setting: Setting, priority: Callable[[str, int], int]
) -> Iterator[Case]:
    """A line per stage, route, length and method: prompts with pixels, alone and packed. The stages between
    come after the first and the last, which bound them.
    """
    for name, (stage, place) in LINES.items():
        for method, length in product(methods(setting), lengths):
            number = priority(method, length) + (stage == "ii")
            for samples in (1, SAMPLES) if length >= SAMPLES * SHORTEST else (1,):
                measure = partial(measure_prompt_step, pair, method, stage, place, samples, length, setting)
                passes = name + (f", {samples} packed" if samples > 1 else "")
                yield Case("training", method, pair.size, passes, length, measure, number)


def text_training_cases(
    model: str, rows: Sequence[Rows], setting: Setting, priority: Callable[[str, int], int]
) -> Iterator[Case]:
    """A line per stage, route, kind of rows and method: rows of text."""
    for name, (stage, place) in LINES.items():
        for method in methods(setting):
            for each in rows:
                measure = partial(measure_text_step, model, method, stage, place, each, setting)
                number = priority(method, each.tokens) + (stage == "ii")
                yield Case("training", method, model, f"{name}, {each}", each.tokens, measure, number)


def methods(setting: Setting) -> tuple[str, ...]:
    """From graphs and as it is; a CPU has no graphs."""
    return (OURS, EAGER) if setting.device.type == "cuda" else (OURS,)


def measure_prompt_step(
    pair: Pair, method: str, stage: str, place: int, samples: int, length: int, setting: Setting
) -> dict[str, Any]:
    """The values of one line; student and optimizer are made for it and dropped."""
    pair.forget()
    student = taught_student(build_teacher(pair.name, pair.layers, setting), {})
    recompute_layers(student)
    batch = side_by_side([prompt_batch(student, length // samples, setting) for _ in range(samples)])
    return measure_step(student, method, PRESETS["vlm"], stage, place, batch, setting)


def prompt_batch(student: nn.Module, length: int, setting: Setting) -> dict[str, Tensor]:
    """One prompt with its pixels, its end supervised."""
    batch = video_inputs(student, prompt(length), setting)
    batch["labels"] = batch["input_ids"].clone()
    batch["labels"][:, : -round(ANSWERED * length)] = UNSUPERVISED
    return batch


def side_by_side(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Prompts (1, L) of one length as samples of one packed row; one is left as it is."""
    if len(batches) == 1:
        return batches[0]
    per_token = {name for name, tensor in batches[0].items() if tensor.shape == batches[0]["labels"].shape}
    row = {
        name: torch.cat([batch[name] for batch in batches], dim=int(name in per_token)) for name in batches[0]
    }
    length = batches[0]["labels"].shape[1]
    place = torch.arange(len(batches) * length, device=row["labels"].device)[None]
    return row | {"linmu_sequence": place // length, "position_ids": place % length}


def measure_text_step(
    model: str, method: str, stage: str, place: int, rows: Rows, setting: Setting
) -> dict[str, Any]:
    """The values of one line, rows of text: padded ones lack up to a sixteenth, packed ones hold up to five
    samples."""
    with torch.device(setting.device):
        teacher = LlamaForCausalLM(LlamaConfig(**TEXT_MODELS[model])).to(setting.dtype).eval()
    config = PRESETS["text"]
    mixer = {"scan_rope": True, "text_only": True, "text_window": config.mixer.text_window}
    student = taught_student(teacher, mixer)
    return measure_step(student, method, config, stage, place, text_batch(model, rows, setting), setting)


def text_batch(model: str, rows: Rows, setting: Setting) -> dict[str, Tensor]:
    """Ids at random, `Rows` of them."""
    shape, draw = (rows.rows, rows.tokens), torch.Generator().manual_seed(0)
    ids = torch.randint(1, TEXT_MODELS[model]["vocab_size"], shape, generator=draw)
    lengths = torch.randint(rows.tokens - rows.tokens // 16, rows.tokens + 1, (rows.rows, 1), generator=draw)
    place = torch.arange(rows.tokens).expand(shape)
    mask = (place < lengths).long()
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, UNSUPERVISED)}
    if rows.packed:
        edges = torch.randint(1, rows.tokens, (rows.rows, 4), generator=draw).sort(1).values
        begins = torch.cat([torch.zeros(rows.rows, 1, dtype=torch.int64), edges], dim=1)
        sample = torch.searchsorted(edges, place.contiguous(), right=True)
        batch |= {"linmu_sequence": sample, "position_ids": place - begins.gather(1, sample)}
        batch["labels"].scatter_(1, begins, UNSUPERVISED)
    return {name: tensor.to(setting.device) for name, tensor in batch.items()}


def taught_student(teacher: nn.Module, mixer: dict[str, Any]) -> nn.Module:
    """A student with its teacher attached, frozen, M-MATE in float32."""
    student = convert(teacher, mixer)
    attach_teacher(student, teacher)
    student.requires_grad_(False)
    for name, parameter in student.named_parameters():
        if belongs(name, MIXER):
            parameter.data = parameter.data.float()
    return student


def measure_step(
    student: nn.Module,
    method: str,
    config: Config,
    stage: str,
    place: int,
    batch: dict[str, Tensor],
    setting: Setting,
) -> dict[str, Any]:
    """The values of one line: a stage of a preset, by one of its objectives."""
    taught: Stage = stage_of(stage, config)
    if taught.trains_mlps:
        rank = config.mlps.lora_rank
        get_peft_model(student, LoraConfig(r=rank, lora_alpha=rank, target_modules=MLPS))
        leave_inputs_alone(student)
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(belongs(name, taught.trained))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    on_gpu = setting.device.type == "cuda"
    optimizer = torch.optim.AdamW(trained, lr=taught.learning_rate_new, fused=on_gpu)
    lesson = Lesson(student.train(), taught.objectives[place])
    if on_gpu and method == OURS:
        lesson.accelerate()
    call = partial(train_step, lesson, optimizer, trained, batch, setting)
    for _ in range(CAPTURES if lesson.graphs is not None else 0):
        call()
    timing, busy = wall_and_busy(call, setting.device, seconds=setting.seconds, most=10)
    replayed, memory = lesson.graphs is not None and lesson.graphs.runs > 0, timing.peak
    if replayed:  # a replay allocates nothing: its pool is reserved
        torch.cuda.empty_cache()
        memory = max(memory, torch.cuda.memory_reserved(setting.device))
    lesson.close()
    tokens = batch["attention_mask"].numel()
    values = values_of(timing, tokens_per_second=tokens / timing.seconds, busy=busy)
    values |= {"trained": sum(part.numel() for part in trained), "memory": memory}
    return values | {"replayed": "CUDA graph" if replayed else ""}


def train_step(lesson: Lesson, optimizer, trained: list[nn.Parameter], batch, setting: Setting) -> None:
    """Forward, backward, clip, update."""
    enabled = setting.dtype != torch.float32
    with torch.autocast(setting.device.type, dtype=torch.bfloat16, enabled=enabled):
        loss = lesson(**batch)["loss"]
    loss.backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
