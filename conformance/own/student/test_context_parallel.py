"""A block over a prompt that is split over processes equals the block in one process."""

import subprocess
import sys


def test_a_split_prompt_equals_the_whole_in_values_states_and_gradients(tmp_path):
    """Four gloo processes, started once; cuts inside segments and windows, ranks with one token."""
    command = [sys.executable, "-m", "linmu.conformance.own.student.context_parallel_blocks"]
    ranks = [
        subprocess.Popen([*command, str(rank), str(tmp_path / "store")], stderr=subprocess.PIPE, text=True)
        for rank in range(4)
    ]
    try:
        failures = [process.communicate(timeout=240)[1] for process in ranks if process.wait(timeout=240)]
    finally:
        for process in ranks:
            process.kill()
    assert not failures, "\n".join(failures)
