"""`reference/projections.py` with RoPE in one pass; GEMMs are the library's, but for a token of few rows.

q, k and v stay three GEMMs. Joined in one they would read u once, which saves 7 KB of the 60 KB that a token
of width 3584 moves there; but that takes a copy of the weights, or modules that cannot be adapted one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..reference.checks import FLOAT_DTYPES
from ..reference.numerics import accumulation_dtype, full_precision_linear
from ..reference.projections import HeadProjections, checked_angles, split_heads
from ..reference.projections import apply_rope as apply_rope_to_angles_with_gradients
from .decoding.operator import (
    OutputInputs,
    ProjectionInputs,
    ProjectionOutputs,
    text_output,
    text_projection,
)
from .elementwise import narrow_product as in_bfloat16_parts
from .elementwise.operator import (
    HeadsInputs,
    NarrowInputs,
    RotateInputs,
    narrow_product,
    rotate,
    scale_heads,
)
from .elementwise.torch_engine import angles_of
from .engine.beside import Fork
from .engine.once import once_a_forward
from .engine.torch_state import has_no_hooks

__all__ = [
    "HeadProjections",
    "apply_rope",
    "are_plain",
    "join_columns",
    "join_weights",
    "narrow_columns",
    "narrow_products",
    "prepare_narrow",
    "scaled_output",
    "split_heads",
    "takes_token_output",
    "token_output",
    "token_products",
]

MOST_ROWS = 4  # of the batch, in one launch of all projections of a token: beyond, a GEMM's tensor cores pay


def apply_rope(tensor: Tensor, position_embeddings: tuple[Tensor, Tensor] | None) -> Tensor:
    """`linmu.reference.projections.apply_rope`, in one pass for angles that need no gradient: arguments,
    result and errors are the same.
    """
    return rotated(tensor, checked_angles(tensor, position_embeddings))


def rotated(
    tensor: Tensor, angles: tuple[Tensor, Tensor], token: Tensor | None = None, engine: str | None = None
) -> Tensor:
    """`apply_rope` by angles that fit. With `token` (n,), the tensor is (1, n, heads, N), at these places of
    the flattened batch, and the angles are those of the whole batch.
    """
    cos, sin = angles
    if not (cos.requires_grad or sin.requires_grad):
        return rotate(RotateInputs(tensor, cos, sin, token, engine=engine))
    if token is not None:
        angles = angles_of(cos, token), angles_of(sin, token)
    return apply_rope_to_angles_with_gradients(tensor, angles)


def narrow_products(u: Tensor, linears: list[nn.Linear]) -> list[Tensor]:
    """`full_precision_linear` of each: one product that reads `u` once, if they are plain and it is long, or
    what it needs of their weights was prepared.
    """
    is_short = u.shape[1] == 1 and once_a_forward(key_of(linears), lambda: None) is None
    if is_short or not are_plain(linears):
        return [full_precision_linear(u, linear) for linear in linears]
    sizes = [linear.out_features for linear in linears]
    return list(plain_columns(u, linears, sizes).split_with_sizes(sizes, dim=-1))


def narrow_columns(u: Tensor, linears: list[nn.Linear]) -> Tensor:
    """`narrow_products`, side by side: (B, L, columns)."""
    if u.shape[1] == 1 or not are_plain(linears):
        products = narrow_products(u, linears)
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)
    return plain_columns(u, linears, [linear.out_features for linear in linears])


def plain_columns(u: Tensor, linears: list[nn.Linear], sizes: list[int]) -> Tensor:
    """`narrow_columns` of plain linears of so many columns each."""
    prepared = once_a_forward(key_of(linears), lambda: None)
    if prepared is not None:
        return in_bfloat16_parts.product_of_parts(u, *prepared)
    wide = accumulation_dtype(u.dtype)
    weight, bias = linears[0].weight, linears[0].bias
    if len(linears) > 1:
        weight = torch.cat([linear.weight for linear in linears])  # of two dtypes the wider
        bias = torch.cat([linear.bias for linear in linears])
    return narrow_product(NarrowInputs(u, weight.to(wide), bias.to(wide), sizes))


def prepare_narrow(u: Tensor, groups: list[list[nn.Linear]]) -> None:
    """Make of all layers' weights at once what `narrow_products` of `u` makes of each group's: eight small
    kernels a layer otherwise. It holds within `one_forward`, and for calls without gradients.

    Args:
        u: (B, L, D), like the hidden states of all layers.
        groups: the linears of each layer, the same sizes in all.
    """
    unread = not groups or u.shape[1] == 1 or not in_bfloat16_parts.takes_parts(u)
    if unread or not all(map(are_plain, groups)):
        return
    linears = [linear for group in groups for linear in group]
    weight = torch.cat([linear.weight for linear in linears]).to(accumulation_dtype(u.dtype))
    bias = torch.cat([linear.bias for linear in linears]).to(weight.dtype).view(len(groups), -1)
    parts = in_bfloat16_parts.in_parts(weight.view(*bias.shape, -1), 1, at=1).flatten(1, 2)
    for group, *prepared in zip(groups, parts, bias, strict=True):
        once_a_forward(key_of(group), lambda prepared=prepared: prepared)


def key_of(linears: list[nn.Linear]) -> tuple:
    """What is prepared for these of all linears is found by it."""
    return ("narrow", *map(id, linears))


def token_products(
    u: Tensor,
    linears: list[nn.Module],
    narrow: list[nn.Module],
    gate: nn.Module | None,
    engine: str | None,
) -> ProjectionOutputs | None:
    """All products with one token, u (B, 1, D): of `linears`, and in the accumulation dtype of `narrow`; None
    where modules must be called.

    A small batch takes `text_projection`, for three linears and one that is narrow, or for what
    `join_weights` has joined. A larger one suits GEMMs: one of what was joined; None if nothing was.
    """
    wide = linears if gate is None else [*linears, gate]
    joined = once_a_forward(joined_key(linears), lambda: None)
    if joined is None and (u.shape[0] > MOST_ROWS or len(linears) > 3 or len(narrow) > 1):
        return None
    plain = are_plain(wide, u.dtype) and are_plain(narrow)
    if not plain or torch.is_autocast_enabled(u.device.type):
        return None
    if u.shape[0] > MOST_ROWS:
        fork = Fork()
        with fork.second():  # few columns leave room on a GPU
            rates = token_columns(u, narrow, engine)
        product, z = F.linear(u[:, 0], joined.weight, joined.bias), None if gate is None else gate(u)[:, 0]
        fork.join()
        return ProjectionOutputs(product, rates, z)
    gated = (None, None) if gate is None else (gate.weight, gate.bias)
    if joined is None:
        weights, biases = [linear.weight for linear in linears], [linear.bias for linear in linears]
        rates = narrow[0].weight, narrow[0].bias
    else:
        (grouped, _), rows = linears[0].weight.shape, len(joined.weight)
        sizes = [grouped, grouped, rows - 2 * grouped]  # any three parts do
        weights = list(joined.weight.split(sizes))
        biases = [None] * 3 if joined.bias is None else list(joined.bias.split(sizes))
        rates = joined.narrow, joined.narrow_bias
    return text_projection(ProjectionInputs(u[:, 0], weights, biases, *rates, *gated, engine))


def token_columns(u: Tensor, narrow: list[nn.Module], engine: str | None) -> Tensor:
    """`narrow_products` with one token, u (B, 1, D), side by side: (B, columns)."""
    prepared = once_a_forward(key_of(narrow), lambda: None)
    if prepared is None or engine == "torch":
        return narrow_columns(u, narrow)[:, 0]
    from .elementwise.kernels import sum_parts

    parts, bias = prepared
    return sum_parts(in_bfloat16_parts.summed_wide(u[:, 0], parts.T), bias)


def takes_token_output(u: Tensor, linears: list[nn.Module]) -> bool:
    """Whether `token_output` takes these two for a token u (B, 1, D): plain ones, in a small batch, or joined
    by `join_columns`.
    """
    few = u.shape[0] <= MOST_ROWS or once_a_forward(side_key(linears), lambda: None) is not None
    return few and are_plain(linears, u.dtype, strided=True) and not torch.is_autocast_enabled(u.device.type)


def token_output(
    flex: Tensor, local: Tensor, mix: Tensor, row: Tensor, linears: list[nn.Linear], engine: str | None
) -> Tensor:
    """Both branches' output projections of one token, mixed; m is one number a token, so that

        m W_f f + (1 - m) W_l l = [W_f W_l] [m f; (1 - m) l]

    Args:
        flex, local: f and l, (B, 1, H·P).
        mix: (B, 1, 1), before its sigmoid.
        row: (B, 1) int64, -1 where only Flex-MA has a say.
        linears: of W_f and W_l, which `takes_token_output` takes.
        engine: "triton" or "torch".
    Returns:
        (B, 1, D).
    """
    flex, local, mix, row = flex[:, 0], local[:, 0], mix[:, 0], row[:, 0]
    weights, biases = ([getattr(linear, name) for linear in linears] for name in ("weight", "bias"))
    if len(flex) <= MOST_ROWS:
        return text_output(OutputInputs(flex, local, mix, row, weights, biases, engine))[:, None]
    return scaled_output(scale_heads(HeadsInputs(flex, local, mix, row, engine)), linears)


def scaled_output(heads: Tensor, linears: list[nn.Linear]) -> Tensor:
    """`token_output` of heads (B, 2, H·P), or flat, that were scaled before, by what was joined."""
    joined = once_a_forward(side_key(linears), lambda: None)
    return F.linear(heads.flatten(1), joined)[:, None]


class Joined(NamedTuple):
    """Weights laid end to end, (rows, D), and biases (rows,) or None; those of narrow linears likewise."""

    weight: Tensor
    bias: Tensor | None
    narrow: Tensor
    narrow_bias: Tensor


@torch.no_grad()
def join_weights(groups: list[tuple[list[nn.Linear], list[nn.Linear]]]) -> None:
    """Lay the weights of each group's linears end to end, where they stay, and their biases, and those of its
    narrow linears: one GEMM then makes the products of a token of many rows. It holds within `one_forward`;
    groups that are not plain, or whose dtypes differ, are left out.
    """
    for linears, narrow in groups:
        biases = [linear.bias for linear in linears]
        plain = are_plain(linears, linears[0].weight.dtype) and are_plain(narrow, narrow[0].weight.dtype)
        if not plain or len({bias is None for bias in biases}) > 1:
            continue
        joined = Joined(
            lay_end_to_end([linear.weight for linear in linears]),
            None if biases[0] is None else lay_end_to_end(biases),
            lay_end_to_end([linear.weight for linear in narrow]),
            lay_end_to_end([linear.bias for linear in narrow]),
        )
        once_a_forward(joined_key(linears), lambda joined=joined: joined)


def lay_end_to_end(parameters: list[nn.Parameter]) -> Tensor:
    """Return one tensor of all, of which they become views."""
    joined = torch.cat(list(parameters))
    for parameter, part in zip(parameters, joined.split([len(each) for each in parameters]), strict=True):
        parameter.data = part
    return joined


@torch.no_grad()
def join_columns(pairs: list[list[nn.Linear]]) -> None:
    """Lay the weights of both of each pair side by side, (rows, both widths), where they stay, for
    `token_output`. It holds within `one_forward`; what is not plain or has a bias is left out.
    """
    for linears in pairs:
        first, second = linears
        plain = are_plain(linears, first.weight.dtype, strided=True)
        if not plain or first.bias is not None or second.bias is not None:
            continue
        joined = torch.cat([first.weight, second.weight], dim=1)
        first.weight.data, second.weight.data = joined.split([first.in_features, second.in_features], dim=1)
        once_a_forward(side_key(linears), lambda joined=joined: joined)


def side_key(linears: list[nn.Module]) -> tuple:
    """What `join_columns` makes of these is found by it."""
    return ("side by side", *map(id, linears))


def joined_key(linears: list[nn.Module]) -> tuple:
    """What `join_weights` makes of these is found by it."""
    return ("joined", *map(id, linears))


def are_plain(linears: list[nn.Module], dtype: torch.dtype | None = None, *, strided: bool = False) -> bool:
    """True if every module is an unmodified nn.Linear whose weight and bias a kernel may read directly.
    Adapted, quantised, sharded or offloaded ones must be called instead.

    Args:
        linears: the modules.
        dtype: what weights must have; None = any float dtype.
        strided: whether rows of weights may be further apart than they are long.
    """
    kinds = FLOAT_DTYPES if dtype is None else (dtype,)
    for linear in linears:
        if type(linear) is not nn.Linear or not has_no_hooks(linear):
            return False
        bias = linear.bias
        weight_fits = is_readable(linear.weight, kinds, strided)
        if not weight_fits or (bias is not None and not is_readable(bias, kinds)):
            return False
    return True


def is_readable(tensor: Tensor, kinds: tuple[torch.dtype, ...], strided: bool = False) -> bool:
    """Whether it is a tensor and no subclass, on a device, contiguous, or its rows, and of one of these
    dtypes.
    """
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.dtype not in kinds:
        return False
    return tensor.is_contiguous() or (strided and tensor.stride(-1) == 1)
