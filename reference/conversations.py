"""Conversations from a JSONL file, in an order that a killed run can take up again.

A line is {"messages": [...], "kind": "optional name"}; messages as chat templates take them, the last one the
assistant's, with {"type": "image", "image": PATH} and {"type": "video", "video": [FRAME_PATH, ...]} blocks.
Paths are relative to the file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from .checks import require

logger = logging.getLogger(__name__)


class Conversations(Dataset):
    """Conversations of a JSONL file, images and frames opened when asked for.

    Args:
        path: the file.
        on_broken: "refuse" raises on a line that cannot be used, "skip" names it and takes the next one.
        max_frames: thin videos evenly to this many frames; 0 = keep all.
        lines: numbers of the lines to use, from 0; None = all.
    Raises:
        ValueError: if the file is missing or empty, or, on access, for a line that cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        on_broken: str = "refuse",
        max_frames: int = 0,
        lines: Sequence[int] | None = None,
    ) -> None:
        where = "Conversations"
        require(on_broken in ("refuse", "skip"), where, "on_broken must be refuse or skip", on_broken)
        self.path, self.on_broken, self.max_frames = Path(path), on_broken, max_frames
        require(self.path.is_file(), where, "path must be a JSONL file", path)
        texts = self.path.read_text(encoding="utf-8").splitlines()
        self.texts = {number: text for number, text in enumerate(texts) if text.strip()}
        self.lines = sorted(self.texts) if lines is None else list(lines)
        require(bool(self.lines), where, f"{path} must hold conversations", "none")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        for attempt in range(len(self)):
            line = self.lines[(index + attempt) % len(self)]
            try:
                return self.read(line)
            except (OSError, ValueError, LookupError, TypeError) as error:
                message = f"{self.path}, line {line + 1}: {type(error).__name__}: {error}"
                if self.on_broken == "refuse":
                    raise ValueError(f"{message}; mend it, or skip broken lines (on_broken)") from error
                logger.warning("skipped %s", message)
        raise ValueError(f"Conversations: {self.path} must hold a line that can be read, got none")

    def split(self, every: int) -> tuple[Conversations, Conversations]:
        """Hold out every `every`-th line: (the rest, the held-out ones)."""
        held_out = self.lines[::every]
        rest = [line for line in self.lines if line not in set(held_out)]
        require(bool(rest), "Conversations", f"{self.path} must hold two lines to split", len(self.lines))
        parts = (
            Conversations(self.path, self.on_broken, self.max_frames, lines) for lines in (rest, held_out)
        )
        return tuple(parts)

    def read(self, line: int) -> dict[str, Any]:
        """Parse one line and open its images: {"kind": str, "messages": list}."""
        item = json.loads(self.texts[line])
        if item["messages"][-1]["role"] != "assistant":
            raise ValueError("the last message must be the assistant's")
        messages = [message | {"content": self._open(message["content"])} for message in item["messages"]]
        return {"kind": str(item.get("kind", "all")), "messages": messages}

    def _open(self, content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Replace the paths in a message's blocks by images."""
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        opened = []
        for block in content:
            if block["type"] == "image":
                block = block | {"image": self._open_image(block["image"])}
            elif block["type"] == "video":
                block = block | {"video": [self._open_image(path) for path in self._thin(block["video"])]}
            opened.append(block)
        return opened

    def _open_image(self, path: str) -> Image.Image:
        with Image.open(self.path.parent / path) as image:
            return image.convert("RGB")

    def _thin(self, frames: list[str]) -> list[str]:
        """At most `max_frames` of the frames, evenly spaced."""
        if not self.max_frames or len(frames) <= self.max_frames:
            return frames
        return [frames[i * len(frames) // self.max_frames] for i in range(self.max_frames)]


class InOrder(Dataset):
    """`length` samples of `data` in an order that depends on the seed alone, epoch after epoch.

    Args:
        data: a dataset with a length.
        length: samples to give.
        seed: of the order; None = as they stand.
        first: samples to leave out at the start of the order, as an earlier stage has seen them.
    """

    def __init__(self, data: Dataset, length: int, seed: int | None = None, first: int = 0) -> None:
        self.data, self.length, self.seed, self.first = data, length, seed, first
        self._shuffled: tuple[int, list[int]] = (-1, [])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        positions = [self.position(index + self.first) for index in indices]
        many = getattr(self.data, "__getitems__", None)
        return many(positions) if many else [self.data[position] for position in positions]

    def position(self, index: int) -> int:
        """Which sample of `data` comes at `index` of the order."""
        epoch, place = divmod(index, len(self.data))
        if self.seed is None:
            return place
        if self._shuffled[0] != epoch:
            generator = torch.Generator().manual_seed(hash((self.seed, epoch)) % 2**63)
            self._shuffled = (epoch, torch.randperm(len(self.data), generator=generator).tolist())
        return self._shuffled[1][place]
