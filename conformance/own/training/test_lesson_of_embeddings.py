"""A lesson over embeddings: the losses and gradients of the same prompt, given as ids."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from linmu.reference import Lesson, Objective, attach_teacher, convert
from linmu.reference.prompts.grids import grid_coordinates, with_newlines
from linmu.reference.training.presets import PRESETS
from linmu.reference.training.stages import stage_of

from ..student.tiny_checkpoint import shake_mixers
from ..student.tiny_families import BUILDERS

pytestmark = pytest.mark.trial_of_the_reference
SLOTS, SIDE = 3, 2
FIRST, LAST = 2, 2 + SLOTS * (SIDE**2 + 1)  # a video with its newlines, as NVILA shows it


@pytest.fixture(scope="module")
def student() -> nn.Module:
    """A text decoder's student that can take vision, in double precision, its teacher attached."""
    teacher = BUILDERS["qwen2"]().teacher.double()
    student = shake_mixers(convert(teacher, {"text_only": False, "window_thw": (2, 2, 2)})).double()
    attach_teacher(student, teacher)
    student.requires_grad_(False)
    for layer in student.get_decoder().layers:
        layer.self_attn.mixer.requires_grad_(True)
    return student


def ids_and_rest() -> tuple[Tensor, dict[str, Tensor]]:
    """A row with a video, and one of text, padded; and what comes with their ids."""
    length = LAST + 3
    ids = torch.arange(2 * length).view(2, length) % 90 + 3
    cells = with_newlines(grid_coordinates(SLOTS, SIDE, SIDE), SIDE**2)
    coords = torch.full((2, length, 4), -1)
    coords[0, FIRST:LAST] = torch.cat([cells[:, :1].clamp(max=0), cells], dim=1)
    mask = torch.ones_like(ids)
    mask[1, -4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :-6] = -100
    return ids, {"labels": labels, "attention_mask": mask, "linmu_coords": coords}


def terms_and_gradients(
    student: nn.Module, objective: Objective, **batch: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    lesson = Lesson(student, objective)
    student.zero_grad()
    terms = lesson(**batch)
    terms["loss"].backward()
    lesson.close()
    gradients = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    return {name: term.detach() for name, term in terms.items()}, gradients


@pytest.mark.parametrize("stage", ["i", "ii", "iii"])
def test_embeddings_with_coordinates_teach_as_their_ids_do(student, stage):
    ids, rest = ids_and_rest()
    embeds = student.get_input_embeddings()(ids)
    for objective in stage_of(stage, PRESETS["demo"]).objectives:
        wanted = terms_and_gradients(student, objective, input_ids=ids, **rest)
        terms, gradients = terms_and_gradients(student, objective, inputs_embeds=embeds, **rest)
        torch.testing.assert_close((terms, gradients), wanted, rtol=1e-10, atol=1e-12)
        assert {name.split(".")[-3] for name in gradients} >= {"flex_ma", "local_swin"}
        text = rest | {"linmu_coords": torch.full_like(rest["linmu_coords"], -1)}
        blind, _ = terms_and_gradients(student, objective, inputs_embeds=embeds, **text)
        assert abs(blind["loss"] - terms["loss"]) > 1e-3 * terms["loss"]


def test_groups_of_tokens_follow_the_coordinates(student):
    ids, rest = ids_and_rest()
    masks = Lesson(student, Objective(mixer=1.0)).token_masks(
        {"inputs_embeds": student.get_input_embeddings()(ids)} | rest, rest["labels"]
    )
    video = [[FIRST + slot * (SIDE**2 + 1) + i for i in range(SIDE**2)] for slot in range(SLOTS)]
    assert masks["vision"].nonzero().tolist() == [[0, position] for slot in video for position in slot]
    assert bool((masks["text"] == (rest["attention_mask"].bool() & ~masks["vision"])).all())
