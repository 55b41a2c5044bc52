"""The torch engine's speed on a CPU, in ratios of one process, so that a busy or slow machine hardly matters.

Eight times the reference at 2,048 tokens, forward and backward, on one thread; and, with --thorough, time and
memory that grow in proportion to the length from 4,096 to 65,536 tokens.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from linmu import optimized, reference

AT_LEAST, PER_DOUBLING = 8, 2.2
STATUS = Path("/proc/self/status")
LENGTHS = (4096, 8192, 16_384, 32_768, 65_536)


def arguments(length: int, heads: int = 8, groups: int = 2, state: int = 64, head_dim: int = 64) -> dict:
    """A prompt whose second half is one video."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(1, length, *shape, generator=generator)

    return {
        "x": numbers(groups, head_dim).requires_grad_(),
        "dt": numbers(heads).sigmoid().requires_grad_(),
        "A": (-torch.linspace(0.01, 1, heads)).requires_grad_(),
        "B": numbers(groups, state).requires_grad_(),
        "C": numbers(heads, state).requires_grad_(),
        "gate": numbers(heads).sigmoid().requires_grad_(),
        "segment": torch.where(torch.arange(length) < length // 2, -1, 0)[None],
    }


def seconds(scan: Callable, given: dict) -> float:
    """One forward and backward."""
    start = time.perf_counter()
    scan(**given)[0].sum().backward()
    return time.perf_counter() - start


def test_the_torch_engine_is_eight_times_as_fast_as_the_reference():
    """H=8, G=2, N=P=64, L=2,048, float32, both directions; the fastest runs of either."""
    given = arguments(2048)
    optimized.set_engine("torch")
    try:
        ours = min(seconds(optimized.bidirectional_scan, given) for _ in range(9))
    finally:
        optimized.set_engine(None)
    theirs = min(seconds(reference.bidirectional_scan, given) for _ in range(2))
    print(f"reference {theirs:.2f} s, torch engine {ours:.4f} s: {theirs / ours:.0f} times as fast")
    assert theirs / ours >= AT_LEAST


def measured(length: int) -> tuple[float, float]:
    """Seconds (the fastest of three) and peak memory in MB above an idle process, in a process of its own."""
    command = [sys.executable, "-m", "linmu.conformance.own.kernels.test_speed", str(length)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    elapsed, memory = map(float, done.stdout.split())
    return elapsed, memory


def test_time_and_memory_grow_in_proportion_to_the_length(request):
    """At most 2.2 times per doubling, over all doublings: their geometric mean."""
    if not request.config.getoption("thorough"):
        pytest.skip("--thorough only: two minutes of scans up to 65,536 tokens")
    if not STATUS.exists():
        pytest.skip(f"peak memory is read from {STATUS}, which only Linux has")
    times, memories = zip(*map(measured, LENGTHS), strict=True)
    print(dict(zip(LENGTHS, zip(times, memories, strict=True), strict=True)))
    doublings = len(LENGTHS) - 1
    assert (times[-1] / times[0]) ** (1 / doublings) <= PER_DOUBLING
    assert (memories[-1] / memories[0]) ** (1 / doublings) <= PER_DOUBLING


def main(length: int) -> None:
    """Print what `measured` reads."""
    optimized.set_engine("torch")
    seconds(optimized.bidirectional_scan, arguments(256))
    before = peak_memory()
    given = arguments(length)
    elapsed = min(seconds(optimized.bidirectional_scan, given) for _ in range(3))
    print(elapsed, peak_memory() - before)


def peak_memory() -> float:
    """MB that this program had at most; getrusage would count what its parent had, too."""
    (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main(int(sys.argv[1]))
