"""Processes that each hold a slice of a prompt compare a block with one on all of it, gradients too."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from linmu import optimized, reference
from linmu.optimized.student import OPERATORS
from linmu.reference.student.context_parallel import ContextParallel, Operators, m_mate
from linmu.reference.student.context_parallel.routes import Route
from linmu.reference.student.context_parallel.scan import bidirectional_scan

TEXT = [[-1] * 4]


def grid(segment: int, t: int, y: int, x: int) -> list[list[int]]:
    return [[segment, a, b, c] for a in range(t) for b in range(y) for c in range(x)]


def prompts() -> list[torch.Tensor]:
    """Rows of 26 tokens: text in front of, inside and behind videos; two segments; a segment over all."""
    film = TEXT * 3 + grid(0, 1, 2, 3) + TEXT + [[0, 1, *yx[2:]] for yx in grid(0, 1, 2, 3)] + TEXT * 2
    film += grid(7, 1, 2, 2) + TEXT * 4
    whole = grid(3, 2, 4, 3) + TEXT * 2
    return [torch.tensor([film, whole]), torch.tensor([whole, film])]


def samples() -> torch.Tensor:
    """The rows of `prompts`' second, as packed ones: samples of one token, of a whole segment, of text."""
    whole = [0] * 24 + [1, 2]
    film = [4] * 17 + [3] + [7] * 5 + [9] * 3
    return torch.tensor([whole, film])


SPLITS = {2: [[1, 25], [9, 17], [24, 2]], 3: [[10, 10, 6], [12, 1, 13]], 4: [[7, 6, 2, 11], [1, 1, 23, 1]]}


def compare(mesh, lengths, coords, layer, masked, started, backend, packed=False):
    torch.manual_seed(layer)
    config = reference.LinMUConfig(
        width=8, heads=4, groups=2, head_dim=4, text_window=4, window_thw=(2, 2, 2), half_life=(2, 40)
    )
    block = (optimized if backend else reference).MMATE(config, layer).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    u = torch.randn(2, 26, 8, dtype=torch.float64)
    weight = torch.randn(2, 26, 8, dtype=torch.float64)
    angles = torch.randn(1, 26, 4, dtype=torch.float64)
    angles = (angles.cos(), angles.sin())
    valid = torch.ones(2, 26, dtype=torch.bool) if masked else None
    if masked:
        valid[0, -3:] = False
        valid[1, -2:] = False
    sequence = samples() if packed else None
    layout = (optimized if backend else reference).VisionLayout(coords, sequence)
    state = None
    if started:
        with torch.no_grad():
            _, state = block(torch.randn_like(u)[:, :2], position_embeddings=tuple(a[:, :2] for a in angles))
    parallel = ContextParallel(mesh, lengths, OPERATORS if backend else None)

    whole = u.clone().requires_grad_()
    y, end = block(whole, layout, valid=valid, position_embeddings=angles, state=state)
    (y * weight).sum().backward()
    wanted = [p.grad.clone() for p in block.parameters()]
    block.zero_grad()

    mine = parallel.local(u).clone().requires_grad_()
    got, last = m_mate(
        parallel,
        block,
        mine,
        layout,
        valid=valid,
        position_embeddings=tuple(map(parallel.local, angles)),
        state=state,
    )
    (got * parallel.local(weight)).sum().backward()
    with torch.no_grad():  # leaves out what is 0
        given = {"valid": valid, "position_embeddings": tuple(map(parallel.local, angles)), "state": state}
        alone, alone_last = m_mate(parallel, block, mine, layout, **given)
    made = set(parallel.made)
    block.layer_index = block.flex_ma.layer_index = block.local_swin.layer_index = layer + 4
    with torch.no_grad():
        m_mate(parallel, block, mine, layout, position_embeddings=tuple(map(parallel.local, angles)))
    assert set(parallel.made) == made, "a layer of the same order must find the way there"
    routes = [route for found in parallel.made.values() for route in (found, *tuples(found))]
    sent = [each.send_sizes[parallel.rank] for each in routes if isinstance(each, Route)]
    assert sent and not any(sent), "what stays on its rank must not be sent"
    close = {"rtol": 1e-9, "atol": 1e-10}
    torch.testing.assert_close(got, parallel.local(y), **close)
    torch.testing.assert_close(mine.grad, parallel.local(whole.grad), **close)
    torch.testing.assert_close(alone, got, **close)
    for one, two, other in zip(last.tensors, alone_last.tensors, end.tensors, strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), **close)
        torch.testing.assert_close(two, other.to(one.dtype), **close)
    for parameter, grad in zip(block.parameters(), wanted, strict=True):
        dist.all_reduce(parameter.grad, group=mesh.get_group())
        torch.testing.assert_close(parameter.grad, grad, **close)


def tuples(found) -> tuple:
    return found if isinstance(found, tuple) else ()


def scan_under_autocast(mesh):
    """Autocast rounds nothing of what passes between ranks."""
    torch.manual_seed(0)
    x, B, C = torch.randn(1, 26, 2, 4), torch.randn(1, 26, 2, 4), torch.randn(1, 26, 4, 4)
    dt, gate, A = torch.rand(1, 26, 4), torch.rand(1, 26, 4), -torch.rand(4)
    segment = torch.tensor([[-1] * 3 + [0] * 20 + [-1] * 3])
    parallel = ContextParallel(mesh, [9, 17])
    mine = [parallel.local(tensor) for tensor in (x, dt, B, C, gate)]
    with torch.autocast("cpu", torch.bfloat16):
        wanted, end = reference.bidirectional_scan(x, dt, A, B, C, gate=gate, segment=segment)
        got, last = bidirectional_scan(parallel, *mine[:2], A, *mine[2:4], gate=mine[4], segment=segment)
    torch.testing.assert_close(got, parallel.local(wanted), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(last, end, rtol=1e-5, atol=1e-5)


def scan_keeps_no_copies(mesh):
    """Of what passes between ranks backward keeps the tokens as they came, and no copies in float32."""
    x, B, C = (torch.randn(1, 26, heads, 16).bfloat16().requires_grad_() for heads in (2, 2, 4))
    dt, gate, A = torch.rand(1, 26, 4), torch.rand(1, 26, 4), -torch.rand(4)
    segment, kept = torch.tensor([[-1] * 3 + [0] * 20 + [-1] * 3]), []

    def scan(x, dt, A, B, C, **given):
        return C + 0, x.sum() * torch.ones(1, 4, 16, 16)

    parallel = ContextParallel(mesh, [9, 17], Operators(bidirectional_scan=scan))
    mine = [parallel.local(tensor) for tensor in (x, dt, B, C, gate)]
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append((t.dtype, t.numel())) or t, lambda t: t
    ):
        y, _ = bidirectional_scan(parallel, *mine[:2], A, *mine[2:4], gate=mine[4], segment=segment)
        total = y.sum()
    total.backward()
    assert kept and (torch.float32, mine[3].numel()) not in kept


@torch.no_grad()
def scan_in_bfloat16(mesh):
    """As far from float32 as one process is in bfloat16, or nearly."""
    torch.manual_seed(0)
    x, B, C = (torch.randn(1, 26, heads, 16).bfloat16() for heads in (2, 2, 4))
    dt, gate, A = torch.rand(1, 26, 4), torch.rand(1, 26, 4), -0.1 * torch.rand(4)
    segment = torch.tensor([[-1] * 3 + [0] * 20 + [-1] * 3])
    options = {"gate": gate, "segment": segment}
    wanted, end = reference.bidirectional_scan(x.float(), dt, A, B.float(), C.float(), **options)
    one, _ = reference.bidirectional_scan(x, dt, A, B, C, **options)
    parallel = ContextParallel(mesh, [9, 17])
    mine = [parallel.local(tensor) for tensor in (x, dt, B, C, gate)]
    got, last = bidirectional_scan(parallel, *mine[:2], A, *mine[2:4], gate=mine[4], segment=segment)
    off = (got.float() - parallel.local(wanted)).norm() / parallel.local(wanted).norm()
    allowed = (one.float() - wanted).norm() / wanted.norm()
    assert got.dtype == torch.bfloat16 and off < 2 * allowed, (off, allowed)
    torch.testing.assert_close(last, end, rtol=1e-4, atol=1e-4)


def work() -> None:
    """One of four processes: cases of 2, 3 and 4 of them in turn."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    for ranks, splits in SPLITS.items():
        mesh = DeviceMesh("cpu", list(range(ranks)))  # every process makes it, those in it use it
        for number, lengths in enumerate(splits if rank < ranks else ()):
            for layer in range(4) if number == 1 else (number + 1,):
                coords = prompts()[layer % 2]
                options = (bool(number % 2), layer >= 2, number == 1)
                try:
                    compare(mesh, lengths, coords, layer, *options)
                    packed = (prompts()[1], layer, bool(number % 2), False, number == 1, True)
                    compare(mesh, lengths, *packed)
                except Exception as error:
                    raise AssertionError(f"rank {rank} of {lengths}, layer {layer}, {options}") from error
        if rank < ranks == 2:
            scan_under_autocast(mesh)
            scan_in_bfloat16(mesh)
            scan_keeps_no_copies(mesh)
    dist.barrier()
    dist.destroy_process_group()
