"""Rows of several samples, told as transformers tells of them, equal the samples alone: logits and gradients.

One decoder layer of three keeps its attention, which must keep to the same boundaries.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linmu.reference import Lesson, Objective, attach_teacher, convert
from linmu.reference.student.packed_rows import SampleSpans
from linmu.reference.student.unconverted_attention import causal_attention

from .tiny_checkpoint import shake_mixers, student_backend
from .tiny_families import BUILDERS, Tiny

pytestmark = pytest.mark.needs("MMATE")

TOLERANCE = 1e-4  # in logits of magnitude 6 to 9, float32
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")


@pytest.fixture(scope="module", params=BUILDERS)
def tiny(request) -> Tiny:
    return BUILDERS[request.param]()


@pytest.fixture(scope="module")
def student(tiny, backend):
    return shake_mixers(
        convert(tiny.teacher, {"text_window": 3}, layers=[0, 2], backend=student_backend(backend))
    )


@pytest.fixture(scope="module", params=("qwen2_5_vl", "qwen2"))
def pair(request, backend):
    """A family with M-RoPE and one of text, and its student with the teacher attached."""
    tiny = BUILDERS[request.param]()
    options = {"text_window": 3}
    student = shake_mixers(convert(tiny.teacher, options, layers=[0, 2], backend=student_backend(backend)))
    attach_teacher(student, tiny.teacher)
    return tiny, student


def samples_of(tiny: Tiny) -> list[dict[str, Tensor]]:
    """Of a text, of pictures if the family has them, and of one token."""
    texts = ["some text", "?", "a longer text"]
    if tiny.image:
        one, *_, other = tiny.sizes
        texts = [f"see {{{one}}} now", f"{{{other}}} or {{{other}}}", "no picture"]
    return [tiny.inputs(text) for text in texts]


def packed(tiny: Tiny, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The samples side by side in one row."""
    row = {}
    for name in dict.fromkeys(name for sample in samples for name in sample):
        parts = [sample.get(name) for sample in samples]
        if name in PER_TOKEN:
            like = [sample["input_ids"] for sample in samples]
            parts = [
                torch.zeros_like(ids) if part is None else part for part, ids in zip(parts, like, strict=True)
            ]
            row[name] = torch.cat(parts, dim=1)
        else:
            row[name] = tiny.joined([part for part in parts if part is not None])
    return row


def lengths(samples: list[dict[str, Tensor]]) -> list[int]:
    return [sample["input_ids"].shape[1] for sample in samples]


def edges(samples: list[dict[str, Tensor]]) -> Tensor:
    return torch.tensor([0, *lengths(samples)]).cumsum(0).int()


def positions(samples: list[dict[str, Tensor]]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths(samples)])[None]


def test_a_packed_row_equals_its_samples_alone(tiny, student):
    """Told by the edges of the samples, without a mask, or by positions that start anew, with one of ones."""
    samples = samples_of(tiny)
    row = packed(tiny, samples)
    by_positions = row | {"position_ids": positions(samples)}
    del row["attention_mask"]
    by_edges = row | {"cu_seq_lens_q": edges(samples), "cu_seq_lens_k": edges(samples)}
    with torch.no_grad():
        alone = torch.cat([student(**sample, use_cache=False).logits for sample in samples], dim=1)
        for given in (by_edges, by_positions):
            assert (student(**given).logits - alone).abs().max() < TOLERANCE, tiny.name


def batched(tiny: Tiny, samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The samples as rows of their own, padded on the right."""
    longest, rows = max(lengths(samples)), packed(tiny, samples)
    for name in PER_TOKEN:
        if name in rows:
            parts = rows[name].split(lengths(samples), dim=1)
            rows[name] = torch.cat([torch.nn.functional.pad(p, (0, longest - p.shape[1])) for p in parts])
    return rows


def labels_of(rows: dict[str, Tensor], samples: list[dict[str, Tensor]] | None = None) -> Tensor:
    """All tokens of text; the first of a sample is nobody's prediction."""
    ids = rows["input_ids"]
    labels = ids.masked_fill((rows["attention_mask"] == 0) | (ids > 255), -100)
    begins = [0] if samples is None else edges(samples)[:-1].long()
    labels[:, begins] = -100
    return labels


@pytest.mark.parametrize("inputs", ("teacher", "student"))
def test_a_lesson_on_a_packed_row_is_that_on_its_samples(pair, inputs):
    """The losses and their gradients are those of the samples as rows of a padded batch."""
    tiny, student = pair
    samples, has_logits = samples_of(tiny), inputs == "student"
    row, rows = packed(tiny, samples), batched(tiny, samples)
    lesson = Lesson(student, Objective(1.0, 0.5, float(has_logits), inputs, end_to_end=has_logits))
    found = []
    for given, starts in ((row | {"cu_seq_lens_q": edges(samples)}, samples), (rows, None)):
        student.zero_grad()
        terms = lesson(labels=labels_of(given, starts), **given)
        terms["loss"].backward()
        grads = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
        found.append({name: term.detach() for name, term in terms.items()} | grads)
    lesson.close()
    assert found[0].keys() == found[1].keys() and len(found[0]) > 20
    for name, value in found[1].items():
        torch.testing.assert_close(
            found[0][name], value, rtol=2e-3, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    ("given", "words"),
    (
        ({"cu_seq_lens_q": [0, 4, 7]}, "cu_seq_lens_q must rise from 0 to the 8 tokens"),
        ({"cu_seq_lens_q": [0, 5, 4, 8]}, "cu_seq_lens_q must rise"),
        ({"cu_seq_lens_q": [0, 4, 8], "cu_seq_lens_k": [0, 3, 8]}, "must be the same"),
        ({"cu_seq_lens_q": [0, 4, 8], "use_cache": True}, "packed rows must have no cache.*use_cache=False"),
        ({"position_ids": [[0, 1, 2, 0, 1, 2, 3, 4]], "use_cache": True}, "packed rows must have no cache"),
    ),
)
def test_what_does_not_fit_a_packed_row_is_refused(pair, given, words):
    ids = pair[0].inputs("12345678")["input_ids"]
    tensors = {name: value if value is True else torch.tensor(value) for name, value in given.items()}
    with pytest.raises(ValueError, match=words):
        pair[1](input_ids=ids, **tensors)


def test_edges_are_of_one_row(pair):
    ids = pair[0].inputs("1234", "5678")["input_ids"]
    with pytest.raises(ValueError, match="there must be one row, got 2; or tell by position_ids"):
        pair[1](input_ids=ids, cu_seq_lens_q=torch.tensor([0, 4]))


def test_positions_of_padded_rows_tell_of_no_samples(pair):
    """Padding on the left starts positions anew, under a mask that says why."""
    tiny, student = pair
    rows = tiny.inputs("1234", "12345678")
    positions = (rows["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        found = student(**rows, position_ids=positions, use_cache=False).logits
        alone = student(input_ids=rows["input_ids"][:1, -4:], use_cache=False).logits
    assert (found[:1, -4:] - alone).abs().max() < TOLERANCE


def test_attention_sample_by_sample_is_attention_under_a_mask():
    """Values and gradients on valid tokens; rows of padding before, between, behind, and of padding alone."""
    torch.manual_seed(0)
    sequence = torch.tensor([[5, 5, 5, 9, 9, 1, 0, 0, 2], [3, 3, 7, 7, 8, 8, 8, 8, 8], [0] * 9])
    valid = torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 1], [0, 0, 1, 1, 0, 1, 1, 1, 0], [0] * 9])
    tensors = [torch.randn(3, heads, 9, 4, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    spans = SampleSpans(sequence, valid)
    places = [[(each.start, each.stop) for each in row] for row in spans.places]
    assert places == [[(0, 3), (3, 5), (5, 6), (8, 9)], [(2, 4), (5, 8)], []]
    found = []
    for given in (spans, None):
        o, _ = causal_attention(module, *tensors, valid.bool(), sequence, given)
        o = o * valid[..., None, None]
        found.append((o, *torch.autograd.grad((o * o.detach().cos()).sum(), tensors)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_padding_inside_a_sample_is_attended_under_a_mask(pair):
    """As in every other batch, its tokens are passed over."""
    tiny, student = pair
    sequence = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]])
    valid = torch.tensor([[1, 0, 1, 1, 1, 1, 0, 1]])
    assert SampleSpans(sequence, valid).places is None
    ids = tiny.inputs("12345678")["input_ids"]
    with torch.no_grad():
        row = student(input_ids=ids, attention_mask=valid, linmu_sequence=sequence).logits
        for own in (slice(0, 4), slice(4, 8)):
            alone = student(input_ids=ids[:, own], attention_mask=valid[:, own], use_cache=False).logits
            kept = valid[:, own].bool()
            assert (row[:, own][kept] - alone[kept]).abs().max() < TOLERANCE
