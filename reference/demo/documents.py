"""Text to distil a language model on, from documentation that lies in folders.

    python -m linmu.reference.demo.documents TOKENIZER FOLDER [FOLDER ...] --output texts

reads every `.html`, `.md`, `.rst` and `.txt` below the folders (`.gz` too), cuts each document into pieces of
`--tokens` tokens, and writes `texts/train.jsonl` and `texts/held_out.jsonl`, rows {"text": ...}. Every 20th
document is held out whole, so that no piece of it is trained on.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
import sys
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..prompts.chat_collator import control_tokens
from ..training.teacher import NOT_OPENED, open_processor

HELD_OUT = 20
ENDINGS = {".html", ".md", ".rst", ".txt"}
SHORTEST = 0.5  # of a piece; the rest of a document that is shorter is left out
PLAIN = 0.97  # share of ASCII below which a document is taken for another language, or for a table of signs
NOT_READ = {"script", "style", "head", "nav", "header", "footer"}
BLOCKS = {
    "p", "div", "li", "tr", "pre", "br", "h1", "h2", "h3", "h4", "dt", "dd", "table", "ul", "ol", "section",
}  # fmt: skip


class Page(HTMLParser):
    """The text of an HTML page, a line for each block."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = self.verbatim = 0

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.hidden = 0 if tag == "body" else self.hidden + (tag in NOT_READ)  # </head> may be left out
        self.verbatim += tag == "pre"
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in NOT_READ
        self.verbatim -= tag == "pre"
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self.hidden <= 0:
            self.parts.append(data if self.verbatim > 0 else re.sub(r"\s+", " ", data))


def text_of(path: Path) -> str:
    """A document as text; "" if it is none that can be used."""
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8", "replace")
    except (EOFError, OSError, zlib.error) as error:
        print(f"skipped {path}: {error}", file=sys.stderr)
        return ""
    if ".html" in path.suffixes[-2:]:
        page = Page()
        page.feed(text)
        text = re.sub(r"\n[ \t]*\n\s*\n", "\n\n", "".join(page.parts)).strip()
    plain = sum(map(str.isascii, text)) >= PLAIN * len(text)
    return text if plain else ""


def documents(folders: list[Path]) -> Iterator[tuple[str, str]]:
    """(path, text) of every document, each text once."""
    seen = set()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            name = path.with_suffix("") if path.suffix == ".gz" else path
            if name.suffix not in ENDINGS or not path.is_file():
                continue
            text = text_of(path)
            key = hashlib.sha256(text.encode()).digest()
            if text and key not in seen:
                seen.add(key)
                yield str(path.relative_to(folder)), text


def pieces(text: str, tokenizer: PreTrainedTokenizerBase, tokens: int, refused: list[str]) -> Iterator[str]:
    """A text cut after every `tokens` tokens, without the pieces that hold one of the `refused`."""
    found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    offsets = found["offset_mapping"]
    for start in range(0, len(offsets), tokens):
        part = offsets[start : start + tokens]
        piece = text[part[0][0] : part[-1][1]]
        if len(part) >= SHORTEST * tokens and not any(sign in piece for sign in refused):
            yield piece


def main() -> None:
    """Read the folders and write both files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tokenizer", help="folder, Hub id or GGUF file of the model that is to read them")
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, default=Path("texts"))
    parser.add_argument("--tokens", type=int, default=1024, help="of a piece")
    options = parser.parse_args()
    for folder in options.folders:
        if not folder.is_dir():
            parser.error(f"a folder must be one, got {folder}")
    if options.tokens < 2:
        parser.error(f"--tokens must be at least 2, got {options.tokens}")
    try:
        processor = open_processor(options.tokenizer)
    except NOT_OPENED as error:
        sys.exit(f"documents: TOKENIZER must be one that opens, got {options.tokenizer}: {error}")
    refused = control_tokens(processor)  # a run would refuse a text that holds one
    options.output.mkdir(parents=True, exist_ok=True)
    counts = {"train": 0, "held_out": 0}
    with (
        (options.output / "train.jsonl").open("w", encoding="utf-8") as train,
        (options.output / "held_out.jsonl").open("w", encoding="utf-8") as held_out,
    ):
        for number, (path, text) in enumerate(documents(options.folders)):
            name, file = ("train", train) if number % HELD_OUT else ("held_out", held_out)
            for piece in pieces(text, processor.tokenizer, options.tokens, refused):
                file.write(json.dumps({"text": piece, "source": path}) + "\n")
                counts[name] += 1
    print(f"{options.output}: {counts['train']} pieces to train on, {counts['held_out']} held out")


if __name__ == "__main__":
    main()
