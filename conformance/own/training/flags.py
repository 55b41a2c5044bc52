"""Flags that tests of distillation share."""

from __future__ import annotations


def steps(i: int, ii: int, iii: int) -> list[str]:
    """The optimizer steps of the three stages."""
    named = {"i": i, "ii": ii, "iii": iii}
    return [word for name, count in named.items() for word in (f"--stage_{name}.steps", str(count))]
