"""A function's kernels, recorded once and launched again in one go: torch's CUDA graphs, and their room.

What is recorded reads and writes fixed memory. So a function that is captured takes no arguments: it reads
static buffers, into which every call's values are copied before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# function -> (what runs its kernels again, what the function returned: the memory that each run overwrites)
Capture = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


class CudaCapture:
    """Captures on the current GPU. All graphs work in one pool of memory, as large as the largest needs: what
    one left there is overwritten by the next, so results must be copied out between the two.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Run the function once, so that all is compiled and tuned, and capture it."""
        torch.cuda.empty_cache()  # another stream takes memory of its own, as much as is kept for this one
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # relaxed: Triton may load a kernel meanwhile; what waits for the GPU fails in every mode
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="relaxed"):
            result = function()
        return graph.replay, result


def copy_all(targets: Iterable[Tensor], sources: Iterable[Tensor]) -> None:
    """Copy each source over its target, in one launch per dtype as far as torch can."""
    by_dtype: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in zip(targets, sources, strict=True):
        if target is not source:
            pair = by_dtype.setdefault(target.dtype, ([], []))
            pair[0].append(target)
            pair[1].append(source)
    for pair in by_dtype.values():
        torch._foreach_copy_(*pair)


def copies(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Contiguous copies in memory of their own."""
    tensors = list(tensors)
    new = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]
    copy_all(new, tensors)
    return new
