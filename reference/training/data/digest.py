"""What tells one data set from another: a run that goes on must go on with the data it began with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from torch.utils.data import ConcatDataset, Dataset

from .conversations import Conversations, Mixture
from .sources import JsonLines, Stream, Table

LOOKED_AT = 256  # rows, evenly spaced: a data set may be of a terabyte


def digests(*datasets: Dataset) -> dict[str, str]:
    """Return a digest of each data set that is named by a flag, by its name; none of a stream or of the demo.

    Args:
        datasets: training and held-out samples, as of `open_data`.
    """
    rows = (part.rows for dataset in datasets for part in parts_of(dataset))
    return {each.source: digest_of(each) for each in rows if not isinstance(each, Stream)}


def parts_of(dataset: Any) -> Iterator[Conversations]:
    """The data sets that one is made of."""
    if isinstance(dataset, Conversations):
        yield dataset
    elif isinstance(dataset, Mixture):
        for order in dataset.orders:
            yield from parts_of(order.data)
    elif isinstance(dataset, ConcatDataset):
        for part in dataset.datasets:
            yield from parts_of(part)


def digest_of(rows: JsonLines | Table) -> str:
    """Hash the number of rows, where they are in a file, and the bytes of `LOOKED_AT` of them.

    Choice: no times of files, which a copy to another machine changes. Goes unnoticed: an edit that changes
    neither the length of a line nor a row that is looked at; images in files of their own.
    """
    found = hashlib.sha256(f"{len(rows)}".encode())
    looked_at = sorted({i * (len(rows) - 1) // LOOKED_AT for i in range(LOOKED_AT + 1)})
    if isinstance(rows, JsonLines):
        for places in (rows.starts, rows.lengths):
            found.update(places)
        for index in looked_at:
            found.update(rows.bytes_of(index))
    else:
        for index in looked_at:
            found.update(repr(without_paths(rows.row(index))).encode("utf-8", "surrogateescape"))
    return found.hexdigest()[:16]


def without_paths(value: Any) -> Any:
    """A row without the places of its images, which are others on another machine."""
    if isinstance(value, dict):
        left_out = {"path"} if value.keys() == {"bytes", "path"} else set()
        return {key: without_paths(each) for key, each in value.items() if key not in left_out}
    return [without_paths(each) for each in value] if isinstance(value, list) else value
