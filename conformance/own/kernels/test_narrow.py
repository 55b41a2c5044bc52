"""Products of bfloat16 hidden states with a few float32 columns, made of bfloat16 parts as on a GPU, are
those of float32, every bit of the weight taken along.
"""

from __future__ import annotations

import pytest
import torch

from linmu import optimized
from linmu.optimized import projections
from linmu.optimized.elementwise import narrow_product as narrow
from linmu.optimized.elementwise.operator import NarrowInputs, NarrowOutputs
from linmu.optimized.engine.once import one_forward
from linmu.optimized.m_mate import prepare_layers
from linmu.reference.numerics import full_precision_linear

from ...harness.compare import assert_same, evaluate
from ..student.tiny_checkpoint import shake


@pytest.fixture
def in_parts(monkeypatch):
    monkeypatch.setattr(narrow, "takes_parts", lambda u: u.dtype == torch.bfloat16)


def linears(dtype: torch.dtype) -> list[torch.nn.Linear]:
    torch.manual_seed(0)
    return [torch.nn.Linear(48, columns).to(dtype) for columns in (5, 5, 1)]


def test_three_parts_hold_every_bit_of_a_float32():
    wide = torch.randn(1000) * 10.0 ** torch.randint(-12, 12, (1000,))
    parts = narrow.in_parts(wide, 0)
    assert {part.dtype for part in parts} == {torch.bfloat16}
    assert torch.equal(parts[0].float() + parts[1].float() + parts[2].float(), wide)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_in_parts_are_those_of_float32(in_parts, dtype):
    """dt must not be rounded to bfloat16, whatever the hidden states and the weights are kept in."""
    modules, u = linears(dtype), torch.randn(2, 37, 48).bfloat16()
    found = projections.narrow_products(u, modules)
    wanted = [full_precision_linear(u.double(), module.double()) for module in modules]
    for got, want in zip(found, wanted, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_products_prepared_for_all_layers_are_the_same(in_parts, monkeypatch):
    """Of every layer its own, and only within the forward they were prepared in; dtypes may be mixed."""
    u, layers = torch.randn(2, 37, 48).bfloat16(), [linears(torch.float32) for _ in range(3)]
    for index, layer in enumerate(layers):
        layer[0].weight += index
        layer[2].bias += index
        layer[1].bfloat16()
    wanted = [projections.narrow_columns(u, layer) for layer in layers]
    own = projections.narrow_product
    monkeypatch.setattr(projections, "narrow_product", None)
    with one_forward():
        projections.prepare_narrow(u, layers)
        for layer, want in zip(layers, wanted, strict=True):
            assert torch.equal(projections.narrow_columns(u, layer), want)
    monkeypatch.setattr(projections, "narrow_product", own)
    layers[1][0].weight *= 2
    with one_forward():
        columns = projections.narrow_columns(u, layers[1])
    changed = wanted[1][..., :5] != columns[..., :5]
    assert changed.any()


@torch.no_grad()
def test_a_token_of_many_rows_takes_what_was_prepared(in_parts, monkeypatch):
    """The dt and the mix of a block's step, where a server prepared them once for all steps."""
    config = optimized.LinMUConfig(width=48, heads=4, groups=2, head_dim=8, text_window=3)
    torch.manual_seed(0)
    block, u = shake(optimized.MMATE(config, 0)).bfloat16(), torch.randn(6, 4, 48).bfloat16()
    angle = torch.randn(6, 4, 8)
    before, last = ((angle[:, part].cos(), angle[:, part].sin()) for part in (slice(3), slice(3, 4)))
    _, state = block(u[:, :3], position_embeddings=before)
    wanted, after = block(u[:, 3:], position_embeddings=last, state=state)
    used, own = [], narrow.product_of_parts
    monkeypatch.setattr(narrow, "product_of_parts", lambda u, *parts: used.append(u) or own(u, *parts))
    prepared = {}
    with one_forward(prepared):
        prepare_layers([block], u, True)
    with one_forward(dict(prepared)):
        found, pooled = block(u[:, 3:], position_embeddings=last, state=state)
    assert len(used) == 2
    torch.testing.assert_close(found, wanted, rtol=2**-8, atol=2**-8)
    torch.testing.assert_close(pooled.scan, after.scan, rtol=1e-5, atol=1e-5)


def test_gradients_in_parts_are_those_of_float32(in_parts):
    """The weights' to float32's last bits; that of the hidden states to the only rounding of its dtype."""
    weight, bias, u = torch.randn(11, 48), torch.randn(11), torch.randn(2, 37, 48).bfloat16()
    grad = torch.randn(2, 37, 11)
    found, wanted = (
        narrow.backward(NarrowInputs(each(u), each(weight), bias, [5, 5, 1]), None, NarrowOutputs(each(grad)))
        for each in (lambda tensor: tensor, torch.Tensor.double)
    )
    assert found[0].dtype == torch.bfloat16
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=2**-8, atol=2**-8)
    for got, want in zip(found[1:], wanted[1:], strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-4)
    given = {"u": u, "weight": weight, "bias": bias}

    def product(u, weight, bias):
        return torch.ops.linmu.narrow_product(u, weight, bias, [5, 5, 1])

    def plain(u, weight, bias):
        return torch.nn.functional.linear(u.float(), weight, bias)

    assert_same(evaluate(product, given, gradients=True), evaluate(plain, given, gradients=True), "in parts")


def test_watched_projections_are_called():
    """A hook sees its call, and what it returns counts."""
    modules, u = linears(torch.float32), torch.randn(1, 3, 48)
    modules[1].register_forward_hook(lambda module, args, output: output + 1)
    found = projections.narrow_products(u, modules)
    for got, module in zip(found, modules, strict=True):
        torch.testing.assert_close(got, module(u))
