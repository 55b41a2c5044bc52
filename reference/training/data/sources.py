"""Where the rows of a data set are: a file of JSON, or what Hugging Face `datasets` reads without a script.

    FILE.jsonl            one JSON object a line
    FILE.json             an array of objects, as LLaVA's data come; or one object a line
    FILE.parquet, .arrow  a table
    FOLDER[:SPLIT]        what Dataset.save_to_disk wrote, or parquet, arrow, JSON or image files
    OWNER/NAME[:SPLIT]    a data set of the Hub

Rows come as they are, images and videos undecoded, so that opening a row is cheap and a broken image breaks
its own row only. Every row has a name, for the message that says it is broken; a stream gives the same rows
the same names.
"""

from __future__ import annotations

import json
from array import array
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...checks import require
from ..refusal import RefusedError

REMEMBERED = 64  # rows that a stream can go back
SPACE = " \t\r\n"
# By the first bytes of a file; the last are those of what `datasets` saves.
TABLES = {b"PAR1": "parquet", b"ARRO": "arrow", b"\xff\xff\xff\xff": "arrow"}
LOCAL = (".jsonl", ".json", ".parquet", ".arrow")
UNREADABLE = {
    b"\x1f\x8b": "gzip; unpack it first",
    b"\x28\xb5\x2f\xfd": "zstandard; unpack it first",
    b"PK\x03\x04": "zip; unpack it first",
    b"\xff\xfe": "UTF-16; save it as UTF-8",
    b"\xfe\xff": "UTF-16; save it as UTF-8",
    **dict.fromkeys(
        (b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF"),
        "a picture or a film; name it in the content of a conversation",
    ),
}


class StreamEndedError(RefusedError):
    """A stream that cannot be read on: no fault of a sample."""


class JsonLines:
    """Rows of a file with one JSON object a line, found by their place in it; empty lines do not count."""

    def __init__(self, path: Path) -> None:
        self.path, self.root, self.source = path, path.parent, str(path)
        self.starts, self.lengths, self.lines = array("q"), array("q"), array("q")
        for start, length, line in self.find():
            self.starts.append(start)
            self.lengths.append(length)
            self.lines.append(line)

    def find(self) -> Iterator[tuple[int, int, int]]:
        """Where each row starts and how long it is, in bytes, and its line."""
        place = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield place, len(line), number
                place += len(line)

    def __len__(self) -> int:
        return len(self.starts)

    def name(self, index: int) -> str:
        """What a row is called."""
        return f"{self.path}, line {self.lines[index]}"

    def bytes_of(self, index: int) -> bytes:
        """One row, not parsed."""
        with self.path.open("rb") as file:
            file.seek(self.starts[index])
            return file.read(self.lengths[index])

    def row(self, index: int) -> Any:
        """Parse one row."""
        return json.loads(self.bytes_of(index))

    def may_hold(self, word: str) -> bool:
        """Whether a word is anywhere in the file."""
        with self.path.open("rb") as file:
            return any(word.encode() in line for line in file)


class JsonArray(JsonLines):
    """Rows of a file that is one array of JSON objects.

    Raises:
        ValueError: if brackets and commas do not fit, as then nobody can say where the next row begins.
    """

    def find(self) -> Iterator[tuple[int, int, int]]:
        """Where each row starts and how long it is, in bytes, and its line."""
        # A byte that is not UTF-8 must break its own row alone.
        text = self.path.read_bytes().decode("utf-8", "surrogateescape")
        decoder, seen, start, line = json.JSONDecoder(), 0, 0, 1
        at = after_space(text, 1 + len(text) - len(text.lstrip("\ufeff" + SPACE)))
        while text[at : at + 1] not in ("]", ""):
            try:
                _, end = decoder.raw_decode(text, at)
            except (ValueError, RecursionError) as error:
                got = f"{type(error).__name__} after {line + text.count(chr(10), seen, at) - 1} lines"
                must = f"{self.path} must be an array of objects"
                raise ValueError(f"open_rows: {must}, got {got}: {error}") from None
            start += size(text[seen:at])
            line += text.count("\n", seen, at)
            length = size(text[at:end])
            yield start, length, line
            start, line, seen = start + length, line + text.count("\n", at, end), end
            at = after_space(text, end)
            if text[at : at + 1] == ",":
                at = after_space(text, at + 1)
            elif text[at : at + 1] != "]":
                break
        rest = text[at:].strip(SPACE)
        must = f"{self.path} must be an array of objects that ends with ]"
        require(rest == "]", "open_rows", must, f"{rest[:20]!r} in line {line}")

    def name(self, index: int) -> str:
        """What a row is called: an array may be one line."""
        return f"{self.path}, item {index + 1} (line {self.lines[index]})"


def after_space(text: str, at: int) -> int:
    """The next place at or after `at` that is no white space."""
    while text[at : at + 1] and text[at] in SPACE:
        at += 1
    return at


def size(text: str) -> int:
    """Bytes of a text."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogateescape"))


class Table:
    """Rows of a Hugging Face data set that is on disk.

    Args:
        source: what it is called.
        data: a `datasets.Dataset`.
        root: what relative paths are relative to.
    """

    def __init__(self, source: str, data: Any, root: Path) -> None:
        self.source, self.data, self.root = source, data.cast(undecoded(data.features)), root

    def __len__(self) -> int:
        return len(self.data)

    def name(self, index: int) -> str:
        """What a row is called."""
        return f"{self.source}, row {index}"

    def row(self, index: int) -> Any:
        """Read one row."""
        return self.data[index]

    def may_hold(self, word: str) -> bool:
        """Whether a word is in the names of columns and fields."""
        return word in repr(self.data.features)


class Stream:
    """Rows that are read on the way, in a shuffled order: of a file, or of a Hugging Face data set.

    A row is asked for by its place in the endless order, epoch after epoch; going on is cheap, going back
    means reading from the start.

    Args:
        source: as of `open_rows`.
        data: a `datasets.IterableDataset` whose rows are {"_name", "_bytes"}, not parsed yet, or hold their
            `_number` in the source beside the rest.
        seed: of the order; None = as it stands.
        buffer: rows from which the next one is drawn.
        root: what relative paths are relative to.
    """

    def __init__(self, source: str, data: Any, root: Path, seed: int | None = None, buffer: int = 1000):
        self.source, self.data, self.root = source, data, root
        self.seed, self.buffer = seed, buffer
        self.recent: deque[tuple[int, dict[str, Any]]] = deque(maxlen=REMEMBERED)
        self.next, self.rows = 0, iter(())

    def name(self, index: int) -> str:
        """What a row is called."""
        row = self.at(index)
        return row["_name"] if "_name" in row else f"{self.source}, row {row['_number']}"

    def row(self, index: int) -> Any:
        """Read on to a row of the order."""
        row = self.at(index)
        if "_bytes" in row:
            return json.loads(row["_bytes"])
        return {key: value for key, value in row.items() if key != "_number"}

    def at(self, index: int) -> dict[str, Any]:
        """The row at a place of the order, with its name or number in the source."""
        if self.recent and index <= self.recent[-1][0]:
            for place, row in self.recent:
                if place == index:
                    return row
        if index < self.next or self.next == 0:
            self.next, self.rows = 0, self.endless()
        while self.next <= index:
            try:
                row = next(self.rows)
            except Exception as error:  # a server that is gone, a file cut off: no row after it can be read
                got, self.next = f"{type(error).__name__} after {self.next} rows: {error}", 0
                must = f"Stream: {self.source} must be readable on"
                raise StreamEndedError(f"{must}, got {got:.500}") from error
            self.recent.append((self.next, row))
            self.next += 1
        return self.recent[-1][1]

    def endless(self) -> Iterator[dict[str, Any]]:
        """The rows of one epoch after another."""
        epoch = 0
        while True:
            data, count = self.shuffled(epoch), 0
            for rows in data.iter(batch_size=1):  # unlike iter(data), the same in every loader worker
                count += 1
                yield {key: values[0] for key, values in rows.items()}
            require(count > 0, "Stream", f"{self.source} must hold samples", "none")
            epoch += 1

    def shuffled(self, epoch: int) -> Any:
        """The data of an epoch. Not by `set_epoch`: loader workers share that number, and one is ahead."""
        if self.seed is None:
            return self.data
        return self.data.shuffle(seed=seed_of(self.seed, epoch), buffer_size=self.buffer)


def seed_of(*numbers: int) -> int:
    """One seed for a run's seed and what it is asked for: an epoch, a block of draws."""
    return hash(numbers) % 2**63


def open_rows(source: str, streaming: bool = False, seed: int | None = None) -> JsonLines | Table | Stream:
    """Open a data set.

    Args:
        source: file, folder, or Hub id, as above.
        streaming: read it on the way instead of finding all rows first.
        seed: of a stream's order; None = as it stands.
    Raises:
        ValueError: if there is nothing of that name, it is empty, or it cannot be read.
    """
    path, split = path_and_split(source)
    if path.is_file() and (kind := kind_of(path)) is not None:
        require(not split, "open_rows", "a file must be named without a split", source)
        if streaming:
            must = f"{source} must hold conversations"
            require(next(rows_of(str(path), kind), None) is not None, "open_rows", must, "none")
            from datasets import IterableDataset

            data = IterableDataset.from_generator(rows_of, gen_kwargs={"path": str(path), "kind": kind})
            return Stream(source, data, path.parent, seed)
        rows = kind(path)
        require(len(rows) > 0, "open_rows", f"{source} must hold conversations", "none")
        return rows
    is_local = path.exists()
    looks_local = source.startswith((".", "/", "~")) or path.suffix in LOCAL
    must = "a data set must be a file, a folder or a Hub id"
    require(is_local or not looks_local, "open_rows", must, source)
    root = path if path.is_dir() else path.parent if path.is_file() else Path()
    try:
        data = load(path, split, streaming)
        if not streaming:
            table = Table(source, data, root)
        else:
            data = data.decode(False).map(with_number, with_indices=True)
    except Exception as error:  # whatever the readers of some twenty formats raise
        must, got = f"{source} must be a data set that can be read", f"{type(error).__name__}: {error}"
        raise ValueError(f"open_rows: {must}, got {got:.500}") from error
    if streaming:
        return Stream(source, data, root, seed)
    require(len(table) > 0, "open_rows", f"{source} must hold conversations", "none")
    return table


def path_and_split(source: str) -> tuple[Path, str]:
    """ "FOLDER:SPLIT" -> (FOLDER, SPLIT); a name that is there as it stands, colon and all, has no split."""
    path = Path(source).expanduser()
    name, _, split = source.rpartition(":")
    return (path, "") if path.exists() or not name else (Path(name).expanduser(), split)


def kind_of(path: Path) -> type[JsonLines] | None:
    """How to read a file of JSON, by what it holds; None for a table.

    Raises:
        ValueError: if it is packed, in UTF-16, or one JSON object over several lines.
    """
    with path.open("rb") as file:
        head = file.read(4)
        if head in TABLES:
            return None
        for magic, name in UNREADABLE.items():
            must = f"{path} must be a file of JSON or a table"
            require(not head.startswith(magic), "open_rows", must, name)
        if path.suffix != ".json":
            return JsonLines
        file.seek(0)
        first = next((line for line in file if line.strip(b"\xef\xbb\xbf \t\r\n")), b"")
    first = first.strip(b"\xef\xbb\xbf \t\r\n")
    if first.startswith(b"["):
        return JsonArray
    try:
        json.loads(first)
    except ValueError:
        try:
            keys = sorted(json.loads(path.read_bytes()))
        except (ValueError, TypeError, RecursionError):
            return JsonLines  # whose rows are broken, each by itself
        must = f"{path} must be an array of objects, or hold one object a line"
        raise ValueError(f"open_rows: {must}, got one object with keys {keys}") from None
    except RecursionError:
        pass
    return JsonLines


def load(path: Path, split: str, streaming: bool) -> Any:
    """A data set of Hugging Face's: from a table, a folder, or the Hub."""
    import datasets

    if path.is_file():
        with path.open("rb") as file:
            kind = TABLES[file.read(4)]
        must = "a file must be named without a split"
        require(not split, "open_rows", must, f"{path}:{split}")
        return datasets.load_dataset(kind, data_files=str(path), split="train", streaming=streaming)
    if not (path / "state.json").is_file() and not (path / "dataset_dict.json").is_file():
        return datasets.load_dataset(str(path), split=split or "train", streaming=streaming)
    data = datasets.load_from_disk(str(path))
    if isinstance(data, datasets.DatasetDict):
        split = split or ("train" if "train" in data else "")
        require(split in data, "open_rows", f"a split must be one of {sorted(data)}", repr(split))
        data = data[split]
    else:
        require(split in ("", str(data.split)), "open_rows", f"the split must be {data.split}", repr(split))
    return data.to_iterable_dataset() if streaming else data


def rows_of(path: str, kind: type[JsonLines]) -> Iterator[dict[str, Any]]:
    """{"_name", "_bytes"} of every row of a file of JSON, unparsed: a bad one must not end the rest."""
    if kind is not JsonLines:
        rows = kind(Path(path))
        yield from ({"_name": rows.name(i), "_bytes": rows.bytes_of(i)} for i in range(len(rows)))
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield {"_name": f"{path}, line {number}", "_bytes": line}


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
