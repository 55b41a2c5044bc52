"""What must hold for the numbers of a run to be trusted; checked while it trains.

Something must be trained and its loss must be able to fall; every number must be finite. A run that breaks
one of these stops before the optimizer's step and before a checkpoint, so that its last one stays good.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..lesson import Lesson
from ..refusal import RefusedError, check


class TrainingStoppedError(RefusedError):
    """Numbers that cannot be trusted: the run has stopped."""


def refuse_infinite_weights(model: nn.Module, flag: str, name: str) -> None:
    """Refuse a model that holds a weight that is not finite: some are met only hours later.

    Args:
        model: as it was opened.
        flag: what the user named it with.
        name: folder or Hub id.
    """
    bad = next((key for key, weight in model.named_parameters() if not bool(weight.isfinite().all())), None)
    check(bad is None, f"{flag} must hold finite weights", f"nan or inf in {bad} of {name}")


def refuse_infinite_loss(lesson: Lesson, loss: Tensor, where: str, names: Sequence[str], last: str) -> None:
    """Stop at a loss that is not finite, and name the first layer and the samples that are not.

    Args:
        lesson: the model, just after its forward.
        loss: scalar.
        where: stage and step.
        names: of the samples of the batch.
        last: what to say of the last checkpoint.
    """
    if bool(loss.isfinite()):
        return
    culprit, rows = first_infinite(lesson)
    got = "nan" if bool(loss.isnan()) else "inf"
    bad = [names[row] for row in rows if row < len(names)] or list(names)
    raise TrainingStoppedError(
        f"{where}: the loss must be finite, got {got}; first in {culprit}, samples {', '.join(bad)}; {last}"
    )


def first_infinite(lesson: Lesson) -> tuple[str, list[int]]:
    """The first thing that a pass left which is not finite, and its rows of the batch."""
    for name, tensor in outputs(lesson):
        rows = (~tensor.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if rows:
            return name, rows
    return "the logits", []


def outputs(lesson: Lesson) -> Iterator[tuple[str, Tensor]]:
    """What every layer gave in the last passes, by name, from the first layer to the last."""
    for layer, of_layer in zip(lesson.layers, lesson.layer_outputs, strict=True):
        index = getattr(layer.self_attn.mixer, "layer_index", "?")
        for role, tensor in layer.self_attn.outputs.items():
            yield f"layer {index}, the {role}'s mixer", tensor
        for role, tensor in of_layer.items():
            yield f"layer {index}, the {role}'s output", tensor


def refuse_infinite_gradients(
    named: Iterable[tuple[str, nn.Parameter]], where: str, names: Sequence[str], last: str
) -> None:
    """Stop before a step with gradients that are not finite, and name the first tensor."""
    given = [(name, local(p.grad)) for name, p in named if p.grad is not None]
    if not given or bool(torch.stack(torch._foreach_norm([grad for _, grad in given])).isfinite().all()):
        return
    name = next(name for name, grad in given if not bool(grad.isfinite().all()))
    raise TrainingStoppedError(
        f"{where}: gradients must be finite, got nan or inf in {name}, samples {', '.join(names)}; {last}"
    )


def refuse_infinite_tensors(tensors: dict[str, Tensor], where: str, last: str) -> None:
    """Stop before weights that are not finite are saved."""
    bad = next((name for name, tensor in tensors.items() if not bool(tensor.isfinite().all())), None)
    if bad:
        raise TrainingStoppedError(f"{where}: weights must be finite, got one that is not in {bad}; {last}")


def refuse_idle_training(model: nn.Module, optimizer: torch.optim.Optimizer, where: str) -> None:
    """Stop at the first step if nothing can move: no parameter, no gradient, no learning rate, no optimizer.

    Args:
        model: just after its first backward.
        optimizer: with the learning rates that the schedule scales, as `initial_lr` or `lr`.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not trained:
        raise TrainingStoppedError(f"{where}: a stage must train something, got no parameter with a gradient")
    rates = [group.get("initial_lr", group["lr"]) for group in optimizer.param_groups]
    if not any(rate > 0 for rate in rates):
        raise TrainingStoppedError(f"{where}: a learning rate must be positive, got {rates}")
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    forgotten = [name for name, p in trained.items() if id(p) not in stepped]
    if forgotten:
        raise TrainingStoppedError(
            f"{where}: the optimizer must step all that is trained, got none of {forgotten[:3]}"
        )
    if not any(p.grad is not None and bool(local(p.grad).any()) for p in trained.values()):
        must = "the loss must depend on what is trained"
        raise TrainingStoppedError(f"{where}: {must}, got no gradient but 0 in {len(trained)} tensors")


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that may be spread over several."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
