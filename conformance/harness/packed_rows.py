"""Packed rows: several samples side by side, told apart by `sequence`, equal the samples alone.

`packed_properties` turns the checks into the tests of one operator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from linmu import reference
from linmu.reference import VisionLayout

from .compare import Results, assert_same
from .layouts import Layout, Text
from .module_cases import ModuleCase, named, random_module, sizes, with_gradients
from .operator_cases import DTYPES, EXACT, Case, ChangedCase, Numbers, fed, operator_of, property_of, run
from .operator_checks import (
    check_matches_the_reference,
    check_no_rows,
    check_nothing_is_remembered,
    check_strides,
    sizes_of_gradients,
)

SAMPLES = 4  # of a row, about
MASKS_OF_ALL = ("mask", "valid", "asks")
ALONE = "the same backend on the samples alone"
SHOWN, ROWS_SHOWN = 24, 4  # ids in a message
ONE_ROW = {"batch": 1, "initial_state": False}


class PackedCase(ChangedCase):
    """The case with rows cut into samples, none of them through a span of vision.

    Attributes:
        samples: of each row, the places of one after the other.
    """

    def __init__(self, case: Case, draw: int = 0, samples: list[list[slice]] | None = None) -> None:
        self.samples = samples or samples_of(case.shape, case.seed, getattr(case, "layout", None))
        super().__init__(case, {"sequence": ids_of(self.samples, valid_tokens(case), case.seed, draw)})
        self.masks = (*case.masks, "sequence")

    def described(self, name: str) -> str:
        """Of ids too many to show, the first of each row."""
        return beginning(self.changes[name]) if name == "sequence" else super().described(name)


class PackedModuleCase:
    """A module's case, and the samples it was run with, for messages."""

    def __init__(self, case: ModuleCase, sequence: Tensor) -> None:
        self.case, self.dtype, self.sequence = case, case.dtype, sequence

    def __repr__(self) -> str:
        return f"{self.case!r} with {beginning(self.sequence)}"


def beginning(sequence: Tensor) -> str:
    """The ids (B, L) of the first rows, of each the first ones."""
    rows = [
        f"[{', '.join(map(str, row[:SHOWN].tolist()))}{', ...' if len(row) > SHOWN else ''}]"
        for row in sequence[:ROWS_SHOWN]
    ]
    return f"sequence = [{', '.join(rows)}{', ...' if len(sequence) > ROWS_SHOWN else ''}]"


def samples_of(shape: tuple[int, int], seed: int, layout: Layout | None) -> list[list[slice]]:
    """The rows (B, L) cut at random; some samples have one token."""
    batch, length = shape
    starts = Numbers(seed + 5).some(batch, length, share=min(0.5, SAMPLES / length))
    cut = []
    for row, begins in enumerate(starts):
        for _, first, stop in () if layout is None else layout.spans(row):
            begins[first + 1 : stop] = False
        edges = [0, *(i for i in begins.nonzero().flatten().tolist() if i > 0), length]
        cut.append([slice(*edge) for edge in pairwise(edges)])
    return cut


def ids_of(samples: list[list[slice]], valid: Tensor, seed: int, draw: int) -> Tensor:
    """(B, L) int64, an id for each sample: they rise from 0, the same ones in every row.

    With another `draw` they come in any order, are in each row equal modulo 2^32 and as float32, or small and
    negative, or the largest and the lowest there are, and those of tokens that are not valid are noise.
    """
    numbers, ids = Numbers(seed + 6 + draw), torch.zeros(valid.shape, dtype=torch.int64)
    for row, own in enumerate(samples):
        order = torch.randperm(len(own), generator=numbers.generator) if draw else torch.arange(len(own))
        for place, sample in zip(order.tolist(), own, strict=True):
            ids[row, sample] = id_of(place, (seed + row) % 3) if draw else place
    noise = torch.randint(-3, 3, valid.shape, generator=numbers.generator)
    return torch.where(valid, ids, noise) if draw else ids


def id_of(place: int, kind: int) -> int:
    """What a sample in this place is called: of each kind as `ids_of` says."""
    ends = 2**63 - 1 - place if place % 2 else place - 2**63
    return (place * 2**32 + 2**59, place - 3, ends)[kind]


def valid_tokens(case: Case) -> Tensor:
    """(B, L) bool."""
    given = case.inputs()
    mask = given.get("mask", given.get("valid"))
    return torch.ones(case.shape, dtype=torch.bool) if mask is None else mask


def sample_by_sample(operator: Callable, case: PackedCase, **given: Any) -> tuple[Tensor, Tensor]:
    """What the operator gives for each sample alone, put together again.

    The state before belongs to the sample that comes first, the state after is that of the last; a sample
    without any valid token is none.
    """
    tokens = (*case.case.tokens, *case.case.masks)
    rows, states = [], []
    for row, samples in enumerate(case.samples):
        one = slice(row, row + 1)
        start = None if given["initial_state"] is None else given["initial_state"][one]
        outputs, state = [], start
        for sample in reversed(samples) if given.get("reverse") else samples:
            alone = given | {name: given[name][one, sample] for name in tokens if given[name] is not None}
            alone |= {"sequence": None, "initial_state": start}
            y, end = operator(**alone)
            outputs.append(y)
            if valid_tokens(case)[row, sample].any():
                start, state = None, end
        state = end if state is None else state
        rows.append(torch.cat(outputs[::-1] if given.get("reverse") else outputs, dim=1))
        states.append(state)
    return torch.cat(rows), torch.cat(states).to(end.dtype)


BORDERS = (  # of chunks, also of 24, 40, 48, 80, 96, 100 and 112 tokens, and beside them
    (0, 32, 128, 129, 256, 512, 1024),
    (0, 31, 64, 127, 255, 384, 513),
    (0, 48, 96, 144, 192, 288, 320, 448, 640, 768),
    (0, 50, 100, 112, 128, 160, 200, 250, 300, 400, 600, 1000),
)
OF_A_LOOP = 200  # tokens that the reference is held against itself with


def samples_at_borders(length: int) -> list[list[slice]]:
    """Rows of samples that begin at `BORDERS`."""
    rows = ((*(start for start in starts if start < length), length) for starts in BORDERS)
    return [[slice(*edge) for edge in pairwise(row)] for row in rows]


def check_samples_at_borders(backend: Any, case: Case) -> None:
    """Rows whose samples begin where chunks may, and fill several: none reads the one before.

    Without a mask, and with padding inside the samples and at the end of one.
    """
    if getattr(backend, case.operator) is getattr(reference, case.operator):
        case = case.part(slice(0, OF_A_LOOP))
    samples = samples_at_borders(case.shape[1])
    holes = Numbers(case.seed + 8).some(*case.shape, share=0.9)
    holes[0, [sample.start for sample in samples[0]]] = True
    holes[1, samples[1][-2].stop - 20 : samples[1][-2].stop] = False
    mask = next(name for name in ("mask", "valid") if name in case.inputs())
    bare = dict.fromkeys({mask, "segment"} & case.inputs().keys())
    for each in (case.changed(**bare), case.changed(**{mask: holes})):
        compare_with_samples_alone(backend, PackedCase(each, samples=samples))


def check_equals_samples_alone(backend: Any, case: Case) -> None:
    """Values, gradients of every argument, and the states before and after."""
    compare_with_samples_alone(backend, PackedCase(case))


def compare_with_samples_alone(backend: Any, packed: PackedCase) -> None:
    """The same, of a packed case."""
    operator = operator_of(backend, packed.case)
    alone = fed(partial(sample_by_sample, operator, packed), packed, gradients=True)
    of_sums = partial(sizes_of_gradients, packed)
    assert_same(run(backend, packed, gradients=True), alone, packed, sizes=of_sums, source=ALONE)


def check_ids_mean_nothing_else(backend: Any, case: Case) -> None:
    """They say where a sample begins: large ones, equal ones in other rows, any at invalid tokens."""
    wanted, other = run(backend, PackedCase(case), gradients=True), PackedCase(case, draw=1)
    assert_same(run(backend, other, gradients=True), wanted, other)


def check_packed_matches(backend: Any, case: Case) -> None:
    """In every dtype, values and gradients."""
    check_matches_the_reference(backend, PackedCase(case))


def check_packed_strides(backend: Any, case: Case) -> None:
    """As of all arguments."""
    check_strides(backend, PackedCase(case))


def check_packed_is_not_remembered(backend: Any, case: Case) -> None:
    """Nor is anything that was made of the ids."""
    check_nothing_is_remembered(backend, PackedCase(case))


def check_no_packed_rows(backend: Any, case: Case) -> None:
    """Nor do ids need rows."""
    check_no_rows(backend, PackedCase(case))


def check_one_sample(backend: Any, case: Case) -> None:
    """One id a row is no id, also after rows of the same shape that had several."""
    wanted = run(backend, case, gradients=True)
    run(backend, PackedCase(case))
    for number in (0, -1, 2**60):
        one = case.changed(sequence=torch.full(case.shape, number))
        assert_same(run(backend, one, gradients=True), wanted, one)


def check_hundreds_of_samples(backend: Any, case: Case) -> None:
    """One row of samples of one token each is a batch of rows of one token: values, gradients, the state."""
    given, operator, length = case.inputs(), operator_of(backend, case), case.shape[1]
    numbers = torch.arange(length)[None]

    def as_rows(**given: Any) -> tuple[Tensor, ...]:
        names = [name for name in (*case.tokens, *case.masks) if given[name] is not None]
        output, *state = operator(**given | {name: given[name].transpose(0, 1) for name in names})
        last = 0 if given.get("reverse") else -1
        return output.transpose(0, 1), *(part[last][None] for part in state)

    present = {name: torch.ones_like(given[name]) for name in MASKS_OF_ALL if given.get(name) is not None}
    alone = fed(as_rows, case.changed(**present), gradients=True)
    packed = case.changed(sequence=numbers, **present)
    of_sums = partial(sizes_of_gradients, packed)
    assert_same(run(backend, packed, gradients=True), alone, packed, sizes=of_sums, source=ALONE)


def check_module_equals_samples_alone(
    backend: Any, name: str, case: ModuleCase, *, has_layout: bool = True
) -> None:
    """Outputs on valid tokens, states, the gradients of the input and of every parameter.

    Without a layout, all tokens are text and the module is told of the samples itself.
    """
    module, valid = random_module(backend, name, case), case.layout.valid
    samples = samples_of(case.layout.shape, case.seed, case.layout)
    sequence = ids_of(samples, valid, case.seed, draw=1)

    def of(place: tuple[slice, slice], u: Tensor, sequence: Tensor | None = None) -> Results:
        given = {
            "valid": valid[place],
            "position_embeddings": tuple(a[place] for a in case.position_embeddings()),
        }
        if has_layout:
            given["layout"] = VisionLayout(case.layout.coords[place].contiguous(), sequence)
        else:
            given["sequence"] = sequence
        output, state = module(u[place], **given)
        return named(output * valid[place][..., None], state)

    def packed(u: Tensor) -> Results:
        return of((slice(None), slice(None)), u, sequence)

    def alone(u: Tensor) -> Results:
        rows = []
        for row, own in enumerate(samples):
            places = [(slice(row, row + 1), sample) for sample in own]
            found = [of(place, u) for place in places]
            there = [result for place, result in zip(places, found, strict=True) if valid[place].any()]
            output = torch.cat([result["output"] for result in found], dim=1)
            rows.append((there or found)[-1] | {"output": output})
        return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

    as_packed = (
        {"layout": VisionLayout(case.layout.coords, sequence)}
        if has_layout
        else {"layout": None, "sequence": sequence}
    )
    of_sums = partial(sizes, reference, name, case, module.state_dict(), **as_packed)
    found, wanted = (with_gradients(module, case, function) for function in (packed, alone))
    assert_same(found, wanted, PackedModuleCase(case, sequence), sizes=of_sums, source=ALONE)


def packed_properties(operator: str, cases: Callable, long: Callable | None = None) -> dict[str, Callable]:
    """The tests of this file for one operator, by name; `long(dtypes)` draws rows of more than a chunk."""
    test, exact = partial(property_of, operator), cases(EXACT)
    row = {"layout": Layout(((Text(300),),)), "initial_state": False}
    hundreds = cases(
        (*EXACT, "bfloat16"), **row if operator == "bidirectional_scan" else {"length": 300, **ONE_ROW}
    )
    long_ones = (
        {}
        if long is None
        else {
            "test_long_packed_rows_equal_their_samples_alone": test(cases=long(EXACT), share=0.15)(
                check_equals_samples_alone
            ),
            "test_long_packed_rows_match_the_reference": test(cases=long(DTYPES), share=0.1)(
                check_packed_matches
            ),
        }
    )
    return long_ones | {
        "test_a_packed_row_equals_its_samples_alone": test(cases=exact, share=0.5)(
            check_equals_samples_alone
        ),
        "test_ids_of_samples_say_where_they_begin_and_nothing_else": test(cases=exact, share=0.6)(
            check_ids_mean_nothing_else
        ),
        "test_packed_rows_match_the_reference": test(cases=cases(DTYPES), share=0.3)(check_packed_matches),
        "test_hundreds_of_samples_equal_as_many_rows": test(cases=hundreds, share=0.2)(
            check_hundreds_of_samples
        ),
        "test_strides_of_packed_rows_do_not_matter": test(cases=exact, share=0.2)(check_packed_strides),
        "test_samples_are_not_remembered_between_calls": test(cases=exact, share=0.1)(
            check_packed_is_not_remembered
        ),
        "test_there_may_be_no_packed_rows": test(cases=exact, share=0.1)(check_no_packed_rows),
        "test_a_row_of_one_sample_is_not_packed": test(cases=exact, share=0.2)(check_one_sample),
    }
