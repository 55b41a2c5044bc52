"""generate()'s loop over tokens, which launches the next one while the GPU computes the one before.

After every token Hugging Face's `_sample` asks the GPU whether all rows have ended, and so waits: during what
it does before the next forward, some 1 ms, the GPU is idle. Its `DeferredStopCheck` asks one token late; the
forward that this is too many, it undoes. So far it does so on Apple's GPUs alone; here it does on NVIDIA's.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from transformers import Cache, GenerationMixin
from transformers.generation import utils

NAME = "DeferredStopCheck"  # of transformers.generation.utils
DEVICES = {"cuda"}


def sample(student: GenerationMixin, *args: Any, **kwargs: Any) -> Any:
    """`student._sample`: arguments, result and errors are the same.

    Logits processors and stopping criteria are asked once more than without, and a streamer is handed each
    token when the next one is launched. What draws numbers at random draws once more.
    """
    return late(GenerationMixin._sample)(student, *args, **kwargs)


def late(loop: Callable) -> Callable:
    """The same function where `DeferredStopCheck` is ours; as it is, if it knows none."""
    if NAME not in loop.__code__.co_names or not hasattr(utils, NAME):
        return loop

    class LateStop(getattr(utils, NAME)):
        """Asks one token late wherever what that token leaves behind is seen by nobody."""

        @staticmethod
        def is_supported(
            device: torch.device, cache: Cache | None, cache_is_returned: bool, is_assistant: bool
        ) -> bool:
            """A state cannot be rolled back: no cache that the caller will see."""
            return device.type in DEVICES and not is_assistant and (cache is None or not cache_is_returned)

    space = vars(utils) | {NAME: LateStop}
    own = FunctionType(loop.__code__, space, loop.__name__, loop.__defaults__, loop.__closure__)
    own.__kwdefaults__ = loop.__kwdefaults__
    return own
