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

from .block import m_mate
from .operators import Operators
from .ranks import ContextParallel

__all__ = ["ContextParallel", "Operators", "m_mate"]
