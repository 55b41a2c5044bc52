"""`--dry_run`: check the data, and say what a run would train, on what, and in how much memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, Dataset

from ...prompts.chat_collator import IGNORED
from ...student.split_forward import context_parallel
from ..data.conversations import ENDLESS, Conversations, Mixture, none_readable
from ..data.open_data import batch_of
from ..evaluation.evaluation import NOTHING_HELD_OUT
from ..evaluation.held_out import OrComplaint
from ..refusal import RefusedError, check
from ..safety.memory import predict

if TYPE_CHECKING:
    from ..run import Run

LOOKED_AT = 1000  # samples of a data set without an end
TRAINING, HELD_OUT = "training data", "held out data"
NAMED = 20  # broken samples that are printed


class Survey(Dataset):
    """Samples as their sizes, or as what is wrong with them."""

    def __init__(self, data: Dataset, measure: Callable[[Any], dict[str, int]]) -> None:
        self.samples, self.measure = OrComplaint(data), measure
        self.length = LOOKED_AT if len(data) >= ENDLESS else len(data)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, int] | str:
        item = self.samples[index]
        return item if isinstance(item, str) else self.measure(item)


def dry_run(run: Run) -> None:
    """Check and describe; nothing is written.

    Args:
        run: opened.
    Raises:
        RefusedError: if samples are broken and broken samples refuse a run.
    """
    largest, broken, refusals = None, 0, []
    answered = {TRAINING: 0, HELD_OUT: 0}  # samples with an answer to learn
    for title, name, data in parts(run):
        sizes, complaints = survey(run, data)
        broken += len(complaints)
        answered[title] += sum(size["supervised"] > 0 for size in sizes)
        if title == TRAINING and not sizes:
            refusals.append(none_readable(name))
        run.say(f"{title}, {name}: {len(sizes)} samples can be read, {len(complaints)} are broken")
        for complaint in complaints[:NAMED]:
            run.say(f"  {complaint}")
        for name in ("tokens", "vision", "supervised") if sizes else ():
            values = [size[name] for size in sizes]
            run.say(f"  {name:10} {min(values)} to {max(values)} a sample, median {median(values):g}")
        longest = max(range(len(sizes)), key=lambda i: sizes[i]["tokens"], default=None)
        if longest is not None and (largest is None or sizes[longest]["tokens"] > largest[1]):
            largest = data, sizes[longest]["tokens"], sizes[longest]["index"]
    refused = broken and run.config.samples.on_broken == "refuse"
    check(not refused, "samples must be readable", f"{broken} that are not", "mend them, or --on_broken skip")
    if refusals:
        raise RefusedError(refusals[0])
    check(answered[HELD_OUT], *NOTHING_HELD_OUT)
    data, _, index = largest
    batch = batch_of(run.collator, [data[index]] * run.config.optimizer.batch_size)
    run.say(f"the largest batch, {run.config.optimizer.batch_size} times the longest sample:")
    for name, tensor in batch.items():
        run.say(f"  {name:20} {tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}")
    describe_stages(run, run.on_device(batch))
    run.say("nothing stands against this run; without --dry_run it starts")


def describe_stages(run: Run, batch: dict[str, torch.Tensor]) -> None:
    """What each stage trains, and its memory on the largest batch: that of its hungriest objective."""
    for stage in run.stages:
        if stage.trains_mlps:
            run.add_adapters()
        run.set_free(stage)
        predictions = []
        for objective in stage.objectives:
            lesson = run.lesson(objective)
            with run.autocast(), context_parallel(run.student, run.context_mesh):
                predictions.append(predict(lesson, batch))
            lesson.close()
        memory = max(predictions, key=lambda prediction: prediction.total)
        run.say(f"stage {stage.name}, {run.config.of_stage(stage.name).steps} steps: memory {memory}")


def parts(run: Run) -> Iterator[tuple[str, str, Dataset]]:
    """The data sets of a run, one by one, with what they are for and their names."""
    for title, data in ((TRAINING, run.training), (HELD_OUT, run.held_out.data)):
        several = [order.data for order in data.orders] if isinstance(data, Mixture) else [data]
        several = data.datasets if isinstance(data, ConcatDataset) else several
        for part in several:
            name = part.rows.source if isinstance(part, Conversations) else " ".join(run.config.data)
            yield title, name, part


def survey(run: Run, data: Dataset) -> tuple[list[dict[str, int]], list[str]]:
    """Sizes of all samples that can be read, and what is wrong with the others."""

    def measure(item: dict[str, Any]) -> dict[str, int]:
        batch = batch_of(run.encoder, [item])
        return {
            "tokens": int(batch["attention_mask"].sum()),
            "vision": int(run.student.placeholder_mask(batch["input_ids"]).sum()),
            "supervised": int((batch["labels"] != IGNORED).sum()),
        }

    told = Survey(data, measure)
    found = list(DataLoader(told, 8, collate_fn=list, num_workers=run.config.samples.workers))
    flat = [result for results in found for result in results]
    sizes = [size | {"index": i} for i, size in enumerate(flat) if isinstance(size, dict)]
    return sizes, [result for result in flat if isinstance(result, str)]
