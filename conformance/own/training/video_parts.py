"""The stock processors' video parts, which they insist on wherever torchvision is installed."""

from __future__ import annotations

from typing import Any

import transformers
from transformers.utils import is_torchvision_available


def video_part(family: str) -> dict[str, Any]:
    """The keyword that a family's stock processor needs for videos, by the family's class prefix."""
    if not is_torchvision_available():
        return {}
    return {"video_processor": getattr(transformers, f"{family}VideoProcessor")()}
