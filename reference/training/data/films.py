"""Films and animated pictures, frame by frame: each frame upright, with its time.

A frame's display matrix (a, b, c, d) says where its pixels are shown: (x, y) at (a x + c y, b x + d y),
y downwards.
"""

from __future__ import annotations

import importlib.util
import io
import struct
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from ..refusal import RefusedError
from .containers import is_cut

# What Pillow decodes of what is shown as a video: FFmpeg does not know all of these, nor all their pauses.
ANIMATIONS = ("GIF", "WEBP", "PNG")
PICTURES = (*ANIMATIONS, "JPEG", "TIFF", "BMP")
NO_PAUSE = Fraction(1, 10)  # seconds that browsers and FFmpeg show a frame for whose pause is 0
WITHOUT_PYAV = "PyAV must be installed to decode films; pip install av, or list their frames"
# How Pillow turns a frame upright, by the signs of its display matrix.
TURNS = {
    (1, 0, 0, 1): None,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,  # Pillow turns to the left
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
}

# One frame as it is decoded: what makes its picture, when it is shown, and for how long, in seconds.
Frame = tuple[Callable[[], Image.Image], Fraction | None, Fraction | None]


class MissingPackageError(RefusedError):
    """A package that the data need: no fault of a sample."""


def is_picture(file: Path | io.BytesIO) -> bool:
    """Whether Pillow is to decode a video, animated or still: by what the file holds, not by its name."""
    try:
        with Image.open(file, formats=PICTURES):
            return True
    except UnidentifiedImageError:
        return False
    finally:
        if isinstance(file, io.BytesIO):
            file.seek(0)


def reader_of(file: Path | io.BytesIO) -> Callable[[], Iterator[Frame]]:
    """What decodes a video from its start, as often as it is called."""
    return partial(frames_of_picture if is_picture(file) else frames_of_film, file)


def frames_of_picture(file: Path | io.BytesIO) -> Iterator[Frame]:
    """The frames of an animated picture, each with its own pause; each must be used before the next.

    A still one is a frame without a time, pages of a TIFF are several.
    """
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with Image.open(file) as image:
        timed = getattr(image, "is_animated", False) and image.format in ANIMATIONS
        start = Fraction(0) if timed else None
        for i, frame in enumerate(ImageSequence.Iterator(image)):
            frame.load()  # WebP tells the pause only then
            if i == 0 and getattr(image, "default_image", False):
                continue  # of an APNG: shown by what cannot play it
            pause = Fraction(frame.info.get("duration") or 0) / 1000 or NO_PAUSE
            yield frame.copy, start, pause
            start = start + pause if timed else None


def frames_of_film(file: Path | io.BytesIO) -> Iterator[Frame]:
    """The frames of a film, with their times if it has any; each must be used before the next.

    Raises:
        MissingPackageError: if PyAV is not installed.
        ValueError: for sound alone, and for a file whose end is missing.
    """
    if not has_film_decoder():
        raise MissingPackageError(f"Media: {WITHOUT_PYAV}")
    import av

    if is_cut(file):
        raise ValueError("a film whose end is missing; copy it anew")
    if isinstance(file, io.BytesIO):
        file.seek(0)
    with av.open(file if isinstance(file, io.BytesIO) else str(file)) as container:
        streams = [
            s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic
        ]
        if not streams:
            raise ValueError("a file without moving pictures")
        for i, frame in enumerate(container.decode(streams[0])):
            start = pause = None
            if frame.pts is not None and frame.time_base:
                start, pause = frame.pts * frame.time_base, (frame.duration or 0) * frame.time_base or None
            elif rate := streams[0].average_rate:
                start, pause = i / rate, 1 / rate
            yield partial(upright, frame), start, pause


def has_film_decoder() -> bool:
    """Whether PyAV is installed."""
    return importlib.util.find_spec("av") is not None


def upright(frame: Any) -> Image.Image:
    """A frame of a film, turned as its display matrix says.

    Raises:
        ValueError: for turns by less than a quarter.
    """
    image = frame.to_image()
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            a, b, _, c, d, *_ = struct.unpack("=9i", bytes(data))
            least = max(map(abs, (a, b, c, d))) / 100
            signs = tuple((x > least) - (x < -least) for x in (a, b, c, d))
            if signs not in TURNS:
                raise ValueError(f"a film turned by {frame.rotation} degrees, and not by quarter turns")
            return image if TURNS[signs] is None else image.transpose(TURNS[signs])
    return image


def mean_rate(
    count: int, first: tuple[Fraction | None, Any], last: tuple[Fraction | None, Fraction | None]
) -> Fraction | None:
    """Frames per second over all of a film or animation: its frames by the time from the first to the end.

    Args:
        count: frames.
        first, last: start and pause of the first and the last frame, in seconds; None = not known.
    """
    (start, _), (end, pause) = first, last
    if start is None or end is None:
        return None
    pause = pause or ((end - start) / (count - 1) if count > 1 else 0)
    seconds = end - start + pause
    return count / Fraction(seconds) if seconds > 0 else None


def frame_rate(fps: Any) -> float:
    """Frames per second that a sample states.

    Raises:
        ValueError: unless it is a finite number > 0.
    """
    is_number = isinstance(fps, int | float | np.integer | np.floating) and not isinstance(fps, bool)
    if not is_number or not 0 < fps <= sys.float_info.max:
        raise ValueError(f"fps must be a finite number > 0, got {fps!r:.40}")
    return float(fps)
