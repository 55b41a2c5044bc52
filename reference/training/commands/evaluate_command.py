"""`distill.py evaluate`: a student's folder on conversations, beside its teacher if there is one.

What a run measures with teacher and student in one model is measured here with two models apart.
"""

from __future__ import annotations

import importlib
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm
from transformers import AutoModelForImageTextToText

from ...demo import TEACHER
from ...prompts.chat_collator import ChatCollator
from ...prompts.processors import load_processor
from ..data.conversations import InOrder, skipped
from ..data.open_data import open_held_out
from ..evaluation.evaluation import scores
from ..teacher_student import supervised
from .command_line import RefusedError, check

if TYPE_CHECKING:
    from distill import Config

NO_TEACHER = "none"


def judge(arguments: list[str], parse: Callable[[list[str]], Config]) -> dict[str, dict[str, Any]]:
    """Measure a student and print the table.

    Args:
        arguments: the student's folder, then flags of a run; `--data` is what it is measured on.
        parse: makes settings of flags.
    Returns:
        rows of accuracy, `kinds`, and with a teacher `kl` in nats and `agreement`, by model.
    """
    check(arguments and not arguments[0].startswith("-"), "evaluate must be followed by a folder", "none")
    folder, *flags = arguments
    check((Path(folder) / "config.json").is_file(), "evaluate must be given a student's folder", folder)
    own_data = "--data" in flags and flags[flags.index("--data") + 1] != "demo"
    if own_data and "--teacher" not in flags:
        flags += ["--teacher", NO_TEACHER]
    config = parse(flags)
    device = PartialState(cpu=config.cpu).device
    try:
        models = {"student": importlib.import_module(f"linmu.{config.backend}").load(folder)}
    except ValueError as error:
        raise RefusedError(str(error)) from None
    if config.teacher != NO_TEACHER:
        name = str(TEACHER) if config.teacher == "demo" else config.teacher
        models = {"teacher": AutoModelForImageTextToText.from_pretrained(name)} | models
    dtype = getattr(torch, config.dtype)
    models = {name: model.to(device, dtype).eval() for name, model in models.items()}
    encoder = ChatCollator(
        load_processor(folder, padding_side="right"),
        supervise=config.supervise,
        max_length=config.max_length,
    )
    report = Path(folder) / "broken.jsonl"
    data = open_held_out(config, config.data, encoder, report)
    data = data[0] if len(data) == 1 else ConcatDataset(data)
    order = InOrder(data, min(config.eval_samples, len(data)))
    loader = DataLoader(order, config.batch_size, collate_fn=list, num_workers=config.workers)
    tally = Tally(models, importlib.import_module(f"linmu.{config.backend}").logit_loss)
    for items in tqdm(loader, desc="evaluate", unit="batch"):
        batch = {name: tensor.to(device) for name, tensor in encoder(items).items()}
        tally.add([item["kind"] for item in items], batch)
    print(table(tally.rows()))
    if reasons := skipped(report):
        print(f"skipped {sum(reasons.values())} broken samples, named in {report}")
    return tally.rows()


class Tally:
    """What models answer, added up over batches.

    Args:
        models: "student", and before it "teacher" if there is one.
        logit_loss: of a backend.
    """

    def __init__(self, models: dict[str, nn.Module], logit_loss: Callable[..., Tensor]) -> None:
        self.models, self.logit_loss = models, logit_loss
        self.sums: dict[str, float] = defaultdict(float)
        self.correct: dict[str, dict[str, list[bool]]] = {name: defaultdict(list) for name in models}

    @torch.no_grad()
    def add(self, kinds: list[str], batch: dict[str, Tensor]) -> None:
        """Ask all models about one batch."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        labels = batch["labels"]
        positions, mask = supervised(labels)
        logits = {}
        for name, model in self.models.items():
            device, dtype = model.device.type, model.dtype
            half = torch.autocast(device, dtype) if dtype == torch.bfloat16 else nullcontext()
            with half:
                logits[name] = model(**inputs, use_cache=False, logits_to_keep=positions).logits
            right = ((logits[name].argmax(-1) == labels[:, positions + 1]) | ~mask).all(1)
            for kind, is_right in zip(kinds, right.tolist(), strict=True):
                self.correct[name][kind].append(is_right)
        if "teacher" in logits:
            tokens = int(mask.sum())
            same = (logits["student"].argmax(-1) == logits["teacher"].argmax(-1)) & mask
            self.sums["tokens"] += tokens
            self.sums["kl"] += float(self.logit_loss(logits["student"], logits["teacher"], mask)) * tokens
            self.sums["agreement"] += float(same.sum())

    def rows(self) -> dict[str, dict[str, Any]]:
        """The measurements by model."""
        rows = {name: scores(correct) for name, correct in self.correct.items()}
        if "teacher" in rows:
            rows["teacher"] |= {"kl": 0.0, "agreement": 1.0}
            tokens = self.sums["tokens"]
            rows["student"] |= {name: self.sums[name] / tokens for name in ("kl", "agreement")}
        return rows


def table(rows: dict[str, dict[str, Any]]) -> str:
    """The rows side by side."""
    measures = [name for name in ("accuracy", "kl", "agreement") if name in rows["student"]]
    kinds = list(rows["student"]["kinds"])
    lines = [f"{'evaluated':12}" + "".join(f"{title:>11}" for title in [*measures, *kinds])]
    for name, row in rows.items():
        values = [row[measure] for measure in measures] + [row["kinds"][kind] for kind in kinds]
        lines.append(f"{name:12}" + "".join(f"{value:11.3f}" for value in values))
    return "\n".join(lines)
