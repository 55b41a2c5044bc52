"""Questions about large pictures and long films of digits: what is on the grid, what is asked, the answer.

Local detail: `row` and `column` in pictures, `changed` in films (a cell beside, a moment before). Global
context: `there`, `count` and `extreme` in pictures, `flashes`, `order` and `again` in films (digits anywhere,
the first moment and the last). Few cells show a digit, so that what counts lies far apart.

`further_questions` asks more about what is already drawn.

Letters: n samples, T Y X grid.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from .digits import BLANK
from .draws import Draws
from .scenes import DIRECTIONS, STEPS, Scenes

Grid = tuple[int, int, int]
# (T, Y, X) of pictures, and of films. Choice: no more moments than columns, since the text after a film of
# Qwen's class has positions that follow its rows and columns, whatever its moments; and long prompts end just
# below 4,096 tokens, text and all, so that steps from CUDA graphs are not padded to 5,120.
LEVELS: dict[str, tuple[Grid, Grid]] = {
    "short": ((1, 8, 8), (4, 4, 4)),
    "middle": ((1, 16, 32), (8, 8, 8)),
    "long": ((1, 63, 64), (16, 14, 18)),
}
# Of long prompts with several questions: smaller, so that up to eight, with their answers, end there as well.
LONG_OF_SEVERAL: tuple[Grid, Grid] = ((1, 61, 64), (16, 14, 17))
SEEN = (1, 18, 18)  # of pictures to learn to see on: a window of the tower's attention
FEWEST, MOST = 3, 12  # digits beside those asked about
MOST_ASKED = 3
BESIDE, THERE, COUNT = "Which digit is {} the {}?", "Is there a {}?", "How many times does the {} appear?"
EXTREME, ORDER = "What is the {} digit?", "Which digit comes {}?"
CHANGED = "One digit changes. What does it become?"
AGAIN = "Is the digit of the first moment there in the last?"


def _drawn(draws: Draws, grid: Grid, low: int = 0, high: int = 10) -> np.ndarray:
    """(n, cells) digits, one for every cell."""
    return draws.integers(low, high, int(np.prod(grid)))


def _others(draws: Draws, digit: np.ndarray, grid: Grid) -> np.ndarray:
    """(n, cells) digits, none the sample's own `digit` (n,)."""
    return (digit[:, None] + _drawn(draws, grid, 1)) % 10


def _ranks(draws: Draws, grid: Grid) -> np.ndarray:
    """(n, cells) int64, the cells in an order of their own for every sample."""
    return draws.ranks(np.ones((len(draws), int(np.prod(grid))), bool))


def _amount(draws: Draws, cells: int) -> np.ndarray:
    """(n, 1) how many cells show digits that are not asked about."""
    return draws.integers(FEWEST, min(MOST, cells // 4) + 1)[:, None]


def _scenes(labels: np.ndarray, grid: Grid, questions: list[str], answers: list[str]) -> Scenes:
    """Scenes of labels (n, cells), in which every cell is its own thing."""
    n = len(labels)
    things = np.broadcast_to(np.arange(labels.shape[1]).reshape(1, *grid), (n, *grid))
    return Scenes(labels.reshape(n, *grid), things, np.tile(grid, (n, 1)), questions, answers)


def cells_scenes(draws: Draws, grid: Grid) -> Scenes:
    """A share of 0.05 to 0.95 of the cells show digits; nothing is asked."""
    shown = draws.uniform(int(np.prod(grid))) < 0.05 + 0.9 * draws.uniform(1)
    return _scenes(np.where(shown, _drawn(draws, grid), BLANK), grid, [""] * len(draws), [""] * len(draws))


def neighbour_scenes(draws: Draws, grid: Grid, ways: tuple[int, int]) -> Scenes:
    """Which digit is beside the only digit of its value, in one of two directions of `STEPS`?"""
    digit, way = draws.integers(0, 10), np.array(ways)[draws.integers(0, 2)]
    digits, step = _others(draws, digit, grid), STEPS[way]
    shown = _ranks(draws, grid) < _amount(draws, digits.shape[1])
    y, x = draws.integers(np.maximum(0, -step), np.array(grid[1:]) - np.maximum(0, step), 2).T
    rows, place = np.arange(len(draws)), y * grid[2] + x
    beside = place + step[:, 0] * grid[2] + step[:, 1]
    labels = np.where(shown, digits, BLANK)
    labels[rows, beside] = digits[rows, beside]
    labels[rows, place] = digit
    questions = [BESIDE.format(DIRECTIONS[w], d) for w, d in zip(way, digit, strict=True)]
    return _scenes(labels, grid, questions, [str(d) for d in digits[rows, beside]])


def there_scenes(draws: Draws, grid: Grid) -> Scenes:
    """Does any cell show a given digit?"""
    digit, is_there = draws.integers(0, 10), draws.integers(0, 2).astype(bool)
    digits, ranks = _others(draws, digit, grid), _ranks(draws, grid)
    digits = np.where((ranks == 0) & is_there[:, None], digit[:, None], digits)
    labels = np.where(ranks < _amount(draws, digits.shape[1]), digits, BLANK)
    questions = [THERE.format(d) for d in digit]
    return _scenes(labels, grid, questions, ["yes" if there else "no" for there in is_there])


def count_scenes(draws: Draws, grid: Grid) -> Scenes:
    """How many cells, of all moments, show a given digit? None to three."""
    digit, asked = draws.integers(0, 10), draws.integers(0, MOST_ASKED + 1)
    digits, ranks = _others(draws, digit, grid), _ranks(draws, grid)
    digits = np.where(ranks < asked[:, None], digit[:, None], digits)
    labels = np.where(ranks < asked[:, None] + _amount(draws, digits.shape[1]), digits, BLANK)
    questions = [COUNT.format(d) for d in digit]
    return _scenes(labels, grid, questions, [str(a) for a in asked])


def extreme_scenes(draws: Draws, grid: Grid) -> Scenes:
    """What is the largest, or the smallest, digit?"""
    largest, answer = draws.integers(0, 2), draws.integers(2, 10)
    digits, ranks = _drawn(draws, grid, 0, answer[:, None] + 1), _ranks(draws, grid)
    digits = np.where(ranks == 0, answer[:, None], digits)
    digits = np.where(largest[:, None], digits, 9 - digits)
    labels = np.where(ranks < _amount(draws, digits.shape[1]), digits, BLANK)
    questions = [EXTREME.format("largest" if up else "smallest") for up in largest]
    answers = [str(a if up else 9 - a) for up, a in zip(largest, answer, strict=True)]
    return _scenes(labels, grid, questions, answers)


def changed_scenes(draws: Draws, grid: Grid) -> Scenes:
    """One digit turns into another and stays so; which is the new one?"""
    n, moments, cells = len(draws), grid[0], grid[1] * grid[2]
    ranks = _ranks(draws, (1, *grid[1:]))
    amount = draws.integers(3, min(13, cells // 2))[:, None]
    still = np.where(ranks < amount, _drawn(draws, (1, *grid[1:])), BLANK)
    place = ranks.argmin(1)
    rows = np.arange(n)
    before = still[rows, place]
    after = (before + draws.integers(1, 10)) % 10
    later = np.arange(moments) >= draws.integers(1, moments)[:, None]
    labels, things = np.repeat(still[:, None], moments, 1), np.tile(np.arange(cells), (n, moments, 1))
    labels[rows, :, place] = np.where(later, after[:, None], before[:, None])
    things[rows, :, place] = np.where(later, cells, place[:, None])
    scenes = _scenes(labels.reshape(n, -1), grid, [CHANGED] * n, [])
    scenes.things, scenes.answers = things.reshape(n, *grid), [str(a) for a in after]
    return scenes


def order_scenes(draws: Draws, grid: Grid) -> Scenes:
    """Digits flash one after the other; which is the first, or the last?"""
    n, moments, cells = len(draws), grid[0], grid[1] * grid[2]
    amount = draws.integers(FEWEST, min(MOST, moments) + 1)[:, None]
    shown = _ranks(draws, (1, 1, moments)) < amount
    digits, place, at_end = (
        draws.integers(0, 10, moments),
        draws.integers(0, cells, moments),
        draws.integers(0, 2),
    )
    labels = np.full((n, moments, cells), BLANK)
    np.put_along_axis(labels, place[..., None], np.where(shown, digits, BLANK)[..., None], axis=2)
    asked = np.where(at_end, moments - 1 - shown[:, ::-1].argmax(1), shown.argmax(1))
    questions = [ORDER.format("last" if last else "first") for last in at_end]
    answers = [str(d) for d in digits[np.arange(n), asked]]
    return _scenes(labels.reshape(n, -1), grid, questions, answers)


def again_scenes(draws: Draws, grid: Grid) -> Scenes:
    """Is the only digit of the first moment among the three of the last?"""
    n, cells = len(draws), grid[1] * grid[2]
    digit, is_again = draws.integers(0, 10), draws.integers(0, 2).astype(bool)
    between = (max(grid[0] - 2, 1), *grid[1:])
    digits, shown = _drawn(draws, between), _ranks(draws, between)
    labels = np.full((n, grid[0], cells), BLANK)
    middle = np.where(shown < _amount(draws, shown.shape[1]), digits, BLANK).reshape(n, -1, cells)
    labels[:, 1:-1] = middle[:, : grid[0] - 2]
    first, last = (_ranks(draws, (1, *grid[1:])) for _ in range(2))
    labels[:, 0] = np.where(first == 0, digit[:, None], BLANK)
    end = _others(draws, digit, (1, *grid[1:]))
    end = np.where((last == 0) & is_again[:, None], digit[:, None], end)
    labels[:, -1] = np.where(last < 3, end, BLANK)
    return _scenes(labels.reshape(n, -1), grid, [AGAIN] * n, ["yes" if a else "no" for a in is_again])


OF_PICTURES = {
    "row": partial(neighbour_scenes, ways=(0, 1)),
    "column": partial(neighbour_scenes, ways=(2, 3)),
    "there": there_scenes,
    "count": count_scenes,
    "extreme": extreme_scenes,
}
OF_FILMS = {"changed": changed_scenes, "flashes": count_scenes, "order": order_scenes, "again": again_scenes}


def _beside(grid: np.ndarray, ways: tuple[int, int]) -> dict[str, str]:
    """Which digit is beside one that is the only one of its value."""
    found = {}
    for digit in range(10):
        places = np.argwhere(grid[0] == digit)
        for way in ways if len(places) == 1 else ():
            y, x = places[0] + STEPS[way]
            if 0 <= y < grid.shape[1] and 0 <= x < grid.shape[2] and grid[0, y, x] != BLANK:
                found[BESIDE.format(DIRECTIONS[way], digit)] = str(grid[0, y, x])
    return found


def _ends(grid: np.ndarray) -> dict[str, str]:
    """Which digit comes first and last, where the moment at that end shows one."""
    moments = [moment[moment != BLANK] for moment in grid if (moment != BLANK).any()]
    ends = {"first": moments[0], "last": moments[-1]} if moments else {}
    return {ORDER.format(end): str(shown[0]) for end, shown in ends.items() if len(shown) == 1}


def _change(grid: np.ndarray) -> dict[str, str]:
    """What the one digit becomes that changes, where all others stay."""
    changes = np.argwhere(grid[1:] != grid[:-1])
    if len(changes) != 1:
        return {}
    t, y, x = changes[0]
    return {CHANGED: str(grid[t + 1, y, x])} if BLANK not in grid[t : t + 2, y, x] else {}


def _return(grid: np.ndarray) -> dict[str, str]:
    """Whether the only digit of the first moment is there in the last."""
    first = grid[0][grid[0] != BLANK]
    return {AGAIN: "yes" if first[0] in grid[-1] else "no"} if len(first) == 1 else {}


def askable(grid: np.ndarray, kinds: Sequence[str]) -> dict[str, dict[str, str]]:
    """What can be asked about a grid (T, Y, X) and has one answer: answers by question, by kind.

    `there`, `extreme` and how often a digit appears are asked about films as well.
    """
    shown = grid[grid != BLANK]
    counts = np.bincount(shown, minlength=10)
    few = {COUNT.format(d): str(c) for d, c in enumerate(counts) if c <= MOST_ASKED}
    found = {"there": {THERE.format(d): "yes" if c else "no" for d, c in enumerate(counts)}}
    if len(shown):
        found["extreme"] = {
            EXTREME.format("largest"): str(shown.max()),
            EXTREME.format("smallest"): str(shown.min()),
        }
    if len(grid) == 1:
        found |= {"row": _beside(grid, (0, 1)), "column": _beside(grid, (2, 3)), "count": few}
    else:
        found |= {"flashes" if "flashes" in kinds else "count": few}
        found |= {"order": _ends(grid), "changed": _change(grid), "again": _return(grid)}
    return {kind: found[kind] for kind in kinds if found.get(kind)}


def further_questions(
    grid: np.ndarray, first: str, kinds: Sequence[str], draws: np.ndarray
) -> list[tuple[str, str]]:
    """More questions about a grid, and their answers.

    Choice: kinds are drawn equally often, then the answers that they have, then questions with that answer: a
    digit that is not there, or a count of 0, would otherwise be most of what is asked.

    Args:
        grid: (T, Y, X) int64, BLANK in empty cells.
        first: the question that was asked; it is not asked again, and neither is another.
        kinds: that may be asked.
        draws: (n, 3) in [0, 1), of which follow kind, answer and question.
    Returns:
        n of them; fewer where no more can be asked.
    """
    left = {kind: dict(answers) for kind, answers in askable(grid, kinds).items()}
    for answers in left.values():
        answers.pop(first, None)
    asked = []
    for draw in draws:
        left = {kind: answers for kind, answers in left.items() if answers}
        if not left:
            break
        answers = left[_drawn_of([*left], draw[0])]
        answer = _drawn_of(sorted({*answers.values()}), draw[1])
        question = _drawn_of([q for q, a in answers.items() if a == answer], draw[2])
        asked.append((question, answers.pop(question)))
    return asked


def _drawn_of(items: list[str], draw: float) -> str:
    """One of several, by a number in [0, 1)."""
    return items[int(draw * len(items))]


def builders_of(level: str, several: bool = False) -> dict[str, Callable[[Draws], Scenes]]:
    """The builders of a level of `LEVELS`, by kind; `cells` is for what learns to see.

    Args:
        level: of `LEVELS`.
        several: whether several questions are asked about each, which makes long ones a little smaller.
    Raises:
        ValueError: for another level.
    """
    if level not in LEVELS:
        raise ValueError(f"large questions: level must be among {tuple(LEVELS)}, got {level!r}")
    picture, film = LONG_OF_SEVERAL if several and level == "long" else LEVELS[level]
    found = {kind: partial(build, grid=picture) for kind, build in OF_PICTURES.items()}
    found |= {kind: partial(build, grid=film) for kind, build in OF_FILMS.items()}
    return found | {"cells": partial(cells_scenes, grid=SEEN)}
