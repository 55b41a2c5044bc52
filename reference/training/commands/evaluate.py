"""`distill.py evaluate`: a student's folder on conversations, beside its teacher if there is one.

What a run measures with teacher and student in one model is measured here with two models apart.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor
from torch.utils.data import ConcatDataset
from tqdm import tqdm
from transformers import PreTrainedModel, ProcessorMixin

from ...demo import TEACHER
from ...prompts.processors import load_processor
from ...student.backend import backend_of
from ...student.convert import load
from ..config import OF_ONE_CALL, Config, settings_of
from ..data.open_data import chat_collator, open_held_out
from ..evaluation.held_out import HeldOut
from ..evaluation.scores import Rows, Scores, table
from ..refusal import RefusedError, check
from ..safety.distributed_means import weights_on_every_process
from ..safety.guards import refuse_infinite_weights
from ..teacher import NOT_OPENED, open_teacher
from ..token_groups import supervised
from .command_line import parse, tell_usage

NO_TEACHER = "none"
# The flags of a run that say how to measure; the others say what to train.
HEEDED = (
    "preset", "settings", "teacher", "data", "backend", "dtype", "seed", "cpu", "on_broken", "supervise",
    "max_length", "max_pixels", "max_frames", "workers", "batch_size", "eval_samples",
)  # fmt: skip
USAGE = """usage: distill.py {command} STUDENT [flags]

{about}

STUDENT is a folder that a run or save_pretrained wrote. Flags, which mean what `distill.py --help` says:
  {flags}
--data is what is measured; the bundled questions if it is left out."""


def evaluate_student(arguments: list[str]) -> Rows:
    """Measure a student and print the table; nothing is written.

    Args:
        arguments: the student's folder, then flags of a run; `--data` is what it is measured on.
    Returns:
        rows of `Scores`, by model.
    Raises:
        RefusedError: for a folder that holds no student, and for data as a run does.
    """
    folder, config = parse_after_folder("evaluate", arguments, "Measure a student, beside its teacher.")
    process = PartialState(cpu=config.cpu)
    models = open_models("evaluate", folder, config, process.device)
    encoder = chat_collator(open_processor("evaluate", folder), config.samples)
    held_out = HeldOut(ConcatDataset(open_held_out(config, config.data, encoder, None)), encoder, config)
    scores = Scores(backend_of(config.backend).Lesson.logit_loss)
    batches = tqdm(held_out.batches(), desc="evaluate", unit="batch", disable=not process.is_main_process)
    for kinds, batch in batches:
        batch = {name: tensor.to(process.device) for name, tensor in batch.items()}
        scores.add({name: ask(model, batch) for name, model in models.items()}, batch["labels"], kinds)
    rows, broken = scores.rows(), held_out.broken()
    check(rows, "--data must hold conversations that can be read, with an answer to learn", "none")
    if process.is_main_process:
        print(table(rows, "evaluated"))
        print(held_out.share())
        for complaint in broken:
            print(f"skipped {complaint}")
        if broken:
            print(f"skipped {len(broken)} broken samples")
    return rows


def after_command(command: str, arguments: list[str]) -> list[str]:
    """What follows a command: a student's folder, and flags.

    Raises:
        RefusedError: if the first is no model's folder.
    """
    check(arguments and not arguments[0].startswith("-"), f"{command} must be followed by a folder", "none")
    is_model = (Path(arguments[0]) / "config.json").is_file()
    check(is_model, f"{command} must be given a student's folder", arguments[0])
    return arguments


def parse_after_folder(command: str, arguments: list[str], about: str) -> tuple[str, Config]:
    """The student's folder that follows a command, and the settings of the flags behind it.

    Args:
        command: its name.
        arguments: what follows it.
        about: what --help says of it.
    Raises:
        RefusedError: if it is none, for flags that would change nothing, and as `parse` does.
        SystemExit: after --help.
    """
    listing = " ".join(f"--{name}" for name in HEEDED)
    tell_usage(arguments, USAGE.format(command=command, about=about, flags=listing))
    folder, *flags = after_command(command, arguments)
    given = [flag.split("=")[0] for flag in flags if flag.startswith("--")]
    names = {flag.removeprefix("--").replace("-", "_").removeprefix("no_"): flag for flag in given}
    known = {*settings_of(Config()), *OF_ONE_CALL}
    idle = [names[name] for name in names if name.split(".")[0] in known and name not in HEEDED]
    check(not idle, f"{command} must be given flags that change it", " ".join(idle), f"they are {listing}")
    own_data = "data" in names and "demo" not in flags
    if own_data and "teacher" not in names:
        flags += ["--teacher", NO_TEACHER]
    config = parse(flags)
    must = f"{command} must be told which --data to measure on"
    check("data" in names or not config.eval_data, must, f"--settings with eval_data {config.eval_data}")
    return folder, config


def open_models(
    command: str, folder: str, config: Config, device: torch.device
) -> dict[str, PreTrainedModel]:
    """Teacher, if there is one, and student, in the dtype asked for; what must be float32 stays so."""
    dtype = getattr(torch, config.dtype)
    try:
        with weights_on_every_process():
            models = {"student": load(folder, dtype=dtype, linmu_backend=backend_of(config.backend))}
            if config.teacher != NO_TEACHER:
                name = str(TEACHER) if config.teacher == "demo" else config.teacher
                models = {"teacher": open_teacher(name, dtype)} | models
    except NOT_OPENED as error:
        raise RefusedError(f"distill: {command} must be given models that open, got {error}") from error
    sizes = {name: model.config.get_text_config().vocab_size for name, model in models.items()}
    check(len({*sizes.values()}) == 1, "--teacher must have as many tokens as the student", sizes)
    for name, model in models.items():
        refuse_infinite_weights(model.to(device).eval(), command, f"the {name}")
    return models


def open_processor(command: str, folder: str) -> ProcessorMixin:
    """The student's processor."""
    try:
        return load_processor(folder, padding_side="right")
    except (ValueError, OSError) as error:
        must = f"distill: {command} must be given a folder with a processor"
        raise RefusedError(f"{must}, got {error}") from error


@torch.no_grad()
def ask(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """Logits (B, n, V) of the positions that `supervised` gives."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    positions, _ = supervised(batch["labels"])
    half = model.dtype == torch.bfloat16
    with torch.autocast(model.device.type, model.dtype) if half else nullcontext():
        return model(**inputs, use_cache=False, logits_to_keep=positions).logits
