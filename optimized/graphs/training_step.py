"""A step's losses and gradients from one CUDA graph: a batch is copied into buffers, and all kernels run.

Letters: B batch, L tokens, D width, n positions whose logits are taught.

Forward and backward of a batch are captured together, since gradients of the loss are wanted of every batch
that is taught. `Replay` hands them to autograd: to all that follows (accumulation, clipping, an optimizer,
the Trainer) a step from a graph is one function of the trained parameters.

What depends on values is asked before, in one question: whether there is padding, which groups of tokens
there are, how many positions are supervised. The answers, and shapes in buckets, choose the graph. Rows are
padded on the left, which is exact. Embeddings of pictures and the layout of their tokens are made before,
too.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...reference.student.packed_rows import started_anew
from ...reference.student.unconverted_attention import padding_is_known
from ...reference.training.batch_facts import Facts, ask
from ...reference.training.lesson import Lesson
from ...reference.training.safety.distributed_means import processes
from ...reference.training.token_groups import is_answered
from ..engine import say_once
from ..engine.once import one_forward
from ..engine.torch_state import is_observed
from ..layout import VisionLayout, fast
from ..m_mate import MMATE
from .capture import Capture, copy_all
from .decoder import DECODERS, FIXED_ROPE, Limits, zeros_like
from .obstacles import OBSERVED, state_of_device, watches
from .static_layout import StaticLayout, is_within_bounds

LENGTHS = (64, 128, 192, *(2**k * quarters // 4 for k in range(8, 16) for quarters in (4, 5, 6, 7)), 65536)
LIMITS = Limits(LENGTHS, most_rows=1024, most_tokens=2**17, most_graphs=16)
EAGER_STEPS = 1  # of each shape, before it is captured: one that is met once is not worth it
HOW_TO_TURN_OFF = "distill.py --no_cuda_graphs, or a Lesson without accelerate(), runs without them"

TEXT = {"input_ids", "attention_mask", "position_ids", "linmu_sequence"}  # what graphs know of text
PER_TOKEN = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "linmu_sequence")


class Problem(NamedTuple):
    """A batch as graphs take it.

    Args:
        call: the decoder's arguments, tensors of L tokens.
        layout: "coords" (B, L, 4) of vision tokens; empty = text.
        groups: masks (B, L) bool by name.
        answers: "positions" (n,) int64 and "mask" (B, n) bool; empty = logits are not taught.
        has_padding: whether the attention mask must be heeded.
    """

    call: dict[str, Tensor]
    layout: dict[Any, Tensor]
    groups: dict[str, Tensor]
    answers: dict[str, Tensor]
    has_padding: bool

    @property
    def parts(self) -> tuple[dict[Any, Tensor], ...]:
        """All tensors, by what they are for."""
        return self.call, self.layout, self.groups, self.answers

    @property
    def tensors(self) -> list[Tensor]:
        """All of them, in order."""
        return [tensor for part in self.parts for tensor in part.values()]

    @property
    def shape(self) -> tuple:
        """What problems of one graph have in common."""
        of_parts = (
            tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in part.items())
            for part in self.parts
        )
        return (*of_parts, self.has_padding)

    def buffers(self) -> Problem:
        """One of the same shape, for values to be copied into."""
        new = ({name: zeros_like(tensor) for name, tensor in part.items()} for part in self.parts)
        return Problem(*new, self.has_padding)


@dataclass
class Graph:
    """A captured step.

    Args:
        buffers: what it reads.
        replay: runs it.
        terms: what `Lesson.forward` returns; each run overwrites them.
        reached: which of the trained parameters have a gradient.
    """

    buffers: Problem
    replay: Callable[[], None] | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)
    reached: list[int] = field(default_factory=list)


class TrainingGraphs:
    """The steps of a lesson, from graphs where nothing watches them.

    Args:
        lesson: whose `forward` asks it.
        limits: what is captured.
        new_capture: makes what captures, on the lesson's device.
    """

    def __init__(self, lesson: Lesson, limits: Limits, new_capture: Callable[[], Capture]) -> None:
        self.lesson, self.limits, self.new_capture = lesson, limits, new_capture
        self.capture: Capture | None = None
        self.made_of: tuple = ()
        self.runs = 0
        self.clear()

    def clear(self) -> None:
        """Forget all graphs, and the buffers of gradients."""
        self.graphs: OrderedDict[tuple, Graph] = OrderedDict()
        self.seen: dict[tuple, int] = {}
        self.trained: list[nn.Parameter] = []
        self.gradients: list[Tensor] = []

    def __call__(
        self, labels: Tensor | None, inputs: dict[str, Tensor], facts: Facts | None = None
    ) -> dict[str, Tensor] | None:
        """`Lesson.forward` from a graph; None where it has to run as it is.

        Only "loss" has a gradient; the other terms are values.

        Raises:
            RuntimeError: if a graph cannot be captured or run.
        """
        if not torch.is_grad_enabled() or "attention_mask" not in inputs:
            return None
        obstacle = self.obstacle(inputs)
        if obstacle is None:
            problem = self.problem(labels, inputs, facts)
            if isinstance(problem, Problem):
                return self.run(problem)
            obstacle = problem
        say_once(f"steps: {obstacle}", f"training steps run without CUDA graphs: {obstacle}")
        return None

    @property
    def decoder(self) -> nn.Module:
        """The student's."""
        return self.lesson.student.get_decoder()

    @property
    def device(self) -> torch.device:
        """Where the decoder is."""
        return self.decoder.embed_tokens.weight.device

    def obstacle(self, inputs: dict[str, Tensor]) -> str | None:
        """Why steps cannot run from graphs now; None = they can."""
        found = state_of_torch(self.device)
        if found:
            return found
        if any(type(parameter) is not nn.Parameter for parameter in self.lesson.parameters()):
            return "weights that are sharded or quantised"
        made_of = tuple((each.data_ptr(), each.requires_grad) for each in self.lesson.parameters())
        if made_of != self.made_of:
            self.clear()
            self.made_of = made_of
            self.trained = [each for each in self.lesson.parameters() if each.requires_grad]
            self.kind = kind_of(self.lesson)
        found = self.kind or hooks_on(self.lesson)
        if found:
            return found
        if not self.trained:
            return "nothing is trained"
        tokens = inputs["attention_mask"]
        if tokens.ndim != 2 or tokens.device != self.device:
            return "a mask other than (B, L) on the decoder's device"
        batch, length = tokens.shape
        if batch > self.limits.most_rows or self.limits.bucket(length) is None:
            return f"batches beyond {self.limits.most_rows} rows of {self.limits.lengths[-1]} tokens"
        if batch * self.limits.bucket(length) > self.limits.most_tokens:
            return f"batches of more than {self.limits.most_tokens} tokens, padding included"
        if self.lesson.student.prompt_layout is not None:
            return None
        other = sorted(inputs.keys() - TEXT)
        if other or inputs.get("input_ids") is None:
            return f"the arguments {', '.join(other) or 'without input_ids'}"
        if inputs.get("position_ids") is not None and inputs.get("linmu_sequence") is None:
            return "position_ids without linmu_sequence, which may tell of packed rows"
        return None

    def problem(self, labels: Tensor | None, inputs: dict[str, Tensor], facts: Facts | None) -> Problem | str:
        """A batch in the shapes of its graph, or why there is none."""
        lesson, taught = self.lesson, bool(self.lesson.objective.logits)
        masks = lesson.token_masks(inputs, labels)
        if facts is None:
            facts = ask(masks, inputs["attention_mask"], labels)
        if not facts.groups or (taught and labels is None):
            return "batches without tokens, or without labels"
        if lesson.student.prompt_layout is None:
            call, layout = text_call(inputs), None
        else:
            call, layout = decoder_call(lesson.student, inputs)
            if isinstance(call, str):
                return call
        length = inputs["attention_mask"].shape[1]
        pad = self.limits.bucket(length) - length
        has_padding = facts.has_padding or pad > 0
        call = {name: padded(tensor, pad, name == "inputs_embeds") for name, tensor in call.items()}
        groups = {name: padded(masks[name], pad) for name in facts.groups}
        answers = {}
        if taught:
            answers = answering(is_answered(labels), self.limits.bucket(max(facts.positions, 1)))
            answers["positions"] = answers["positions"] + pad
        where = {}
        if layout is not None:
            if not is_within_bounds(layout):
                return "coordinates with very large numbers"
            where["coords"] = F.pad(layout.coords, (0, 0, pad, 0), value=-1)
        return Problem(call, where, groups, answers, has_padding)

    def run(self, problem: Problem) -> dict[str, Tensor] | None:
        """A step from its graph, which is captured if it is new; None = before that."""
        lesson, device = self.lesson, self.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        recomputed = tuple(getattr(layer, "gradient_checkpointing", False) for layer in self.decoder.layers)
        key = (
            problem.shape,
            lesson.objective,
            lesson.training,
            lesson.student.training,
            recomputed,
            autocast,
        )
        graph = self.graphs.get(key)
        if graph is None:
            self.seen[key] = self.seen.get(key, 0) + 1
            if self.seen[key] <= EAGER_STEPS:
                return None
            graph = self.record(problem, autocast)
            self.graphs[key] = graph
            while len(self.graphs) > self.limits.most_graphs:
                self.graphs.popitem(last=False)
        self.graphs.move_to_end(key)
        copy_all(graph.buffers.tensors, problem.tensors)
        loss, *others = Replay.apply(self, graph, *self.trained)
        return dict(zip(graph.terms, (loss, *others), strict=True))

    def record(self, problem: Problem, autocast: torch.dtype | None) -> Graph:
        """Capture a step of this shape."""
        graph = Graph(problem.buffers())
        copy_all(graph.buffers.tensors, problem.tensors)
        self.lesson.forget()
        if self.capture is None:
            self.capture = self.new_capture()
        if not self.gradients:
            self.gradients = [torch.zeros_like(each) for each in self.trained]
        try:
            graph.replay, (graph.terms, graph.reached) = self.capture(
                lambda: self.step(graph.buffers, autocast)
            )
        except Exception as error:
            self.lesson.rest()
            self.clear()
            self.made_of = ()
            got = f"{type(error).__name__}: {error}"
            raise RuntimeError(
                f"Lesson: a step must run from a CUDA graph, got {got}; {HOW_TO_TURN_OFF}"
            ) from error
        finally:
            self.lesson.forget()
        shape = tuple(graph.buffers.call["attention_mask"].shape)
        say_once("steps", f"training steps run from CUDA graphs, the first of {shape[0]} rows of {shape[1]}")
        return graph

    def step(self, buffers: Problem, autocast: torch.dtype | None) -> tuple[dict[str, Tensor], list[int]]:
        """Losses of a problem; their gradients go into `gradients`. This is what is captured."""
        device = self.device.type
        with fresh_leaves(self.lesson, self.trained) as leaves:
            with (
                torch.enable_grad(),
                torch.autocast(device, autocast, enabled=autocast is not None, cache_enabled=False),
                padding_is_known(buffers.has_padding),
            ):
                terms = self.terms(buffers)
            with torch.autocast(device, enabled=False):  # as where .backward() is called
                found = torch.autograd.grad(terms["loss"], leaves, allow_unused=True)
        self.lesson.forget()
        reached = [index for index, gradient in enumerate(found) if gradient is not None]
        copy_all([self.gradients[index] for index in reached], [found[index] for index in reached])
        return {name: term.detach() for name, term in terms.items()}, reached

    def terms(self, buffers: Problem) -> dict[str, Tensor]:
        """What `Lesson.forward` does, from the decoder on."""
        lesson, objective = self.lesson, self.lesson.objective
        layout, sequence = None, buffers.call.get("linmu_sequence")
        if buffers.layout:
            layout = StaticLayout(buffers.layout["coords"], sequence)
        head = lesson.student.get_output_embeddings()

        def run(role: str) -> Tensor | None:
            lesson.set_role(role)
            hidden = self.decoder(**buffers.call, linmu_layout=layout, use_cache=False).last_hidden_state
            return head(hidden[:, buffers.answers["positions"]]) if buffers.answers else None

        logits = {}
        with one_forward():
            with torch.no_grad():
                logits["teacher"] = run("teacher")
            if objective.inputs == "teacher":
                lesson.follow_teacher(whole_layers=objective.layer > 0)
            else:
                logits["student"] = run("student")
        return lesson.terms(logits, buffers.answers.get("mask"), [*buffers.groups.values()])


class Replay(torch.autograd.Function):
    """Losses of a batch as a function of what is trained: their gradients come from the same run."""

    @staticmethod
    def forward(ctx, graphs: TrainingGraphs, graph: Graph, *trained: Tensor) -> tuple[Tensor, ...]:
        """Run the graph: (loss, the other terms)."""
        graph.replay()
        graphs.runs += 1
        ctx.graphs, ctx.graph, ctx.number = graphs, graph, graphs.runs
        loss, *others = (term.clone() for term in graph.terms.values())
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients that the run left, times that of the loss."""
        graphs, reached = ctx.graphs, ctx.graph.reached
        if ctx.number != graphs.runs:
            raise RuntimeError(
                "Lesson: backward must come before the next batch's forward, whose gradients lie where this "
                f"one's did; {HOW_TO_TURN_OFF}"
            )
        results: list[Tensor | None] = [None] * len(graphs.trained)
        scaled = torch._foreach_mul([graphs.gradients[index] for index in reached], gradient)
        for index, result in zip(reached, scaled, strict=True):
            results[index] = result
        return None, None, *results


@contextmanager
def fresh_leaves(module: nn.Module, trained: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Within, other parameters over the same memory stand in the place of those that are trained.

    Autograd keeps one node for each parameter as long as any loss of before lives, and lets it work on the
    stream where it was made; work on that stream cannot be captured.
    """
    new = {id(each): nn.Parameter(each.detach()) for each in trained}
    places = [
        (part._parameters, name, own)
        for part in module.modules()
        for name, own in part._parameters.items()
        if id(own) in new
    ]
    for space, name, own in places:
        space[name] = new[id(own)]
    try:
        yield [new[id(each)] for each in trained]
    finally:
        for space, name, own in places:
            space[name] = own


def answering(answered: Tensor, most: int) -> dict[str, Tensor]:
    """The first `most` positions (n,), supervised ones before others, and which rows (B, n) count there.

    Those that no row supervises count nowhere: that they fill the bucket changes nothing.
    """
    order = answered.any(0).logical_not().sort(stable=True).indices
    positions = order[: min(most, answered.shape[1])]
    return {"positions": positions, "mask": answered[:, positions]}


def text_call(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the decoder of a language model is given."""
    ids, mask, sequence = inputs["input_ids"], inputs["attention_mask"], inputs.get("linmu_sequence")
    positions = inputs.get("position_ids")
    if positions is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
        if sequence is not None:
            positions = started_anew(positions, sequence, mask.bool())
    call = {"input_ids": ids, "attention_mask": mask, "position_ids": positions.expand(ids.shape)}
    return call if sequence is None else call | {"linmu_sequence": sequence}


class ReachedError(Exception):
    """Raised to stop a forward at its decoder."""


def decoder_call(
    student: nn.Module, inputs: dict[str, Tensor]
) -> tuple[dict[str, Tensor] | str, VisionLayout | None]:
    """What the decoder of a model that sees is given: all that leads to it runs; and the layout.

    Instead of the arguments there may be a reason why graphs cannot take them.
    """
    given: dict[str, Any] = {}

    def stop(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        given.update(kwargs, args=args)
        raise ReachedError

    hook = student.get_decoder().register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            student(**inputs, use_cache=False, logits_to_keep=1)
    except ReachedError:
        pass
    finally:
        hook.remove()
    layout, call = fast(given.pop("linmu_layout", None)), {}
    given.pop("linmu_spans", None)  # where samples are depends on values: graphs take their ids
    for name, value in given.items():
        if isinstance(value, Tensor) and name in PER_TOKEN:
            call[name] = value
        elif value is not None and not isinstance(value, bool) and value != ():
            return f"the decoder's argument {name}", None
    batch, length = inputs["attention_mask"].shape
    positions = call.get("position_ids")
    if positions is None or "attention_mask" not in call:
        return "a decoder without positions", None
    call["position_ids"] = positions.expand(*positions.shape[:-2], batch, length)
    return call, layout


def padded(tensor: Tensor, pad: int, has_width: bool = False) -> Tensor:
    """(..., L), or (B, L, D) where it has a width, behind so many tokens of zeros."""
    return F.pad(tensor, (0, 0, pad, 0) if has_width else (pad, 0)) if pad else tensor


def kind_of(lesson: Lesson) -> str | None:
    """What about a lesson's modules graphs have no place for."""
    decoder = lesson.student.get_decoder()
    if type(decoder) not in DECODERS:
        return f"a decoder of {type(decoder).__name__}"
    if getattr(decoder.rotary_emb, "rope_type", "default") not in FIXED_ROPE:
        return "RoPE whose angles depend on more than positions"
    if not all(isinstance(layer.self_attn.mixer, MMATE) for layer in lesson.layers):
        return "mixers of another package"
    if len({parameter.device for parameter in decoder.parameters()}) > 1:
        return "a decoder on several devices"
    for module in lesson.student.modules():
        if hasattr(module, "_hf_hook"):
            return "weights that are offloaded"
        if isinstance(module, nn.Dropout) and module.p > 0 and module.training:
            return "dropout"
    return None


def hooks_on(lesson: Lesson) -> str | None:
    """Hooks that are neither the lesson's own nor those that Hugging Face leaves asleep."""
    every = nn.modules.module
    if every._global_forward_hooks or every._global_forward_pre_hooks or every._global_backward_hooks:
        return "hooks on all modules"
    own = {hook.id for hook in lesson.hooks}
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    for module in lesson.student.modules():
        for kind in kinds:
            hooks = module.__dict__.get(kind)
            if hooks and watches({number: hook for number, hook in hooks.items() if number not in own}):
                return "hooks on its modules"
    return None


def state_of_torch(device: torch.device) -> str | None:
    """What of torch's state asks for steps as they are."""
    if processes() > 1:
        return "several processes train together"
    return OBSERVED if is_observed() else state_of_device(device)
