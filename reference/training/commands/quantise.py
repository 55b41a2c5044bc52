"""`distill.py quantise`: a student's folder in 8 and 4 bits, beside itself as it was saved."""

from __future__ import annotations

from dataclasses import replace

import torch
from accelerate import PartialState
from torch.utils.data import ConcatDataset
from tqdm import tqdm

from ...student.backend import backend_of
from ...student.convert import load
from ...student.model import LinMUModel
from ...student.quantised import QUANTISERS, weight_bytes
from ..data.open_data import chat_collator, open_held_out
from ..evaluation.held_out import HeldOut
from ..evaluation.scores import Scores
from ..refusal import check
from .evaluate import NO_TEACHER, ask, open_models, open_processor, parse_after_folder

TITLES = "| weights | MiB | accuracy | KL, nats | same first choice |\n| --- | --- | --- | --- | --- |"
DIGITS = {"accuracy": 3, "kl": 5, "agreement": 4}


def quantise_student(arguments: list[str]) -> str:
    """Print what each quantiser costs and saves; nothing is written. Returns the table, in Markdown.

    Args:
        arguments: the student's folder, then flags of a run, such as `--data` and `--dtype`.
    Raises:
        RefusedError: for a folder that holds no student, and for data as a run does.
    """
    folder, config = parse_after_folder("quantise", arguments, __doc__.split("\n")[0])
    process = PartialState(cpu=config.cpu)
    check(process.num_processes == 1, "quantise must run as one process", process.num_processes)
    dtype = getattr(torch, config.dtype)
    plain = open_models("quantise", folder, replace(config, teacher=NO_TEACHER), process.device)["student"]
    encoder = chat_collator(open_processor("quantise", folder), config.samples)
    held_out = HeldOut(ConcatDataset(open_held_out(config, config.data, encoder, None)), encoder, config)

    def measured(student: LinMUModel, name: str) -> dict[str, float]:
        """The scores of a student, the saved one being what it is compared with."""
        scores = Scores(backend_of(config.backend).Lesson.logit_loss)
        for kinds, batch in tqdm(held_out.batches(), desc=name, unit="batch"):
            batch = {key: tensor.to(process.device) for key, tensor in batch.items()}
            logits = {"teacher": ask(plain, batch), "student": ask(student, batch)}
            scores.add(logits, batch["labels"], kinds)
        rows = scores.rows()
        check(rows, "--data must hold conversations that can be read, with an answer to learn", "none")
        return rows["student"]

    lines = [TITLES, row("as saved", weight_bytes(plain), measured(plain, "as saved"))]
    for name, configuration in QUANTISERS.items():
        try:
            options = {"dtype": dtype, "linmu_backend": backend_of(config.backend)}
            student = load(
                folder, quantization_config=configuration(dtype), device_map=str(process.device), **options
            )
            size = weight_bytes(student)  # before it computes, which may pack the weights anew
            lines.append(row(name, size, measured(student, name)))
        except (ImportError, RuntimeError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            lines.append(f"| {name} | not here: {reason} | | | |")
    table = "\n".join(lines) + "\n"
    print(f"\n{table}{held_out.share()}")
    return table


def row(name: str, size: int, scores: dict[str, float]) -> str:
    """One line of the table."""
    shown = " | ".join(f"{scores[key]:.{digits}f}" for key, digits in DIGITS.items())
    return f"| {name} | {size / 2**20:.2f} | {shown} |"
