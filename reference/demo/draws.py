"""Random numbers addressed by (seed, split, index): order, batching and workers change nothing.

A counter-based generator: every number is a hash (the finaliser of SplitMix64) of its sample's key, the
number of draws before, and its place in the draw. Letters: n samples.
"""

from __future__ import annotations

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def mix(bits: np.ndarray) -> np.ndarray:
    """Hash uint64 to uint64, elementwise."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def sample_keys(seed: int, split: int, indices: np.ndarray) -> np.ndarray:
    """Return (n,) uint64, one key per sample index."""
    stream = mix(mix(np.array([seed], np.uint64) + GOLDEN) + np.array([split + 1], np.uint64) * GOLDEN)
    return mix(stream + (indices.astype(np.uint64) + np.uint64(1)) * GOLDEN)


class Draws:
    """The numbers of n samples. Each call is a new draw; equal keys and equal calls give equal numbers.

    Args:
        keys: (n,) uint64 of `sample_keys`.
    """

    def __init__(self, keys: np.ndarray):
        self.keys = keys
        self.calls = 0

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: np.ndarray) -> Draws:
        """Return the draws of some samples, starting afresh."""
        return Draws(mix(self.keys[rows] + GOLDEN))

    def uniform(self, *shape: int) -> np.ndarray:
        """Return (n, *shape) float64 in [0, 1)."""
        self.calls += 1
        counters = np.arange(1, int(np.prod(shape)) + 1, dtype=np.uint64) * GOLDEN
        draw = mix(self.keys + np.array([self.calls], np.uint64) * np.uint64(0xD1342543DE82EF95))
        bits = mix(draw[:, None] + counters)
        return ((bits >> np.uint64(11)) * 2.0**-53).reshape(len(self), *shape)

    def integers(self, low: np.ndarray | int, high: np.ndarray | int, *shape: int) -> np.ndarray:
        """Return (n, *shape) int64 in [low, high); bounds broadcast over the result."""
        return (low + np.floor(self.uniform(*shape) * (np.asarray(high) - low))).astype(np.int64)

    def ranks(self, among: np.ndarray) -> np.ndarray:
        """Rank the True entries of `among` (n, m) at random: int64 from 0; False entries come last."""
        order = np.argsort(np.where(among, self.uniform(among.shape[1]), 2.0), axis=1)
        ranks = np.empty_like(order)
        np.put_along_axis(ranks, order, np.arange(among.shape[1])[None], axis=1)
        return ranks

    def one_of(self, among: np.ndarray) -> np.ndarray:
        """Return (n,) int64, the column of one True entry of each row of `among` (n, m)."""
        return np.argmax(np.where(among, self.uniform(among.shape[1]), -1.0), axis=1)
