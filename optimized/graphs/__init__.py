"""A student's forward, generate() and training steps from CUDA graphs: the GPU need not wait for the host.

    optimized.accelerate(student)
    student.generate(...)              # as before, exact
    optimized.unaccelerate(student)

decoder         the decoder's forward from graphs: buckets, buffers, caches
layers          the decoder's layers, in fewer kernels
token_loop      generate() without waiting for each token
tower           a vision tower's forward from graphs, by the grids of its pictures
graphed_forward what both share: when graphs are of no more use, copies without them
training_step   a Lesson's losses and gradients from one graph
static_layout   where vision tokens are, in buffers
capture         torch's CUDA graphs
obstacles       what makes a forward run eagerly, which is said once
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from ...reference.checks import require
from ...reference.student.model import LinMUModel, decoder_layers, mixers
from ..m_mate import MMATE
from .capture import Capture, CudaCapture
from .decoder import DECODERS, FIXED_ROPE, GraphedDecoder, Limits
from .token_loop import sample
from .tower import TOWERS, GraphedTower, towers_of

__all__ = ["accelerate", "unaccelerate"]

# Four to an octave, so that padding is at most a fifth of what runs.
LENGTHS = (64, 128, 192, *(2**k * quarters // 4 for k in range(8, 13) for quarters in (4, 5, 6, 7)), 8192)


def accelerate(
    student: LinMUModel,
    *,
    lengths: Sequence[int] = LENGTHS,
    most_rows: int = 64,
    most_tokens: int = 16384,
    most_graphs: int = 32,
) -> LinMUModel:
    """Let a student's forwards without gradients, and so generate(), run from CUDA graphs, in place.

    The first prompt of a length's bucket, and the first token of a batch's size, are run once as before and
    captured, which takes about a second; later ones are copied into the graph's buffers and replayed. Results
    are the same up to rounding. Whatever graphs cannot do runs as before, and the reason is said once on
    stderr: gradients, hooks, adapters that are not merged, `output_hidden_states` and `output_attentions`,
    autocast, masks other than (B, S), and what exceeds the limits. Beams run from graphs, at the price of a
    copy of the states a token. The vision towers of Qwen2-VL and Qwen2.5-VL run from graphs where pictures of
    the same sizes come again, as a video's frames do. Calls from several threads take turns. generate() asks
    one token late whether it has ended, unless its cache is returned or was passed in: `token_loop.sample`.

    Memory beside the weights: of each graph of B rows and a bucket of L tokens its inputs, some B·L·(D+1,000)
    values, of one that decodes the states of B rows; and one pool that all share, as large as the largest
    prompt's activations; another such pool for the tower.

    Args:
        student: on a GPU, of a family whose decoder is Qwen2's, Llama's, Qwen2-VL's or Qwen2.5-VL's, as all
            families' but Qwen3-VL's are; all its layers converted, and computed by this package.
        lengths: the buckets of prompts, in tokens: each is padded to the next. Longer ones run as before.
        most_rows: of a batch; larger ones run as before.
        most_tokens: of a prompt, all rows and padding together; larger ones run as before.
        most_graphs: that are kept; the one used longest ago makes room.
    Returns:
        the student.
    Raises:
        ValueError: for another student, one on a CPU or on several devices, and limits below 1.
    """
    require(device_of(student).type == "cuda", "accelerate", "student must be on a GPU", device_of(student))
    return install(student, Limits(tuple(sorted(lengths)), most_rows, most_tokens, most_graphs), CudaCapture)


def unaccelerate(student: LinMUModel) -> LinMUModel:
    """Let a student run as before `accelerate`, and free its graphs; returns it. Caches stay good."""
    graphed = (GraphedDecoder, GraphedTower)
    towers = (module for module in student.modules() if type(module) in TOWERS)
    for module in (student.get_decoder(), *towers):
        if isinstance(module.__dict__.get("forward"), graphed):
            del module.forward
    student.__dict__.pop("token_loop", None)
    return student


def install(student: LinMUModel, limits: Limits, new_capture: Callable[[], Capture]) -> LinMUModel:
    """`accelerate` with another way to capture."""
    decoder = unaccelerate(student).get_decoder()
    check(student, limits)
    decoder.forward = GraphedDecoder(decoder, limits, new_capture)
    student.token_loop = sample
    for tower in towers_of(student):
        if "forward" not in tower.__dict__:
            tower.forward = GraphedTower(tower, new_capture)
    return student


def device_of(student: nn.Module) -> torch.device:
    """Where a student's decoder is."""
    require(
        isinstance(student, LinMUModel), "accelerate", "student must be a student", type(student).__name__
    )
    devices = {parameter.device for parameter in student.get_decoder().parameters()}
    must = "the decoder must be on one device, without offloading"
    require(len(devices) == 1, "accelerate", must, sorted(map(str, devices)))
    return devices.pop()


def check(student: LinMUModel, limits: Limits) -> None:
    """Raise ValueError unless it can be captured within limits."""
    where, decoder = "accelerate", student.get_decoder()
    known = ", ".join(kind.__name__ for kind in DECODERS)
    must, hint = f"the decoder must be one of {known}", "run this family as it is"
    require(type(decoder) in DECODERS, where, must, type(decoder).__name__, hint)
    blocks, layers = mixers(student), decoder_layers(student)
    own = [index for index, block in blocks.items() if isinstance(block, MMATE)]
    hint = "convert all layers, and load with linmu.optimized.load"
    require(len(own) == len(layers), where, f"all {len(layers)} layers must be linmu.optimized's", own, hint)
    rope = getattr(decoder.rotary_emb, "rope_type", "default")
    must = f"rope_type must be one of {', '.join(FIXED_ROPE)}, whose angles follow from positions alone"
    require(rope in FIXED_ROPE, where, must, rope, "run this student as it is")
    parameters = {type(parameter) for parameter in decoder.parameters()}
    must, hint = "weights must be whole and plain", "shard or quantise it, or accelerate it"
    require(parameters <= {nn.Parameter}, where, must, sorted(kind.__name__ for kind in parameters), hint)
    is_own = "forward" not in decoder.__dict__
    require(is_own, where, "the decoder's forward must be its class's", "another one")
    numbers = (*limits.lengths, limits.most_rows, limits.most_tokens, limits.most_graphs)
    require(len(limits.lengths) > 0 and min(numbers) >= 1, where, "all limits must be >= 1", limits)
