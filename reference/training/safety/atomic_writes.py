"""Atomic writes: write beside, fsync, rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..refusal import RefusedError

PART = ".part"  # ends the names of what is not whole yet


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Within, write to the path given; after, the file has its name. On an error nothing has changed.

    Raises:
        RefusedError: if the disk is full, or cannot be written.
    """
    part = path.with_name(path.name + PART)
    try:
        with refused_by_disk(path):
            yield part
            sync(part)
            os.replace(part, path)
            sync(path.parent)
    except BaseException:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Within, fill the folder given; after, it has its name, in place of an older one.

    Raises:
        RefusedError: if the disk is full, or cannot be written.
    """
    part = path.with_name(path.name + PART)
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    try:
        with refused_by_disk(path):
            part.mkdir(parents=True)
            yield part
            finish_folder(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


@contextmanager
def refused_by_disk(path: Path) -> Iterator[None]:
    """Turn what a disk says while `path` is written into a refusal that names it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RefusedError(
            f"distill: {path} must fit on its disk, got {error}; make room there and go on with --resume"
        ) from error


def finish_folder(part: Path, path: Path) -> None:
    """Bring a folder to the disk and give it its name."""
    for folder, _, names in os.walk(part, topdown=False):
        for name in names:
            sync(Path(folder) / name)
        sync(Path(folder))
    if path.exists():
        shutil.rmtree(path)
    os.replace(part, path)
    sync(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file whole."""
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
