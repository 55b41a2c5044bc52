"""Context parallel: one prompt's tokens on several processes (ranks), each with a slice, cut anywhere.

A scan is linear in its state. So no rank waits for the one before: each scans its tokens from a zero state
and hands on the state it ends with, and the decay by which it multiplies the one that enters. Then it adds to
its outputs what its tokens read of the state that came in (equations in `scan.py`). The rest of a layer looks
at few tokens: convolution and text window at the K-1 and W-1 before a slice, a window at its own.

    block.py         M-MATE in terms of the files below; read it first
    ranks.py         which rank holds which tokens; the collectives
    routes.py        tokens travel to the rank that computes them, outputs return: scan orders and windows
    scan.py          states are handed on, in both directions
    halos.py         convolution and text window: the last tokens before a slice
    windows.py       window attention: a window is computed where it begins
    packed_rows.py   samples of packed rows, of which nothing passes to the next
    operators.py     what a rank runs on its own tokens: the reference's operators, or faster ones

Letters: B batch, L tokens of the prompt, n tokens of this rank, R ranks, H heads, G groups, N state, P head
dim, K taps, W text window. An *edge* lies between two ranks' slices, or at an end of the prompt: R + 1 edges.

Every rank calls the same functions with the same layout. Gradients go back through the same collectives, so
every rank must call backward, of a loss times 0 where nothing on it is supervised. A rank's parameter
gradients are its share: sum them over ranks. What follows from the layout alone, such as routes and cut
segments, takes host reads: it is computed once for all layers, in one `ContextParallel` a prompt, which
`split_forward.py` makes.
"""

from .block import m_mate
from .operators import Operators
from .ranks import ContextParallel

__all__ = ["ContextParallel", "Operators", "m_mate"]
