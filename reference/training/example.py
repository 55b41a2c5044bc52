"""A question about a held-out picture, which a finished run says how to ask its student."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image


class Example(NamedTuple):
    """A picture, a question about it, and the answer that the data give."""

    picture: Image.Image
    question: str
    answer: str


def first_example(samples: Iterable[dict[str, Any] | str]) -> Example | None:
    """The first sample that makes an example; broken ones, which are complaints, and documents make none."""
    for sample in samples:
        if not isinstance(sample, str) and "messages" in sample and (found := example_of(sample["messages"])):
            return found
    return None


def example_of(messages: list[dict[str, Any]]) -> Example | None:
    """The example in a conversation that begins with a question about one picture."""
    question, answer = [turn["content"] for turn in messages if turn["role"] != "system"][:2]
    media = [block for block in question if block["type"] != "text"]
    texts = [
        " ".join(block["text"] for block in turn if block["type"] == "text") for turn in (question, answer)
    ]
    if len(media) == 1 and media[0]["type"] == "image" and all(texts):
        return Example(media[0]["image"], *texts)
    return None


def how_to_ask(example: Example, student: Path, picture: Path) -> str:
    """The command that asks the student in a folder about the example's picture, and what it should say."""
    command = ["python", "-m", "linmu.reference.demo.ask", str(student), str(picture), example.question]
    return f"Ask it (the answer should be {example.answer}):\n  {shlex.join(command)}"
