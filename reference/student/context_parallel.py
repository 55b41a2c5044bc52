"""Context parallel: one prompt's tokens on several processes, each with a slice of them, cut anywhere.

Letters: B batch, L tokens of the prompt, n tokens of this rank, R ranks, H heads, G groups, N state, P head
dim, K taps, W text window, S(r) the state that enters rank r.

    S(r+1) = exp(A Σ dt) S(r) + the state rank r ends with when it starts from zero                       (1)
    y_t = the local y_t + exp(A Σ_{s <= t} dt_s) S(r)ᵀ C_t                                                (2)

The reverse scan does the same from right to left, for the one segment that a boundary can cut. Scan order and
windows are permutations of tokens which all ranks know from the layout: tokens go to the rank that computes
them and the outputs return, by all-to-all. Choice: (2), not a second scan from S(r): it is one product
with C, as the scan is linear in its state. Convolution and text window fetch the K-1 and W-1 tokens before.

Every rank calls the same functions with the same layout; gradients go back through the same collectives, so
every rank must call backward, of a loss times 0 where nothing on it is supervised. A rank's parameter
gradients are its share: sum them over ranks. What follows from the layout alone, routes and cut segments, is
computed once and shared by all layers, with host reads: one object a prompt. `split_forward.py` makes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import checkpoint

from ..causal_conv import causal_conv
from ..checks import require
from ..flex_ma import FlexMA, FlexMAState
from ..layout import VisionLayout, samples_of
from ..m_mate import MMATE, MMATEState
from ..numerics import (
    accumulation_dtype,
    full_precision_linear,
    last_where,
    without_autocast,
    zero_where_masked,
)
from ..projections import apply_rope
from ..scan import bidirectional_scan
from ..sliding_window_attention import WindowState, sliding_window_attention
from ..window_attention import window_attention


def narrow_products(u: Tensor, linears: list[nn.Linear]) -> list[Tensor]:
    """`full_precision_linear` of u (B, n, D) by each."""
    return [full_precision_linear(u, linear) for linear in linears]


def mix_branches(y: Tensor, local: Tensor, logit: Tensor, mixes: Tensor | None) -> Tensor:
    """The branches (B, n, D) mixed by sigmoid(logit), (B, n, 1), where `mixes` (B, n), else y; None = all."""
    mix = torch.sigmoid(logit)
    mixed = (mix * y + (1 - mix) * local).to(y.dtype)
    return mixed if mixes is None else torch.where(mixes[..., None], mixed, y)


@dataclass(frozen=True)
class Operators:
    """The operators each rank runs on its own tokens: the reference's, or those of another backend.

    `m_mate` is another backend's `ContextParallel.m_mate` for calls without gradients and packed rows, whose
    first argument is the object; None = there is none.
    """

    causal_conv: Callable = causal_conv
    bidirectional_scan: Callable = bidirectional_scan
    sliding_window_attention: Callable = sliding_window_attention
    window_attention: Callable = window_attention
    apply_rope: Callable = apply_rope
    narrow_products: Callable = narrow_products
    mix_branches: Callable = mix_branches
    m_mate: Callable | None = None


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
        arrived = self.parallel.exchange(sent, receive_sizes, send_sizes).split(widths, 1)
        return [
            tensor[stay].index_copy_(0, enter, new.reshape(-1, *tensor.shape[1:]))
            for tensor, new in zip(tensors, arrived, strict=True)
        ]

    def of_prompt(self, tensor: Tensor) -> Tensor:
        """(B, L) known to all ranks -> (M,) of the tokens computed here, in their places."""
        return tensor.flatten()[self.arrived]


class Samples:
    """The samples of packed rows, beside where rows are cut.

    Args:
        ids: (B, L) int64, the sample of each token of the prompt; those of invalid tokens say nothing.
        valid: (B, L) bool.
        edges: where slices begin, and L.

    Attributes:
        open: of each edge, (B,): the sample of the last valid token before it, less than all ids if none.
        passes: of each slice, (B,) bool: nothing in it is of another sample than its edge's.
    """

    def __init__(self, ids: Tensor, valid: Tensor, edges: list[int]) -> None:
        self.ids, self.valid = ids, valid
        none = ids.amin() - 1
        places = torch.arange(ids.shape[1], device=ids.device)
        last = torch.where(valid, places, -1).cummax(1).values  # the last valid token up to each
        found = torch.where(last < 0, none, ids.gather(1, last.clamp(min=0)))
        self.open = [found[:, edge - 1] if edge else none.expand(len(ids)) for edge in edges]
        slices = [slice(*pair) for pair in pairwise(edges)]
        own = (ids[:, part] == self.open[rank][:, None] for rank, part in enumerate(slices))
        self.passes = [(same | ~valid[:, part]).all(1) for same, part in zip(own, slices, strict=True)]

    def first(self, part: slice) -> Tensor:
        """(B, 1): the sample of a slice's first valid token."""
        return self.ids[:, part].gather(1, self.valid[:, part].int().argmax(1, keepdim=True))


class ContextParallel:
    """The operators of a block over one prompt, of one layout, split by tokens over the ranks of a mesh.

    Args:
        mesh: of one dimension; its ranks hold the prompt's slices in order.
        lengths: how many tokens each rank holds, each at least 1; the same for every row.
        operators: what a rank runs on its own tokens; None = the reference's.
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
        """`local`, of nothing None."""
        return None if tensor is None else self.local(tensor)

    def exchange(self, tensor: Tensor, receive_sizes: list[int], send_sizes: list[int]) -> Tensor:
        """All-to-all along the first dimension, with a gradient."""
        arrived = self.sent(tensor, receive_sizes, send_sizes)
        if not arrived.requires_grad:
            arrived = waited(arrived)
        return arrived.reshape(sum(receive_sizes), *tensor.shape[1:])

    def sent(self, tensor: Tensor, receive_sizes: list[int], send_sizes: list[int]) -> Tensor:
        """`exchange` under way, (M, ...) flattened to two dimensions: `waited` gives what comes of it."""
        flat = tensor.reshape(len(tensor), math.prod(tensor.shape[1:])).contiguous()
        return all_to_all_single_autograd(flat, receive_sizes, send_sizes, (self.mesh, 0))

    def gather(self, tensor: Tensor) -> Tensor:
        """One tensor a rank -> (R, ...) on every rank, with a gradient."""
        ones = [1] * self.ranks
        return self.exchange(tensor.expand(self.ranks, *tensor.shape), ones, ones)

    def everywhere(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """(B, n, ...) of this rank, or n at `dim` -> the whole prompt's on every rank, with a gradient."""
        mine = tensor.movedim(dim, 0)
        sent = mine.expand(self.ranks, *mine.shape).flatten(0, 1)
        return self.exchange(sent, self.lengths, [len(mine)] * self.ranks).movedim(0, dim)

    def in_order(self, order: Tensor) -> Route | None:
        """Route to the prompt's scan order, (B, L) int64: afterwards rank r holds its slice of the scan.

        None = it does so already.
        """
        if bool((order == torch.arange(order.shape[1], device=order.device)).all()):
            return None
        position = order.argsort(1)  # where each token stands in the scan
        rows = torch.arange(len(order), device=order.device)[:, None]
        return Route(self.owner[position], position + rows * order.shape[1], self)

    @without_autocast
    def causal_conv(self, u, weight, bias=None, *, mask=None, initial_state=None, sequence=None):
        """`causal_conv` of this rank's u (B, n, channels) with the prompt's mask and sequence (B, L).

        Returns:
            This rank's output, and the state after the whole prompt.
        """
        taps, dtype = weight.shape[1], accumulation_dtype(u.dtype)
        mine, ends = None if mask is None else self.local(mask), initial_state
        if taps > 1:
            there = initial_state is not None
            samples, before = self.samples(sequence, mask), [initial_state]
            mine_before, after = self.pass_tails([u.to(dtype)], mask, taps - 1, before, there, samples)
            ((initial_state,), _), ((ends,), _) = mine_before, after
        given = {"mask": mine, "initial_state": initial_state, "sequence": self.local_or_none(sequence)}
        out, end = self.operators.causal_conv(u, weight, bias, **given)
        return out, end if taps == 1 else ends

    @without_autocast
    def sliding_window_attention(
        self, q, k, v, window, *, asks=None, valid=None, initial_state=None, sequence=None, **given
    ):
        """`sliding_window_attention` of this rank's q, k, v with the prompt's asks, valid, sequence (B, L).

        Returns:
            This rank's output, and the state after the whole prompt.
        """
        asks, mine = (None if mask is None else self.local(mask) for mask in (asks, valid))
        before = (None, None) if initial_state is None else (initial_state.k, initial_state.v)
        there = False if initial_state is None else initial_state.present
        if window > 1:
            samples = self.samples(sequence, valid)
            states = self.pass_tails([k, v], valid, window - 1, before, there, samples)
            initial_state, after = (WindowState(*kept, present) for kept, present in states)
        o, end = self.operators.sliding_window_attention(
            q,
            k,
            v,
            window,
            asks=asks,
            valid=mine,
            initial_state=initial_state,
            sequence=self.local_or_none(sequence),
            **given,
        )
        return o, after if window > 1 else end

    def pass_tails(self, tensors, valid, size, before, present, samples: Samples | None = None):
        """The last `size` valid tokens before this rank, and those after the prompt; of packed rows, those of
        the sample that goes on.

        Args:
            tensors: this rank's, (B, n, ...) each.
            valid: (B, L) bool, of the prompt; None = all.
            size: at least 1.
            before: what stood before the prompt, (B, size, ...) each, or None.
            present: which of it there is, (B, size) bool, or one bool for all.
            samples: of packed rows; None = a row is one sample.
        Returns:
            twice: (B, size, ...) of each tensor, oldest first, and (B, size) bool, which of them there are.
        """
        valid = valid if samples is None else samples.valid
        place, found = self.once(("tail", size), lambda: self.tail(valid, size, len(tensors[0])))
        rows = torch.arange(len(place), device=place.device)[:, None]
        tails = [
            zero_where_masked(t[rows, place], found.view(*found.shape, *(1,) * (t.ndim - 2))) for t in tensors
        ]
        return self.pass_on(tails, valid, before, present, samples)

    def tail(self, valid: Tensor | None, size: int, batch: int) -> tuple[Tensor, Tensor]:
        """Where this rank's last `size` valid tokens stand in its slice, (B, size), and which there are."""
        length, device = self.lengths[self.rank], self.counts.device
        place = torch.arange(-size, length, device=device).expand(batch, -1)
        mine = place >= 0 if valid is None else F.pad(self.local(valid), (size, 0))
        (place,), found = last_where(mine, size, place)
        return place, found

    def pass_on(self, tails, valid, before, present, samples: Samples | None = None):
        """`pass_tails` of tails found before, (B, size, ...) each."""
        batch, size, device = *tails[0].shape[:2], tails[0].device
        nothing = [torch.zeros_like(tail) for tail in tails]
        if valid is None:
            counts = self.counts.expand(batch, -1)
        else:
            counts = torch.stack([part.sum(1) for part in valid.split(self.lengths, 1)], 1)  # (B, R)
        there = torch.arange(size, device=device) >= size - counts[..., None]  # (B, R, size)
        if not isinstance(present, Tensor):
            present = torch.full((batch, size), present, device=device)
        there = torch.cat([present, there.flatten(1)], 1)  # (B, (R + 1)·size)
        before = [n if b is None else b.to(n.dtype) for n, b in zip(nothing, before, strict=True)]
        # All of it goes into both states: so on every rank the collectives of backward pair up.
        every = self.gather(torch.cat([tail.flatten(2) for tail in tails], 2)).movedim(0, 1).flatten(1, 2)
        every = every.split([math.prod(tail.shape[2:]) for tail in tails], 2)
        history = [
            torch.cat([b, own.unflatten(2, b.shape[2:])], 1) for b, own in zip(before, every, strict=True)
        ]
        column = torch.arange(there.shape[1], device=device)
        mine, after = there & (column < (self.rank + 1) * size), there
        if samples is not None:
            parts = [slice(*pair) for pair in pairwise(self.edges)]
            ids, kept = ([F.pad(each[:, part], (size, 0)) for part in parts] for each in (samples.ids, valid))
            ids = [last_where(k, size, i)[0][0] for i, k in zip(ids, kept, strict=True)]
            ids = torch.cat([ids[0].new_zeros(batch, size), *ids], 1)  # of `history`; none stood before
            mine = mine & (ids == samples.first(self.slice))
            after = after & (ids == samples.open[-1][:, None])
        return last_where(mine, size, *history), last_where(after, size, *history)

    @without_autocast
    def window_attention(self, q, k, v, window_id, *, scale=None, key=None):
        """`window_attention` of this rank's q, k, v with the prompt's window_id (B, L).

        Layers of one `key` have the same ids; None = find the way anew. A window is computed by the rank that
        holds its first token; so what travels is what is cut off.
        """
        make = partial(self.to_windows, window_id)
        route, here = make() if key is None else self.once(key, make)
        arrived, has_more = route.there(q, k, v), False
        if torch.is_grad_enabled() or not len(arrived[0]):
            # One token of zeros more, in a window of its own: every rank runs the operator and its gradient,
            # also where no token is in a window, so that the collectives of backward pair up.
            arrived, has_more = [torch.cat([t, t.new_zeros(1, *t.shape[1:])]) for t in arrived], True
        if not has_more:
            bare = here[:, :-1]
            here = bare if key is None else self.once((key, "bare"), lambda: bare)
        o = self.operators.window_attention(*(t[None] for t in arrived), here, scale=scale)
        return route.back(o[0, :-1] if has_more else o[0])

    def to_windows(self, window_id: Tensor) -> tuple[Route, Tensor]:
        """The route to the ranks that compute the windows (B, L), and the ids there, (1, M + 1)."""
        ids, destination, _ = self.holders(window_id)
        route = Route(destination, torch.arange(ids.numel(), device=ids.device).view_as(ids), self)
        return route, torch.cat([route.of_prompt(ids), ids.amax().clamp(min=-1).view(1) + 1])[None]

    def holders(self, window_id: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of windows (B, L): ids that no two rows share, which rank computes each token's, and whether a cut
        goes through it, (B, L) each.
        """
        rows = torch.arange(len(window_id), device=window_id.device)[:, None]
        ids = torch.where(window_id < 0, -1, window_id * len(window_id) + rows)  # rows side by side
        found, inverse = ids.flatten().unique(return_inverse=True)
        owner = self.owner.expand_as(ids)
        first, last = (
            owner.new_full(found.shape, fill).scatter_reduce(0, inverse, owner.flatten(), which)
            for fill, which in ((self.ranks, "amin"), (-1, "amax"))
        )
        destination = torch.where(ids < 0, owner, first[inverse].view_as(ids))
        return ids, destination, (ids >= 0) & (first != last)[inverse].view_as(ids)

    @without_autocast
    def bidirectional_scan(
        self,
        x,
        dt,
        A,
        B,
        C,
        *,
        gate,
        segment=None,
        valid=None,
        D=None,
        initial_state=None,
        sequence=None,
    ):
        """`bidirectional_scan` of this rank's tokens in scan order; segment, valid and sequence (B, L) of the
        prompt.

        Returns:
            This rank's y (B, n, H, P), and the state after the whole prompt.
        """
        dtype = accumulation_dtype(x.dtype)
        mine, own = (None if each is None else self.local(each) for each in (valid, segment))
        samples = self.samples(sequence, valid)
        given = {"gate": gate, "segment": own, "valid": mine, "D": D}
        given["sequence"] = self.local_or_none(sequence)
        y, end = self.operators.bidirectional_scan(x, dt, A, B, C, **given)
        steps = dt.to(dtype)  # (B, n, H)
        if mine is not None:
            steps = zero_where_masked(steps, mine[..., None])
            x, B, C = (zero_where_masked(t, mine[..., None, None]) for t in (x, B, C))
        A, gate = A.to(dtype), gate.to(dtype)
        # With gradients every rank computes all of it, so that the collectives of backward pair up. Without,
        # what is 0 is left out, and products are those of the tensors' dtype, as within the scan.
        learns = torch.is_grad_enabled()
        wide = dtype if learns else x.dtype
        y = y.to(wide)
        start = torch.zeros_like(end) if initial_state is None else initial_state.to(dtype)
        decay = torch.exp(A * steps.sum(1))
        if samples is not None:
            decay = decay * samples.passes[self.rank][:, None]
        forward = self.fold(end, decay, start)  # eq. (1)
        if learns or self.rank > 0 or initial_state is not None:
            kept = torch.exp(A * sums(steps))  # (B, n, H), of what entered
            if own is not None:
                kept = kept * torch.where(own[..., None] >= 0, gate, 1)
            if samples is not None:
                goes_on = self.local(samples.ids) == samples.open[self.rank][:, None]
                kept = zero_where_masked(kept, goes_on[..., None])
            y = plus_reads(y, kept, C, forward[self.rank])  # eq. (2)
        cut, is_cut = (None, False) if own is None else self.once("cuts", lambda: self.cuts(segment))
        if is_cut:
            into_left, from_right = (
                (own == cut[e][:, None]) & (own >= 0) for e in (self.rank, self.rank + 1)
            )
            left = zero_where_masked(steps, into_left[..., None])
            state = torch.zeros_like(end)
            if learns or self.rank > 0:
                write = torch.exp(A * (sums(left) - left)) * left
                state = recomputed(written, x, B, write.to(wide)).to(dtype)
            through = [(a == b) & (a >= 0) for a, b in pairwise(cut)]  # the rank lies inside one segment
            incoming = self.fold(state, torch.exp(A * left.sum(1)), torch.zeros_like(state), through)
            if learns or self.rank + 1 < self.ranks:
                right = zero_where_masked(steps, from_right[..., None])
                kept = torch.exp(A * sums(right.flip(1)).flip(1)) * (1 - gate)
                kept = zero_where_masked(kept, from_right[..., None])
                y = plus_reads(y, kept, C, incoming[self.rank + 1])
        return y.to(x.dtype), forward[-1]

    def hand_on(
        self, added: Tensor, decay: Tensor, start: Tensor | None, arriving: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Eq. (1) of both directions in one exchange, without gradients.

        Args:
            added: (directions, B, H, N, P), what this rank adds from zero to the states.
            decay: (directions, B, H), by what it multiplies those that enter.
            start: (B, H, N, P), the forward state before the prompt; None = zeros.
            arriving: what `send_states` gave.
        Returns:
            the states at the edges, (R + 1, B, H, N, P): forward ones, and reverse ones if there are such.
        """
        every = waited(arriving).split([added.numel(), decay.numel()], 1)
        states, decays = every[0].view(-1, *added.shape), every[1].view(-1, *decay.shape)
        edges = []
        for direction, order in enumerate((range(self.ranks), reversed(range(self.ranks)))[: len(added)]):
            state = torch.zeros_like(added[0])
            found = [state if start is None or direction else start.to(added.dtype)]
            for rank in order:
                factor = decays[rank, direction][..., None, None]
                found.append(torch.addcmul(states[rank, direction], factor, found[-1]))
            edges.append(torch.stack(found[::-1] if direction else found))
        return edges[0], edges[1] if len(edges) > 1 else None

    def send_states(self, added: Tensor, decay: Tensor) -> Tensor:
        """The exchange for `hand_on`, under way."""
        mine, ones = torch.cat([added.flatten(), decay.flatten()]), [1] * self.ranks
        return self.sent(mine.expand(self.ranks, -1), ones, ones)

    def fold(
        self, state: Tensor, decay: Tensor, start: Tensor, through: list[Tensor] | None = None
    ) -> Tensor:
        """Eq. (1): the state at each edge, (R + 1, B, H, N, P); from the right, if `through` is given.

        Args:
            state: (B, H, N, P), what this rank adds from zero.
            decay: (B, H), by what it multiplies the state that enters.
            start: (B, H, N, P), the state at the first edge, or at the last.
            through: of each rank, (B,) bool: may a state pass from its right edge to its left?
        """
        both = self.gather(torch.cat([state.flatten(1), decay], 1)).split(
            [state[0].numel(), decay.shape[1]], 2
        )
        states, decays = both[0].unflatten(2, state.shape[1:]), both[1]
        edges, ranks = [start], range(self.ranks)
        for rank in ranks if through is None else reversed(ranks):
            factor = decays[rank][..., None, None]
            enters = edges[-1]
            if through is not None:
                enters = zero_where_masked(enters, through[rank][:, None, None, None])
            edges.append(factor * enters + states[rank])
        # Stacked, so that on every rank every state has a gradient and the collectives of backward pair up.
        return torch.stack(edges if through is None else edges[::-1])

    def cuts(self, segment: Tensor) -> tuple[list[Tensor], bool]:
        """The segment that each edge cuts, (B,) each, -1 = none; and whether any does."""
        cut = [crossing(segment, edge) for edge in self.edges]
        return cut, bool((torch.stack(cut) >= 0).any())

    def m_mate(
        self,
        block: MMATE,
        u: Tensor,
        layout: VisionLayout | None = None,
        *,
        valid: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        state: MMATEState | None = None,
        sequence: Tensor | None = None,
    ) -> tuple[Tensor, MMATEState]:
        """`MMATE.forward` of this rank's tokens.

        Args:
            block: the reference's or the optimized one; its parameters are used, with these operators.
            u: (B, n, D), this rank's.
            layout, valid: of the whole prompt, L tokens.
            position_embeddings: (cos, sin), each (B or 1, n, N), this rank's.
            state: the state before the prompt, the same on every rank; of packed rows None.
            sequence: (B, L) int64, the samples of packed rows, where no layout says them; None = one a row.
        Returns:
            This rank's (B, n, D), and the state after the whole prompt, the same on every rank.
        """
        config = block.config
        sequence = samples_of("ContextParallel.m_mate", layout, sequence)
        must = "packed rows must have no state before them"
        require(sequence is None or state is None, "ContextParallel.m_mate", must, "a state")
        if self.operators.m_mate is not None and sequence is None and not torch.is_grad_enabled():
            return self.operators.m_mate(self, block, u, layout, valid, position_embeddings, state)
        given = {"sequence": sequence}
        y, after = self.flex_ma(block.flex_ma, u, layout, valid, position_embeddings, state, **given)
        window = None if state is None else state.window
        if layout is not None or config.text_window:
            rest = (layout, valid, position_embeddings, window)
            local, window = self.local_swin(block.local_swin, u, *rest, **given)
            mixes = valid if config.text_window else layout.is_vision
            mixes = None if mixes is None else self.local(mixes)
            (logit,) = self.operators.narrow_products(u, [block.mix_proj])
            y = self.operators.mix_branches(y, local, logit, mixes)
        conv, scan = (tensor.clone() for tensor in after)  # no views of what all ranks sent
        window = None if window is None else WindowState(*(tensor.clone() for tensor in window))
        return y, MMATEState(conv, scan, window)

    def flex_ma(
        self, flex, u, layout, valid, position_embeddings, state, sequence=None
    ) -> tuple[Tensor, FlexMAState]:
        """`FlexMA.forward` of this rank's tokens; arguments as for `m_mate`."""
        xBC, dt, gate = self.project(flex, u, position_embeddings)
        route = None
        if layout is not None:
            layer = flex.order_layer
            route = self.once(("order", layer % 4), lambda: self.in_order(layout.order(layer)))
        if route is not None:
            (xBC,), (rates,) = route.there(xBC), route.there(torch.cat([dt, gate], -1))
            xBC, rates = (each.unflatten(0, (len(u), -1)) for each in (xBC, rates))
            dt, gate = rates.chunk(2, -1)
        conv_start, scan_start = (None, None) if state is None else (state.conv, state.scan)
        conv_state = xBC.new_zeros(len(u), 0, xBC.shape[2])
        if flex.config.conv_kernel:
            weights = (flex.conv_weight, flex.conv_bias)
            given = {"mask": valid, "initial_state": conv_start, "sequence": sequence}
            xBC, conv_state = self.causal_conv(xBC, *weights, **given)
        x, B, C = FlexMA.split(flex, xBC)
        A = -torch.exp(flex.A_log.to(dt.dtype))
        has_reverse = layout is not None and flex.config.reverse_scan
        segment = layout.segment if has_reverse else None
        y, scan_state = self.bidirectional_scan(
            x,
            dt,
            A,
            B,
            C,
            gate=gate,
            segment=segment,
            valid=valid,
            D=flex.D,
            initial_state=scan_start,
            sequence=sequence,
        )
        if route is not None:
            y = route.back(y.flatten(0, 1))
        return FlexMA.project_out(flex, y, u), FlexMAState(conv_state, scan_state)

    def project(self, flex, u: Tensor, position_embeddings) -> tuple[Tensor, Tensor, Tensor]:
        """`FlexMA.project` by this object's operators."""
        C, B, x = flex.project_heads(u)
        if flex.config.scan_rope:
            C, B = (self.operators.apply_rope(each, position_embeddings) for each in (C, B))
        C = C * flex.config.head_dim**-0.5
        xBC = torch.cat([tensor.flatten(2) for tensor in (x, B, C)], dim=-1)
        linears = [flex.dt_proj] if flex.config.text_only else [flex.dt_proj, flex.scan_gate_proj]
        rates = self.operators.narrow_products(u, linears)
        dt = F.softplus(rates[0])
        return xBC, dt, torch.full_like(dt, 0.5) if flex.config.text_only else torch.sigmoid(rates[1])

    def local_swin(self, swin, u, layout, valid, position_embeddings, state, sequence=None):
        """`LocalSwin.forward` of this rank's tokens; arguments as for `m_mate`."""
        q, k, v = swin.project_heads(u)
        q, k = (self.operators.apply_rope(each, position_embeddings) for each in (q, k))
        mixed, takes_part = 0, None
        if layout is not None:
            sizes, layer = swin.config.window_thw, swin.layer_index
            windows, key = layout.windows(sizes, layer), ("windows", sizes, layer % 2)
            mixed, takes_part = self.window_attention(q, k, v, windows, key=key), layout.is_vision
        if swin.config.text_window:
            asks = None if layout is None else ~layout.is_vision
            given = {"asks": asks, "valid": valid, "initial_state": state, "sequence": sequence}
            near, state = self.sliding_window_attention(q, k, v, swin.config.text_window, **given)
            mixed, takes_part = mixed + near, valid
        output = swin.o_proj(mixed.flatten(2))
        if takes_part is not None:
            output = output * self.local(takes_part)[..., None]
        return output, state


def waited(tensor: Tensor) -> Tensor:
    """What a collective gives, once it is there: a plain tensor, that a cache may hold and copy."""
    return tensor.trigger_wait() if isinstance(tensor, AsyncCollectiveTensor) else tensor


def sums(steps: Tensor) -> Tensor:
    """The sums of steps (B, n, H) up to each token. Along memory: a GPU runs over H columns one by one."""
    return steps.mT.contiguous().cumsum(-1).mT


def plus_reads(y: Tensor, kept: Tensor, C: Tensor, state: Tensor) -> Tensor:
    """y (B, n, H, P) and what tokens read by C (B, n, H, N) of a state (B, H, N, P), of which `kept`
    (B, n, H) is left; all in the dtype of y.
    """
    kept, state = kept.to(y.dtype)[..., None], state.to(y.dtype)
    if torch.is_grad_enabled():
        return y + recomputed(lambda kept, C, state: kept * reads(C, state), kept, C, state)
    return torch.addcmul(y, kept, reads(C, state))


def reads(C: Tensor, state: Tensor) -> Tensor:
    """C (B, n, H, N) and a state (B, H, N, P) -> (B, n, H, P)."""
    return torch.einsum("blhn,bhnp->blhp", C.to(state.dtype), state)


def written(x: Tensor, B: Tensor, write: Tensor) -> Tensor:
    """The state (B, H, N, P) of x (B, n, G, P) by B (B, n, G, N), each token's share `write`, (B, n, H)."""
    shares = write.unflatten(2, (x.shape[2], -1))[..., None]  # (B, n, G, H/G, 1)
    parts = x.to(write.dtype)[:, :, :, None] * shares
    return torch.einsum("blgn,blgrp->bgrnp", B.to(write.dtype), parts).flatten(1, 2)


def recomputed(function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(*arguments)`, of which backward finds nothing kept: copies of all tokens in float32 would be
    a third of a layer's memory.
    """
    if not torch.is_grad_enabled():
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def crossing(segment: Tensor, edge: int) -> Tensor:
    """(B,): the id of the segment (B, L) that has tokens on both sides of `edge`, -1 where there is none."""
    before, after = segment[:, :edge], segment[:, edge:]
    none = segment.new_full((len(segment),), -1)
    if not before.shape[1] or not after.shape[1]:
        return none
    left = before.flip(1).gather(1, (before.flip(1) >= 0).int().argmax(1, keepdim=True))[:, 0]
    right = after.gather(1, (after >= 0).int().argmax(1, keepdim=True))[:, 0]
    return torch.where(left == right, left, none)
