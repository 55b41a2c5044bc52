"""An operator of `linmu::`: a NamedTuple of inputs, a function per engine, gradients by name.

    scan = Operator("scan", ScanInputs, ScanOutputs, forward=Engines(...), fake=scan_outputs)
    scan.has_gradient(ScanGrads, Engines(...), saved=("y_before_norm",))
    y, final_state, _ = scan(ScanInputs(x, dt, A, B, C))

Both passes are registered with torch.library. torch.compile therefore sees an opaque operator and the shapes
of its fake; autograd, checkpointing and fullgraph compilation hold on both engines. Where nothing observes
the call, it goes straight to the engine's function (`torch_state`), with autocast off and on the device of
the first tensor.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from . import choose_engine
from .torch_state import is_observed, is_plain

SCHEMA = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[Tensor | None]: "Tensor?[]",
    list[float]: "float[]",
    list[int]: "SymInt[]",
    bool: "bool",
    float: "float",
    int: "SymInt",
    str | None: "str?",
}
OPTIONAL = {"Tensor": "Tensor?", "Tensor[]": "Tensor?[]"}
SAVED = object()  # stands for a tensor that autograd saves


class Engines(NamedTuple):
    """The function of each engine, for the same arguments."""

    torch: Callable
    triton: Callable


def lazy(module: str, name: str) -> Callable:
    """The function `name` of a module that its first call imports: only its engine needs Triton."""

    @cache
    def function() -> Callable:
        return getattr(importlib.import_module(module), name)

    return lambda *arguments: function()(*arguments)


class Operator:
    """One operator, called with an instance of its inputs.

    Args:
        name: of `torch.ops.linmu`.
        inputs: NamedTuple type, a tensor or a list of tensors first. A field `engine` names the engine that
            the caller has chosen; None = the operator chooses.
        outputs: NamedTuple type. An operator with one output returns it bare.
        forward: inputs -> outputs, a function or one per engine.
        fake: inputs -> outputs without values, for compilers.
        head_dims: inputs -> the sizes that a kernel must hold in one tile.
        overwrites: the inputs that the operator writes to.
    """

    def __init__(
        self,
        name: str,
        inputs: type[NamedTuple],
        outputs: type[NamedTuple],
        *,
        forward: Engines | Callable,
        fake: Callable,
        head_dims: Callable = lambda inputs: (),
        overwrites: tuple[str, ...] = (),
    ) -> None:
        self.name, self.inputs, self.outputs = name, inputs, outputs
        self.forward, self.head_dims = forward, head_dims
        self.overwritten = [inputs._fields.index(each) for each in overwrites]
        written = {field: f"Tensor({letter}!)" for field, letter in zip(overwrites, "abcdef", strict=False)}
        kinds = schema_of(inputs)
        written = {field: kind + "?" * kinds[field].endswith("?") for field, kind in written.items()}
        arguments = [f"{written.get(field, kind)} {field}" for field, kind in kinds.items()]
        returns = ", ".join(schema_of(outputs).values())
        returns = f"({returns})" if len(outputs._fields) > 1 else returns
        self.registered = torch.library.custom_op(
            f"linmu::{name}",
            lambda *given: self.run(self.forward, inputs(*given)),
            mutates_args=overwrites,
            schema=f"({', '.join(arguments)}) -> {returns}",
        )
        self.registered.register_fake(lambda *given: fake(inputs(*given)))

    def __call__(self, given: NamedTuple) -> Any:
        if is_observed() or not all(map(is_plain, given)):
            return self.registered(*given)
        for place in self.overwritten:
            if (
                given[place] is not None and not given[place].is_inference()
            ):  # a graph that saved the tensor must not use it any more
                torch.autograd.graph.increment_version(given[place])
        return self.run(self.forward, given)

    def run(self, function: Engines | Callable, given: NamedTuple, *rest: NamedTuple) -> Any:
        """Call the engine's function."""
        first = given[0][0] if isinstance(given[0], list) else given[0]
        if isinstance(function, Engines):
            engine = given.engine or choose_engine(self.name, first, *self.head_dims(given))
            function = function.torch if engine == "torch" else function.triton
        if torch.is_autocast_enabled(first.device.type):  # turning it off where it is off costs 5 µs
            with torch.autocast(device_type=first.device.type, enabled=False):
                return on_device_of(first, function, given, *rest)
        return on_device_of(first, function, given, *rest)

    def has_gradient(
        self,
        grads: type[NamedTuple],
        backward: Engines | Callable,
        *,
        of: tuple[str, ...] | None = None,
        saved: tuple[str, ...] = (),
        unread: tuple[str, ...] = (),
    ) -> None:
        """Register the gradient.

        Args:
            grads: NamedTuple type, whose fields are the inputs that have a gradient.
            backward: (inputs, outputs, gradients of outputs) -> grads, a function or one per engine.
                Gradients are cast to the dtypes of their inputs. A gradient of an output is None if nothing
                depends on that output.
            of: the outputs whose gradient counts; None = all.
            saved: the outputs that `backward` reads; the others are None there.
            unread: inputs that `backward` does not read and that have shape and dtype of the first output:
                they are not saved, and the gradient of that output takes their place.
        """
        inputs, outputs = self.inputs, self.outputs
        of = outputs._fields if of is None else of
        results, kinds = schema_of(outputs), schema_of(inputs)
        of_places, saved_places = ([outputs._fields.index(name) for name in names] for names in (of, saved))
        grad_places = [inputs._fields.index(name) for name in grads._fields]
        unread_places = [inputs._fields.index(name) for name in unread]

        def arranged(given: Sequence) -> tuple[NamedTuple, NamedTuple, NamedTuple]:
            """The arguments of `backward`, from those of the registered operator."""
            found, kept = [None] * len(results), [None] * len(results)
            for place, value in zip(of_places, given, strict=False):
                found[place] = value
            for place, value in zip(saved_places, given[len(of) :], strict=False):
                kept[place] = value
            own = list(given[len(of) + len(saved) :])
            for place in unread_places:
                own[place] = given[0]
            return inputs._make(own), outputs._make(kept), outputs._make(found)

        def run(*given) -> list[Tensor]:
            """The gradients of the inputs that are there, in the order of `grads`."""
            own, kept, found = arranged(given)
            result, wanted = [], []
            for grad, place in zip(self.run(backward, own, kept, found), grad_places, strict=True):
                if own[place] is not None:
                    wanted += own[place] if isinstance(own[place], list) else [own[place]]
                    result += grad if isinstance(grad, list) else [grad]
            return [grad.to(like.dtype).contiguous() for grad, like in zip(result, wanted, strict=True)]

        def empty_grads(*given) -> list[Tensor]:
            own = arranged(given)[0]
            wanted = tensors_in(own[place] for place in grad_places)
            return [like.new_empty(like.shape) for like in wanted]

        arguments = [f"{OPTIONAL[results[name]]} {name}_grad" for name in of]
        arguments += [f"{results[name]} {name}_out" for name in saved]
        arguments += [f"{OPTIONAL[kind] if n in unread else kind} {n}" for n, kind in kinds.items()]
        name, schema = f"linmu::{self.name}_backward", f"({', '.join(arguments)}) -> Tensor[]"
        registered = torch.library.custom_op(name, run, mutates_args=(), schema=schema)
        registered.register_fake(empty_grads)

        def save(ctx, inputs: tuple, output) -> None:
            ctx.set_materialize_grads(False)
            output, own = output if isinstance(output, tuple) else (output,), list(inputs)
            for place in unread_places:
                own[place] = None
            values = [*(output[place] for place in saved_places), *own]
            ctx.save_for_backward(*tensors_in(values))
            ctx.values = [without_tensors(value) for value in values]

        def gradients(ctx, *found) -> tuple:
            if not tensors_in(found):
                return (None,) * len(kinds)
            tensors = iter(ctx.saved_tensors)
            given = [*(found[place] for place in of_places), *(with_tensors(v, tensors) for v in ctx.values)]
            direct = not is_observed() and all(map(is_plain, given))
            result = iter((run if direct else registered)(*given))
            own, placed = given[len(of) + len(saved) :], [None] * len(kinds)
            for place in grad_places:
                if isinstance(own[place], list):
                    placed[place] = [next(result) for _ in own[place]]
                elif own[place] is not None or place in unread_places:
                    placed[place] = next(result)
            return tuple(placed)

        self.registered.register_autograd(gradients, setup_context=save)


def on_device_of(tensor: Tensor, function: Callable, *arguments) -> Any:
    """Call it with the GPU of `tensor` current, which Triton launches on."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return function(*arguments)
    with torch.cuda.device_of(tensor):
        return function(*arguments)


def schema_of(fields: type[NamedTuple]) -> dict[str, str]:
    """The types of the fields as torch's schemas have them."""
    return {name: SCHEMA[kind] for name, kind in get_type_hints(fields).items()}


def tensors_in(values: Iterable) -> list[Tensor]:
    """The tensors among some values, those in lists too."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


def without_tensors(value: Any) -> Any:
    """A value with SAVED in the place of tensors."""
    if isinstance(value, Tensor):
        return SAVED
    return [without_tensors(each) for each in value] if isinstance(value, list | tuple) else value


def with_tensors(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The inverse of `without_tensors`."""
    if value is SAVED:
        return next(tensors)
    return [with_tensors(each, tensors) for each in value] if isinstance(value, list) else value
