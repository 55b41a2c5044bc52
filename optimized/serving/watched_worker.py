"""What the GPU was busy with between two calls: vLLM's `worker_extension_cls`."""

from __future__ import annotations

import time
from typing import Any

import torch

MOST = 16  # kernels by name
NAME = 90  # letters of it


class WatchedWorker:
    """Two calls of `LLM.collective_rpc`."""

    def begin_watching(self) -> None:
        """Record kernels from now on; on a CPU operators."""
        profiler = torch.profiler
        activity = profiler.ProfilerActivity
        kind = activity.CUDA if torch.cuda.is_available() else activity.CPU
        self.watch = profiler.profile(activities=[kind])
        self.watch.start()
        self.watched_from = time.perf_counter()

    def end_watching(self) -> dict[str, Any]:
        """Return milliseconds on the clock and of kernels, and the longest: name, launches, milliseconds."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        wall = time.perf_counter() - self.watched_from
        self.watch.stop()
        found = [
            (event.key[:NAME], event.count, (event.self_device_time_total or event.self_cpu_time_total) / 1e3)
            for event in self.watch.key_averages()
            if not torch.cuda.is_available() or event.self_device_time_total
        ]
        found.sort(key=lambda row: -row[2])
        return {
            "wall_ms": round(1e3 * wall, 2),
            "busy_ms": round(sum(row[2] for row in found), 2),
            "launches": sum(row[1] for row in found),
            "steps": sum(row[1] for row in found if "text_step" in row[0]),
            "kernels": [[name, count, round(ms, 3)] for name, count, ms in found[:MOST]],
        }
