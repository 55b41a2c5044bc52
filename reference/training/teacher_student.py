"""One model that is teacher and student at once, and the losses between the two.

Letters: B batch, L tokens, D width, V vocabulary.

While a student is taught, every converted layer keeps the teacher's attention beside its M-MATE block, and a
switch says which of the two mixes. All other weights serve both, adapters are off for the teacher: one copy
of the weights.

    mixer_l = mean over groups of tokens of hidden_loss(M-MATE_l(u), attention_l(u))                       (1)
    block_l = mean over groups of tokens of hidden_loss(layer_l with M-MATE, layer_l with attention)       (2)
    logits  = KL(teacher ‖ student) over the supervised positions                                          (3)
    loss    = Σ weights · (mean_l mixer_l, mean_l block_l, logits)                                         (4)

The groups are vision, text, and the positions that predict an answer. Choice: they weigh the same, since most
tokens are vision, while answers are made at the few that are not.

Where (1) and (2) take their input from (LinMU, arXiv 2601.01322 for the stages; the routes are a Choice):
    "teacher"  layer l of both sees the teacher's hidden states; every layer learns on its own, in one pass
    "student"  the student runs on its own states, its targets are the teacher's run over the same batch
With "student" and `end_to_end` off, gradients stop between layers, so a layer still learns on its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import require
from ..losses import hidden_loss, logit_loss
from .safety.distributed_means import energies, share, total

IGNORED_LABEL = -100  # Hugging Face's mark of positions that are not supervised


@dataclass(frozen=True)
class Objective:
    """What a stage minimises.

    Args:
        mixer: weight of (1).
        block: weight of (2).
        logits: weight of (3).
        inputs: "teacher" or "student": whose hidden states a layer is taught on.
        end_to_end: let gradients flow from layer to layer; with "student" inputs only.
        temperature: of (3).
    """

    mixer: float = 0.0
    block: float = 0.0
    logits: float = 0.0
    inputs: str = "student"
    end_to_end: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        require(
            self.inputs in ("teacher", "student"),
            "Objective",
            "inputs must be teacher or student",
            self.inputs,
        )
        alone = self.inputs == "teacher" and (self.logits or self.end_to_end)
        require(not alone, "Objective", "logits and end_to_end need the student's own inputs", self)


class TeacherStudentMixer(nn.Module):
    """A decoder layer's mixer while it is being taught: attention and M-MATE in one place, one of them in
    use.

    Args:
        attention: the teacher's attention.
        mixer: the student's M-MATE, called in the same way.
    """

    def __init__(self, attention: nn.Module, mixer: nn.Module) -> None:
        super().__init__()
        self.attention, self.mixer = attention, mixer
        self.role = "student"
        self.compare = False
        self.heard: dict[str, Tensor] = {}

    def forward(self, *args: Any, linmu_role: str | None = None, **kwargs: Any) -> Any:
        """Mix as `linmu_role`, or else `role`, says and keep the output; with `compare`, run the other one on
        the same input too."""
        role = linmu_role or self.role
        output = (self.attention if role == "teacher" else self._mix)(*args, **kwargs)
        self.heard[role] = output[0]
        if self.compare and role == "teacher":
            self.heard["student"] = self._mix(*args, **kwargs)[0]
        return output

    def _mix(self, *args: Any, **kwargs: Any) -> Any:
        """Run M-MATE. Whatever the tokens, every trained tensor gets a gradient, if of 0: processes that
        share a batch must agree on which there are, and one process must do as they do."""
        output, *rest = self.mixer(*args, **kwargs)
        trained = [parameter for parameter in self.mixer.parameters() if parameter.requires_grad]
        if trained:
            output = output + 0 * sum(parameter.flatten()[0] for parameter in trained).to(output.dtype)
        return (output, *rest)


def attach_teacher(student: nn.Module, teacher: nn.Module) -> None:
    """Put the teacher's attention beside every M-MATE of `student`, in place.

    Args:
        student: what `convert(teacher)` returned.
        teacher: the model it was converted from; it stays usable, and its attention is shared, not copied.
    Raises:
        ValueError: if no layer of the student is converted, or its teacher is attached already.
    """
    layers, taught = student.get_decoder().layers, teacher.get_decoder().layers
    converted = [i for i, layer in enumerate(layers) if hasattr(layer.self_attn, "flex_ma")]
    require(bool(converted), "attach_teacher", "student must have M-MATE layers", "none", "convert it first")
    for i in converted:
        attention = copy.copy(
            taught[i].self_attn
        )  # same weights, but it must read the student's kind of mask
        attention.config = student.config.get_text_config(decoder=True)
        layers[i].self_attn = TeacherStudentMixer(attention, layers[i].self_attn)


def detach_teacher(student: nn.Module) -> None:
    """Undo `attach_teacher`: only the M-MATE blocks remain, and the student can be saved."""
    for layer in student.get_decoder().layers:
        if isinstance(layer.self_attn, TeacherStudentMixer):
            layer.self_attn = layer.self_attn.mixer


class Lesson(nn.Module):
    """Student with its teacher attached; calling it with a batch gives the loss of eq. (4).

    Args:
        student: a model after `attach_teacher`.
        objective: weights and route.
    """

    hidden_loss = staticmethod(hidden_loss)
    logit_loss = staticmethod(logit_loss)

    def __init__(self, student: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        self.layers = [
            layer
            for layer in student.get_decoder().layers
            if isinstance(layer.self_attn, TeacherStudentMixer)
        ]
        require(
            bool(self.layers), "Lesson", "student must have its teacher attached", "none", "attach_teacher"
        )
        self.role = "student"
        self.blocks: list[dict[str, Tensor]] = [{} for _ in self.layers]
        self.hooks = [
            hook
            for index, layer in enumerate(self.layers)
            for hook in (
                layer.register_forward_pre_hook(self._before_layer, with_kwargs=True),
                layer.register_forward_hook(self._after_layer(index), with_kwargs=True),
            )
        ]

    def close(self) -> nn.Module:
        """Take the hooks off and give the student back, its teacher still attached."""
        for hook in self.hooks:
            hook.remove()
        self.set_role("student")
        for layer in self.layers:
            layer.self_attn.heard.clear()
        return self.student

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        """Teach one batch.

        Args:
            labels: (B, L) int64, -100 where not supervised; needed for logits.
            **inputs: what the model's forward takes; `attention_mask` (B, L) says which tokens count.
        Returns:
            {"loss": eq. (4), "mixer": (1), "block": (2), "logits": (3)}: scalars, those with weight 0 left
            out.
        """
        terms = self._follow(inputs, labels)
        weights = {name: getattr(self.objective, name) for name in terms}
        return {"loss": sum(weights[name] * term for name, term in terms.items()), **terms}

    def _follow(self, inputs: dict[str, Tensor], labels: Tensor | None) -> dict[str, Tensor]:
        """The terms of eq. (4) that have a weight, on the objective's route."""
        goal, groups = self.objective, self.token_groups(inputs, labels)
        if goal.inputs == "teacher":
            self.run("teacher", inputs, compare=True)
            return self.hidden_terms(groups)
        positions, mask = supervised(labels) if goal.logits else (None, None)
        with pictures_encoded_once(self.student.base_model):
            with torch.no_grad():
                target = self.run("teacher", inputs, positions)
            prediction = self.run("student", inputs, positions)
        terms = self.hidden_terms(groups)
        if goal.logits:
            logits = self.logit_loss(prediction, target, mask, goal.temperature)
            terms["logits"] = logits * share(mask.sum().to(logits))
        return terms

    def run(
        self, role: str, inputs: dict[str, Tensor], positions: Tensor | None = None, compare: bool = False
    ) -> Tensor:
        """One pass as teacher or student. Returns logits (B, n, V) of the positions (n,); of the last if
        None."""
        self.set_role(role, compare)
        keep = 1 if positions is None else positions
        return self.student(**inputs, use_cache=False, logits_to_keep=keep).logits

    def set_role(self, role: str, compare: bool = False) -> None:
        """Choose who mixes. Adapters work for the student only. `compare`: M-MATE listens in on the
        teacher."""
        self.role, self.compare = role, compare
        whole_layers = compare and self.objective.block > 0
        for layer in self.layers:
            layer.self_attn.role = role
            layer.self_attn.compare = compare and not whole_layers
        set_adapters(self.student, role == "student")

    def token_groups(self, inputs: dict[str, Tensor], labels: Tensor | None) -> list[Tensor]:
        """Masks (B, L) of vision, text and answering tokens, padding in none; empty groups are left out."""
        valid, vision = inputs["attention_mask"].bool(), self.vision_tokens(inputs)
        answering = torch.zeros_like(valid)
        if labels is not None:
            answering[:, :-1] = labels[:, 1:] != IGNORED_LABEL
        groups = [valid & vision, valid & ~vision, valid & answering]
        counts = total(torch.stack([group.sum() for group in groups]))  # of all processes: all must agree
        return [group for group, count in zip(groups, counts.tolist(), strict=True) if count]

    def vision_tokens(self, inputs: dict[str, Tensor]) -> Tensor:
        """Mask (B, L) of image and video tokens."""
        return self.student.placeholder_mask(inputs["input_ids"])

    def hidden_terms(self, groups: list[Tensor]) -> dict[str, Tensor]:
        """Eqs. (1) and (2), means over layers, from what the last passes left."""
        terms = {}
        if self.objective.mixer:
            terms["mixer"] = self._mean_loss([layer.self_attn.heard for layer in self.layers], groups)
        if self.objective.block:
            terms["block"] = self._mean_loss(self.blocks, groups)
        return terms

    def _mean_loss(self, pairs: list[dict[str, Tensor]], groups: list[Tensor]) -> Tensor:
        """Mean of the hidden loss over layers and groups of tokens."""
        losses = [
            self.hidden_loss(pair["student"], pair["teacher"], group) for pair in pairs for group in groups
        ]
        sizes = energies([pair["teacher"] for pair in pairs], groups)
        return (torch.stack(losses) * share(sizes).to(losses[0])).mean()

    def _before_layer(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Stop gradients between layers, unless the student learns end to end."""
        if self.role == "student" and not self.objective.end_to_end:
            return replace_hidden(args, kwargs, lambda hidden: hidden.detach())
        return None

    def _after_layer(self, index: int):
        """Keep the layer's output; when comparing whole layers, run it as student on the teacher's input as
        well."""

        def hook(layer: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            self.blocks[index][self.role] = first(output)
            if self.compare and self.objective.block:
                # an argument, not a switch: gradient checkpointing runs the layer again when it is needed
                as_student = kwargs | {"linmu_role": "student"}
                self.blocks[index]["student"] = first(layer.forward(*args, **as_student))

        return hook


def supervised(labels: Tensor | None) -> tuple[Tensor, Tensor]:
    """Positions whose next token is supervised in some row: (n,) int64, and (B, n) bool, which rows count
    there."""
    require(labels is not None, "Lesson", "labels must be given where logits are taught", None)
    mask = labels[:, 1:] != IGNORED_LABEL
    positions = mask.any(0).nonzero().squeeze(-1)
    return positions, mask[:, positions]


@contextmanager
def pictures_encoded_once(model: nn.Module) -> Iterator[None]:
    """Within, the first pass encodes images and videos for all: the frozen tower gives the same again."""

    def once(encode: Callable) -> Callable:
        kept: list[Any] = []

        def encode_or_recall(*args: Any, **kwargs: Any) -> Any:
            if not kept:
                kept.append(encode(*args, **kwargs))
            return kept[0]

        return encode_or_recall

    names = ("get_image_features", "get_video_features")
    for name in names:
        setattr(model, name, once(getattr(model, name)))
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)


def first(output: Any) -> Tensor:
    """The hidden states of a decoder layer's output, tensor or tuple."""
    return output[0] if isinstance(output, tuple) else output


def replace_hidden(args: tuple, kwargs: dict, change) -> tuple[tuple, dict]:
    """Apply `change` to the layer's hidden states, given by position or by name."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}


def set_adapters(model: nn.Module, enabled: bool) -> None:
    """Switch every peft adapter in `model`, and every tuned copy of a module, on or off. What is trained
    stays so: peft alone would freeze what it switches off."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    for module in model.modules():
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            trained = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
            module.enable_adapters(enabled)
            for parameter, is_trained in trained:
                parameter.requires_grad_(is_trained)


@contextmanager
def temporary_objective(lesson: Lesson, objective: Objective) -> Iterator[Lesson]:
    """Use another objective for a while, without gradients: to measure what is not being trained."""
    trained, was_training = lesson.objective, lesson.training
    lesson.objective = objective
    lesson.eval()
    try:
        with torch.no_grad():
            yield lesson
    finally:
        lesson.objective = trained
        lesson.train(was_training)
