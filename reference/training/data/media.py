"""Images and videos of a sample, opened from whatever a data set holds: paths, bytes, or pixels.

An image is a path, `{"bytes": ..., "path": ...}` as Hugging Face datasets keep it, a PIL image, or an array
(height, width, 3) uint8. A video is a list of images, an array (frames, height, width, 3) uint8, an animated
image, or a video file, for which PyAV must be installed.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageSequence

ANIMATED = (".gif", ".webp", ".apng")


@dataclass(frozen=True)
class Media:
    """How to open images and videos.

    Args:
        root: what relative paths are relative to.
        max_pixels: shrink images and frames to this area before the processor rounds to whole tokens; 0 = no.
        max_frames: thin videos evenly to this many frames; 0 = keep all.
    """

    root: Path
    max_pixels: int = 0
    max_frames: int = 0

    def image(self, source: Any) -> Image.Image:
        """One image as RGB.

        Raises:
            OSError, ValueError: if it is missing or cannot be decoded.
        """
        if isinstance(source, Image.Image):
            return self._fit(source)
        if isinstance(source, np.ndarray | list):
            return self._fit(Image.fromarray(np.asarray(source, dtype=np.uint8)))
        file, name = self.file(source)
        try:
            with Image.open(file) as image:
                return self._fit(image)
        except FileNotFoundError:
            raise
        except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
            raise ValueError(f"{name} must be an image that can be decoded, got {error}") from error

    def video(self, source: Any, fps: float | None = None) -> dict[str, Any]:
        """One video: {"video": list of frames, "fps": frames per second of these, if known}."""
        if isinstance(source, np.ndarray | Sequence) and not isinstance(source, str | bytes):
            count, frames = len(source), [self.image(source[i]) for i in self.kept(len(source))]
        else:
            file, name = self.file(source)
            count, frames, own_rate = self._decode(file, name)
            fps = own_rate if fps is None else fps
        if not frames:
            raise ValueError("a video must have frames, got none")
        # Choice: thinned frames stand for the time between them, so the rate falls with their number.
        return {"video": frames} | ({} if fps is None else {"fps": fps * len(frames) / count})

    def kept(self, count: int) -> list[int]:
        """Which of `count` frames are kept."""
        if not self.max_frames or count <= self.max_frames:
            return list(range(count))
        return [i * count // self.max_frames for i in range(self.max_frames)]

    def _decode(self, file: Any, name: str) -> tuple[int, list[Image.Image], float | None]:
        """Frames of a file: how many there are, those kept, and their rate."""
        if str(name).lower().endswith(ANIMATED):
            with Image.open(file) as image:
                kept = set(self.kept(getattr(image, "n_frames", 1)))
                frames = [
                    self._fit(frame) for i, frame in enumerate(ImageSequence.Iterator(image)) if i in kept
                ]
                pause = image.info.get("duration")
                return getattr(image, "n_frames", 1), frames, 1000 / pause if pause else None
        try:
            import av
        except ImportError as error:
            raise RuntimeError(
                f"Media: to decode {name}, PyAV must be installed; pip install av, or list its frames"
            ) from error
        try:
            with av.open(file if isinstance(file, io.BytesIO) else str(file)) as container:
                stream = container.streams.video[0]
                count = stream.frames or sum(1 for _ in container.decode(stream))
                container.seek(0)
                kept = set(self.kept(count))
                frames = [
                    self._fit(f.to_image()) for i, f in enumerate(container.decode(stream)) if i in kept
                ]
                return count, frames, float(stream.average_rate) if stream.average_rate else None
        except FileNotFoundError:
            raise
        except (av.FFmpegError, IndexError) as error:
            raise ValueError(f"{name} must be a video that can be decoded, got {error}") from error

    def file(self, source: Any) -> tuple[Any, str]:
        """A path or an open buffer, and what to call it."""
        if isinstance(source, dict) and source.get("bytes"):
            return io.BytesIO(source["bytes"]), source.get("path") or "an image in the data set"
        path = source.get("path") if isinstance(source, dict) else source
        if isinstance(path, str | Path) and path:
            return self.root / path, str(path)
        raise ValueError(f"an image or video must be a path, bytes or pixels, got {type(source).__name__}")

    def _fit(self, image: Image.Image) -> Image.Image:
        """RGB, no larger than `max_pixels`."""
        image = image.convert("RGB")
        if not self.max_pixels or image.width * image.height <= self.max_pixels:
            return image
        ratio = (self.max_pixels / (image.width * image.height)) ** 0.5
        return image.resize((max(1, int(image.width * ratio)), max(1, int(image.height * ratio))))
