"""Questions about large pictures and long films of digits, endless, or written to files to distil on.

    python -m linmu.reference.demo.large_questions --output questions

writes `questions/train.jsonl` and `questions/held_out.jsonl`, rows as `distill.py --data` reads them, with
their pictures in them. At level `long` a picture or film is 4,032 tokens of the bundled class of teachers.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .flags import at_least, folder_to_write
from .large_scenes import LEVELS, OF_FILMS, OF_PICTURES, builders_of
from .questions import DigitsQuestions

LARGE_KINDS = (*OF_PICTURES, *OF_FILMS)
AT_ONCE = 16  # items made in one go


class LargeQuestions(DigitsQuestions):
    """DigitsQuestions of one level of `LEVELS`: all its pictures, and all its films, are of one size.

    Args:
        level: "short", "middle" or "long".
        split, seed, length, kinds: as of `DigitsQuestions`; kinds of `LARGE_KINDS`, or "cells".
    Raises:
        ValueError: as it does, and for an unknown level.
    """

    def __init__(
        self,
        level: str,
        split: str = "train",
        seed: int = 0,
        length: int = 1_000_000,
        kinds: tuple[str, ...] = LARGE_KINDS,
    ):
        self.builders = builders_of(level)
        super().__init__(split, seed, length, kinds)


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


def rows(level: str, split: str, seed: int, kinds: tuple[str, ...], start: int, stop: int) -> list[str]:
    """Lines of the items `start` to `stop` of a level."""
    items = LargeQuestions(level, split, seed, kinds=kinds).__getitems__(range(start, stop))
    return [as_row(item, level) for item in items]


def write(
    path: Path, counts: dict[str, int], split: str, seed: int, kinds: tuple[str, ...], workers: int
) -> None:
    """Write so many items of every level to a file."""
    with path.open("w", encoding="utf-8") as file, ProcessPoolExecutor(workers) as pool:
        for level, count in counts.items():
            starts = range(0, count, AT_ONCE)
            stops = [min(start + AT_ONCE, count) for start in starts]
            for lines in pool.map(partial(rows, level, split, seed, kinds), starts, stops):
                file.writelines(f"{line}\n" for line in lines)


def main(arguments: list[str] | None = None) -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=folder_to_write, default="questions", help="folder for both files")
    for level, count in zip(LEVELS, (0, 0, 3000), strict=True):
        parser.add_argument(
            f"--{level}", type=at_least(0), default=count, help=f"training questions of level {level}"
        )
    parser.add_argument("--held-out", type=at_least(0), default=300, help="held-out questions")
    parser.add_argument("--held-out-level", choices=LEVELS, default="long", help="their level")
    parser.add_argument("--kinds", nargs="+", choices=LARGE_KINDS, default=LARGE_KINDS, help="of questions")
    parser.add_argument("--seed", type=at_least(0), default=1)
    parser.add_argument("--workers", type=at_least(1), default=4, help="processes")
    options = parser.parse_args(arguments)
    counts, kinds = {level: getattr(options, level) for level in LEVELS}, tuple(options.kinds)
    write(options.output / "train.jsonl", counts, "train", options.seed, kinds, options.workers)
    counts = {options.held_out_level: options.held_out}
    write(options.output / "held_out.jsonl", counts, "heldout", options.seed, kinds, options.workers)


if __name__ == "__main__":
    main()
