"""Two branches of a block at once: a second stream of the GPU, where its first would leave room.

A CUDA graph that is captured over both streams keeps them apart: kernels of one branch run while those of the
other leave parts of the GPU idle. Outside `branches_beside` nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch

_stream: ContextVar[torch.cuda.Stream | None] = ContextVar("of the second branch", default=None)


@contextmanager
def branches_beside(stream: torch.cuda.Stream | None) -> Iterator[None]:
    """Within, second branches run on this stream; None = after the first ones."""
    before = _stream.set(stream)
    try:
        yield
    finally:
        _stream.reset(before)


class Fork:
    """Where two branches part, made before either: what was launched so far both may read.

    The first branch is launched as it is, the second within `second`, and `join` comes before anything of the
    second is read. Memory is safe without more: what either stream has freed it hands out again after the
    other has passed the next fork, or the next join.
    """

    def __init__(self, wanted: bool = True) -> None:
        self.stream = _stream.get() if wanted and not torch.compiler.is_compiling() else None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream())

    def second(self) -> AbstractContextManager:
        """Within, what is launched is of the second branch."""
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def join(self) -> None:
        """Let what follows wait for the second branch."""
        if self.stream is not None:
            torch.cuda.current_stream().wait_stream(self.stream)
