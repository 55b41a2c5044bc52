"""Files and folders that are there whole or not at all, whenever the process is killed.

What is written goes to a neighbour first, is brought to the disk, and takes its name by one rename.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PART = ".part"  # ends the names of what is not whole yet


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Within, write to the path given; after, the file has its name. On an error nothing has changed."""
    part = path.with_name(path.name + PART)
    try:
        yield part
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Within, fill the folder given; after, it has its name, in place of an older one."""
    part = path.with_name(path.name + PART)
    shutil.rmtree(part, ignore_errors=True)  # of a process that was killed
    part.mkdir(parents=True)
    try:
        yield part
        finish_folder(part, path)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


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


def remove_folder(path: Path) -> None:
    """Remove a folder so that, if this is cut short, none of its name is left."""
    doomed = path.with_name(path.name + PART)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def sync(path: Path) -> None:
    """Bring a file or a folder's list of names to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
