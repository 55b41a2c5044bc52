"""A scheduler that never ends a chunk of a prompt inside an image or a video.

vLLM's `disable_chunked_mm_input` does not suffice: a chunk that begins exactly on an image is still cut.
"""

from __future__ import annotations

from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request


class WholeBlocksScheduler(Scheduler):
    """vLLM's scheduler; what would end inside a block ends before it, and waits for a step with room."""

    def _try_schedule_encoder_inputs(
        self, request: Request, num_computed_tokens: int, num_new_tokens: int, *args, **kwargs
    ):
        end = num_computed_tokens + num_new_tokens
        for feature in request.mm_features or ():
            start = feature.mm_position.offset
            if start < end < start + feature.mm_position.length:
                num_new_tokens = max(0, start - num_computed_tokens)
        return super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, *args, **kwargs
        )
