"""A scheduler that never ends a chunk of a prompt inside an image or a video.

vLLM's `disable_chunked_mm_input` does not suffice: a chunk that begins exactly on an image is still cut.
"""

from __future__ import annotations

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class WholeBlocks:
    """Before one of vLLM's: what would end inside a block ends before it, and waits for a step with room."""

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, *args, **kwargs
    ):
        pictures = [(f.mm_position.offset, f.mm_position.length) for f in request.mm_features or ()]
        tokens = whole_tokens(pictures, num_computed_tokens, num_new_tokens)
        inputs, tokens, *rest = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, tokens, *args, **kwargs
        )
        return inputs, whole_tokens(pictures, num_computed_tokens, tokens), *rest


class WholeBlocksScheduler(WholeBlocks, Scheduler):
    """Plans a step when the tokens of the one before are there."""


class AsyncWholeBlocksScheduler(WholeBlocks, AsyncScheduler):
    """Plans a step while the GPU works on the one before."""


def whole_tokens(pictures: list[tuple[int, int]], past: int, tokens: int) -> int:
    """Return how many of so many tokens after `past` a chunk may have, 0 = none in this step.

    It ends in no picture, and not before a picture of one token: vLLM would take that one, alone in the next
    chunk, for a token that was sampled.

    Args:
        pictures: where each begins, and of how many tokens it is, in the order of the prompt.
        past: tokens of the prompt that were computed.
        tokens: how many there is room for.
    """
    end = past + tokens
    for start, length in reversed(pictures):
        if start < end < start + length:
            end = start
        if length == 1 and past < end == start:
            end -= 1
    return max(0, end - past)
