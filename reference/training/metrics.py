"""`metrics.jsonl`: what a run measured, a line for every logged step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .safety.atomic_writes import write_text


def append_json(path: Path, values: dict[str, Any]) -> None:
    """Add a line to a JSONL file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`; a last one that was cut short by a kill does not count."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}\n")]


def forget_after(path: Path, stage: str, step: int) -> None:
    """Drop what was logged after the checkpoint at which a stage goes on: it will be logged again."""
    kept = [line for line in read_metrics(path) if line["stage"] != stage or line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
