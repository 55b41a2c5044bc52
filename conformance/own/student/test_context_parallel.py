"""A block over a prompt that is split over processes equals the block in one process."""

from __future__ import annotations

from ..ranks import run_ranks
from .context_parallel_blocks import work


def test_a_split_prompt_equals_the_whole_in_values_states_and_gradients(tmp_path):
    """Four gloo processes, started once; cuts inside segments and windows, ranks with one token."""
    run_ranks(4, tmp_path, work)
