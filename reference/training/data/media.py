"""Images and videos of a sample, opened from whatever a data set holds: paths, URLs, bytes, or pixels.

    source = a path | file:// | data: | base64 text | bytes | {"bytes": ..., "path": ...} as Hugging Face
             data sets keep it | a PIL image | pixels (height, width, 3), uint8 or lists of 0 to 255
    video  = a source that is a film or an animated picture | a list of images | pixels (frames, height,
             width, 3)

Every picture of every origin passes `Media._fit`: upright, RGB, within bounds. Films need PyAV. Nothing is
downloaded.
"""

from __future__ import annotations

import base64
import binascii
import io
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from .films import MissingPackageError, frame_rate, is_picture, mean_rate, reader_of

HEIC = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")  # brands that Pillow cannot decode
MOST_PIXELS = 2**32  # of a video in memory, 12 GiB
SHOWN = 80  # characters of a source in a message
UNNAMED = "a picture in the data set"


@dataclass(frozen=True)
class Media:
    """How to open images and videos.

    Args:
        root: what relative paths are relative to.
        max_pixels: shrink images and frames to this area before the processor rounds to whole tokens; 0 = no.
        max_frames: thin videos evenly to this many frames; 0 = keep all.
        min_pixels: enlarge images and frames to this area; 0 = no.
    """

    root: Path
    max_pixels: int = 0
    max_frames: int = 0
    min_pixels: int = 0

    def bounded(self, block: Mapping[str, Any]) -> Media:
        """The same with a content block's own bounds, the tighter of both.

        Raises:
            ValueError: for a bound that is no whole number > 0.
        """
        own = {}
        for name in ("max_pixels", "max_frames", "min_pixels"):
            bound = block.get(name)
            if bound is None:
                continue
            is_whole = isinstance(bound, int | float) and not isinstance(bound, bool) and bound == bound // 1
            if not is_whole or not 0 < bound < math.inf:
                raise ValueError(f"{name} must be a whole number > 0, got {bound!r}")
            given = getattr(self, name)
            own[name] = min(int(bound), given or int(bound)) if name != "min_pixels" else int(bound)
        return replace(self, **own)

    def image(self, source: Any) -> Image.Image:
        """One image, upright, as RGB.

        Raises:
            FileNotFoundError: if it is missing.
            ValueError: if it cannot be decoded, or for pixels of another type or shape.
        """
        if isinstance(source, Image.Image):
            return self._fit(source)
        if is_pixels(source):
            return self._fit(picture_of(source))
        file, name = self.file(source)
        try:
            with Image.open(file) as image:
                return self._fit(image)
        except Exception as error:
            raise ValueError(
                f"{name} must be an image that can be decoded, got {what_is(file, error)}"
            ) from error

    def area(self, source: Any) -> int:
        """About how many pixels an image has when it is opened, from the head of its file."""
        if is_pixels(source):
            area = len(source) * len(source[0])
        elif isinstance(source, Image.Image):
            area = source.width * source.height
        else:
            with Image.open(self.file(source)[0]) as image:
                area = image.width * image.height
        return self.bound(area)

    def bound(self, area: int) -> int:
        """The area that a picture of `area` pixels gets."""
        return min(max(area, self.min_pixels), self.max_pixels or max(area, self.min_pixels))

    def video(self, source: Any, fps: float | None = None) -> dict[str, Any]:
        """One video: {"video": list of frames, "fps": frames per second of these, if known}.

        Args:
            source: see above.
            fps: frames per second of what is given; None = the mean rate of the film.
        Raises:
            OSError, ValueError: as `image` does, for frames of several sizes, and for an `fps` that is no
                finite number > 0.
            MissingPackageError: for a film where PyAV is not installed.
        """
        if fps is not None:
            fps = frame_rate(fps)
        if is_pixels(source):
            count, frames, own_rate = (
                len(source),
                [self.image(source[i]) for i in self.kept(len(source))],
                None,
            )
        else:
            count, frames, own_rate = self._decode(*self.file(source))
        if not frames:
            raise ValueError("a video must have frames, got none")
        if len(sizes := {frame.size for frame in frames}) > 1:
            raise ValueError(f"a video's frames must be of one size, got {sorted(sizes)[:3]}")
        fps = own_rate if fps is None else fps
        # Choice: thinned frames stand for the time between them, so the rate falls with their number.
        return {"video": frames} | ({} if fps is None else {"fps": float(fps * len(frames) / count)})

    def kept(self, count: int) -> list[int]:
        """Which of `count` frames are kept."""
        if not self.max_frames or count <= self.max_frames:
            return list(range(count))
        return [i * count // self.max_frames for i in range(self.max_frames)]

    def needs_film_decoder(self, source: Any) -> bool:
        """Whether a video is a film, for which PyAV must be installed."""
        return not is_pixels(source) and not is_picture(self.file(source)[0])

    def _decode(self, file: Path | io.BytesIO, name: str) -> tuple[int, list[Image.Image], Fraction | None]:
        """Frames of a file: how many there are, those kept, and the mean rate of all.

        The frames are counted by decoding them, as headers are often wrong; none is kept for that.
        """
        try:
            read = reader_of(file)
            kept = set(self.kept(sum(1 for _ in read()))) if self.max_frames else None
            frames, times, pixels = [], [], 0
            for i, (picture, start, pause) in enumerate(read()):
                times = [*times[:1], (start, pause)]  # the first and the last
                if kept is None or i in kept:
                    frames.append(self._fit(picture()))
                    pixels += frames[-1].width * frames[-1].height
                if pixels > MOST_PIXELS:
                    got = f"more than {MOST_PIXELS} pixels in {len(frames)} frames"
                    raise ValueError(f"{got}; set max_frames or max_pixels")
            count = i + 1 if times else 0
        except MissingPackageError:
            raise
        except Exception as error:
            raise ValueError(
                f"{name} must be a video that can be decoded, got {what_is(file, error)}"
            ) from error
        return count, frames, mean_rate(count, *times[:1], *times[-1:]) if times else None

    def file(self, source: Any) -> tuple[Path | io.BytesIO, str]:
        """A path that exists or an open buffer, and what to call it.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: for anything else that is no source, the address of a server included.
        """
        name = UNNAMED
        if isinstance(source, Mapping):
            name = str(source.get("path") or UNNAMED)
            source = source.get("bytes") or source.get("path") or source.get("url")
        if isinstance(source, bytes):
            return io.BytesIO(source), shortened(name)
        if not isinstance(source, str | Path) or not str(source):
            got = repr(source) if source in (None, "") else type(source).__name__
            raise ValueError(f"an image or video must be a path, bytes or pixels, got {got}")
        text, shown = str(source), shortened(str(source), 260)  # as long as paths get
        if text.startswith("data:"):
            return io.BytesIO(from_base64(text.partition(",")[2], shown)), shown
        if text.startswith("file://"):
            path = text.removeprefix("file://").removeprefix("localhost")
            text = path if os.path.exists(self.root / path) else unquote(path)
        elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", text):
            raise ValueError(f"an image or video must be on this machine, got {shown}; download it first")
        for path in (text, text.replace("\\", "/")):  # the second: written on Windows
            if os.path.exists(self.root / path):
                return self.root / path, shown
        if re.fullmatch(r"[A-Za-z0-9+/\s]{64,}={0,2}\s*", text):
            return io.BytesIO(from_base64(text, shown)), shown
        raise FileNotFoundError(f"{shown} must exist in {self.root}")

    def _fit(self, image: Image.Image) -> Image.Image:
        """Upright, RGB, and within `max_pixels` and `min_pixels`."""
        image = eight_bit(ImageOps.exif_transpose(image)).convert("RGB")
        area = image.width * image.height
        bound = self.bound(area)
        if area == bound or not area:
            return image
        ratio, whole = (bound / area) ** 0.5, math.floor if bound < area else math.ceil
        return image.resize([max(1, whole(side * ratio)) for side in image.size])


def is_pixels(source: Any) -> bool:
    """Whether a source holds pixels, or a list of frames, itself."""
    return isinstance(source, np.ndarray | torch.Tensor | list | tuple)


def picture_of(pixels: Any) -> Image.Image:
    """Pixels (height, width, 3) as a picture.

    Raises:
        ValueError: for another type or shape; floats, uint16 and the like would be scaled by a guess.
    """
    dtype = getattr(pixels, "dtype", None)
    if dtype is None:
        try:
            pixels = np.asarray(pixels)
        except ValueError as error:
            raise ValueError(f"pixels must be (height, width, 3), got a ragged list ({error})") from None
        dtype = pixels.dtype
        if pixels.dtype.kind in "iu":
            low, high = pixels.min(initial=0), pixels.max(initial=0)
            if low < 0 or high > 255:
                raise ValueError(f"pixels must be uint8, 0 to 255, got {low} to {high} in a list of {dtype}")
            pixels, dtype = pixels.astype(np.uint8), np.dtype(np.uint8)
    if str(dtype).removeprefix("torch.") != "uint8":
        raise ValueError(f"pixels must be uint8, 0 to 255, got {dtype}; scale and round them")
    pixels = np.asarray(pixels)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or not pixels.size:
        raise ValueError(f"pixels must be (height, width, 3), got {pixels.shape}")
    return Image.fromarray(pixels)


def eight_bit(image: Image.Image) -> Image.Image:
    """The same picture with 8 bits a channel: Pillow would cut 16 bits at 255, which is white.

    Raises:
        ValueError: for floats, or integers of 32 bits, whose range the file does not say.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        kind = {"I": "int32", "F": "float32"}[image.mode]
        raise ValueError(
            f"pixels must have 8 or 16 bits, got {kind} (mode {image.mode}); scale and round them"
        )
    return image


def from_base64(text: str, shown: str) -> bytes:
    """The bytes of a base64 text."""
    try:
        return base64.b64decode("".join(unquote(text).split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{shown} must be base64, got {error}") from None


def what_is(file: Path | io.BytesIO, error: Exception) -> str:
    """What is wrong with a file that cannot be decoded."""
    try:
        if isinstance(file, Path):
            with file.open("rb") as opened:
                head = opened.read(12)
        else:
            head = file.getvalue()[:12]
    except OSError:
        head = b"?"
    if not head:
        return "an empty file"
    if head[4:8] == b"ftyp" and head[8:12] in HEIC:
        return "HEIC, whatever its name; convert it to JPEG"
    if head.startswith(b"version http"):
        return "a pointer of Git LFS; fetch the file itself with `git lfs pull`"
    if isinstance(error, UnidentifiedImageError):  # whose message holds an address in memory
        return "a format that Pillow does not know"
    return shortened(str(error), 200)


def shortened(text: str, most: int = SHOWN) -> str:
    """A text for a message: on one line, printable on any terminal, cut if it is longer than `most`."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return shown if len(text) <= most else f"{shown}… ({len(text)} characters)"
