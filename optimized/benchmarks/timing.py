"""How a call is timed, and the two rates that no call can beat.

On a GPU: everything is run once before (compilation, autotuning), then device events stand around each of
many queued runs, with the L2 cache flushed between them. On a CPU: wall clock. The median counts; the spread
is the distance between the 20th and 80th percentiles over the median. Where the caller says so, a call that
takes very long is run once: what its first run costs beside is lost in it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

FLUSHED = 2**28  # bytes written between two runs, more than any L2 cache holds
LONG = 2.0  # seconds from which on a single timed run is enough
VERY_LONG = 15.0  # seconds from which on a model's first run is its timed one


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, and the memory that it needed.

    Args:
        seconds: the median.
        low, high: 20th and 80th percentile.
        runs: how many were timed.
        memory: bytes allocated at the peak beyond what was there before; None on a CPU.
        peak: all bytes allocated at the peak; None on a CPU.
    """

    seconds: float
    low: float
    high: float
    runs: int
    memory: int | None = None
    peak: int | None = None

    @property
    def spread(self) -> float:
        """Distance of the percentiles over the median."""
        return (self.high - self.low) / self.seconds


def time_calls(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    *,
    seconds: float = 0.2,
    most: int = 100,
    once_from: float = math.inf,
) -> Timing:
    """Time calls that do the same on different inputs, in turn.

    Args:
        calls: each is run once untimed; what a call returns is dropped.
        device: where they run.
        seconds: how long to measure, roughly; at least three runs, but one where it takes `LONG`.
        most: runs at the most.
        once_from: seconds from which on the first run is the timed one: for what compiles and tunes nothing.
    """
    flush = memory = peak = None
    if device.type == "cuda":
        flush = torch.empty(FLUSHED, dtype=torch.int8, device=device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    times = timed_runs(calls[:1], flush, 1)
    if times[0] < once_from:
        for call in calls[1:]:
            call()
        if flush is not None:
            torch.cuda.reset_peak_memory_stats(device)
        times = timed_runs(calls[:1], flush, 1)
        if times[0] < LONG:  # the first of them has only told how many fit
            times = timed_runs(calls, flush, min(max(int(seconds / times[0]), 3), most))
    if flush is not None:
        memory = torch.cuda.max_memory_allocated(device) - before
        peak = memory + before - flush.nbytes
    middle, low, high = (percentile(times, share) for share in (0.5, 0.2, 0.8))
    return Timing(middle, low, high, len(times), memory, peak)


def timed_runs(calls: Sequence[Callable[[], object]], flush: Tensor | None, count: int) -> list[float]:
    """Seconds of each of `count` runs, the calls in turn; `flush` is written before each, None on a CPU."""
    if flush is None:
        return [wall_clock(calls[place % len(calls)]) for place in range(count)]
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    torch.cuda.synchronize(flush.device)
    for place, (start, end) in enumerate(events):
        flush.zero_()
        start.record()
        calls[place % len(calls)]()
        end.record()
    torch.cuda.synchronize(flush.device)
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def wall_clock(call: Callable[[], object]) -> float:
    """Seconds of one run on the host."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def wall_and_busy(
    call: Callable[[], object],
    device: torch.device,
    *,
    seconds: float = 0.2,
    most: int = 30,
) -> tuple[Timing, float | None]:
    """What a user waits for, and of it what the GPU works.

    Args:
        call: is run twice untimed; what it returns is dropped.
        device: where it runs.
        seconds: how long to measure, roughly.
        most: runs, three at least.
    Returns:
        the time from each call until the GPU is done, nothing queued before it; the seconds of all kernels
        and copies in a profile of one call, None on a CPU.
    """
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def waited() -> None:
        call()
        synchronize()

    waited()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    once = wall_clock(waited)
    times = [wall_clock(waited) for _ in range(min(max(int(seconds / once), 3), most))]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    middle, low, high = (percentile(times, share) for share in (0.5, 0.2, 0.8))
    timing = Timing(middle, low, high, len(times), peak=peak)
    return timing, busy_seconds(call) if device.type == "cuda" else None


def busy_seconds(call: Callable[[], object]) -> float:
    """The sum of the times of all kernels and copies that a call runs, from torch's profiler."""
    with profile(activities=[ProfilerActivity.CUDA]) as told:
        call()
        torch.cuda.synchronize()
    return sum(event.device_time for event in told.events() if event.device_type == DeviceType.CUDA) / 1e6


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them lie, interpolated."""
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


@dataclass(frozen=True)
class Ceilings:
    """What this device reached in this run: bytes per second copied, operations per second multiplied."""

    bandwidth: float
    rate: float

    def floor(self, flops: float, moved: float) -> float:
        """The seconds below which a job of these operations and bytes cannot fall."""
        return max(flops / self.rate, moved / self.bandwidth)


def measure_ceilings(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """A large copy, counting bytes read and written, and a large matrix product, both of random numbers."""
    on_gpu = device.type == "cuda"
    source = random((2**29 if on_gpu else 2**24,), dtype, device)
    target = torch.empty_like(source)
    copy = time_calls([lambda: target.copy_(source)], device)
    moved = 2 * source.numel() * source.element_size()
    size = 8192 if on_gpu else 1024
    pairs = [(random((size, size), dtype, device), random((size, size), dtype, device)) for _ in range(2)]
    product = time_calls([lambda pair=pair: pair[0] @ pair[1] for pair in pairs], device)
    return Ceilings(moved / copy.seconds, 2 * size**3 / product.seconds)


def random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Normal numbers; never zeros, on which a processor may run faster."""
    return torch.randn(shape, device=device, dtype=dtype)
