"""What a user would call today for attention in windows: torch's own attention, in three ways.

All take a `WindowProblem`, whose windows are whole, and give o (B, L, H, P) with 0 on text. What depends on
the layout alone (the order of the tokens, our plan, flex_attention's block mask) is made once and not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout.operator import WindowPlanInputs, window_plan
from ..window_attention import planned_attention
from .cases import LeftOutError
from .problems import WINDOW_TOKENS, WindowProblem

Run = Callable[[WindowProblem], Tensor]
LONGEST_BLOCK_MASK = 2**18  # its construction looks at L² pairs
FLEX_LIMIT = (
    f"flex_attention: block masks are built for up to {LONGEST_BLOCK_MASK} tokens, since that costs L²."
)


def kernel(problem: WindowProblem) -> Run:
    """Our own operator, as the layers of a model call it."""
    ids, plan = problem.window_id, window_plan(WindowPlanInputs(problem.window_id))
    return lambda problem: planned_attention(problem.q, problem.k, problem.v, ids, plan)


def gathered(_: WindowProblem) -> Run:
    """Gather into a batch of windows, `scaled_dot_product_attention`, scatter."""

    def run(problem: WindowProblem) -> Tensor:
        windows = [
            tensor[0, problem.order].unflatten(0, (-1, WINDOW_TOKENS)).transpose(1, 2)
            for tensor in (problem.q, problem.k, problem.v)
        ]  # (windows, heads, W, N)
        o = F.scaled_dot_product_attention(*windows, enable_gqa=True).transpose(1, 2).flatten(0, 1)
        return scattered(problem, o)

    return run


def scattered(problem: WindowProblem, o: Tensor) -> Tensor:
    """(V, H, P), window by window -> (1, L, H, P), 0 on text."""
    return o.new_zeros(problem.prompt.length, *o.shape[1:]).index_copy(0, problem.order, o)[None]


def flex_natural(problem: WindowProblem) -> Run:
    """Compiled `flex_attention` on the tokens as they lie: blocks that hold few pairs of one window."""
    ids = problem.window_id[0]

    def together(batch, head, query, key):
        return (ids[query] == ids[key]) & (ids[query] >= 0)

    mask = block_mask(together, problem.prompt.length, ids.device)

    def run(problem: WindowProblem) -> Tensor:
        q, k, v = (tensor.transpose(1, 2) for tensor in (problem.q, problem.k, problem.v))
        return compiled_flex()(q, k, v, block_mask=mask, enable_gqa=True).transpose(1, 2)

    return run


def flex_sorted(problem: WindowProblem) -> Run:
    """Gather window by window, compiled `flex_attention` on whole blocks, scatter."""
    count = problem.prompt.vision

    def together(batch, head, query, key):
        return query // WINDOW_TOKENS == key // WINDOW_TOKENS

    mask = block_mask(together, count, problem.q.device)

    def run(problem: WindowProblem) -> Tensor:
        q, k, v = (tensor[:, problem.order].transpose(1, 2) for tensor in (problem.q, problem.k, problem.v))
        o = compiled_flex()(q, k, v, block_mask=mask, enable_gqa=True)[0].transpose(0, 1)
        return scattered(problem, o)

    return run


def block_mask(together, length: int, device: torch.device):
    """Which blocks of 128 x 128 pairs hold a pair of one window."""
    from torch.nn.attention.flex_attention import create_block_mask

    if length > LONGEST_BLOCK_MASK:
        raise LeftOutError(f"left out: {FLEX_LIMIT}")
    on_gpu = device.type == "cuda"  # compiled, it does not materialise all pairs
    return create_block_mask(together, None, None, length, length, device=str(device), _compile=on_gpu)


@cache
def compiled_flex():
    """`flex_attention` under torch.compile."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def causal(problem: WindowProblem) -> Tensor:
    """Causal attention over all tokens, for comparison: it does another job."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (problem.q, problem.k, problem.v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


WINDOW_PEERS = {
    "gather + SDPA + scatter": gathered,
    "flex_attention, sorted": flex_sorted,
    "flex_attention": flex_natural,
}
