"""Tokens exchanged in place with the ranks that scan them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...reference.student.context_parallel.ranks import wait
from ...reference.student.context_parallel.routes import Route


class Swap:
    """Tokens exchanged in place: those that come take the room of those that leave, row by row.

    Args:
        route: to an order of which every rank holds as many tokens of each row as it does now.
        batch: B.

    Attributes:
        order: (B, n) int64, where in its row the token of each place of this rank's part of the order stands.
    """

    def __init__(self, route: Route, batch: int) -> None:
        self.route, self.parallel = route, route.parallel
        length = len(route.to_home) // batch
        self.room = torch.empty_like(route.send)  # of each token that comes, as they arrive
        self.room[route.receive.argsort()] = route.send.sort().values
        place = route.from_home.index_copy(0, route.receive, self.room).view(batch, length)
        self.order = place - torch.arange(batch, device=place.device)[:, None] * length

    def sent(self, tensors: list[Tensor]) -> Tensor:
        """The exchange of (B, n, ...) each, of one dtype, under way."""
        route = self.route
        leaving = torch.cat([rows_of(tensor)[route.send] for tensor in tensors], 1)
        return self.parallel.start_all_to_all(leaving, route.receive_sizes, route.send_sizes)

    def arrive(self, tensors: list[Tensor], arriving: Tensor) -> None:
        """Write into the tensors what `sent` of them brings."""
        widths = [rows_of(tensor).shape[1] for tensor in tensors]
        for tensor, new in zip(tensors, wait(arriving).split(widths, 1), strict=True):
            rows_of(tensor).index_copy_(0, self.room, new)

    def sent_back(self, tensor: Tensor) -> Tensor:
        """The exchange the other way."""
        leaving = rows_of(tensor)[self.room]
        return self.parallel.start_all_to_all(leaving, self.route.send_sizes, self.route.receive_sizes)

    def arrive_back(self, tensor: Tensor, arriving: Tensor) -> None:
        """Write into the tensor what `sent_back` of it brings."""
        rows_of(tensor).index_copy_(0, self.route.send, wait(arriving))


def rows_of(tensor: Tensor) -> Tensor:
    """(B, n, ...) -> (B·n, ·), the same memory."""
    return tensor.view(tensor.shape[0] * tensor.shape[1], math.prod(tensor.shape[2:]))
