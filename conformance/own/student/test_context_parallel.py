"""A block over a prompt that is split over processes equals the block in one process."""

import subprocess
import sys
import time


def test_a_split_prompt_equals_the_whole_in_values_states_and_gradients(tmp_path):
    """Four gloo processes, started once; cuts inside segments and windows, ranks with one token."""
    command = [sys.executable, "-m", "linmu.conformance.own.student.context_parallel_blocks"]
    logs = [tmp_path / f"rank{rank}.log" for rank in range(4)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as stderr:
            given = [*command, str(rank), str(tmp_path / "store")]
            ranks.append(subprocess.Popen(given, stderr=stderr))
    try:
        until = time.monotonic() + 240
        # The first to fail ends it: the others would wait for it.
        while not any(process.poll() for process in ranks) and time.monotonic() < until:
            if all(process.poll() == 0 for process in ranks):
                return
            time.sleep(0.1)
        time.sleep(1)  # for the ranks that compare the same to fail too
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    raise AssertionError("\n".join(log.read_text() for log in logs))
