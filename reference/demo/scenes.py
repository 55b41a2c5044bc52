"""The nine kinds of questions: what is on the grid, what is asked, what is the answer.

Local detail: `cell`, `neighbour`, `read`. Global context: `count`, `frequent`, `extreme`. Time: `moved`,
`moment`, `changed`. Each builder makes n scenes at once on grids padded to a common (T, Y, X). Rows, columns
and moments are counted from 1. Letters: n samples, T Y X grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .digits import BLANK
from .draws import Draws

IMAGE_SIDES = (4, 7)  # rows and columns of an image: 4, 5 or 6
IMAGE_GRID, VIDEO_GRID = (
    (6, 6),
    (4, 4),
)  # (Y, X) that scenes are padded to; fixed, so that batching changes nothing
MOMENTS = 4
DIRECTIONS = ("left of", "right of", "above", "below")
WAYS = ("left", "right", "up", "down")
STEPS = np.array([[0, -1], [0, 1], [-1, 0], [1, 0]])  # (y, x) of a direction or way
SHORT_VIDEOS = np.array(
    [[2, 3, 3], [2, 4, 4], [3, 3, 3], [3, 3, 4], [3, 4, 3], [4, 3, 3], [4, 2, 4], [4, 4, 2]]
)
LONG_VIDEOS = SHORT_VIDEOS[2:]


@dataclass
class Scenes:
    """n scenes of one kind.

    Attributes:
        labels: (n, T, Y, X) int64, 0..9, BLANK in empty cells and outside a scene's own size.
        things: (n, T, Y, X) int64, cells with the same thing show the same image.
        sizes: (n, 3) int64, each scene's own (T, Y, X).
        questions, answers: n texts each.
    """

    labels: np.ndarray
    things: np.ndarray
    sizes: np.ndarray
    questions: list[str]
    answers: list[str]


def _image_sizes(draws: Draws) -> np.ndarray:
    sides = draws.integers(*IMAGE_SIDES, 2)
    return np.concatenate([np.ones((len(draws), 1), np.int64), sides], axis=1)


def _inside(sizes: np.ndarray, grid: tuple[int, int] = IMAGE_GRID) -> np.ndarray:
    """Return (n, Y, X) bool, True inside each scene's own rows and columns."""
    y, x = np.mgrid[: grid[0], : grid[1]]
    return (y < sizes[:, 1, None, None]) & (x < sizes[:, 2, None, None])


def _fill(draws: Draws, inside: np.ndarray, digits: np.ndarray) -> np.ndarray:
    """Blank out a tenth to four tenths of the cells and all outside; (n, Y, X)."""
    blank = draws.uniform(*inside.shape[1:]) < 0.1 + 0.3 * draws.uniform(1, 1)
    return np.where(inside & ~blank, digits, BLANK)


def _others(draws: Draws, digit: np.ndarray, *shape: int) -> np.ndarray:
    """Return (n, *shape) digits, none equal to the sample's own `digit` (n,)."""
    own = digit.reshape(-1, *(1 for _ in shape))
    return (own + draws.integers(1, 10, *shape)) % 10


def _still(labels: np.ndarray, sizes: np.ndarray, questions: list[str], answers: list[str]) -> Scenes:
    """Make scenes of one moment from labels (n, Y, X); every cell is its own thing."""
    n, y, x = labels.shape
    things = np.broadcast_to(np.arange(y * x).reshape(1, 1, y, x), (n, 1, y, x))
    return Scenes(labels[:, None], things, sizes, questions, answers)


def cell_scenes(draws: Draws) -> Scenes:
    """Which digit is at a given row and column?"""
    rows, sizes = np.arange(len(draws)), _image_sizes(draws)
    inside = _inside(sizes)
    digits = draws.integers(0, 10, *inside.shape[1:])
    y, x = draws.integers(0, sizes[:, 1]), draws.integers(0, sizes[:, 2])
    labels = _fill(draws, inside, digits)
    labels[rows, y, x] = digits[rows, y, x]
    questions = [f"Which digit is in row {r + 1}, column {c + 1}?" for r, c in zip(y, x, strict=True)]
    return _still(labels, sizes, questions, [str(d) for d in digits[rows, y, x]])


def neighbour_scenes(draws: Draws) -> Scenes:
    """Which digit is beside the only digit of its value?"""
    rows, sizes = np.arange(len(draws)), _image_sizes(draws)
    inside = _inside(sizes)
    digit, way = draws.integers(0, 10), draws.integers(0, 4)
    digits = _others(draws, digit, *inside.shape[1:])
    step = STEPS[way]
    low, high = np.maximum(0, -step), sizes[:, 1:] - np.maximum(0, step)
    y, x = draws.integers(low, high, 2).T
    labels = _fill(draws, inside, digits)
    labels[rows, y, x] = digit
    beside = rows, y + step[:, 0], x + step[:, 1]
    labels[beside] = digits[beside]
    questions = [f"Which digit is {DIRECTIONS[w]} the {d}?" for w, d in zip(way, digit, strict=True)]
    return _still(labels, sizes, questions, [str(d) for d in digits[beside]])


def read_scenes(draws: Draws) -> Scenes:
    """Read the two to four digits of a row or column, in order."""
    sizes = _image_sizes(draws)
    inside = _inside(sizes)
    digits = draws.integers(0, 10, *inside.shape[1:])
    labels = _fill(draws, inside, digits)
    upright, amount = draws.integers(0, 2), draws.integers(2, 5)
    line = draws.integers(0, np.where(upright, sizes[:, 2], sizes[:, 1]))
    y, x = np.mgrid[: inside.shape[1], : inside.shape[2]]
    on_line = inside & (np.where(upright[:, None, None], x, y) == line[:, None, None])
    ranks = draws.ranks(on_line.reshape(len(draws), -1)).reshape(on_line.shape)
    shown = on_line & (ranks < amount[:, None, None])
    labels = np.where(on_line, np.where(shown, digits, BLANK), labels)
    questions = [f"Read {'column' if u else 'row'} {i + 1}." for u, i in zip(upright, line, strict=True)]
    answers = ["".join(str(d) for d in grid[mask]) for grid, mask in zip(digits, shown, strict=True)]
    return _still(labels, sizes, questions, answers)


def count_scenes(draws: Draws) -> Scenes:
    """How many cells show a given digit? None to five."""
    sizes = _image_sizes(draws)
    inside = _inside(sizes)
    digit, amount = draws.integers(0, 10), draws.integers(0, 6)
    labels = _fill(draws, inside, _others(draws, digit, *inside.shape[1:]))
    ranks = draws.ranks(inside.reshape(len(draws), -1)).reshape(inside.shape)
    labels = np.where(inside & (ranks < amount[:, None, None]), digit[:, None, None], labels)
    questions = [f"How many times does the {d} appear?" for d in digit]
    return _still(labels, sizes, questions, [str(a) for a in amount])


def frequent_scenes(draws: Draws) -> Scenes:
    """Which digit appears most often? It leads by at least two."""
    n, sizes = len(draws), _image_sizes(draws)
    inside = _inside(sizes)
    winner, amount = draws.integers(0, 10), draws.integers(4, 7)
    rest = np.tile(np.repeat(np.arange(1, 10), 4), (n, 1))  # every other digit up to four times
    allowed = np.tile(np.arange(4), 9) < amount[:, None] - 2
    order = np.argsort(draws.ranks(allowed), axis=1)
    queue = np.take_along_axis(np.where(allowed, (winner[:, None] + rest) % 10, BLANK), order, axis=1)
    ranks = draws.ranks(inside.reshape(n, -1))
    place = (ranks - amount[:, None]).clip(0, rest.shape[1] - 1)
    digits = np.where(ranks < amount[:, None], winner[:, None], np.take_along_axis(queue, place, axis=1))
    full = (amount + (0.6 + 0.4 * draws.uniform()) * (inside.sum((1, 2)) - amount)).astype(np.int64)
    labels = np.where(ranks < full[:, None], digits, BLANK).reshape(inside.shape)
    return _still(labels, sizes, ["Which digit appears most often?"] * n, [str(w) for w in winner])


def extreme_scenes(draws: Draws) -> Scenes:
    """What is the largest, or the smallest, digit?"""
    rows, sizes = np.arange(len(draws)), _image_sizes(draws)
    inside = _inside(sizes)
    largest, answer = draws.integers(0, 2), draws.integers(2, 10)
    below = draws.integers(0, answer[:, None, None] + 1, *inside.shape[1:])
    labels = _fill(draws, inside, below)
    spot = draws.one_of(inside.reshape(len(draws), -1))
    labels.reshape(len(draws), -1)[rows, spot] = answer
    mirrored = np.where(labels == BLANK, BLANK, 9 - labels)
    labels = np.where(largest[:, None, None], labels, mirrored)
    questions = [f"What is the {'largest' if up else 'smallest'} digit?" for up in largest]
    return _still(
        labels, sizes, questions, [str(a if up else 9 - a) for up, a in zip(largest, answer, strict=True)]
    )


def _background(draws: Draws, sizes: np.ndarray, absent: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Return labels and things (n, T, Y, X) of scenes that stand still and never show the digit `absent`."""
    inside = _inside(sizes, VIDEO_GRID)
    digits = draws.integers(0, 10, *VIDEO_GRID) if absent is None else _others(draws, absent, *VIDEO_GRID)
    still = _fill(draws, inside, digits)
    shown = np.arange(MOMENTS)[:, None, None] < sizes[:, 0, None, None, None]
    labels = np.where(shown, still[:, None], BLANK)
    things = np.broadcast_to(np.arange(still[0].size).reshape(still[0].shape), labels.shape).copy()
    return labels, things


def _walk(draws: Draws, sizes: np.ndarray, way: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return paths y, x (n, T) of something that takes at least one step, all one way, within the grid."""
    n, step = len(draws), STEPS[way]
    sideways = way < 2
    room = np.where(sideways, sizes[:, 2], sizes[:, 1]) - 1
    steps = draws.uniform(MOMENTS - 1) < 0.6
    steps[np.arange(n), draws.integers(0, sizes[:, 0] - 1)] = True
    steps &= np.arange(1, MOMENTS) < sizes[:, :1]
    walked = np.minimum(
        np.concatenate([np.zeros((n, 1), np.int64), np.cumsum(steps, axis=1)], axis=1), room[:, None]
    )
    low = np.where(step.sum(1) < 0, walked[:, -1], 0)
    high = np.where(step.sum(1) < 0, room, room - walked[:, -1]) + 1
    along, across = draws.integers(low, high), draws.integers(0, np.where(sideways, sizes[:, 1], sizes[:, 2]))
    y = np.where(sideways, across, along)[:, None] + step[:, :1] * walked
    x = np.where(sideways, along, across)[:, None] + step[:, 1:] * walked
    return y, x


def moved_scenes(draws: Draws) -> Scenes:
    """Which way does a given digit move? Another digit moves as well, somewhere, some way."""
    n = len(draws)
    sizes = SHORT_VIDEOS[draws.integers(0, len(SHORT_VIDEOS))]
    digit, way = draws.integers(0, 10), draws.integers(0, 4)
    labels, things = _background(draws, sizes, digit)
    rows, moments = np.arange(n)[:, None], np.arange(labels.shape[1])
    running = moments < sizes[:, :1]
    walkers = ((_others(draws, digit), draws.integers(0, 4)), (digit, way))  # the one asked about is in front
    for thing, (value, direction) in enumerate(walkers, start=int(things.max()) + 1):
        path = rows, moments, *_walk(draws, sizes, direction)
        labels[path] = np.where(running, value[:, None], BLANK)
        things[path] = thing
    questions = [f"Which way does the {d} move?" for d in digit]
    return Scenes(labels, things, sizes, questions, [WAYS[w] for w in way])


def moment_scenes(draws: Draws) -> Scenes:
    """At which moment does a given digit appear? It is there once; another digit flashes up as well."""
    n = len(draws)
    sizes = LONG_VIDEOS[draws.integers(0, len(LONG_VIDEOS))]
    digit = draws.integers(0, 10)
    labels, things = _background(draws, sizes, digit)
    rows, thing = np.arange(n), int(things.max()) + 1
    for value in (_others(draws, digit), digit):  # the one asked about is in front
        when = draws.integers(0, sizes[:, 0])
        flash = rows, when, draws.integers(0, sizes[:, 1]), draws.integers(0, sizes[:, 2])
        labels[flash], things[flash] = value, thing
        thing += 1
    questions = [f"At which moment does the {d} appear?" for d in digit]
    return Scenes(labels, things, sizes, questions, [str(w + 1) for w in when])


def changed_scenes(draws: Draws) -> Scenes:
    """One digit turns into another and stays so; which is the new one?"""
    n = len(draws)
    sizes = SHORT_VIDEOS[draws.integers(0, len(SHORT_VIDEOS))]
    before = draws.integers(0, 10)
    after = _others(draws, before)
    labels, things = _background(draws, sizes, None)
    y, x, when = (
        draws.integers(0, sizes[:, 1]),
        draws.integers(0, sizes[:, 2]),
        draws.integers(1, sizes[:, 0]),
    )
    rows, moments = np.arange(n)[:, None], np.arange(labels.shape[1])
    later, running = moments >= when[:, None], moments < sizes[:, :1]
    spot = rows, moments, y[:, None], x[:, None]
    labels[spot] = np.where(running, np.where(later, after[:, None], before[:, None]), BLANK)
    things[spot] = np.where(later, int(things.max()) + 1, things[spot])
    return Scenes(
        labels, things, sizes, ["One digit changes. What does it become?"] * n, [str(a) for a in after]
    )


BUILDERS: dict[str, Callable[[Draws], Scenes]] = {
    "cell": cell_scenes,
    "neighbour": neighbour_scenes,
    "read": read_scenes,
    "count": count_scenes,
    "frequent": frequent_scenes,
    "extreme": extreme_scenes,
    "moved": moved_scenes,
    "moment": moment_scenes,
    "changed": changed_scenes,
}
