"""Training and held-out data, as the flags name them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import ConcatDataset, Dataset
from transformers import ProcessorMixin

from ...demo import DigitsQuestions
from ...prompts.answers import ChatTemplateError
from ...prompts.chat_collator import IGNORED, ChatCollator
from ..config import Config, SampleSettings
from ..refusal import RefusedError, check
from .conversations import ENDLESS, Conversations, InOrder, Mixture, order_of, template_refused
from .sources import JsonLines, Table, open_rows
from .turns import OF_CONVERSATIONS

LOOKED_AT = 1000  # rows of a data set that are looked at before a run
BUNDLED = 400  # questions of the demo that are measured, all of them being short
HELD_OUT = 20  # one sample in so many is held out unless --eval_data names others


def open_data(
    config: Config, encoder: ChatCollator, report: Path | None, world_size: int
) -> tuple[Dataset, Dataset]:
    """Training and held-out samples; held-out ones keep their messages.

    Args:
        config: the flags.
        encoder: makes tensors of samples.
        report: file that is told which samples were skipped.
        world_size: processes that share a batch.
    Raises:
        RefusedError: if there are no such data.
    """
    if config.data == ("demo",):
        return tuple(bundled_questions(config, split, encoder) for split in ("train", "heldout"))
    try:
        sources, weights = zip(*map(parse_weight, config.data), strict=True)
        parts = [
            open_dataset(config, source, encoder, encoder.encode, report, config.samples.streaming)
            for source in sources
        ]
        if config.eval_data:
            held_out = open_held_out(config, config.eval_data, encoder, report)
        else:
            parts, held_out = zip(*(part.split(every=HELD_OUT) for part in parts), strict=True)
            for part in held_out:
                part.prepare = partial(with_tensors, encoder)
    except (ValueError, OSError) as error:
        raise RefusedError(str(error)) from error
    if any(config.of_stage(stage).logits for stage in config.stages) and not config.samples.streaming:
        require_answer(parts)
    if len(parts) == 1:
        return parts[0], held_out[0] if len(held_out) == 1 else ConcatDataset(held_out)
    group = config.optimizer.batch_size * world_size if config.samples.group_by_length else 0
    return Mixture(parts, weights, config.seed, group), ConcatDataset(held_out)


def require_answer(parts: Sequence[Conversations]) -> None:
    """Refuse data for training on logits that hold no answer to learn, as far as `LOOKED_AT` samples tell.

    Reads on until it finds one; mostly that is the first.
    """
    read = 0
    for part in parts:
        for line in part.lines[:LOOKED_AT]:
            try:
                labels = part.read(line)["tensors"]["labels"]
            except Exception:  # a broken sample, named when its turn comes
                continue
            read += 1
            if bool((labels != IGNORED).any()):
                return
    must, hint = "--data must hold an answer to learn", "--stages i ii learn none; weight 0 is context alone"
    check(not read, must, f"none in the first {read} samples", hint)


def open_held_out(
    config: Config, names: Sequence[str], encoder: ChatCollator, report: Path | None
) -> list[Dataset]:
    """Data sets to measure on, as they stand; weights do not count."""
    if names == ("demo",):
        return [bundled_questions(config, "heldout", encoder)]
    try:
        sources = [parse_weight(name)[0] for name in names]
        prepare = partial(with_tensors, encoder)
        return [open_dataset(config, source, encoder, prepare, report) for source in sources]
    except (ValueError, OSError) as error:
        raise RefusedError(str(error)) from error


def bundled_questions(config: Config, split: str, encoder: ChatCollator) -> DigitsQuestions:
    """The bundled data.

    Raises:
        RefusedError: if --max_length or --packing_tokens is less than the tokens of their longest sample.
    """
    data, most = DigitsQuestions(split, config.seed, ENDLESS), config.samples.most_tokens
    if most:
        # One sample in 70 is as long as any can be.
        ids = ChatCollator(encoder.processor, supervise="all")(data.__getitems__(range(BUNDLED)))
        longest = ids["attention_mask"].sum(1)
        flag = "--max_length" if config.samples.max_length == most else "--packing_tokens"
        must = f"{flag} must be at least the {longest.max()} tokens of the demo's sample {longest.argmax()}"
        check(longest.max() <= most, must, most, f"set {flag} {longest.max()}")
    return data


def parse_weight(source: str) -> tuple[str, float]:
    """ "a.jsonl@2" -> ("a.jsonl", 2.0); without a weight 1, and so for a file whose name holds an @.

    Raises:
        RefusedError: unless the weight is a finite number > 0.
    """
    name, at, weight = source.rpartition("@")
    if not at or Path(source).exists() or "/" in weight:
        return source, 1.0
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    must = "a weight in --data must be a finite number > 0"
    hint = f"write {name}@2 to draw it twice as often, or leave @ out"
    check(0 < number < math.inf, must, f"{weight!r} in {source}", hint)
    return name, number


def open_dataset(
    config: Config,
    source: str,
    encoder: ChatCollator,
    prepare: Any,
    report: Path | None,
    streaming: bool = False,
) -> Conversations:
    """One data set of conversations."""
    rows = open_rows(source, streaming, config.seed)
    if not streaming:
        require_chat_template(rows, encoder)
    options = (config.samples.on_broken, config.samples.max_frames, config.samples.max_pixels)
    return Conversations(rows, *options, prepare=prepare, report=report)


def require_chat_template(rows: JsonLines | Table, encoder: ChatCollator) -> None:
    """Refuse, at the start, conversations without a chat template that reads them.

    Beyond the first rows, and in a stream, they are refused when their turn comes.
    """
    for index in range(min(len(rows), LOOKED_AT)):
        try:
            row = rows.row(index)
            is_conversation = any(row.get(key) is not None for key in OF_CONVERSATIONS)
        except Exception:  # a broken sample, named when its turn comes
            continue
        if is_conversation:
            try:
                return encoder.require_chat_template()
            except ChatTemplateError as error:
                raise template_refused(rows.name(index), error) from error


def chat_collator(processor: ProcessorMixin, settings: SampleSettings) -> ChatCollator:
    """What makes tensors of samples."""
    return ChatCollator(processor, supervise=settings.supervise, max_length=settings.most_tokens)


def batch_of(collate: Callable[[Sequence[Any]], Any], samples: Sequence[Any]) -> Any:
    """What a collator makes of samples, each of which it can read.

    Raises:
        RefusedError: for samples that do not go together into a batch, or not into a row.
    """
    try:
        return collate(samples)
    except ValueError as error:
        raise RefusedError(f"distill: {error}") from error


def with_tensors(encoder: ChatCollator, item: dict[str, Any]) -> dict[str, Any]:
    """A sample with its tensors."""
    return item | encoder.encode(item)


def in_order(config: Config, training: Dataset, samples: int, seen: int, world_size: int) -> InOrder:
    """The samples of a stage, after those that earlier stages have seen."""
    endless = config.data == ("demo",) or isinstance(training, Mixture)  # in an order already
    seed = None if endless else order_of(training, config.seed)
    grouped = config.samples.group_by_length and seed is not None
    return InOrder(training, samples, seed, seen, config.optimizer.batch_size * world_size if grouped else 0)
