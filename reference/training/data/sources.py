"""Where the rows of a data set lie: a JSONL file, or whatever Hugging Face `datasets` reads without a script.

    FILE.jsonl            one JSON object a line
    FOLDER                what Dataset.save_to_disk wrote, or parquet, arrow, JSON or image files
    OWNER/NAME[:SPLIT]    a data set of the Hub

Rows come as they are, images and videos undecoded, so that opening a row is cheap and a broken image breaks
its own row only. Every row has a name, for the message that says it is broken.
"""

from __future__ import annotations

import json
from array import array
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...checks import require

REMEMBERED = 64  # rows that a stream can go back


class JsonLines:
    """Rows of a JSONL file, found by their place in it; empty lines do not count."""

    def __init__(self, path: Path) -> None:
        self.path, self.root, self.source = path, path.parent, str(path)
        self.starts, self.numbers = array("q"), array("q")
        place = 0
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self.starts.append(place)
                    self.numbers.append(number)
                place += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def name(self, index: int) -> str:
        """What a row is called."""
        return f"{self.path}, line {self.numbers[index]}"

    def row(self, index: int) -> Any:
        """Parse one line."""
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            return json.loads(file.readline())


class Table:
    """Rows of a Hugging Face data set that is on disk."""

    def __init__(self, source: str, data: Any) -> None:
        self.source, self.data = source, data.cast(undecoded(data.features))
        self.root = Path(source) if Path(source).is_dir() else Path()

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        """What a row is called."""
        return f"{self.source}, row {index}"

    def row(self, index: int) -> Any:
        """Read one row."""
        return self.data[index]


class Stream:
    """Rows that are read on the way, in a shuffled order: of a file, or of a Hugging Face data set.

    A row is asked for by its place in the endless order, epoch after epoch; going on is cheap, going back
    means reading from the start.

    Args:
        source: as of `open_rows`.
        data: a `datasets.IterableDataset` whose rows hold their `_number` in the source, beside the rest.
        seed: of the order; None = as it stands.
        buffer: rows from which the next one is drawn.
        root: what relative paths are relative to.
    """

    def __init__(self, source: str, data: Any, root: Path, seed: int | None = None, buffer: int = 1000):
        self.source, self.root = source, root
        self.data = data if seed is None else data.shuffle(seed=seed, buffer_size=buffer)
        self.recent: deque[tuple[int, dict[str, Any]]] = deque(maxlen=REMEMBERED)
        self.next, self.rows = 0, iter(())

    def name(self, index: int) -> str:
        """What a row is called."""
        kind = "line" if self.source.endswith(".jsonl") else "row"
        return f"{self.source}, {kind} {self.at(index)['_number']}"

    def row(self, index: int) -> Any:
        """Read on to a row of the order."""
        row = {key: value for key, value in self.at(index).items() if key != "_number"}
        return json.loads(row["line"]) if row.keys() == {"line"} else row

    def at(self, index: int) -> dict[str, Any]:
        """The row at a place of the order, with its number in the source."""
        if self.recent and index <= self.recent[-1][0]:
            for place, row in self.recent:
                if place == index:
                    return row
        if index < self.next or self.next == 0:
            self.next, self.rows = 0, self.endless()
        while self.next <= index:
            self.recent.append((self.next, next(self.rows)))
            self.next += 1
        return self.recent[-1][1]

    def endless(self) -> Iterator[dict[str, Any]]:
        """The rows of one epoch after another."""
        epoch = 0
        while True:
            self.data.set_epoch(epoch)
            count = 0
            for rows in self.data.iter(batch_size=1):  # unlike iter(data), the same in every loader worker
                count += 1
                yield {key: values[0] for key, values in rows.items()}
            require(count > 0, "Stream", f"{self.source} must hold samples", "none")
            epoch += 1


def open_rows(source: str, streaming: bool = False, seed: int | None = None) -> JsonLines | Table | Stream:
    """Open a data set.

    Args:
        source: JSONL file, folder, or Hub id.
        streaming: read it on the way instead of finding all rows first.
        seed: of a stream's order; None = as it stands.
    Raises:
        ValueError: if there is nothing of that name, or it is empty.
    """
    path, where = Path(source), "open_rows"
    if path.is_file():
        if streaming:
            return Stream(source, stream_of_lines(path), path.parent, seed)
        rows = JsonLines(path)
        require(len(rows) > 0, where, f"{source} must hold conversations", "none")
        return rows
    looks_local = path.is_dir() or source.startswith((".", "/", "~")) or path.suffix in (".jsonl", ".json")
    require(
        path.is_dir() or not looks_local, where, "a data set must be a file, a folder or a Hub id", source
    )
    import datasets

    if path.is_dir() and (path / "state.json").is_file():
        data = datasets.load_from_disk(source)
        data = data.to_iterable_dataset() if streaming else data
    else:
        name, _, split = source.partition(":")
        data = datasets.load_dataset(name, split=split or "train", streaming=streaming)
    if streaming:
        data = data.decode(False).map(with_number, with_indices=True)
        return Stream(source, data, path if path.is_dir() else Path(), seed)
    return Table(source, data)


def stream_of_lines(path: Path) -> Any:
    """The lines of a file as a `datasets.IterableDataset`, unparsed: a bad one must not end the rest."""
    from datasets import IterableDataset

    return IterableDataset.from_generator(lines_of, gen_kwargs={"path": str(path)})


def lines_of(path: str) -> Iterator[dict[str, Any]]:
    """{"line": text, "_number": from 1} of every line that is not empty."""
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield {"line": line, "_number": number}


def with_number(row: dict[str, Any], number: int) -> dict[str, Any]:
    """The row and its number."""
    return row | {"_number": number}


def undecoded(features: Any) -> Any:
    """The features of a data set with images and videos left as bytes or paths."""
    import datasets

    if isinstance(features, datasets.Image | datasets.Video):
        return type(features)(decode=False)
    if isinstance(features, datasets.Features):
        return datasets.Features({name: undecoded(feature) for name, feature in features.items()})
    if isinstance(features, dict):
        return {name: undecoded(feature) for name, feature in features.items()}
    if isinstance(features, datasets.List):
        return datasets.List(undecoded(features.feature), length=features.length)
    if isinstance(features, list):
        return [undecoded(features[0])]
    return features
