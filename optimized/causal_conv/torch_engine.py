"""The torch engine of the causal convolution: K shifted products, over the valid tokens of a row moved
together.

Letters: B batch, L tokens, K taps. With s the state and then the valid inputs of a row times the scale:

    out_t = Σ_k weight[k] s_{t+k} + bias     s̄_t = Σ_k weight[k] out̄_{t-k}     weight̄[k] = Σ_t out̄_t s_{t+k}

Of packed rows, a token whose sample has `age` tokens before it reads no further back than that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from ...reference.numerics import accumulation_dtype
from ..layout.tokens import gather_tokens
from .operator import ConvGrads, ConvInputs, ConvOutputs, conv_outputs

ENDLESS = 2**30  # more inputs than taps


@dataclass(frozen=True)
class Packing:
    """Where the valid tokens of each row go: to its front, in their order; None = all are valid."""

    mask: Tensor | None  # (B, L) bool
    order: Tensor | None  # (B, L): the token that stands at each place, valid ones first
    counts: Tensor | None  # (B, 1): valid tokens
    age: (
        Tensor | None
    )  # (B, L): inputs that each, once moved, has before it in its sample; None = all there are
    given: Tensor | None  # (B, L): the order in which the inputs are to be read; None = as they are

    @classmethod
    def of(cls, inputs: ConvInputs) -> Packing:
        mask, begins, given = inputs.mask, inputs.begins, inputs.order
        if mask is None:
            return cls(None, None, None, None if begins is None else ages(begins), given)
        order = (~mask).to(torch.int8).argsort(dim=1, stable=True)
        counts = mask.sum(1, keepdim=True)
        age = None if begins is None else begins_by_rank(begins, mask.cumsum(1) - 1).gather(1, order)
        return cls(mask, order, counts, None if age is None else ages(age), given)

    @cached_property
    def absent(self) -> Tensor:
        """(B, L, 1) bool: places behind the valid tokens."""
        return ~self.mask.gather(1, self.order)[..., None]

    @cached_property
    def back(self) -> Tensor:
        """(B, L): the place of each token, the inverse of `order`."""
        return self.order.argsort(dim=1)

    @cached_property
    def taken(self) -> Tensor | None:
        """(B, L): the input that stands at each place; None = they are as they were."""
        if self.mask is None or self.given is None:
            return self.given if self.mask is None else self.order
        return self.given.gather(1, self.order)

    @cached_property
    def returned(self) -> Tensor:
        """(B, L): the place of each input, the inverse of `taken`."""
        return self.taken.argsort(dim=1)

    def reached(self, tensor: Tensor, steps: int) -> Tensor:
        """(B, L, channels) of moved tokens, 0 where the input so many steps before is of another sample."""
        if self.age is None or not steps:
            return tensor
        return torch.where((self.age >= steps)[..., None], tensor, 0)

    def of_last_sample(self, tensor: Tensor) -> Tensor:
        """(B, K-1, channels), of the last K-1 inputs: 0 where they are none of the row's last sample."""
        if self.age is None:
            return tensor
        steps = torch.arange(tensor.shape[1], device=tensor.device).flip(0)  # back from the last input
        if self.counts is None:
            age = self.age[:, -1:]
        else:
            age = torch.where(self.counts > 0, self.age.gather(1, (self.counts - 1).clamp_min(0)), len(steps))
        return torch.where((age >= steps)[..., None], tensor, 0)

    def pack_inputs(self, inputs: Tensor) -> Tensor:
        """(B, L, channels), inputs -> valid tokens in the given order, zeros after them."""
        moved = in_order(inputs, self.taken)
        return moved if self.mask is None else moved.masked_fill_(self.absent, 0)

    def pack(self, tensor: Tensor) -> Tensor:
        """The same of what is in the given order already."""
        if self.mask is None:
            return tensor
        return in_order(tensor, self.order).masked_fill_(self.absent, 0)

    def unpack(self, tensor: Tensor) -> Tensor:
        """The inverse of `pack`, 0 where the mask is False."""
        if self.mask is None:
            return tensor
        return in_order(tensor, self.back).masked_fill_(~self.mask[..., None], 0)

    def unpack_inputs(self, tensor: Tensor) -> Tensor:
        """The inverse of `pack_inputs`, 0 where the mask is False; never a view."""
        if self.taken is None:
            return tensor.clone()
        moved = in_order(tensor, self.returned)
        if self.mask is None:
            return moved
        return moved.masked_fill_(in_order(self.absent, self.returned), 0)

    def last(self, padded: Tensor, states: int) -> Tensor:
        """(B, K-1): where the last K-1 inputs stand in the state followed by the packed tokens."""
        place = torch.arange(states, device=padded.device)
        start = padded.shape[1] - states if self.counts is None else self.counts
        return (start + place).expand(padded.shape[0], states)


def begins_by_rank(begins: Tensor, rank: Tensor) -> Tensor:
    """`begins` of `ConvInputs`, places -> ranks among valid tokens, (B, L) int32."""
    return torch.where(begins < 0, begins, rank.gather(1, begins.clamp_min(0).long()).int())


def ages(begins: Tensor, rank: Tensor | None = None) -> Tensor:
    """(B, L) int32: how many inputs of its sample a token has before it; ENDLESS in the row's first sample.

    `begins` are those of `ConvInputs` by rank among valid tokens, `rank` (B, L) int32 is that of each token;
    None = its place.
    """
    rank = torch.arange(begins.shape[1], dtype=torch.int32, device=begins.device) if rank is None else rank
    return torch.where(begins < 0, ENDLESS, rank - begins)


def forward(inputs: ConvInputs) -> ConvOutputs:
    """The operator on the torch engine."""
    packing, found = Packing.of(inputs), []
    for part in each_part(inputs):
        found.append(convolve(*part, packing))
    outs, states = zip(*found, strict=True)
    shaped = [out.view(part.shape) for out, part in zip(outs, inputs.parts, strict=True)]
    return ConvOutputs(shaped, torch.cat(states, dim=2))


def convolve(
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor | None,
    scale: float,
    packing: Packing,
) -> tuple[Tensor, Tensor]:
    """out (B, L, channels) in the dtype of `u`, and the last K-1 valid inputs in the accumulation dtype."""
    taps, length = weight.shape[1], u.shape[1]
    padded = with_start(scaled(packing.pack_inputs(u), scale), taps, start)
    wide = weight.to(padded.dtype)
    out = packing.reached(padded[:, :length], taps - 1) * wide[:, 0]
    for tap in range(1, taps):
        out.addcmul_(packing.reached(padded[:, tap : tap + length], taps - 1 - tap), wide[:, tap])
    if bias is not None:
        out += bias.to(out.dtype)
    final = in_order(padded, packing.last(padded, taps - 1))
    return packing.unpack(out.to(u.dtype)), packing.of_last_sample(final)


def backward(inputs: ConvInputs, outputs: ConvOutputs, grads: ConvOutputs) -> ConvGrads:
    """The gradients of the operator on the torch engine, in the accumulation dtype."""
    packing = Packing.of(inputs)
    return of_each_part(partial(part_backward, packing=packing), inputs, grads)


def part_backward(
    out_grad: Tensor,
    final_grad: Tensor,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    start: Tensor | None,
    scale: float,
    *,
    packing: Packing,
) -> tuple[Tensor | None, ...]:
    """Gradients of u, weight, bias and start, none a view of another."""
    taps, length = weight.shape[1], u.shape[1]
    padded = with_start(scaled(packing.pack_inputs(u), scale), taps, start)
    wide, grad = weight.to(padded.dtype), packing.pack(out_grad.to(padded.dtype))
    padded_grad = torch.zeros_like(padded)
    last = packing.last(padded, taps - 1)[..., None].expand(-1, -1, u.shape[2])
    padded_grad.scatter_(1, last, packing.of_last_sample(final_grad.to(padded.dtype)))
    weight_grad = torch.empty_like(wide)
    for tap in range(taps):
        shifted, reaching = slice(tap, tap + length), packing.reached(grad, taps - 1 - tap)
        padded_grad[:, shifted].addcmul_(reaching, wide[:, tap])
        weight_grad[:, tap] = (reaching * padded[:, shifted]).sum((0, 1))
    return (
        scaled(packing.unpack_inputs(padded_grad[:, taps - 1 :]), scale),
        weight_grad,
        None if bias is None else grad.sum((0, 1)),
        None if start is None else padded_grad[:, : taps - 1].clone(),
    )


def each_part(inputs: ConvInputs) -> list[tuple]:
    """u (B, L, channels), weight, bias, initial state and scale of each part."""
    parts = [part.flatten(2) for part in inputs.parts]
    sizes = [part.shape[2] for part in parts]
    weights, biases = by_part(inputs.weight, sizes, 0), by_part(inputs.bias, sizes, 0)
    return list(
        zip(parts, weights, biases, by_part(inputs.initial_state, sizes, 2), inputs.scales, strict=True)
    )


def of_each_part(part_backward: Callable, inputs: ConvInputs, grads: ConvOutputs) -> ConvGrads:
    """The gradients of every part by `part_backward`, put together."""
    parts, final_grad = each_part(inputs), grads.final_state
    if final_grad is None:
        final_grad = torch.zeros_like(conv_outputs(inputs).final_state)
    finals = by_part(final_grad, [part[0].shape[2] for part in parts], 2)
    found = []
    for out_grad, final, part in zip(grads.parts, finals, parts, strict=True):
        out_grad = torch.zeros_like(part[0]) if out_grad is None else out_grad.flatten(2)
        found.append(part_backward(out_grad, final, *part))
    u_grads, weights, biases, starts = zip(*found, strict=True)
    u_grads = [grad.view(part.shape) for grad, part in zip(u_grads, inputs.parts, strict=True)]
    return ConvGrads(u_grads, torch.cat(weights), joined(biases, 0), joined(starts, 2))


def by_part(tensor: Tensor | None, sizes: list[int], dim: int) -> tuple[Tensor | None, ...]:
    """A tensor split along its channels; None for each part if there is none."""
    return (None,) * len(sizes) if tensor is None else tensor.split_with_sizes(sizes, dim)


def joined(parts: tuple[Tensor | None, ...], dim: int) -> Tensor | None:
    """The inverse of `by_part`."""
    return None if parts[0] is None else torch.cat(parts, dim)


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """`tensor` times `scale`, in its dtype."""
    return tensor if scale == 1 else tensor * scale


def with_start(u: Tensor, taps: int, initial_state: Tensor | None) -> Tensor:
    """The K-1 inputs before the first in front, in the accumulation dtype: (B, K-1+L, channels)."""
    accumulate = accumulation_dtype(u.dtype)
    if initial_state is None:
        initial_state = u.new_zeros(u.shape[0], taps - 1, u.shape[2])
    return torch.cat([initial_state.to(accumulate), u.to(accumulate)], dim=1)


def in_order(tensor: Tensor, order: Tensor | None) -> Tensor:
    """tensor (B, L, channels), order (B, M) -> (B, M, channels): in each row; None = as they are."""
    if order is None:
        return tensor
    start = torch.arange(tensor.shape[0], device=tensor.device)[:, None] * tensor.shape[1]
    return gather_tokens(tensor, (order + start).flatten()).view(*order.shape, tensor.shape[2])
