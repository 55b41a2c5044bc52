"""States as the plugin of vLLM keeps them: rows of pools, the convolution's and the window's as rings."""

from __future__ import annotations

import torch
from torch import Tensor

from linmu.optimized.decoding.torch_engine import ring_slots
from linmu.optimized.m_mate import PooledMMATEState
from linmu.optimized.sliding_window_attention import PooledWindowState
from linmu.reference.m_mate import MMATEState


def state_in_pool(state: MMATEState, taps: int, turn: Tensor) -> PooledMMATEState:
    """A state after so many tokens, (B,), in pools of strided rows, not in their order, the others NaN."""
    rows = 2 * torch.arange(len(state.scan)).flip(0) + 1

    def in_pool(tensor: Tensor, ring: bool = True) -> Tensor:
        size = tensor.shape[1] + ring
        shape = 2 * len(tensor) + 1, 2, size, *tensor.shape[2:]
        pool = torch.full(shape, float("nan"), dtype=tensor.dtype)[:, 1]
        pool[rows] = 0
        if ring:
            pool[rows[:, None], ring_slots(turn, size)] = tensor
            pool[rows, turn % size] = float("nan")  # the oldest: nothing may read it
        else:
            pool[rows] = tensor
        return pool

    window = state.window
    if window is not None and window.k.shape[1]:
        near = (in_pool(each) for each in (window.k, window.v, window.present.to(state.scan.dtype)))
        window = PooledWindowState(*near, rows, turn)
    conv = in_pool(state.conv) if taps > 1 else None
    return PooledMMATEState(conv, in_pool(state.scan, False), rows, turn, window)


def pools_of(state: PooledMMATEState) -> dict[str, Tensor]:
    """Its pools by name."""
    pools = {"conv": state.conv, "scan": state.scan}
    if isinstance(state.window, PooledWindowState):
        pools |= dict(zip(("k", "v", "present"), state.window[:3], strict=True))
    return {name: pool for name, pool in pools.items() if pool is not None}


def states_in(state: PooledMMATEState, turn: Tensor) -> dict[str, Tensor]:
    """What stands in them after so many tokens, in its order."""
    rows = state.rows
    return {
        name: pool[rows] if name == "scan" else pool[rows[:, None], ring_slots(turn, pool.shape[1])]
        for name, pool in pools_of(state).items()
    }
