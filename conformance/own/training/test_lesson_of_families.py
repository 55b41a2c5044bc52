"""Every family goes through the losses of all stages, and they are those of two models apart."""

from __future__ import annotations

import pytest
import torch

from linmu.reference import Lesson, attach_teacher, convert, logit_loss
from linmu.reference.training.presets import PRESETS
from linmu.reference.training.stages import stage_of
from linmu.reference.training.token_groups import supervised

from ..student.tiny_checkpoint import shake_mixers
from ..student.tiny_families import BUILDERS, Tiny

pytestmark = pytest.mark.trial_of_the_reference


@pytest.fixture(scope="module", params=BUILDERS)
def tiny(request) -> Tiny:
    return BUILDERS[request.param]()


def batches(tiny: Tiny) -> dict[str, dict[str, torch.Tensor]]:
    """Inputs by what they hold: pictures and text in one batch, text alone, a video."""
    made = {"text": tiny.inputs("a longer prompt of text", "short")}
    if tiny.image:
        one, *_, other = tiny.sizes
        made["pictures"] = tiny.inputs(f"see {{{one}}} and {{{other}}} now", f"{{{other}}}?", "no picture")
    return made | ({"video": tiny.video(3)} if tiny.video else {})


def labels_of(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The last three tokens of every row are supervised."""
    labels = inputs["input_ids"].masked_fill(~inputs["attention_mask"].bool(), -100)
    labels[:, :-3] = -100
    return labels


@pytest.mark.parametrize("stage", ["i", "ii", "iii"])
def test_every_stage_teaches_every_family(tiny, stage):
    teacher = tiny.teacher
    student = shake_mixers(convert(teacher))
    attach_teacher(student, teacher)
    student.requires_grad_(False)
    for layer in student.get_decoder().layers:
        layer.self_attn.mixer.requires_grad_(True)
    for objective in stage_of(stage, PRESETS["demo"]).objectives:
        lesson = Lesson(student, objective)
        for kind, inputs in batches(tiny).items():
            student.zero_grad()
            terms = lesson(labels_of(inputs), **inputs)
            terms["loss"].backward()
            assert all(bool(term.isfinite()) and term > 0 for term in terms.values()), (kind, terms)
            mixers = [layer.self_attn.mixer for layer in lesson.layers]
            moved = {name for mixer in mixers for name, p in mixer.named_parameters() if p.grad is not None}
            branches = {name.split(".")[0] for name in moved}
            assert {"flex_ma", "local_swin", "mix_proj"} <= branches, (kind, branches)  # text has its window
        lesson.close()


@torch.no_grad()
def test_both_give_the_logits_of_two_models_apart_though_pictures_are_encoded_once(tiny):
    teacher = tiny.teacher
    student = shake_mixers(convert(teacher))
    alone = shake_mixers(convert(teacher))
    attach_teacher(student, teacher)
    lesson = Lesson(student, stage_of("iii", PRESETS["demo"]).objectives[0])
    encoded = []
    tower = getattr(student.base_model, "visual", None) or getattr(student.base_model, "vision_tower", None)
    tower = tower or getattr(student.base_model, "vision_model", None)
    if tower is not None:
        tower.register_forward_hook(lambda *_: encoded.append(1))
    for kind, inputs in batches(tiny).items():
        labels = labels_of(inputs)
        positions, mask = supervised(labels)
        encoded.clear()
        got = lesson.run_both(inputs, positions)
        assert len(encoded) == (kind != "text")
        for role, model in (("teacher", teacher), ("student", alone)):
            wanted = model(**inputs, use_cache=False).logits[:, positions]
            torch.testing.assert_close(got[role][mask], wanted[mask], rtol=1e-4, atol=1e-4)
        assert logit_loss(got["student"], got["teacher"], mask) > 0
