"""Real handwritten digits, and pictures made of them.

The images are scikit-learn's copy of the UCI optical digits (1797 of 8x8 pixels, 17 grey levels).
A picture is a (T, Y, X) grid of 8x8-pixel cells; a cell shows a digit or is blank (black). With patches of
4x4 pixels and a 2x2 merge one cell is one token of the language model; a moment t lasts two frames, the
temporal patch.

Held-out images are the same ones in every run: a fifth of each digit's images, never shown in training.
Letters: n samples, N cells, T Y X grid, F = 2 T frames.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.ndimage import zoom
from sklearn.datasets import load_digits

from .draws import Draws

CELL = 8
FRAMES_PER_MOMENT = 2
BLANK = -1
SPLITS = ("train", "heldout")
HELDOUT_SHARE = 0.2
SPLIT_SEED = 0
MARGIN = 2  # pixels of black around a digit, so that moving it never cuts into a neighbour
FINE = 4  # the scans are counts of 4x4 blocks of a bitmap; interpolation starts from that finer grid


@dataclass(frozen=True)
class Warp:
    """How far training digits are varied: largest shift (pixels), turn (radians), scale, shear, and gain."""

    shift: float = 0.75
    turn: float = 0.2
    scale: float = 0.12
    shear: float = 0.15
    gain: float = 0.2


@dataclass(frozen=True)
class DigitBank:
    """The images of one split.

    Attributes:
        scans: (N, 8, 8) uint8, 0..255, sorted by digit.
        sources: (N,) int64, place of each scan in the original data.
        first, count: (10,) int64, where the scans of a digit begin and how many there are.
    """

    scans: np.ndarray
    sources: np.ndarray
    first: np.ndarray
    count: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64, the digit of each scan."""
        return np.repeat(np.arange(10), self.count)

    def choose(self, digits: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Return the scan of each digit (none blank) that u in [0, 1) selects, evenly; any shape."""
        return self.first[digits] + (u * self.count[digits]).astype(np.int64)


@cache
def digit_bank(split: str) -> DigitBank:
    """Return the images of "train" or "heldout"."""
    if split not in SPLITS:
        raise ValueError(f"digit_bank: split must be one of {SPLITS}, got {split!r}")
    data = load_digits()
    rng = np.random.default_rng(SPLIT_SEED)
    chosen = []
    for digit in range(10):
        places = rng.permutation(np.flatnonzero(data.target == digit))
        held_out = round(HELDOUT_SHARE * len(places))
        chosen.append(np.sort(places[:held_out] if split == "heldout" else places[held_out:]))
    sources = np.concatenate(chosen)
    count = np.array([len(places) for places in chosen])
    scans = np.round(data.images[sources] * (255 / 16)).astype(np.uint8)
    return DigitBank(scans, sources, np.cumsum(count) - count, count)


@cache
def _fine_scans(split: str) -> np.ndarray:
    """Return the scans with a black margin, interpolated to FINE times the resolution, (N, S, S) float32."""
    padded = np.pad(digit_bank(split).scans.astype(np.float32), ((0, 0), (MARGIN, MARGIN), (MARGIN, MARGIN)))
    # One by one: over the array, each number would be a sum of 64 others instead of 16.
    fine = [zoom(scan, FINE, order=3, grid_mode=True, mode="grid-constant") for scan in padded]
    return np.stack(fine).clip(0, 255)


def draw_scans(split: str, scans: np.ndarray) -> np.ndarray:
    """Return scans as they are: (N,) places in the bank to (N, 8, 8) uint8."""
    return digit_bank(split).scans[scans]


def warp_scans(split: str, scans: np.ndarray, u: np.ndarray, warp: Warp) -> np.ndarray:
    """Return scans shifted, turned, scaled, sheared and dimmed a little, each by its own amount.

    Args:
        scans: (N,) int64, places in the bank.
        u: (N, 7) in [0, 1), the amounts: shift y, shift x, turn, scale y, scale x, shear, gain.
    Returns:
        (N, 8, 8) uint8.
    """
    fine = _fine_scans(split)
    sy, sx, turn, scale_y, scale_x, shear, gain = (2 * u.astype(np.float32) - 1).T
    cos, sin = np.cos(warp.turn * turn), np.sin(warp.turn * turn)
    ky, kx = 1 + warp.scale * scale_y, 1 + warp.scale * scale_x
    y, x = np.mgrid[:CELL, :CELL].astype(np.float32).reshape(2, -1) - (CELL - 1) / 2
    row = (cos * ky)[:, None] * y + (sin * kx)[:, None] * x + warp.shift * sy[:, None]
    column = (warp.shear * shear - sin * ky)[:, None] * y + (cos * kx)[:, None] * x + warp.shift * sx[:, None]
    pixels = _sample(fine, scans, row, column) * (1 - warp.gain * np.abs(gain))[:, None]
    return np.round(pixels).astype(np.uint8).reshape(-1, CELL, CELL)


def _sample(fine: np.ndarray, scans: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Interpolate bilinearly at (N, 64) offsets from the centre, in pixels of the coarse grid."""
    side = fine.shape[1]
    row = (row * FINE + (side - 1) / 2).clip(0, side - 1.001)
    column = (column * FINE + (side - 1) / 2).clip(0, side - 1.001)
    r, c = row.astype(np.int64), column.astype(np.int64)
    fr, fc = row - r, column - c
    flat, base = fine.reshape(-1), scans[:, None] * side * side + r * side + c
    upper = flat[base] * (1 - fc) + flat[base + 1] * fc
    lower = flat[base + side] * (1 - fc) + flat[base + side + 1] * fc
    return upper * (1 - fr) + lower * fr


def render(split: str, labels: np.ndarray, things: np.ndarray, draws: Draws, warp: Warp | None) -> np.ndarray:
    """Draw grids of digits.

    Args:
        labels: (n, T, Y, X) int64, 0..9 or BLANK.
        things: (n, T, Y, X) int64 >= 0; cells with the same thing show the same image, so that a digit that
            stays or moves in a video keeps its handwriting.
        warp: variation of the digits, None for the images as they are.
    Returns:
        (n, T, Y * 8, X * 8) uint8.
    """
    u = draws.uniform(int(things.max()) + 1, 8)
    n, t, y, x = labels.shape
    cells = np.zeros((n, t, y, x, CELL, CELL), np.uint8)
    shown = labels != BLANK
    amounts = u[np.nonzero(shown)[0], things[shown]]
    scans = digit_bank(split).choose(labels[shown], amounts[:, 0])
    cells[shown] = (
        draw_scans(split, scans) if warp is None else warp_scans(split, scans, amounts[:, 1:], warp)
    )
    return cells.transpose(0, 1, 2, 4, 3, 5).reshape(n, t, y * CELL, x * CELL)
