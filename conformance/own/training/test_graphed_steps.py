"""Steps of a lesson from graphs give the losses and gradients of the lesson as it is, and say where not.

On a CPU a tape stands for a CUDA graph: all but the capture itself is the product's.
"""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from linmu import optimized
from linmu.optimized.graphs.decoder import Limits
from linmu.optimized.graphs.training_step import TrainingGraphs
from linmu.optimized.training import Lesson, Objective, attach_teacher
from linmu.reference.training.parameter_groups import MIXER, MLPS, belongs
from linmu.reference.training.safety.memory import leave_inputs_alone, recompute_layers

from ..student.tape import tape
from ..student.tiny_checkpoint import build_teacher, every_kind, shake_mixers
from ..student.tiny_families import text_decoder

LIMITS = Limits((8, 12, 16, 24, 32, 48, 64), 8, 512, 2)
OBJECTIVES = {
    "i": Objective(mixer=1.0, inputs="teacher"),
    "ii, teacher's": Objective(mixer=1.0, layer=0.5, inputs="teacher"),
    "ii, student's": Objective(mixer=1.0, layer=0.5),
    "iii": Objective(layer=0.3, logits=1.0, end_to_end=True, temperature=2.0),
}
STAGES = pytest.mark.parametrize("stage", OBJECTIVES)


def lesson_of(teacher: nn.Module, recompute: bool = False) -> Lesson:
    """Its students learn M-MATE and adapters of the MLPs, in float64."""
    student = shake_mixers(optimized.convert(teacher, {"text_window": 4})).double()
    attach_teacher(student, teacher.double())
    if recompute:
        recompute_layers(student)
    torch.manual_seed(0)
    target = r".*layers\.\d+\.mlp\.(gate_proj|up_proj|down_proj)"
    get_peft_model(student, LoraConfig(r=2, target_modules=target, init_lora_weights=False))
    leave_inputs_alone(student)
    for name, parameter in student.double().named_parameters():
        if ".visual." not in name:
            parameter.requires_grad_(belongs(name, (*MIXER, *MLPS)))
    return Lesson(student.train(), OBJECTIVES["i"])


class Both:
    """One lesson twice, over weights of their own: as it is, and from graphs."""

    def __init__(self, teacher: nn.Module, recompute: bool = False) -> None:
        self.eager, self.fast = (lesson_of(copy.deepcopy(teacher), recompute) for _ in range(2))
        self.fast.graphs = TrainingGraphs(self.fast, LIMITS, lambda: tape)

    def teach(self, *batches: dict[str, Tensor]) -> None:
        """Forward and backward of batches, gradients accumulated; losses and gradients must be the same."""
        for batch in batches:
            terms = [lesson(**batch) for lesson in (self.eager, self.fast)]
            for each in terms:
                (each["loss"] / len(batches)).backward()
            want, got = ({name: term.detach() for name, term in each.items()} for each in terms)
            torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-14)
        wanted = dict(self.eager.named_parameters())
        for name, parameter in self.fast.named_parameters():
            want = wanted[name].grad
            assert (parameter.grad is None) == (want is None), name
            if want is not None:
                atol = 1e-12 * max(1e-3, want.abs().max().item())
                torch.testing.assert_close(parameter.grad, want, rtol=1e-9, atol=atol, msg=name)

    def set(self, objective: Objective) -> None:
        for lesson in (self.eager, self.fast):
            lesson.objective = objective
            lesson.zero_grad()

    def step(self) -> None:
        """What an optimizer does: weights change where they lie."""
        for lesson in (self.eager, self.fast):
            with torch.no_grad():
                for parameter in lesson.parameters():
                    if parameter.grad is not None:
                        parameter.sub_(0.01 * parameter.grad)
            lesson.zero_grad()


@pytest.fixture(scope="module")
def text() -> Both:
    return Both(text_decoder(llama=True).teacher)


@pytest.fixture(scope="module")
def sees() -> Both:
    return Both(build_teacher())


def words(seed: int, length: int = 11, rows: int = 2, padding: int = 0, packed: bool = False) -> dict:
    """A batch of text: its first row padded, the first tokens not supervised."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 20, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    mask[0, length - padding :] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, : 4 + seed % 3] = -100
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if packed:
        places = torch.arange(length).expand(rows, length)
        begin = 3 + seed % 4
        batch["linmu_sequence"] = (places >= begin).long()
        batch["position_ids"] = torch.where(places < begin, places, places - begin)
    return batch


@STAGES
def test_steps_of_text_are_those_of_the_lesson(text, stage):
    text.set(OBJECTIVES[stage])
    before = text.fast.graphs.runs
    for number in range(3):  # the first of a shape runs as it is, the second is captured
        text.teach(words(number))
        text.step()
    assert text.fast.graphs.runs - before == 2


@pytest.mark.parametrize("kind", ["padded", "packed", "recomputed"])
def test_padded_packed_and_recomputed_steps_accumulate(text, kind):
    """Of shapes that share a graph, and of objectives that follow each other."""
    pair = text
    if kind == "recomputed":
        pair = Both(text_decoder().teacher, recompute=True)
    for stage in ("ii, teacher's", "iii"):
        pair.set(OBJECTIVES[stage])
        before = pair.fast.graphs.runs
        batches = [
            words(seed, length, padding=2 * (kind == "padded"), packed=kind == "packed")
            for seed, length in ((0, 11), (1, 11), (2, 10), (3, 11))
        ]
        pair.teach(*batches)
        pair.step()
        assert pair.fast.graphs.runs - before == 3


@STAGES
def test_steps_with_pictures_are_those_of_the_lesson(sees, stage):
    sees.set(OBJECTIVES[stage])
    before = sees.fast.graphs.runs
    inputs = every_kind("right")
    inputs = {name: each.double() if each.is_floating_point() else each for name, each in inputs.items()}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    labels[:, :5] = -100
    for _ in range(3):
        sees.teach(inputs | {"labels": labels})
        sees.step()
    assert sees.fast.graphs.runs - before == 2
