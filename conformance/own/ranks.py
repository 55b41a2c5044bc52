"""Several processes of one job, forked from the tests, which have imported what they need: it takes longer to
import than what they do.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(world: int, logs: Path, work: Callable, *arguments: Any) -> None:
    """Call `work(*arguments)` in `world` processes with the variables that torchrun sets.

    Raises:
        AssertionError: with what all processes wrote into the folder `logs`, as soon as one has failed (the
            others would wait for it), or after four minutes.
    """
    fork, port, paths = multiprocessing.get_context("fork"), free_port(), []
    ranks = []
    for rank in range(world):
        paths.append(logs / f"rank{rank}.log")
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
        variables |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        ranks.append(fork.Process(target=as_rank, args=(variables, paths[-1], work, arguments)))
    for process in ranks:
        process.start()
    try:
        until = time.monotonic() + 240
        while not any(process.exitcode for process in ranks) and time.monotonic() < until:
            if all(process.exitcode == 0 for process in ranks):
                return
            time.sleep(0.02)
        time.sleep(1)  # for the ranks that compare the same to fail too
    finally:
        for process in ranks:
            process.kill()
            process.join()
    raise AssertionError("\n".join(path.read_text() for path in paths))


def as_rank(variables: dict[str, str], log: Path, work: Callable, arguments: tuple) -> None:
    """One process; it ends without the interpreter's end, which gloo's threads now and then keep up."""
    os.environ |= variables
    sys.stdout = sys.stderr = open(log, "w", buffering=1)  # noqa: SIM115 (as long as the process)
    try:
        work(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)
