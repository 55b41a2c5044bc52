"""A block over a prompt that is split over processes equals the block in one process."""

from __future__ import annotations

import multiprocessing
import time

from .context_parallel_blocks import work


def test_a_split_prompt_equals_the_whole_in_values_states_and_gradients(tmp_path):
    """Four gloo processes, started once; cuts inside segments and windows, ranks with one token."""
    fork, logs = multiprocessing.get_context("fork"), [tmp_path / f"rank{rank}.log" for rank in range(4)]
    ranks = [
        fork.Process(target=work, args=(rank, str(tmp_path / "store"), str(log)))
        for rank, log in enumerate(logs)
    ]
    for process in ranks:
        process.start()
    try:
        until = time.monotonic() + 240
        # The first to fail ends it: the others would wait for it.
        while not any(process.exitcode for process in ranks) and time.monotonic() < until:
            if all(process.exitcode == 0 for process in ranks):
                return
            time.sleep(0.1)
        time.sleep(1)  # for the ranks that compare the same to fail too
    finally:
        for process in ranks:
            process.kill()
            process.join()
    raise AssertionError("\n".join(log.read_text() for log in logs))
