"""Whether a film's file is whole: decoders play what there is of a cut one and say nothing.

Such files are parts one after another, each with its size in bytes. A file is cut if a part ends beyond it:

    MP4, MOV    box      size (4 bytes, big-endian, itself included) name (4); size 1 = 8 bytes more hold it
    AVI         chunk    "RIFF" size (4, little-endian, of what follows)
    MKV, WebM   element  id, size: EBML numbers, in whose first byte the leading zeros tell how many follow

Sizes that say "until the end", as live recordings have them, prove nothing; nor does MPEG-TS have any.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

BOXES = (b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"sidx", b"pnot")
EBML = b"\x1a\x45\xdf\xa3"
UNFINISHED = (0, 2**32 - 1)  # sizes of an AVI that its writer did not come back to
MOST_PARTS = 10**6


def is_cut(file: Path | io.BytesIO) -> bool:
    """Whether the file ends before its last part does; False for other containers."""
    if isinstance(file, io.BytesIO):
        return is_cut_stream(io.BytesIO(file.getbuffer()))
    with file.open("rb") as stream:
        return is_cut_stream(stream)


def is_cut_stream(stream: BinaryIO) -> bool:
    """The same of an open file, which is read from its start."""
    length = stream.seek(0, io.SEEK_END)
    stream.seek(0)
    head = stream.read(8)
    size_of = next(
        (reader for known, reader in ((head[4:] in BOXES, box), (head[:4] == b"RIFF", chunk),
                                      (head[:4] == EBML, element)) if known), None
    )  # fmt: skip
    place = 0
    for _ in range(MOST_PARTS if size_of else 0):
        stream.seek(place)
        size = size_of(stream)
        if size is None or place + size == length:
            return False
        place += size
        if place > length:
            return True
    return False


def box(stream: BinaryIO) -> int | None:
    """Bytes of the box that begins here; None = until the end, or no box."""
    head = stream.read(16)
    size = int.from_bytes(head[:4], "big")
    if size == 1:
        size = int.from_bytes(head[8:16], "big")
    return size if size >= 8 and len(head) >= 8 and head[4:8].isalnum() else None


def chunk(stream: BinaryIO) -> int | None:
    """Bytes of the RIFF chunk that begins here; None = not known, or no chunk."""
    head = stream.read(8)
    size = int.from_bytes(head[4:], "little")
    return 8 + size if head[:4] == b"RIFF" and size not in UNFINISHED else None


def element(stream: BinaryIO) -> int | None:
    """Bytes of the EBML element that begins here; None = until the end, or no element."""
    head = stream.read(12)
    if not head or not head[0]:
        return None
    width = 9 - head[0].bit_length()  # of the id
    if len(head) <= width or not head[width]:
        return None
    more = 9 - head[width].bit_length()  # bytes of the size
    size = int.from_bytes(head[width : width + more], "big") - (1 << 7 * more)  # without its marking bit
    return width + more + size if size != (1 << 7 * more) - 1 else None
