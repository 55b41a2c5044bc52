"""With pytest-xdist: how many processes run the tests, which tests stay together, and which come first."""

from __future__ import annotations

import os

from xdist.scheduler import LoadScopeScheduling

MEMORY = 3 * 2**30  # bytes for a worker and all that its tests start
# Files whose tests share what takes seconds to make: runs, processes that have imported, students, truths.
TOGETHER = ("own/package/", "own/student/", "own/training/", "meta_tests/test_bugs_by_size")
# Long ones, so that nobody begins one when all others have ended.
FIRST = ("own/kernels/", "own/training/", "own/package/", "own/student/", "meta_tests/")


class Scheduling(LoadScopeScheduling):
    """Files of `TOGETHER` go to one worker each, all else test by test."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return file if any(folder in file for folder in TOGETHER) else nodeid


def number_of_workers() -> int:
    """One more than there are cores, for tests that wait, if all fit into the memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(cores + 1, memory // MEMORY))


def place(nodeid: str) -> int:
    """Where a test stands among all."""
    return next((place for place, folder in enumerate(FIRST) if folder in nodeid), len(FIRST))
