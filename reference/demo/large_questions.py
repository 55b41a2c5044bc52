"""Questions about large pictures and long films of digits, endless, or written to files to distil on.

    python -m linmu.reference.demo.large_questions --output questions

writes `questions/train.jsonl` and `questions/held_out.jsonl`, rows as `distill.py --data` reads them, with
their pictures in them. At level `long` a picture or film is 4,032 tokens of the bundled class of teachers.
Training conversations ask up to eight questions about one picture or film (`--questions-each`): eight times
the answers to learn from, in as many tokens. Held-out conversations ask one.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .digits import SPLITS
from .draws import Draws, sample_keys
from .flags import at_least, folder_to_write
from .large_scenes import LEVELS, OF_FILMS, OF_PICTURES, builders_of, further_questions
from .questions import DigitsQuestions

LARGE_KINDS = (*OF_PICTURES, *OF_FILMS)
AT_ONCE = 16  # items made in one go


class LargeQuestions(DigitsQuestions):
    """DigitsQuestions of one level of `LEVELS`: all its pictures, and all its films, are of one size.

    Args:
        level: "short", "middle" or "long".
        split, seed, length, kinds: as of `DigitsQuestions`; kinds of `LARGE_KINDS`, or "cells".
        each: how many questions a conversation asks, all different; fewer where no more can be asked. The
            first is of the item's kind, and asked before the picture as ever; those that follow may be of all
            `kinds`. At level "long", pictures and films are 3 to 6 % smaller if there are several.
    Raises:
        ValueError: as it does, for an unknown level, and for fewer than one question.
    """

    def __init__(
        self,
        level: str,
        split: str = "train",
        seed: int = 0,
        length: int = 1_000_000,
        kinds: tuple[str, ...] = LARGE_KINDS,
        each: int = 1,
    ):
        if each < 1:
            raise ValueError(f"LargeQuestions: each must be at least 1, got {each}")
        self.builders, self.each = builders_of(level, several=each > 1), each
        super().__init__(split, seed, length, kinds)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the items of several indices."""
        items = super().__getitems__(indices)
        if self.each == 1:
            return items
        every = np.arange(len(indices))
        keys = sample_keys(self.seed, SPLITS.index(self.split), np.asarray(indices, np.int64))
        draws = Draws(keys).take(every).take(every).uniform(self.each - 1, 3)
        for item, grid, draw in zip(items, self.grids(indices), draws, strict=True):
            first = item["messages"][0]["content"][0]["text"]
            for question, answer in further_questions(grid, first, self.asked, draw):
                item["messages"] += [turn("user", question), turn("assistant", answer)]
        return items


def turn(role: str, text: str) -> dict[str, Any]:
    """A turn of text alone."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def png(pixels: np.ndarray) -> str:
    """A picture (height, width, 3) uint8 as a `data:` address."""
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0]).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def as_row(item: dict[str, Any], level: str) -> str:
    """One item as a line of JSON, its kind told with its level where that is not long."""
    for block in item["messages"][0]["content"]:
        if block["type"] == "image":
            block["image"] = png(np.asarray(block["image"]))
        elif block["type"] == "video":
            block["video"] = [png(frame) for frame in block["video"]]
    kind = item["kind"] if level == "long" else f"{item['kind']}, {level}"
    return json.dumps({"kind": kind, "messages": item["messages"]})


def rows(options: dict[str, Any], level: str, start: int, stop: int) -> list[str]:
    """Lines of the items `start` to `stop` of a level."""
    items = LargeQuestions(level, **options).__getitems__(range(start, stop))
    return [as_row(item, level) for item in items]


def write(path: Path, counts: dict[str, int], workers: int, **options: Any) -> None:
    """Write so many items of every level to a file; `options` are `LargeQuestions`' own."""
    with path.open("w", encoding="utf-8") as file, ProcessPoolExecutor(workers) as pool:
        for level, count in counts.items():
            starts = range(0, count, AT_ONCE)
            stops = [min(start + AT_ONCE, count) for start in starts]
            for lines in pool.map(partial(rows, options, level), starts, stops):
                file.writelines(f"{line}\n" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=folder_to_write, default="questions", help="folder for both files")
    for level, count in zip(LEVELS, (0, 0, 3000), strict=True):
        parser.add_argument(
            f"--{level}", type=at_least(0), default=count, help=f"training conversations of level {level}"
        )
    parser.add_argument(
        "--questions-each", type=at_least(1), default=8, help="questions of a training conversation, at most"
    )
    parser.add_argument("--held-out", type=at_least(0), default=300, help="held-out questions")
    parser.add_argument("--held-out-level", choices=LEVELS, default="long", help="their level")
    parser.add_argument("--kinds", nargs="+", choices=LARGE_KINDS, default=LARGE_KINDS, help="of questions")
    parser.add_argument("--seed", type=at_least(0), default=1)
    parser.add_argument("--workers", type=at_least(1), default=4, help="processes")
    options = parser.parse_args(arguments)
    asked: dict[str, Any] = {"seed": options.seed, "kinds": tuple(options.kinds)}
    counts = {level: getattr(options, level) for level in LEVELS}
    train = options.output / "train.jsonl"
    write(train, counts, options.workers, split="train", each=options.questions_each, **asked)
    counts = {options.held_out_level: options.held_out}
    write(options.output / "held_out.jsonl", counts, options.workers, split="heldout", **asked)


if __name__ == "__main__":
    main()
