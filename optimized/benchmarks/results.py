"""What follows from the lines: how time grows, who is faster by how much, and from which length on."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

Line = dict[str, Any]
Series = dict[int, float]  # tokens -> seconds
OURS = "LinMU"
FITTED = 4  # longest lengths that the growth is fitted to: short ones are dominated by fixed costs


def measured(lines: Sequence[Line]) -> list[Line]:
    """The lines that have a time."""
    return [line for line in lines if "seconds" in line]


def growth_exponent(series: Series) -> float | None:
    """The power of the length that time grows with: least squares through the logarithms of the longest
    lengths; None for fewer than two.
    """
    points = [(math.log(length), math.log(seconds)) for length, seconds in sorted(series.items())[-FITTED:]]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    above = sum((x - mean_x) * (y - mean_y) for x, y in points)
    return above / sum((x - mean_x) ** 2 for x, _ in points)


def crossover(ours: Series, theirs: Series) -> float | None:
    """The length from which on ours is faster at all longer ones that both have: interpolated in logarithms,
    the shortest common one if ours is faster there already, None if it is slower at the longest.
    """
    common = sorted(ours.keys() & theirs.keys())
    if not common:
        return None
    gain = {length: math.log(theirs[length] / ours[length]) for length in common}
    if gain[common[-1]] <= 0:
        return None
    slower = [length for length in common if gain[length] <= 0]
    if not slower:
        return float(common[0])
    left = slower[-1]
    right = common[common.index(left) + 1]
    share = -gain[left] / (gain[right] - gain[left])
    return math.exp(math.log(left) + share * (math.log(right) - math.log(left)))


def panels(lines: Sequence[Line]) -> dict[tuple[str, str], dict[str, Series]]:
    """Lines of one benchmark by (size, passes), then by method: seconds per length."""
    found: dict[tuple[str, str], dict[str, Series]] = defaultdict(lambda: defaultdict(dict))
    for line in measured(lines):
        found[line["size"], line["passes"]][line["method"]][line["length"]] = cost(line)
    return {key: dict(methods) for key, methods in found.items()}


def cost(line: Line) -> float:
    """What is compared: seconds per item, where a line does several, else seconds."""
    return line["seconds"] / line.get("items", 1)


def with_ratios(lines: Sequence[Line]) -> list[Line]:
    """The lines, each with `ratio`: its cost over LinMU's at the same place; above 1, LinMU is faster."""
    place = ("benchmark", "size", "passes", "length")
    ours = {
        tuple(line[part] for part in place): cost(line) for line in measured(lines) if line["method"] == OURS
    }
    found = []
    for line in lines:
        base = ours.get(tuple(line[part] for part in place))
        has_ratio = base is not None and "seconds" in line and line["method"] != OURS
        found.append(line | ({"ratio": cost(line) / base} if has_ratio else {}))
    return found
