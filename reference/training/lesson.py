"""The losses between teacher and student, and the passes that they are taken from.

Letters: B batch, L tokens, D width, V vocabulary, u the hidden states that go into mixer or layer l.

    mixer_l = mean over groups of tokens of hidden_loss(M-MATE_l(u), attention_l(u))                       (1)
    layer_l = mean over groups of tokens of hidden_loss(layer_l with M-MATE, layer_l with attention)       (2)
    logits  = KL(teacher ‖ student) over the supervised positions                                          (3)
    loss    = Σ weights · (mean_l mixer_l, mean_l layer_l, logits)                                         (4)

The groups are vision, text, and the positions that predict an answer. Choice: they weigh the same, since most
tokens are vision, while answers are made at the few that are not.

Where (1) and (2) take their input from (LinMU, arXiv 2601.01322 for the stages; the routes are a Choice):
    "teacher"  layer l of both sees the teacher's hidden states; every layer learns on its own
    "student"  the student runs on its own states, its targets are the teacher's run over the same batch
With "student" and `end_to_end` off, gradients stop between layers, so a layer still learns on its own.

Within `context_parallel` every rank brings the whole batch and teaches its own tokens: terms (1) to (3) are
its share, as those of processes with batches of their own are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..checks import require
from ..losses import hidden_loss, logit_loss
from .safety.distributed_means import energies, share, total
from .teacher_student import Call, TeacherStudentMixer, set_adapters
from .token_groups import supervised, token_masks


@dataclass(frozen=True)
class Objective:
    """What a stage minimises.

    Args:
        mixer: weight of (1).
        layer: weight of (2).
        logits: weight of (3).
        inputs: "teacher" or "student": whose hidden states a layer is taught on.
        end_to_end: let gradients flow from layer to layer; with "student" inputs only.
        temperature: of (3).
    """

    mixer: float = 0.0
    layer: float = 0.0
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


class Lesson(nn.Module):
    """Student with its teacher attached; calling it with a batch gives the loss of eq. (4).

    A copy of the lesson, or of its student, is a student with a lesson of its own, without graphs. If a batch
    raises an error, the student is left as student.

    Args:
        student: a model after `attach_teacher`.
        objective: weights and route.

    Attributes:
        layers: the converted decoder layers.
        mixers: the `TeacherStudentMixer` of each.
        layer_calls: what each was given in the last pass as teacher.
        layer_outputs: (B, L, D) by role, of each in the last passes.
        graphs: what runs steps from CUDA graphs; None = they run as they are.
    """

    graphs: Any = None

    hidden_loss = staticmethod(hidden_loss)
    logit_loss = staticmethod(logit_loss)

    def __init__(self, student: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.student = student
        self.objective = objective
        layers = student.get_decoder().layers
        self.layers = [layer for layer in layers if isinstance(layer.self_attn, TeacherStudentMixer)]
        require(
            bool(self.layers), "Lesson", "student must have its teacher attached", "none", "attach_teacher"
        )
        self.mixers = [layer.self_attn for layer in self.layers]
        self.role = "student"
        self.layer_calls: list[Call | None] = [None for _ in self.layers]
        self.layer_outputs: list[dict[str, Tensor]] = [{} for _ in self.layers]
        self.hooks = []
        for index, layer in enumerate(self.layers):
            before, after = partial(self._before_layer, index), partial(self._after_layer, index)
            self.hooks.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            self.hooks.append(layer.register_forward_hook(after))

    def __getstate__(self) -> dict[str, Any]:
        """What is copied and pickled: without graphs and what the last passes left."""
        nothing = {"layer_calls": [None for _ in self.layers], "layer_outputs": [{} for _ in self.layers]}
        return vars(self) | nothing | {"graphs": None}

    def accelerate(self) -> Lesson:
        """Let losses with gradients come from CUDA graphs, where a backend has them; the reference has none.
        Returns the lesson."""
        return self

    def close(self) -> nn.Module:
        """Take the hooks off and give the student back, its teacher still attached."""
        for hook in self.hooks:
            hook.remove()
        self.rest()
        return self.student

    def rest(self) -> None:
        """Leave the student as student, and drop what the last passes left."""
        self.set_role("student")
        self.forget()

    def forget(self) -> None:
        """Drop what the last passes left: outputs hold all that autograd recorded of them."""
        for index, mixer in enumerate(self.mixers):
            mixer.call = self.layer_calls[index] = None
            mixer.outputs.clear()
            self.layer_outputs[index].clear()

    def forward(self, labels: Tensor | None = None, **inputs: Tensor) -> dict[str, Tensor]:
        """Teach one batch.

        Args:
            labels: (B, L) int64, -100 where not supervised; needed for logits.
            **inputs: what the model's forward takes; `attention_mask` (B, L) says which tokens count.
                `inputs_embeds` (B, L, D) in the place of ids come with `linmu_coords` (B, L, 4) int64, as in
                `VisionLayout`.
        Returns:
            {"loss": eq. (4), "mixer": (1), "layer": (2), "logits": (3)}: scalars, those with weight 0 left
            out.
        Raises:
            ValueError: if the teacher was detached, or logits are taught without labels.
        """
        try:
            return self._taught(labels, inputs)
        except BaseException:
            self.rest()
            raise

    def _taught(self, labels: Tensor | None, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """`forward`."""
        attached = all(hasattr(layer.self_attn, "outputs") for layer in self.layers)
        must, hint = (
            "student must keep its teacher while it is taught",
            "attach_teacher, then a new Lesson",
        )
        require(attached, "Lesson", must, "one that was detached", hint)
        objective = self.objective
        positions, mask = supervised(labels) if objective.logits else (None, None)
        logits = {}
        if objective.inputs == "teacher":
            with torch.no_grad():
                self.run("teacher", inputs)
            self.follow_teacher(whole_layers=objective.layer > 0)
        else:
            logits = self.run_both(inputs, positions)
            mask = None if mask is None else mask[:, self.is_mine(positions, labels.shape[1])]
        return self.terms(logits, mask, self.token_groups(inputs, labels))

    def terms(
        self, logits: dict[str, Tensor], mask: Tensor | None, groups: list[Tensor]
    ) -> dict[str, Tensor]:
        """The result of `forward`, of what the last passes left.

        Args:
            logits: (B, n, V) by role, where they are taught.
            mask: (B, n) bool, which of them count.
            groups: masks (B, L) bool.
        """
        objective, terms = self.objective, {}
        if objective.mixer:
            terms["mixer"] = self._mean_loss(self.mixer_outputs, groups)
        if objective.layer:
            terms["layer"] = self._mean_loss(self.layer_outputs, groups)
        if objective.logits:
            loss = self.logit_loss(logits["student"], logits["teacher"], mask, objective.temperature)
            terms["logits"] = loss * share(mask.sum().to(loss))
        return {"loss": sum(getattr(objective, name) * term for name, term in terms.items()), **terms}

    def is_mine(self, positions: Tensor, length: int) -> Tensor:
        """(n,) bool: which positions of a prompt this rank teaches, all of them where prompts are whole."""
        context = self.student.context
        mine = slice(0, length) if context is None else context.slice(length)
        return (mine.start <= positions) & (positions < mine.stop)

    def run(self, role: str, inputs: dict[str, Tensor], positions: Tensor | None = None) -> Tensor:
        """One pass as teacher or student. Returns logits (B, n, V) of the positions (n,); of the last if
        None."""
        self.set_role(role)
        keep = 1 if positions is None else positions
        return self.student(**inputs, use_cache=False, logits_to_keep=keep).logits

    def run_both(self, inputs: dict[str, Tensor], positions: Tensor | None = None) -> dict[str, Tensor]:
        """A pass as teacher, without gradients, and one as student; images and videos are encoded once.

        Returns:
            logits by role, as of `run`.
        """
        decoder, calls = self.student.get_decoder(), []

        def keep_call(module: nn.Module, args: tuple, kwargs: dict) -> None:
            calls.append((args, kwargs))

        hook = decoder.register_forward_pre_hook(keep_call, with_kwargs=True)
        try:
            with torch.no_grad():
                teacher = self.run("teacher", inputs, positions)
        finally:
            hook.remove()
        if not self.student.has_vision(inputs):
            return {"teacher": teacher, "student": self.run("student", inputs, positions)}
        # The decoder is called as in the first pass: what leads to it needs no pictures and no layout.
        hook = decoder.register_forward_pre_hook(lambda *_: calls[0], with_kwargs=True)
        tokens = inputs["attention_mask"]
        pictures = self.student.prompt_layout.argument_names
        unseen = {name: value for name, value in inputs.items() if name not in pictures}
        unseen |= {
            "position_ids": calls[0][1].get("position_ids"),
            "linmu_coords": torch.full((*tokens.shape, 4), -1, device=tokens.device),
        }
        try:
            return {"teacher": teacher, "student": self.run("student", unseen, positions)}
        finally:
            hook.remove()

    def follow_teacher(self, whole_layers: bool = False) -> None:
        """Run every M-MATE on what its attention was given in the last pass as teacher; with `whole_layers`,
        every converted layer as student on what it was given."""
        self.set_role("student")
        for layer, mixer, call in zip(self.layers, self.mixers, self.layer_calls, strict=True):
            if whole_layers:
                args, kwargs = call
                layer(*args, **kwargs)
            elif getattr(layer, "gradient_checkpointing", False) and layer.training:
                # M-MATE draws nothing at random, and a CUDA graph cannot ask for the generator's state
                checkpoint(mixer.mix_teachers_input, use_reentrant=False, preserve_rng_state=False)
            else:
                mixer.mix_teachers_input()

    def set_role(self, role: str) -> None:
        """Choose who mixes. Adapters work for the student only."""
        self.role = role
        for mixer in self.mixers:
            mixer.role = role
        set_adapters(self.student, role == "student")

    @property
    def mixer_outputs(self) -> list[dict[str, Tensor]]:
        """(B, L, D) by role, of each converted layer's mixer in the last passes."""
        return [mixer.outputs for mixer in self.mixers]

    def token_groups(self, inputs: dict[str, Tensor], labels: Tensor | None) -> list[Tensor]:
        """Masks of `token_masks`; groups that are empty in the batches of all processes are left out."""
        groups = self.token_masks(inputs, labels)
        if (context := self.student.context) is not None:
            groups = {name: group[:, context.slice(group.shape[1])] for name, group in groups.items()}
        counts = total(torch.stack([group.sum() for group in groups.values()]))
        return [group for group, count in zip(groups.values(), counts.tolist(), strict=True) if count]

    def token_masks(self, inputs: dict[str, Tensor], labels: Tensor | None) -> dict[str, Tensor]:
        """Masks (B, L) bool of vision, text and answering tokens; padding is in none."""
        return token_masks(inputs["attention_mask"], self.vision_tokens(inputs), labels)

    def vision_tokens(self, inputs: dict[str, Tensor]) -> Tensor:
        """Mask (B, L) bool of image and video tokens: as the caller's coordinates say, otherwise the ids.

        Embeddings without coordinates are text, as the student's forward takes them.
        """
        coords, ids = inputs.get("linmu_coords"), inputs.get("input_ids")
        if coords is not None:
            return coords[..., 0] >= 0
        if ids is None:
            return torch.zeros_like(inputs["attention_mask"], dtype=torch.bool)
        return self.student.placeholder_mask(ids)

    def _mean_loss(self, outputs: list[dict[str, Tensor]], groups: list[Tensor]) -> Tensor:
        """Mean of the hidden loss over layers and groups of tokens."""
        losses = [
            self.hidden_loss(output["student"], output["teacher"], group)
            for output in outputs
            for group in groups
        ]
        sizes = energies([output["teacher"] for output in outputs], groups)
        return (torch.stack(losses) * share(sizes).to(losses[0])).mean()

    def _before_layer(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> Call | None:
        """Keep what a layer is given as teacher; stop gradients between layers, unless the student learns end
        to end."""
        if self.role == "teacher":
            self.layer_calls[index] = args, kwargs
        elif not self.objective.end_to_end:
            return replace_hidden(args, kwargs, lambda hidden: hidden.detach())
        return None

    def _after_layer(self, index: int, layer: nn.Module, args: tuple, output: Any) -> None:
        """Keep a layer's output."""
        self.layer_outputs[index][self.role] = output[0] if isinstance(output, tuple) else output


def replace_hidden(args: tuple, kwargs: dict, change: Callable[[Tensor], Tensor]) -> Call:
    """Apply `change` to the layer's hidden states, given by position or by name."""
    if args:
        return (change(args[0]), *args[1:]), kwargs
    return args, kwargs | {"hidden_states": change(kwargs["hidden_states"])}
