"""The operators of one token of text: `linmu::scan_step`, `linmu::text_projection`, `linmu::text_step`,
`linmu::pooled_text_step`, whose states are among those of others, and `linmu::text_output`.

Letters: B batch, D width, H query heads, G groups, N state size, P head dim, K conv taps, R rows of a pool.
The last four have no gradient: they are taken where none is asked for. What they overwrite they say.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...reference.numerics import accumulation_dtype
from ..engine.operator import Engines, Operator, lazy


class StepInputs(NamedTuple):
    """What one token of the scan reads.

    state (B, H, N, P), x (B, G, P), dt (B, H), A (H,), B (B, G, N), C (B, H, N), D (H,) and valid (B,) are
    those of `reference.scan_step`; engine None = by the tensors.
    """

    state: Tensor
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None = None
    valid: Tensor | None = None
    engine: str | None = None


class StepOutputs(NamedTuple):
    """y (B, H, P) in the dtype of x, and the new state in the accumulation dtype."""

    y: Tensor
    state: Tensor


class StepGrads(NamedTuple):
    """The gradients of the inputs of the same names."""

    state: Tensor
    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None


def step_outputs(inputs: StepInputs) -> StepOutputs:
    """Shapes and dtypes of the outputs."""
    x, state = inputs.x, inputs.state
    y = x.new_empty(x.shape[0], inputs.C.shape[1], x.shape[2])
    return StepOutputs(y, state.new_empty(state.shape, dtype=accumulation_dtype(x.dtype)))


scan_step = Operator(
    "scan_step",
    StepInputs,
    StepOutputs,
    forward=Engines(
        lazy(f"{__package__}.torch_engine", "scan_step"),
        lazy(f"{__package__}.kernels.scan_step", "scan_step"),
    ),
    fake=step_outputs,
    head_dims=lambda inputs: (inputs.B.shape[2], inputs.x.shape[2]),
)
scan_step.has_gradient(StepGrads, lazy(f"{__package__}.torch_engine", "scan_step_backward"))


class ProjectionInputs(NamedTuple):
    """The hidden states of one token, and all that is multiplied with them.

    Args:
        u: (B, D).
        weights: of v, k and q: (G·P, D), (G·N, D), (H·N, D), in the dtype of `u`.
        biases: theirs; None = none.
        dt_weight, dt_bias: (H, D), (H,), of any float dtype.
        z_weight, z_bias: (H·P, D), (H·P,) in the dtype of `u`; None = no output gate.
        engine: "triton" or "torch"; None = by the tensors.
    """

    u: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    dt_weight: Tensor
    dt_bias: Tensor
    z_weight: Tensor | None = None
    z_bias: Tensor | None = None
    engine: str | None = None


class ProjectionOutputs(NamedTuple):
    """xBC: [x, B, C] (B, channels); rate: W_dt u + b_dt (B, H) in the accumulation dtype; z (B, H·P), or
    nothing.
    """

    xBC: Tensor
    rate: Tensor
    z: Tensor


def projection_outputs(inputs: ProjectionInputs) -> ProjectionOutputs:
    """Shapes and dtypes of the outputs."""
    u, z_weight, batch = inputs.u, inputs.z_weight, inputs.u.shape[0]
    return ProjectionOutputs(
        u.new_empty(batch, sum(weight.shape[0] for weight in inputs.weights)),
        u.new_empty(batch, inputs.dt_weight.shape[0], dtype=accumulation_dtype(u.dtype)),
        u.new_empty(0 if z_weight is None else (batch, z_weight.shape[0])),
    )


text_projection = Operator(
    "text_projection",
    ProjectionInputs,
    ProjectionOutputs,
    forward=Engines(
        lazy(f"{__package__}.torch_engine", "project"), lazy(f"{__package__}.kernels.text_step", "project")
    ),
    fake=projection_outputs,
)


class OutputInputs(NamedTuple):
    """One token of both branches before their output projections, and these.

    Args:
        flex, local: (B, n), Flex-MA's heads and Local-Swin's.
        logit: (B, 1), the mix before its sigmoid.
        row: (B,) int64, -1 where only Flex-MA has a say.
        weights: of Flex-MA and Local-Swin, (D, n) each in the dtype of `flex`, rows of any stride.
        biases: theirs, (D,); None = none.
        engine: "triton" or "torch"; None = by the tensors.
    """

    flex: Tensor
    local: Tensor
    logit: Tensor
    row: Tensor
    weights: list[Tensor]
    biases: list[Tensor | None]
    engine: str | None = None


class OutputOutputs(NamedTuple):
    """y: the block's output, (B, D) in the dtype of `flex`."""

    y: Tensor


text_output = Operator(
    "text_output",
    OutputInputs,
    OutputOutputs,
    forward=Engines(
        lazy(f"{__package__}.torch_engine", "output"), lazy(f"{__package__}.kernels.text_step", "output")
    ),
    fake=lambda inputs: inputs.flex.new_empty(len(inputs.flex), len(inputs.weights[0])),
)


class TextStepInputs(NamedTuple):
    """What Flex-MA's token needs between its projections and its output projection.

    Args:
        scan_state: (B, H, N, P) in the accumulation dtype, contiguous: overwritten with the new state.
        conv_state: (B, K-1, channels); None = no convolution.
        x, B, C: (B, G, P), (B, G, N), (B, H, N), before `scale` and convolution.
        rate: (B, H), dt before its softplus.
        A_log, D: (H,).
        conv_weight, conv_bias: (channels, K), (channels,); None = no convolution.
        norm_weight: (H·P,); None = no norm.
        z: (B, H·P), before its silu; None = no output gate.
        valid: (B,) bool; other rows keep their states and give 0. None = all.
        scale: of C.
        eps: of the norm.
        engine: "triton" or "torch"; None = by the tensors.
    """

    scan_state: Tensor
    conv_state: Tensor | None
    x: Tensor
    B: Tensor
    C: Tensor
    rate: Tensor
    A_log: Tensor
    D: Tensor
    conv_weight: Tensor | None
    conv_bias: Tensor | None
    norm_weight: Tensor | None
    z: Tensor | None
    valid: Tensor | None
    scale: float
    eps: float
    engine: str | None = None


class TextStepOutputs(NamedTuple):
    """y (B, H·P) in the dtype of x, and the convolution's new state (B, K-1, channels)."""

    y: Tensor
    conv_state: Tensor


def text_step_outputs(inputs: TextStepInputs) -> TextStepOutputs:
    """Shapes and dtypes of the outputs."""
    x, conv_weight, (_, heads, _, head_dim) = inputs.x, inputs.conv_weight, inputs.scan_state.shape
    batch = len(x)
    channels = sum(part.shape[1] * part.shape[2] for part in (x, inputs.B, inputs.C))
    before = 0 if conv_weight is None else conv_weight.shape[1] - 1
    dtype = x.dtype if conv_weight is None else inputs.scan_state.dtype
    conv_state = x.new_empty(batch, before, channels, dtype=dtype)
    return TextStepOutputs(x.new_empty(batch, heads * head_dim), conv_state)


text_step = Operator(
    "text_step",
    TextStepInputs,
    TextStepOutputs,
    forward=Engines(
        lazy(f"{__package__}.torch_engine", "text_step"),
        lazy(f"{__package__}.kernels.text_step", "text_step"),
    ),
    fake=text_step_outputs,
    head_dims=lambda inputs: (inputs.x.shape[2],),
    overwrites=("scan_state",),
)


class PooledTextStepInputs(NamedTuple):
    """As `TextStepInputs`, with states that are rows of pools, each row contiguous.

    Args:
        scan_pool: (R, H, N, P) of any float dtype: overwritten.
        conv_pool: (R, K, channels) float32, a ring of the last tokens, of which the t-th stands at t mod K:
            overwritten. None = no convolution, or one of a single tap.
        rows: (B,) int64, which row is each one's.
        turn: (B,) int64, how many tokens each one has read before.
        logit: (B, 1), y is multiplied with its sigmoid; None = with 1.
        out: (B, H·P), rows of any stride, in the dtype of x: overwritten with y, and nothing is returned.
    """

    scan_pool: Tensor
    conv_pool: Tensor | None
    rows: Tensor
    turn: Tensor
    x: Tensor
    B: Tensor
    C: Tensor
    rate: Tensor
    A_log: Tensor
    D: Tensor
    conv_weight: Tensor | None
    conv_bias: Tensor | None
    norm_weight: Tensor | None
    z: Tensor | None
    valid: Tensor | None
    scale: float
    eps: float
    engine: str | None = None
    logit: Tensor | None = None
    out: Tensor | None = None


class PooledTextStepOutputs(NamedTuple):
    """y (B, H·P) in the dtype of x; (0,) if it went elsewhere."""

    y: Tensor


def pooled_output(inputs: PooledTextStepInputs) -> Tensor:
    """What is returned, without values."""
    size = 0 if inputs.out is not None else (len(inputs.x), inputs.C.shape[1] * inputs.x.shape[2])
    return inputs.x.new_empty(size)


pooled_text_step = Operator(
    "pooled_text_step",
    PooledTextStepInputs,
    PooledTextStepOutputs,
    forward=Engines(
        lazy(f"{__package__}.torch_engine", "pooled_text_step"),
        lazy(f"{__package__}.kernels.text_step", "pooled_text_step"),
    ),
    fake=pooled_output,
    head_dims=lambda inputs: (inputs.x.shape[2],),
    overwrites=("scan_pool", "conv_pool", "out"),
)
