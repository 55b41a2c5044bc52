"""The processors of Qwen2-VL and Qwen2.5-VL without torchvision.

Letters: frames F, height and width in pixels; grid T Y X in patches, before the spatial merge m x m:
`T = ceil(F / temporal_patch_size)`, `Y = height / patch_size`, `X = width / patch_size`. A row of
`pixel_values_videos` is one patch, (C, temporal_patch_size, patch_size, patch_size) flattened, and rows run
over (T, Y/m, X/m, m, m): the m*m patches that become one token are neighbours.

The stock processors of Qwen2-VL and Qwen2.5-VL refuse to load without torchvision, because of videos alone.
`FrameProcessor` does what their video processor does to frames already in memory, to the last bit, in torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.nn.functional import interpolate
from transformers import BatchFeature
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.video_processing_utils import BaseVideoProcessor
from transformers.video_utils import make_batched_metadata, make_batched_videos

__all__ = ["QWEN_PROCESSORS", "FrameProcessor", "LinMUQwen2VLProcessor", "LinMUQwen2_5_VLProcessor"]

BICUBIC = 3

FRAME_DEFAULTS = {
    "do_convert_rgb": True,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28},
    "resample": BICUBIC,
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "do_sample_frames": False,
}


class FrameProcessor:
    """Qwen2VLVideoProcessor for frames in memory, without torchvision.

    Args:
        **settings: any of `FRAME_DEFAULTS`, and `min_pixels`/`max_pixels` for the two edges of `size`, as in
            `video_preprocessor_config.json`. Other keys of that file do not concern frames and are left out.
    """

    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, **settings: Any):
        values = FRAME_DEFAULTS | {k: v for k, v in settings.items() if k in FRAME_DEFAULTS and v is not None}
        values["size"] = dict(values["size"])
        for edge, bound in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
            if settings.get(bound) is not None:
                values["size"][edge] = settings[bound]
        self.__dict__.update(values)

    @classmethod
    def from_pretrained(cls, folder: str, **hub_kwargs: Any) -> FrameProcessor:
        """Read the video settings of a folder or Hub id, wherever its layout keeps them."""
        settings, _ = BaseVideoProcessor.get_video_processor_dict(folder, **hub_kwargs)
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as the stock video processor writes them."""
        return {
            **{key: getattr(self, key) for key in FRAME_DEFAULTS},
            "video_processor_type": "Qwen2VLVideoProcessor",
        }

    def __call__(
        self, videos: Any, *, video_metadata: Any = None, return_metadata: bool = False, **overrides: Any
    ) -> BatchFeature:
        """Turn videos into patches.

        Args:
            videos: one video or (nested) lists of them; a video is a list of PIL frames or a uint8 array
                (F, height, width, 3).
            video_metadata: per video, `fps` and friends, as the stock processor takes it.
            **overrides: settings for this call.
        Returns:
            `pixel_values_videos` (sum of T*Y*X, 3 * temporal_patch_size * patch_size**2) float32,
            `video_grid_thw` (videos, 3) int64, and `video_metadata` if asked for.
        Raises:
            ValueError: for files and links, for an unknown setting, for sizes that do not fit the patches.
        """
        settings = self._settings(overrides)
        arrays = [_as_frames(video) for video in make_batched_videos(videos)]
        patches, grids = zip(*(_patchify(frames, settings) for frames in arrays), strict=True)
        data = {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}
        if return_metadata:
            data["video_metadata"] = make_batched_metadata(arrays, video_metadata=video_metadata)
        return BatchFeature(data)

    def _settings(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        given = {k: v for k, v in overrides.items() if v is not None and k != "return_tensors"}
        if unknown := sorted(given.keys() - FRAME_DEFAULTS.keys()):
            raise ValueError(
                f"FrameProcessor: settings must be among {sorted(FRAME_DEFAULTS)}, got {unknown}; "
                "install torchvision for the stock video processor"
            )
        if given.get("do_sample_frames", self.do_sample_frames):
            raise ValueError(
                "FrameProcessor: do_sample_frames must be False, got True; sample the frames before, or "
                "install torchvision for the stock video processor"
            )
        return {key: getattr(self, key) for key in FRAME_DEFAULTS} | given


def _as_frames(video: Any) -> torch.Tensor:
    """Return (F, 3, height, width) uint8."""
    if isinstance(video, (str, list)):
        raise ValueError(
            f"FrameProcessor: a video must be frames in memory, got {type(video).__name__}; open the frames "
            "before, or install torchvision and a video decoder for the stock video processor"
        )
    frames = torch.as_tensor(np.ascontiguousarray(video) if isinstance(video, np.ndarray) else video)
    if frames.ndim != 4 or frames.dtype != torch.uint8 or frames.shape[-1] != 3:
        raise ValueError(
            "FrameProcessor: a video must be uint8 of shape (frames, height, width, 3), "
            f"got {frames.dtype} of shape {tuple(frames.shape)}"
        )
    return frames.permute(0, 3, 1, 2)


def _resize(frames: torch.Tensor, settings: Mapping[str, Any]) -> torch.Tensor:
    """Bring the frames to the nearest size whose sides are whole tokens and whose area is within bounds."""
    if settings["resample"] != BICUBIC:
        raise ValueError(f"FrameProcessor: resample must be {BICUBIC} (bicubic), got {settings['resample']}")
    size, factor = settings["size"], settings["patch_size"] * settings["merge_size"]
    height, width = frames.shape[-2:]
    target = smart_resize(height, width, factor, size["shortest_edge"], size["longest_edge"])
    if target == (height, width):
        return frames
    return interpolate(frames, size=target, mode="bicubic", antialias=True)


def _normalise(frames: torch.Tensor, settings: Mapping[str, Any]) -> torch.Tensor:
    """Return float32, rescaled and normalised in one step, in the stock order of roundings."""
    rescale, normalise = settings["do_rescale"], settings["do_normalize"]
    if not normalise:
        return frames * settings["rescale_factor"] if rescale else frames.float()
    unit = 1.0 / settings["rescale_factor"] if rescale else 1.0
    mean = (torch.tensor(settings["image_mean"]) * unit).view(-1, 1, 1)
    std = (torch.tensor(settings["image_std"]) * unit).view(-1, 1, 1)
    return (frames.float() - mean) / std


def _patchify(frames: torch.Tensor, settings: Mapping[str, Any]) -> tuple[torch.Tensor, list[int]]:
    """Cut frames (F, 3, height, width) uint8 into patch rows; return them and the grid [T, Y, X]."""
    patch, depth, merge = (settings[key] for key in ("patch_size", "temporal_patch_size", "merge_size"))
    pixels = _normalise(_resize(frames, settings) if settings["do_resize"] else frames, settings)
    height, width = pixels.shape[-2:]
    if height % (patch * merge) or width % (patch * merge):
        raise ValueError(
            f"FrameProcessor: without resizing, sides must be multiples of {patch * merge} pixels, "
            f"got {height} x {width}; set do_resize or crop the frames"
        )
    missing = -len(pixels) % depth
    pixels = torch.cat([pixels, pixels[-1:].expand(missing, -1, -1, -1)]) if missing else pixels
    t, y, x = len(pixels) // depth, height // patch, width // patch
    rows = pixels.reshape(t, depth, -1, y // merge, merge, patch, x // merge, merge, patch)
    rows = rows.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)  # (T, Y/m, X/m, m, m, C, depth, patch, patch)
    return rows.reshape(t * y * x, -1), [t, y, x]


class _WithFrames:
    """Replaces a stock processor's video part: `__init__` takes no `video_processor`, so none is loaded."""

    def __init__(self, image_processor=None, tokenizer=None, chat_template=None, **kwargs: Any):
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)
        self.video_processor = FrameProcessor()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs: Any):
        """Load as any processor is loaded, then the frame settings from the same place."""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        hub = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
        hub_kwargs = {key: kwargs[key] for key in hub if key in kwargs}
        processor.video_processor = FrameProcessor.from_pretrained(
            pretrained_model_name_or_path, **hub_kwargs
        )
        return processor

    def to_dict(self) -> dict[str, Any]:
        """Return what `save_pretrained` writes: the stock layout, video settings included."""
        return super().to_dict() | {"video_processor": self.video_processor.to_dict()}

    @property
    def model_input_names(self) -> list[str]:
        return [*super().model_input_names, *self.video_processor.model_input_names]


class LinMUQwen2_5_VLProcessor(_WithFrames, Qwen2_5_VLProcessor):  # noqa: N801 (named after its twin)
    """Qwen2_5_VLProcessor that takes videos as frames and needs no torchvision."""


class LinMUQwen2VLProcessor(_WithFrames, Qwen2VLProcessor):
    """Qwen2VLProcessor that takes videos as frames and needs no torchvision."""


QWEN_PROCESSORS = {"qwen2_5_vl": LinMUQwen2_5_VLProcessor, "qwen2_vl": LinMUQwen2VLProcessor}
