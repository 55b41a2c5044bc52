"""What is computed: a prompt that is one video for four fifths, as inputs of the scan and of windows.

Letters as in `reference/`. The video's grid is made of whole windows of (4, 8, 8) tokens, so that a peer
without ragged windows can take part; the text lies half before and half after it. Numbers are normal, never
zeros.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from ...reference.checks import require
from .counts import Sizes

VISION_SHARE = 0.8
WINDOW = (4, 8, 8)
WINDOW_TOKENS = math.prod(WINDOW)
SHORTEST = 320  # tokens of a prompt whose video has one window


@dataclass(frozen=True)
class Prompt:
    """Where the video lies: `length` tokens, of which [start, start + vision) are a grid (T, Y, X)."""

    length: int
    start: int
    grid: tuple[int, int, int]

    @property
    def vision(self) -> int:
        """Tokens of the video."""
        return math.prod(self.grid)

    @property
    def inside(self) -> slice:
        """Positions of the video."""
        return slice(self.start, self.start + self.vision)

    def coords(self, device: torch.device) -> Tensor:
        """(1, L, 4) int64, [segment, t, y, x], -1 on text."""
        coords = torch.full((1, self.length, 4), -1, dtype=torch.int64, device=device)
        axes = (torch.arange(size, device=device) for size in self.grid)
        cells = torch.cartesian_prod(*axes)
        coords[0, self.inside, 0] = 0
        coords[0, self.inside, 1:] = cells
        return coords

    def positions(self, device: torch.device) -> Tensor:
        """(3, 1, L) int64: M-RoPE's positions, text after the video from its largest position on."""
        positions = torch.arange(self.length, device=device).expand(3, 1, -1).clone()
        positions[:, 0, self.inside] = self.coords(device)[0, self.inside, 1:].T + self.start
        after = self.start + self.vision
        positions[..., after:] += self.start + max(self.grid) - after
        return positions


def prompt(length: int) -> Prompt:
    """The prompt of that many tokens; frames of 16 x 16 tokens, 8 x 8 in a short one.

    Raises:
        ValueError: if no window fits.
    """
    require(length >= SHORTEST, "benchmark", f"lengths must be at least {SHORTEST}", length)
    wanted, side = int(VISION_SHARE * length), 16 if VISION_SHARE * length >= 1024 else 8
    frames = wanted // (WINDOW[0] * side * side) * WINDOW[0]
    vision = frames * side * side
    return Prompt(length, (length - vision) // 2, (frames, side, side))


@dataclass(frozen=True)
class ScanProblem:
    """Arguments of `bidirectional_scan`, in scan order."""

    prompt: Prompt
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    gate: Tensor
    segment: Tensor


@dataclass(frozen=True)
class WindowProblem:
    """Arguments of `window_attention`; `order` (V,) lists the video's tokens window by window."""

    prompt: Prompt
    q: Tensor
    k: Tensor
    v: Tensor
    window_id: Tensor
    order: Tensor


def scan_problem(
    length: int, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> ScanProblem:
    """Random inputs with half-lives of 64 to 8192 tokens over the heads, as a fresh student has."""
    where, heads, groups, dim = prompt(length), sizes.heads, sizes.groups, sizes.head_dim
    draw = drawing(device, seed)
    half_life = torch.logspace(math.log10(64), math.log10(8192), heads, device=device)
    segment = torch.full((1, length), -1, dtype=torch.int64, device=device)
    segment[:, where.inside] = 0
    return ScanProblem(
        where,
        x=draw(1, length, groups, dim, dtype=dtype),
        dt=torch.nn.functional.softplus(draw(1, length, heads)),
        A=-math.log(2) / half_life,
        B=draw(1, length, groups, dim, dtype=dtype),
        C=draw(1, length, heads, dim, dtype=dtype).mul_(dim**-0.5),
        gate=draw(1, length, heads).sigmoid_(),
        segment=segment,
    )


def window_problem(
    length: int, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> WindowProblem:
    """Random queries, keys and values over the video's windows, not shifted."""
    where, draw = prompt(length), drawing(device, seed)
    shape = (1, length, sizes.groups, sizes.head_dim)
    q = draw(1, length, sizes.heads, sizes.head_dim, dtype=dtype)
    k, v = draw(*shape, dtype=dtype), draw(*shape, dtype=dtype)
    axes = where.coords(device)[0, where.inside, 1:] // torch.tensor(WINDOW, device=device)
    counts = [size // width for size, width in zip(where.grid, WINDOW, strict=True)]
    ids = (axes[:, 0] * counts[1] + axes[:, 1]) * counts[2] + axes[:, 2]
    window_id = torch.full((1, length), -1, dtype=torch.int64, device=device)
    window_id[0, where.inside] = ids
    return WindowProblem(where, q, k, v, window_id, ids.argsort(stable=True) + where.start)


def drawing(device: torch.device, seed: int):
    """A function that returns normal numbers of a shape."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    return draw


def with_gradients(problem):
    """The same problem on leaves that ask for gradients, and those leaves by name."""
    names = [field.name for field in fields(problem) if is_float(getattr(problem, field.name))]
    leaves = {name: getattr(problem, name).detach().requires_grad_() for name in names}
    return replace(problem, **leaves), leaves


def is_float(value: object) -> bool:
    """Say whether `value` is a tensor that may have a gradient."""
    return isinstance(value, Tensor) and value.is_floating_point()
