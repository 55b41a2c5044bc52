"""The suite on trial: each planted bug must be caught, in a default run, by the properties about it."""

from __future__ import annotations

import pytest

from ..harness.backends import NAMES, load
from . import (
    bugs_at_edges,  # noqa: F401
    bugs_in_bidirectional_scan,  # noqa: F401  these fill BUGS
    bugs_in_calls,  # noqa: F401
    bugs_in_groups,  # noqa: F401
    bugs_in_long_rows,  # noqa: F401
    bugs_in_module_memory,  # noqa: F401
    bugs_in_modules,  # noqa: F401
    bugs_in_operators,  # noqa: F401
    bugs_in_packed_rows,  # noqa: F401
    bugs_in_scan,  # noqa: F401
    bugs_in_sliding_window,  # noqa: F401
)
from .planting import BUGS, Bug, run_quietly

BY_NAME = {bug.name: bug for bug in BUGS}


@pytest.mark.parametrize("name", BY_NAME)
def test_a_planted_bug_is_caught(name):
    """Each property listed for a bug fails on it: with an assertion, not with a crash of the bug itself."""
    bug: Bug = BY_NAME[name]
    broken = bug.plant(load("linmu.reference"))
    for test in bug.caught_by:
        with pytest.raises(AssertionError):
            run_quietly(test, broken)
            pytest.fail(f"{test.__name__} must notice that {name.replace('_', ' ')}", pytrace=False)


def test_there_are_enough_bugs_of_every_kind():
    """At least forty, at least one for every operator, loss and module, and no two of one name."""
    assert len(BY_NAME) == len(BUGS) >= 40
    targets = {bug.target for bug in BUGS}
    missing = set(NAMES) - targets
    assert not missing, f"no bug is planted in {sorted(missing)}"
