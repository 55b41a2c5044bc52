"""The operations and bytes that a job needs, the same for everyone who does it.

Letters: L tokens, V of them vision, H heads, G groups, N state size, P head dim, C chunk, W window.

    scan, forward      FLOPs  H · [L · (2C(N + P) + 4NP) + V · 4NP]                                        (1)
    windows, forward   FLOPs  H · V · W · 2(N + P)                                                         (2)
    backward           twice the forward's, whatever is computed again is not counted                      (3)
    bytes              every input read once, every output written once; backward reads the inputs and the
                       output's gradient, and writes the inputs' gradients                                 (4)

(1) counts a scan in chunks of C = 64 tokens whose two directions share one product C Bᵀ; writing and reading
the state are 2NP each per direction, and text has the forward direction only. Choice: the chunk is that of
the kernels here and of fla.
"""

from __future__ import annotations

from dataclasses import dataclass

CHUNK = 64
WIDE = 4  # bytes of dt, the gate and A, which stay float32
INDEX = 8  # bytes of a segment or window id


@dataclass(frozen=True)
class Sizes:
    """Heads of one operator: H, G, N = P."""

    heads: int
    groups: int
    head_dim: int

    def __str__(self) -> str:
        return f"H={self.heads} G={self.groups} N=P={self.head_dim}"


@dataclass(frozen=True)
class Counts:
    """Operations and bytes of one call."""

    flops: int
    moved: int


def scan_counts(sizes: Sizes, length: int, vision: int, item: int, backward: bool) -> Counts:
    """Eqs. (1), (3), (4) of a bidirectional scan; `item` is the bytes of one number of x, B, C."""
    heads, groups, dim = sizes.heads, sizes.groups, sizes.head_dim
    flops = heads * (length * (2 * CHUNK * 2 * dim + 4 * dim * dim) + vision * 4 * dim * dim)  # eq. (1)
    inputs = length * ((2 * groups + heads) * dim * item + 2 * heads * WIDE)
    output = length * heads * dim * item
    return with_backward(flops, inputs, length * INDEX, output, backward)


def window_counts(sizes: Sizes, length: int, vision: int, window: int, item: int, backward: bool) -> Counts:
    """Eqs. (2) to (4) of attention in windows of `window` tokens each."""
    flops = sizes.heads * vision * window * 4 * sizes.head_dim  # eq. (2)
    inputs = vision * (sizes.heads + 2 * sizes.groups) * sizes.head_dim * item
    output = length * sizes.heads * sizes.head_dim * item
    return with_backward(flops, inputs, length * INDEX, output, backward)


def attention_counts(sizes: Sizes, length: int, item: int, backward: bool) -> Counts:
    """Causal attention over all tokens: half of L² scores, 2(N + P) operations each."""
    flops = sizes.heads * length * (length + 1) // 2 * 4 * sizes.head_dim
    inputs = length * (sizes.heads + 2 * sizes.groups) * sizes.head_dim * item
    return with_backward(flops, inputs, 0, length * sizes.heads * sizes.head_dim * item, backward)


def with_backward(flops: int, inputs: int, ids: int, output: int, backward: bool) -> Counts:
    """Eqs. (3) and (4) from the bytes of differentiable inputs, of ids and of the output."""
    moved = inputs + ids + output
    if not backward:
        return Counts(flops, moved)
    return Counts(3 * flops, moved + (inputs + ids + output) + inputs)
