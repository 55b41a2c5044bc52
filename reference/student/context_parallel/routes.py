"""Routes: tokens travel to the rank that computes them, and outputs return, by all-to-all.

Scan orders and windows are permutations of the prompt's tokens, which all ranks know from the layout. So
every rank finds by itself what it sends and receives, once for all layers of the same order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .ranks import ContextParallel


class Route:
    """Which of this rank's tokens go to which rank, and where those that arrive stand.

    Choice: what stays on its rank is no part of the collective, whose copies of it would cost more than what
    travels.

    Args:
        destination: (B, L) int64, the rank that gets each token of the prompt.
        place: (B, L) int64, where it stands among all tokens of its destination: any sortable number.
        parallel: who holds which tokens now.
    """

    def __init__(self, destination: Tensor, place: Tensor, parallel: ContextParallel) -> None:
        self.parallel = parallel
        rank, ranks = parallel.rank, parallel.ranks
        mine = destination[:, parallel.slice].flatten()  # where this rank's N = B·n tokens go
        leaves = mine != rank
        order = torch.where(leaves, mine, ranks).argsort(stable=True)  # by destination, then by row and token
        self.send_sizes = torch.bincount(mine[leaves], minlength=ranks).tolist()
        self.send = order[: sum(self.send_sizes)]  # index into the N
        here = (destination == rank).flatten().nonzero().squeeze(1)  # M, by row and token
        self.arrived = here[place.flatten()[here].argsort(stable=True)]  # index into the (B·L)
        source = parallel.owner.expand_as(destination).flatten()[self.arrived]  # the rank that has each now
        comes = source != rank
        order = torch.where(comes, source, ranks) * destination.numel() + self.arrived
        self.receive_sizes = torch.bincount(source[comes], minlength=ranks).tolist()
        self.receive = order.argsort()[: sum(self.receive_sizes)]  # index into the M, as they arrive
        length, row = destination.shape[1], self.arrived // destination.shape[1]
        home = row * len(mine) // len(destination) + self.arrived % length - parallel.slice.start
        self.from_home = torch.where(comes, 0, home)  # (M,), of those that stay
        stays = (~leaves).nonzero().squeeze(1)
        self.to_home = torch.zeros_like(mine)  # (N,), of those that stay: their index into the M
        self.to_home[stays] = (~comes).nonzero().squeeze(1)[home[~comes].argsort()]

    def there(self, *tensors: Tensor) -> list[Tensor]:
        """(B, n, ...) of this rank each, of one dtype -> (M, ...) each: those computed here, in place."""
        flat = [tensor.flatten(0, 1) for tensor in tensors]
        sizes = self.receive_sizes, self.send_sizes
        return self.carried(flat, self.from_home, self.send, self.receive, *sizes)

    def back(self, tensor: Tensor) -> Tensor:
        """(M, ...) in their places -> (B, n, ...) of this rank."""
        if not len(tensor):  # nothing of it can be read
            tensor = torch.cat([tensor, tensor.new_zeros(1, *tensor.shape[1:])])
        sizes = self.send_sizes, self.receive_sizes
        (home,) = self.carried([tensor], self.to_home, self.receive, self.send, *sizes)
        return home.unflatten(0, (-1, self.parallel.lengths[self.parallel.rank]))

    def carried(self, tensors, stay: Tensor, leave: Tensor, enter: Tensor, receive_sizes, send_sizes):
        """Rows `stay` of each tensor; at `enter` those that come for the rows `leave`, in one exchange."""
        sent = torch.cat([tensor[leave].flatten(1) for tensor in tensors], 1)
        widths = [math.prod(tensor.shape[1:]) for tensor in tensors]
        arrived = self.parallel.all_to_all(sent, receive_sizes, send_sizes).split(widths, 1)
        return [
            tensor[stay].index_copy_(0, enter, new.reshape(-1, *tensor.shape[1:]))
            for tensor, new in zip(tensors, arrived, strict=True)
        ]

    def of_prompt(self, tensor: Tensor) -> Tensor:
        """(B, L) known to all ranks -> (M,) of the tokens computed here, in their places."""
        return tensor.flatten()[self.arrived]


def route_to_scan(parallel: ContextParallel, order: Tensor) -> Route | None:
    """Route to the prompt's scan order, (B, L) int64: afterwards rank r holds its slice of the scan.

    None = it does so already.
    """
    if bool((order == torch.arange(order.shape[1], device=order.device)).all()):
        return None
    position = order.argsort(1)  # where each token stands in the scan
    rows = torch.arange(len(order), device=order.device)[:, None]
    return Route(parallel.owner[position], position + rows * order.shape[1], parallel)
