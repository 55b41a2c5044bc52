"""Conversations of users' data sets, one sample at a time, in an order that a killed run can take up again.

Which sample comes at which place of a run depends on the seed and the place alone, so a run that goes on
needs to know its step and nothing else.
"""

from __future__ import annotations

import json
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers.trainer_pt_utils import get_length_grouped_indices

from ...checks import require
from ...prompts.answers import ChatTemplateError
from ...prompts.chat_collator import content_blocks
from ..refusal import RefusedError
from ..safety.atomic_writes import refused_by_disk
from .films import WITHOUT_PYAV, MissingPackageError, has_film_decoder
from .media import Media, shortened
from .sources import JsonLines, Stream, StreamEndedError, Table, open_rows, seed_of
from .turns import document_of, kind_of, read_turns

logger = logging.getLogger(__name__)

ENDLESS = 2**40  # samples counted where there is no end
PIXELS_PER_TOKEN = 28 * 28  # of Qwen's vision towers; only to sort by rough length
ATTEMPTS = 1000  # broken samples in a row that a stream may skip
DRAWN = 1024  # places of a mixture drawn at once
LONGEST = 600  # characters of what is wrong with a sample


class BrokenSampleError(RefusedError):
    """A sample that cannot be used, by file and line.

    Args:
        complaint: which one, and what is wrong with it.
        hint: what to do about it, where a broken sample ends the run.
    """

    def __init__(self, complaint: str, hint: str = "") -> None:
        super().__init__(f"{complaint}; {hint}" if hint else complaint)
        self.complaint = complaint


def template_refused(name: str, error: ChatTemplateError) -> RefusedError:
    """The refusal of a run by its teacher's chat template, met first at the sample of this name."""
    return RefusedError(f"distill: --teacher must have a chat template that reads {name}: {error}")


def none_readable(source: str) -> str:
    """What is said of a data set all of whose samples are broken; of a stream, `ATTEMPTS` in a row."""
    return f"distill: {source} must hold samples that can be read, got broken ones alone"


class Conversations(Dataset):
    """Conversations of one data set, images and frames opened when asked for.

    Args:
        source: JSONL file, folder or Hub id, as of `open_rows`, or opened rows.
        on_broken: "refuse" raises on a sample that cannot be used, "skip" names it and takes the next one.
        max_frames, max_pixels: as of `Media`.
        lines: indices of the rows to use; None = all.
        prepare: what else is done to a sample; an error in it breaks the sample.
        report: JSONL file that is told which samples were skipped, by every process.
    Raises:
        ValueError: if there is no such data set or it is empty.
        MissingPackageError: for films where PyAV is not installed; of a stream, when the first one comes.
        StreamEndedError: on access, if a stream cannot be read on.
        RefusedError: on access, for a conversation where `prepare` has no chat template, or one of no use.
        BrokenSampleError: on access, for a sample that cannot be used: whatever error its row, its pictures
            or `prepare` raise.
    """

    def __init__(
        self,
        source: str | Path | JsonLines | Table | Stream,
        on_broken: str = "refuse",
        max_frames: int = 0,
        max_pixels: int = 0,
        lines: Sequence[int] | None = None,
        prepare: Callable[[dict[str, Any]], Any] | None = None,
        report: Path | None = None,
    ) -> None:
        require(
            on_broken in ("refuse", "skip"), "Conversations", "on_broken must be refuse or skip", on_broken
        )
        self.rows = open_rows(str(source)) if isinstance(source, str | Path) else source
        self.on_broken, self.prepare, self.report = on_broken, prepare, report
        self.media = Media(self.rows.root, max_pixels, max_frames)
        every = range(ENDLESS if isinstance(self.rows, Stream) else len(self.rows))
        self.lines: Sequence[int] = every if lines is None else lines
        self.skipped: set[str] = set()
        require(len(self.lines) > 0, "Conversations", f"{source} must hold conversations", "none")
        self.require_film_decoder()

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Any:
        for attempt in range(min(len(self), ATTEMPTS)):
            line = self.lines[(index + attempt) % len(self)]
            try:
                return self.read(line)
            except (MissingPackageError, StreamEndedError):
                raise
            except ChatTemplateError as error:
                raise template_refused(self.rows.name(line), error) from error
            except Exception as error:  # any error of a sample is that sample's
                name, why = self.rows.name(line), shortened(f"{type(error).__name__}: {error}", LONGEST)
                if self.on_broken == "refuse":
                    hint = "mend it, or --on_broken skip; --dry_run names all of them"
                    raise BrokenSampleError(f"{name}: {why}", hint) from error
                if name not in self.skipped:  # once, however many epochs there are
                    self.skipped.add(name)
                    logger.warning("skipped %s: %s", name, why)
                    self.note(name, why)
        raise BrokenSampleError(none_readable(self.rows.source))

    def note(self, name: str, why: str) -> None:
        """Tell the report that a sample was skipped: one write, so that processes do not mix their lines."""
        if self.report is not None:
            with refused_by_disk(self.report), self.report.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"sample": name, "why": why}) + "\n")

    def split(self, every: int) -> tuple[Conversations, Conversations]:
        """Hold out every `every`-th sample: (the rest, the held-out ones)."""
        held_out = list(self.lines[::every])
        rest = [line for place, line in enumerate(self.lines) if place % every]
        must = "a data set must hold two samples to split"
        require(bool(rest), "Conversations", must, len(self.lines))
        options = (self.on_broken, self.media.max_frames, self.media.max_pixels)
        return tuple(
            Conversations(self.rows, *options, lines, self.prepare, self.report) for lines in (rest, held_out)
        )

    def read(self, line: int) -> Any:
        """Parse one row and open its images: {"kind", "messages" or "text", "name"}, prepared."""
        row = self.rows.row(line)
        document = document_of(row)
        content = {"messages": self.read_conversation(row)} if document is None else {"text": document}
        item = {"kind": kind_of(row), "name": self.rows.name(line)} | content
        return item if self.prepare is None else self.prepare(item)

    def read_conversation(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        """The turns of a row, its images opened."""
        messages = read_turns(row)
        for block in content_blocks(messages, "image"):
            block["image"] = self.media.bounded(block).image(block["image"])
        for block in content_blocks(messages, "video"):
            fps = block.get("fps", row.get("fps"))
            block |= self.media.bounded(block).video(block["video"], fps)
        return messages

    def rough_length(self, index: int) -> int:
        """About how many tokens a sample has, from its text and the sizes of its pictures; 0 if broken."""
        try:
            row = self.rows.row(self.lines[index])
            document = document_of(row)
            if document is not None:
                return len(document) // 4
            messages = read_turns(row)
            text = sum(len(block["text"]) for block in content_blocks(messages, "text")) // 4
            area = 0
            for block in content_blocks(messages, "image"):
                area += self.media.bounded(block).area(block["image"])
            for block in content_blocks(messages, "video"):
                media, frames = self.media.bounded(block), block["video"]
                if isinstance(frames, list):  # a film would have to be decoded
                    area += sum(media.area(frames[i]) for i in media.kept(len(frames)))
            return text + area // PIXELS_PER_TOKEN
        except Exception:
            return 0

    def require_film_decoder(self) -> None:
        """Refuse films without PyAV once, at the start, and not film by film."""
        if has_film_decoder() or isinstance(self.rows, Stream) or not self.rows.may_hold("video"):
            return
        for line in self.lines:
            try:
                blocks = list(content_blocks(read_turns(self.rows.row(line)), "video"))
                needed = any(self.media.needs_film_decoder(block["video"]) for block in blocks)
            except Exception:  # a broken sample, named when its turn comes
                continue
            if needed:
                raise MissingPackageError(f"{self.rows.name(line)}: {WITHOUT_PYAV}")


class Mixture(Dataset):
    """Samples of several data sets, drawn with weights, each data set in an order of its own.

    Args:
        parts: the data sets.
        weights: how often each is drawn, finite and > 0, relative to each other.
        seed: of the draws and of the orders.
        group: as of `InOrder`.
    """

    def __init__(self, parts: Sequence[Dataset], weights: Sequence[float], seed: int, group: int = 0) -> None:
        require(len(parts) == len(weights), "Mixture", "every part must have a weight", len(weights))
        usable = all(0 < weight < math.inf for weight in weights)
        require(usable, "Mixture", "weights must be finite numbers > 0", tuple(weights))
        self.orders = [InOrder(part, ENDLESS, order_of(part, seed), group=group) for part in parts]
        self.weights, self.seed = torch.tensor(weights, dtype=torch.float64), seed
        self.drawn: list[torch.Tensor] = [torch.zeros(len(parts), dtype=torch.int64)]  # before each block

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Any:
        part, place = self.draw(index)
        return self.orders[part][place]

    def draw(self, index: int) -> tuple[int, int]:
        """Which data set comes at `index`, and how many of its samples came before."""
        block, place = divmod(index, DRAWN)
        while len(self.drawn) <= block + 1:
            counts = torch.bincount(self._choices(len(self.drawn) - 1), minlength=len(self.orders))
            self.drawn.append(self.drawn[-1] + counts)
        choices = self._choices(block)
        part = int(choices[place])
        return part, int(self.drawn[block][part] + (choices[:place] == part).sum())

    def _choices(self, block: int) -> torch.Tensor:
        """The data sets at the places of a block."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, block, 1))
        return torch.multinomial(self.weights, DRAWN, replacement=True, generator=generator)


class InOrder(Dataset):
    """`length` samples of `data` in an order that depends on the seed alone, epoch after epoch.

    Args:
        data: a dataset with a length.
        length: samples to give.
        seed: of the order; None = as they stand.
        first: samples to leave out at the start of the order, as an earlier stage has seen them.
        group: samples in a batch over all processes, to fill batches with samples of about one length, so
            that little is padded; 0 = do not group. `data` must tell each `rough_length`.
    """

    def __init__(
        self, data: Dataset, length: int, seed: int | None = None, first: int = 0, group: int = 0
    ) -> None:
        self.data, self.length, self.seed, self.first = data, length, seed, first
        self.group, self.lengths = group, []
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        positions = [self.position(index + self.first) for index in indices]
        many = getattr(self.data, "__getitems__", None)
        items = many(positions) if many else [self.data[position] for position in positions]
        return [
            {"name": f"sample {position}"} | item if isinstance(item, dict) else item
            for position, item in zip(positions, items, strict=True)
        ]

    def position(self, index: int) -> int:
        """Which sample of `data` comes at `index` of the order."""
        epoch, place = divmod(index, len(self.data))
        if self.seed is None:
            return place
        if self._shuffled[0] != epoch:
            generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
            self._shuffled = (epoch, self._shuffle(generator))
        return self._shuffled[1][place]

    def _shuffle(self, generator: torch.Generator) -> list[int]:
        """The samples of one epoch."""
        if not self.group:
            return torch.randperm(len(self.data), generator=generator).tolist()
        if not self.lengths:
            self.lengths = [self.data.rough_length(i) for i in range(len(self.data))]
        order = get_length_grouped_indices(self.lengths, self.group, generator=generator)
        batches = [order[i : i + self.group] for i in range(0, len(order), self.group)]
        whole = [batch for batch in batches if len(batch) == self.group]
        mixed = torch.randperm(len(whole), generator=generator).tolist()  # long ones must not all come first
        rest = [i for batch in batches if len(batch) < self.group for i in batch]
        return [i for number in mixed for i in whole[number]] + rest


class SharedBatches(Dataset):
    """The batches of `data`, each several times: once for each of the processes that share its tokens, which
    follow each other and get batch after batch in turn.

    Args:
        data: a dataset with a length, of whole batches.
        batch_size: samples of one batch.
        times: processes that share a batch.
    """

    def __init__(self, data: Dataset, batch_size: int, times: int) -> None:
        self.data, self.batch_size, self.times = data, batch_size, times

    def __len__(self) -> int:
        return len(self.data) * self.times

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        batches = [divmod(index, self.batch_size) for index in indices]
        return self.data.__getitems__([b // self.times * self.batch_size + place for b, place in batches])


def order_of(data: Dataset, seed: int) -> int | None:
    """The seed that orders a data set; None for one that comes in an order of its own."""
    return None if len(data) >= ENDLESS else seed


def skipped(report: Path) -> Counter[str]:
    """How many samples were skipped, by what was wrong with them; each counts once."""
    lines = report.read_text(encoding="utf-8").splitlines() if report.is_file() else []
    reasons = {entry["sample"]: entry["why"] for entry in map(json.loads, lines)}
    return Counter(why.split(":")[0] for why in reasons.values())
