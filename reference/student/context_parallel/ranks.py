"""Which rank holds which tokens of a prompt, and the collectives between them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh

from ...checks import require
from .operators import Operators
from .packed_rows import Samples


class ContextParallel:
    """One prompt, of one layout, split by tokens over the ranks of a mesh.

    Args:
        mesh: of one dimension; its ranks hold the prompt's slices in order.
        lengths: how many tokens each rank holds, each at least 1; the same for every row.
        operators: what a rank runs on its own tokens; None = the reference's.

    Attributes:
        rank, ranks: this process's number, and how many there are, R.
        edges: where slices begin among the prompt's tokens, and L.
        counts: (R,) int64, `lengths` on the ranks' device.
        owner: (L,) int64, the rank of each token.

    Raises:
        ValueError: for a mesh of several dimensions, or lengths that do not fit it.
    """

    def __init__(self, mesh: DeviceMesh, lengths: Sequence[int], operators: Operators | None = None) -> None:
        require(mesh.ndim == 1, "ContextParallel", "mesh must have one dimension", mesh.ndim)
        fits = len(lengths) == mesh.size() and min(lengths) >= 1
        must = f"lengths must be {mesh.size()} numbers >= 1, one a rank"
        require(fits, "ContextParallel", must, list(lengths), "give every rank a token, or use fewer ranks")
        self.mesh, self.lengths = mesh, list(lengths)
        self.operators = Operators() if operators is None else operators
        self.rank, self.ranks = mesh.get_local_rank(), mesh.size()
        ends = torch.tensor(self.lengths).cumsum(0).tolist()
        self.edges = [0, *ends]
        device = mesh.device_type
        self.counts = torch.tensor(self.lengths, device=device)
        self.owner = torch.arange(self.ranks, device=device).repeat_interleave(self.counts)
        self.made: dict[Hashable, Any] = {}

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """Return what `make` returns of the layout, computed once per `key` for all layers."""
        if key not in self.made:
            self.made[key] = make()
        return self.made[key]

    def samples(self, sequence: Tensor | None, valid: Tensor | None) -> Samples | None:
        """What the ids (B, L) of packed rows say of this prompt; None = a row is one sample."""
        if sequence is None:
            return None
        valid = torch.ones_like(sequence, dtype=torch.bool) if valid is None else valid
        return self.once("samples", lambda: Samples(sequence, valid, self.edges))

    @property
    def slice(self) -> slice:
        """This rank's tokens among those of the prompt."""
        return slice(self.edges[self.rank], self.edges[self.rank + 1])

    def local(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """Return this rank's slice of a tensor of the whole prompt, (B, L, ...) or with L at `dim`."""
        must = f"dimension {dim} must be the prompt's {self.edges[-1]} tokens"
        require(tensor.shape[dim] == self.edges[-1], "ContextParallel.local", must, tuple(tensor.shape))
        return tensor.narrow(dim, self.slice.start, self.lengths[self.rank])

    def local_or_none(self, tensor: Tensor | None) -> Tensor | None:
        """`local`, or None of None."""
        return None if tensor is None else self.local(tensor)

    def all_to_all(self, tensor: Tensor, receive_sizes: list[int], send_sizes: list[int]) -> Tensor:
        """All-to-all along the first dimension, with a gradient."""
        arrived = self.start_all_to_all(tensor, receive_sizes, send_sizes)
        if not arrived.requires_grad:
            arrived = wait(arrived)
        return arrived.reshape(sum(receive_sizes), *tensor.shape[1:])

    def start_all_to_all(self, tensor: Tensor, receive_sizes: list[int], send_sizes: list[int]) -> Tensor:
        """Start `all_to_all`; `wait` gives what arrives, flattened to two dimensions."""
        flat = tensor.reshape(len(tensor), math.prod(tensor.shape[1:])).contiguous()
        return all_to_all_single_autograd(flat, receive_sizes, send_sizes, (self.mesh, 0))

    def all_gather(self, tensor: Tensor) -> Tensor:
        """One tensor a rank -> (R, ...) on every rank, with a gradient."""
        ones = [1] * self.ranks
        return self.all_to_all(tensor.expand(self.ranks, *tensor.shape), ones, ones)

    def all_gather_tokens(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """(B, n, ...) of this rank, or n at `dim` -> the whole prompt's on every rank, with a gradient."""
        mine = tensor.movedim(dim, 0)
        sent = mine.expand(self.ranks, *mine.shape).flatten(0, 1)
        return self.all_to_all(sent, self.lengths, [len(mine)] * self.ranks).movedim(0, dim)


def wait(tensor: Tensor) -> Tensor:
    """Wait for a collective: a plain tensor, which a cache may hold and copy."""
    return tensor.trigger_wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor
