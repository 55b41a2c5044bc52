"""Users' data as small files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from linmu.reference.demo import TEACHER

BROKEN = "gone.png"  # a picture that is not there


def row(answer: str | list = "1", picture: str | None = "p.png", question: str = "how many") -> dict:
    """A conversation of one question; without `picture` it is text alone."""
    pictures = [{"type": "image", "image": picture}] if picture else []
    asked = {"role": "user", "content": [{"type": "text", "text": question}, *pictures]}
    return {"messages": [asked, {"role": "assistant", "content": answer}]}


def write(folder: Path, name: str, rows: list[dict], size: tuple[int, int] = (48, 48)) -> Path:
    """A JSONL file, and the picture p.png beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "p.png")
    path = folder / name
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def flags(data: Path, output: Path) -> list[str]:
    """A run on these data, as short as can be, with the bundled teacher's folder."""
    stages = [word for stage in ("i", "ii", "iii") for word in (f"--stage_{stage}.steps", "1")]
    small = [
        "--batch_size",
        "2",
        "--eval_samples",
        "2",
        "--calibration_batches",
        "1",
        "--log_every",
        "1",
        "--cpu",
    ]
    return ["--preset", "smoke", "--teacher", str(TEACHER), "--data", str(data), "--output", str(output),
            *small, *stages, "--cpu"]  # fmt: skip
