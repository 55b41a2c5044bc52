"""Processes that each compute a slice of a prompt compare a student's forwards with those of one process."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from linmu import optimized, reference
from linmu.reference.student.cache import CACHE_NAME
from linmu.reference.student.split_forward import context_parallel, evenly

from .tiny_checkpoint import shake_mixers
from .tiny_families import BUILDERS

NEAR = {"rtol": 1e-9, "atol": 1e-10}
ROUNDED = {"rtol": 1e-5, "atol": 1e-6}  # of a loss that transformers computes in float32
OPTIONS = {"text_window": 4, "window_thw": (2, 2, 2)}
STUDENTS = {  # family: package and converted layers
    "qwen3_vl": (optimized, None),
    "internvl": (optimized, [0, 2]),
    "llama": (reference, [1]),
}
Lengths = Callable[[int, int], Sequence[int]]


def unevenly(first: int, last: int, length: int, ranks: int) -> list[int]:
    """The first and the last rank's tokens, the rest between them."""
    middle = evenly(length - first - last, ranks - 2) if ranks > 2 else []
    return [first, *middle, last] if middle else [length - last, last]


UNEVEN = partial(unevenly, 1, 2)
SPLITS: dict[int, dict[str, Lengths]] = {
    2: {"qwen3_vl": evenly, "llama": UNEVEN},
    3: {"qwen3_vl": UNEVEN, "internvl": evenly, "llama": UNEVEN},
}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Of all parameters, which forget them."""
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return {n: torch.zeros_like(model.get_parameter(n)) if g is None else g for n, g in found.items()}


@dataclass
class Case:
    """A student, a padded batch, and what one process makes of them."""

    student: nn.Module
    inputs: dict[str, Tensor]
    labels: Tensor
    logits: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    tokens: Tensor
    state: Any

    @classmethod
    def of(cls, family: str) -> Case:
        package, layers = STUDENTS[family]
        tiny = BUILDERS[family]()
        student = shake_mixers(package.convert(tiny.teacher, OPTIONS, layers=layers)).double()
        inputs = tiny.inputs("hello you dear", "a {wide} b {tall} d" if tiny.image else "and you", seed=3)
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        outputs = student(**inputs, labels=labels, use_cache=False)
        outputs.loss.backward()
        with torch.no_grad():
            tokens = student.generate(**inputs, max_new_tokens=3, do_sample=False)
            state = student(**inputs, use_cache=True)[CACHE_NAME]
        found = gradients(student)
        return cls(
            student, inputs, labels, outputs.logits.detach(), outputs.loss.detach(), found, tokens, state
        )

    @property
    def length(self) -> int:
        return self.labels.shape[1]

    def near(self, got: Tensor, wanted: Tensor, mine: slice) -> None:
        """Logits of valid tokens: what padding gives is anything."""
        valid = self.inputs["attention_mask"][:, mine].bool()
        torch.testing.assert_close(got[valid], wanted[:, mine][valid], **NEAR)


def learns(case: Case, mesh: DeviceMesh, lengths: Lengths) -> None:
    """Logits are the rank's; losses and gradients add up."""
    with context_parallel(case.student, mesh, lengths):
        outputs = case.student(**case.inputs, labels=case.labels, use_cache=False)
        mine = case.student.context.slice(case.length)
        outputs.loss.backward()
    assert case.student.context is None
    case.near(outputs.logits, case.logits, mine)
    loss = outputs.loss.detach()
    dist.all_reduce(loss, group=mesh.get_group())
    torch.testing.assert_close(loss, case.loss, **ROUNDED)
    for name, gradient in gradients(case.student).items():
        dist.all_reduce(gradient, group=mesh.get_group())
        torch.testing.assert_close(
            gradient, case.gradients[name], **ROUNDED, msg=lambda m, n=name: f"{n}: {m}"
        )


def packs(case: Case, mesh: DeviceMesh, lengths: Lengths) -> None:
    """Rows of several samples: logits are the rank's, losses and gradients add up."""
    sequence, labels = torch.zeros_like(case.labels), case.labels.clone()
    for row, valid in enumerate(case.inputs["attention_mask"].bool()):
        places = valid.nonzero().flatten()
        sequence[row, places[2] :], sequence[row, places[-1]] = 3, 1
        labels[row, places[0]] = -100  # which padding, where logits may be anything, would foretell
    if case.student.prompt_layout is not None:  # whose first picture is not cut
        is_picture = case.student.placeholder_mask(case.inputs["input_ids"][1:])
        sequence[1, : int(is_picture.int().argmax())] = 3
    given = {**case.inputs, "labels": labels, "linmu_sequence": sequence, "use_cache": False}
    wanted = case.student(**given)
    wanted.loss.backward()
    whole = gradients(case.student)
    with context_parallel(case.student, mesh, lengths):
        outputs = case.student(**given)
        mine = case.student.context.slice(case.length)
        outputs.loss.backward()
    found = gradients(case.student)
    valid = case.inputs["attention_mask"][:, mine].bool()
    torch.testing.assert_close(outputs.logits[valid], wanted.logits[:, mine][valid], **NEAR)
    assert not torch.allclose(wanted.logits[1, -1], case.logits[1, -1], atol=1e-3)  # samples matter
    for name, gradient in found.items():
        dist.all_reduce(gradient, group=mesh.get_group())
        torch.testing.assert_close(gradient, whole[name], **ROUNDED, msg=lambda m, n=name: f"{n}: {m}")


def states(cache: Any) -> list[Tensor]:
    """What each layer of a cache keeps."""
    kept = []
    for layer in cache.layers:
        kept += layer.state.tensors if hasattr(layer, "state") else (layer.keys, layer.values)
    return kept


@torch.no_grad()
def goes_on(case: Case, mesh: DeviceMesh, lengths: Lengths) -> None:
    """The prefill leaves the whole prompt's state on every rank, from which it decodes or goes on alone."""
    student, inputs, positions = case.student, case.inputs, torch.tensor([0, 2, case.length - 1])
    with context_parallel(student, mesh, lengths):
        tokens = student.generate(**inputs, max_new_tokens=3, do_sample=False)
        mine = student.context.slice(case.length)
        last = student(**inputs, use_cache=True, logits_to_keep=3)
        some = student(**inputs, use_cache=False, logits_to_keep=positions).logits
    assert torch.equal(tokens, case.tokens)
    torch.testing.assert_close(last.logits, case.logits[:, -3:], **NEAR)
    held = positions[(mine.start <= positions) & (positions < mine.stop)]
    valid = inputs["attention_mask"][:, held].bool()
    torch.testing.assert_close(some[valid], case.logits[:, held][valid], **NEAR)
    cache = last[CACHE_NAME]
    assert cache.get_seq_length() == case.length
    for one, other in zip(states(cache), states(case.state), strict=True):
        torch.testing.assert_close(one, other, **NEAR)
    new = torch.tensor([[5, 6, 7, 8, 9], [11, 12, 13, 14, 15]])
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1)
    given = {"input_ids": new, "attention_mask": mask, "use_cache": True}
    if hasattr(student.base_model, "rope_deltas"):  # which counts from the prompt that it saw last
        given["position_ids"] = mask.cumsum(1)[:, -new.shape[1] :] - 1
    wanted = student(**given, **{CACHE_NAME: copy.deepcopy(cache)}).logits
    with context_parallel(student, mesh, evenly):
        got = student(**given, **{CACHE_NAME: cache})
        mine = student.context.slice(new.shape[1])
    torch.testing.assert_close(got.logits, wanted[:, mine], **NEAR)
    assert cache.get_seq_length() == case.length + 5


OBJECTIVES = [
    reference.Objective(mixer=1.0, layer=0.5, inputs="teacher"),
    reference.Objective(mixer=1.0, layer=0.5, logits=2.0),
    reference.Objective(layer=0.5, logits=2.0, end_to_end=True),
]


@dataclass
class Taught:
    """A student with its teacher, and what one process learns of a batch whose end alone is supervised."""

    student: nn.Module
    inputs: dict[str, Tensor]
    labels: Tensor
    wanted: list[tuple[dict[str, Tensor], dict[str, Tensor]]]

    @classmethod
    def of(cls, family: str, package: Any) -> Taught:
        tiny = BUILDERS[family]()
        student = shake_mixers(package.convert(tiny.teacher, OPTIONS)).double()
        package.attach_teacher(student, tiny.teacher.double())
        inputs = tiny.inputs("hello you dear", "a {wide} b {tall} d", seed=4)
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        labels = inputs["input_ids"].clone()
        labels[:, :-3] = -100
        for name, parameter in student.named_parameters():
            parameter.requires_grad_(".mixer." in name)
        taught = cls(student, inputs, labels, [])
        taught.wanted = [taught.learn(objective) for objective in OBJECTIVES]
        return taught

    def learn(self, objective: reference.Objective) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The loss's terms, and the gradients."""
        lesson = self.student.linmu_backend.Lesson(self.student, objective)
        inputs = dict(self.inputs)
        if objective is OBJECTIVES[1]:  # packed: text, then the rest; one token at the end of each
            inputs["linmu_sequence"] = torch.zeros_like(self.labels)
            inputs["linmu_sequence"][:, -1:] = 1
        terms = lesson(labels=self.labels, **inputs)
        terms["loss"].backward()
        lesson.close()
        return {name: term.detach() for name, term in terms.items()}, gradients(self.student)


def teaches(taught: Taught, mesh: DeviceMesh, lengths: Lengths) -> None:
    """Terms and gradients, averaged as data-parallel training averages them, are those of one process."""
    for objective, wanted in zip(OBJECTIVES, taught.wanted, strict=True):
        with context_parallel(taught.student, mesh, lengths):
            found = taught.learn(objective)
        for got, whole in zip(found, wanted, strict=True):
            for name, tensor in got.items():
                dist.all_reduce(tensor)
                mean = tensor / dist.get_world_size()
                off = (mean - whole[name]).norm() / whole[name].norm().clamp(min=1e-9)
                assert off < 1e-6, (objective, name, off)  # shares are float32


def refuses(case: Case, mesh: DeviceMesh) -> None:
    """What cannot be split is said to be so, on every rank, before anything is sent."""
    ids = case.inputs["input_ids"]
    with context_parallel(case.student, mesh):
        with pytest.raises(ValueError, match="lengths must be 3 numbers >= 1"):
            case.student(input_ids=ids[:, :2])
        with pytest.raises(ValueError, match="output_router_logits must be off"):
            case.student(input_ids=ids, output_router_logits=True)
        with pytest.raises(ValueError, match="split once"), context_parallel(case.student, mesh):
            pass
    square = DeviceMesh("cpu", [list(range(mesh.size()))])
    with (
        pytest.raises(ValueError, match="mesh must have one dimension"),
        context_parallel(case.student, square),
    ):
        pass


def work(cases: dict[str, Case], lesson: Taught) -> None:
    """One of three processes; cases of two of them, then of all."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for ranks, splits in SPLITS.items():
        mesh = DeviceMesh("cpu", list(range(ranks)))  # every process makes it, those in it use it
        for family, lengths in splits.items() if dist.get_rank() < ranks else ():
            try:
                learns(cases[family], mesh, lengths)
                if ranks == 3:
                    goes_on(cases[family], mesh, lengths)
                    packs(cases[family], mesh, lengths)
            except Exception as error:
                raise AssertionError(f"{family}, rank {dist.get_rank()} of {ranks}") from error
    teaches(lesson, mesh, UNEVEN)
    refuses(cases["llama"], mesh)
    dist.barrier()
    dist.destroy_process_group()
