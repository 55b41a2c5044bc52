"""Cases for the modules: sizes, options, a layout, random parameters and random rotary angles."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from linmu.reference import (
    LinMUConfig,
    VisionLayout,
    WindowState,
    bidirectional_scan,
    flex_ma,
    local_swin,
    sliding_window_attention,
)

from .cancellation import sizes_of_sums
from .compare import Results, assert_matches, check_form, cotangent
from .layouts import Layout, Pad, Text, Vision, layouts
from .operator_cases import DTYPES, EXACT, FEW_SHAPES, SEEDS, SHAPES, Numbers, dtypes
from .second_sliding_window import pairs_and_rest

WIDTH = 6
IN_MODEL_DTYPE = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm", "z_proj")


@dataclass(frozen=True)
class ModuleCase:
    """A module and its inputs."""

    layout: Layout
    config: LinMUConfig
    layer_index: int
    dtype: str
    seed: int
    equal_halves: bool = True  # of cos and of sin, as Hugging Face's are

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype][0]

    @property
    def vision_layout(self) -> VisionLayout:
        """What the modules take as `layout`."""
        return VisionLayout(self.layout.coords)

    def hidden_states(self, draw: int = 0) -> Tensor:
        """(B, L, D); another `draw` gives other numbers."""
        return Numbers(self.seed + 7919 * draw).normal(
            *self.layout.shape, self.config.width, dtype=self.torch_dtype
        )

    def position_embeddings(self) -> tuple[Tensor, Tensor]:
        """(cos, sin), each (B, L, N), of random angles, float32 or better as Hugging Face computes them."""
        halves = 2 if self.equal_halves else 1
        shape = (*self.layout.shape, self.config.head_dim // halves)
        angles = Numbers(self.seed + 2).uniform(*shape, low=-3, high=3).repeat(1, 1, halves)
        wide = torch.float64 if self.dtype == "float64" else torch.float32
        return angles.cos().to(wide), angles.sin().to(wide)

    def arguments(self, name: str) -> dict[str, Any]:
        """Keyword arguments of the forward of `name`, without the hidden states."""
        arguments = {"layout": self.vision_layout, "position_embeddings": self.position_embeddings()}
        return {**arguments, "valid": self.layout.valid}

    def with_options(self, **options: Any) -> ModuleCase:
        """The same case with other options of the configuration."""
        return replace(self, config=replace(self.config, **options))


HEAD_DIMS = (32, 40, 64, 66, 72, 80, 96, 112, 256)
HEADS_OF_A_GROUP = (5, 7, 9, 12, 16)
LONG_WINDOW = 1030


def large_cases(name: str) -> dict[str, ModuleCase]:
    """Sizes that people run, of heads, groups, width and windows, and an image longer than a chunk, with all
    options on."""
    prompt = Layout(
        (
            (Text(9), Vision(1, (1, 4, 6), "row"), Text(2), Vision(0, (2, 3, 4), "frame"), Text(11)),
            (Pad(20), Vision(0, (1, 5, 5)), Vision(1, (1, 3, 4)), Text(17)),
        )
    )
    image = Layout(((Text(5), Vision(0, (1, 17, 19)), Text(30)),))
    small = Layout(((Text(3), Vision(0, (1, 2, 2)), Text(1)),))

    def sized(layout: Layout, heads: int, groups: int, head_dim: int, seed: int, **fixed: Any) -> ModuleCase:
        options = {
            "qkv_bias": True,
            "qk_norm": True,
            "scan_rope": True,
            "output_gate": True,
            "conv_kernel": 4,
        }
        options |= {"width": WIDTH, "heads": heads, "groups": groups, "head_dim": head_dim, **fixed}
        dtype = options.pop("dtype", "float32")
        return ModuleCase(layout, LinMUConfig(**options), seed % 4, dtype, seed)

    cases = {
        "N=P=128": sized(prompt.only(0), 4, 2, 128, 5),
        "N=P=128, mixed": sized(prompt.only(1), 4, 2, 128, 6, dtype="mixed"),
        "an image of 323 tokens": sized(image, 2, 1, 4, 7),
        "width 5,120": sized(small, 1, 1, 8, 8, width=5120),
    }
    cases |= {f"N=P={size}": sized(small, 2, 1, size, size) for size in HEAD_DIMS}
    cases |= {
        f"{2 * ratio} heads, {ratio} to a group": sized(small, 2 * ratio, 2, 4, ratio)
        for ratio in HEADS_OF_A_GROUP
    }
    if name == "LocalSwin":  # the others walk through a text token by token
        text = Layout(((Text(LONG_WINDOW + 4),),))
        cases["a text longer than its window of 1,030"] = sized(text, 1, 1, 2, 9, text_window=LONG_WINDOW)
    return cases


def initial(backend: Any, name: str, case: ModuleCase) -> nn.Module:
    """The module as its constructor leaves it, in the dtype of the case; torch's own layers seeded.

    "mixed" is how a bfloat16 student is loaded: projections in bfloat16, all that is Mamba2's in float32.
    """
    torch.manual_seed(case.seed)
    module = getattr(backend, name)(case.config, case.layer_index)
    for key, parameter in module.named_parameters():
        of_mamba = not set(key.split(".")) & set(IN_MODEL_DTYPE)
        parameter.data = parameter.data.to(DTYPES[case.dtype][of_mamba])
    return module


def random_module(backend: Any, name: str, case: ModuleCase) -> nn.Module:
    """The module with every parameter drawn at random, so that no test sits at the neutral starting point."""
    module = initial(backend, name, case)
    with torch.no_grad():
        for index, (key, parameter) in enumerate(sorted(module.named_parameters())):
            numbers = Numbers(case.seed + 31 * index)
            centre, spread = (1.0, 0.3) if "norm" in key else (-2.0, 1.0) if "A_log" in key else (0.0, 0.5)
            parameter.copy_(centre + spread * numbers.normal(*parameter.shape))
    return module


def branches_of(module: nn.Module) -> list[nn.Module]:
    """The branches of a block, or the module itself."""
    found = [getattr(module, name) for name in ("flex_ma", "local_swin") if hasattr(module, name)]
    return found or [module]


def run(
    module: nn.Module, name: str, case: ModuleCase, hidden_states: Tensor | None = None, **changes: Any
) -> Results:
    """Outputs of a module by name: the output, and the state if there is one."""
    hidden_states = case.hidden_states() if hidden_states is None else hidden_states
    return named(*module(hidden_states, **{**case.arguments(name), **changes}))


def named(output: Tensor, state: Any) -> Results:
    """The output of a module and the tensors of its state, of a branch or of both, by name; what holds no
    number, as the state of a convolution of one tap, is left out.
    """
    window = state if isinstance(state, WindowState) else getattr(state, "window", None)
    parts = {part: getattr(state, part, None) for part in ("conv", "scan")}
    parts |= {} if window is None else {f"window's {part}": getattr(window, part) for part in window._fields}
    there = {n: part for n, part in parts.items() if part is not None and part.numel()}
    return {"output": output} | {f"{n} state": part for n, part in there.items()}


def run_with_gradients(
    module: nn.Module, name: str, case: ModuleCase, draw: int | None = None, **changes: Any
) -> Results:
    """Outputs, and the gradients of the hidden states and of every parameter; `draw` as in `evaluate`."""
    return with_gradients(module, case, lambda u: run(module, name, case, u, **changes), draw)


def with_gradients(
    module: nn.Module, case: ModuleCase, function: Callable[[Tensor], Results], draw: int | None = None
) -> Results:
    """What a function of the hidden states gives, and the gradients of these and of the parameters."""
    hidden_states = case.hidden_states().requires_grad_()
    results = function(hidden_states)
    asked = [result for result in results.values() if result.requires_grad]
    leaves = {"hidden_states": hidden_states, **dict(module.named_parameters())}
    cotangents = [cotangent(result, i, draw) for i, result in enumerate(asked)]
    found = torch.autograd.grad(asked, list(leaves.values()), cotangents, allow_unused=True)
    gradients = {
        f"grad {key}": torch.zeros_like(leaf) if gradient is None else gradient
        for (key, leaf), gradient in zip(leaves.items(), found, strict=True)
    }
    return {key: result.detach() for key, result in {**results, **gradients}.items()}


def check_module(
    module: nn.Module, reference: Any, name: str, case: ModuleCase, strong: bool = False, **changes: Any
) -> None:
    """Outputs, states and every gradient against the reference with the same parameters; the reference itself
    can only be finite. `changes` are other arguments than the case's.

    Where `strong` steps decay a state by e^-20 and more at once, the gradient of A need only be finite: of
    decays that are differences of sums, it multiplies the step by what cancels.
    """
    found = run_with_gradients(module, name, case, **changes)
    if type(module) is getattr(reference, name):
        for key, result in found.items():
            check_form(key, result, result, case)
        return
    parameters = module.state_dict()
    truth, in_own_dtypes = truth_and_reference(reference, name, case, parameters, **changes)
    of_sums = partial(sizes, reference, name, case, parameters, **changes)
    for key in [key for key in found if strong and key.endswith("A_log")]:
        check_form(key, found.pop(key), in_own_dtypes.pop(key), case)
        del truth[key]
    assert_matches(found, truth, in_own_dtypes, case, of_sums)


def truth_and_reference(
    reference: Any, name: str, case: ModuleCase, parameters: Mapping[str, Tensor], **changes: Any
) -> tuple[Results, Results]:
    """Results of the reference with these parameters: in float64, and in the dtype of the case."""
    module, wide_module = (initial(reference, name, case) for _ in range(2))
    module.load_state_dict(parameters)
    wide_module.load_state_dict(parameters)
    in_own_dtypes = run_with_gradients(module, name, case, **changes)
    wide_module.double()
    wide = RoundedCase(case)
    return run_with_gradients(wide_module, name, wide, **changes), in_own_dtypes


def sizes(
    reference: Any, name: str, case: ModuleCase, parameters: Mapping[str, Tensor], **changes: Any
) -> Results:
    """`sizes_of_sums` of the reference with these parameters, as it is and with `constant_factors`, where the
    two scans that a gate weighs count each by itself."""
    module = initial(reference, name, case)
    module.load_state_dict(parameters)
    run = partial(run_with_gradients, module.double(), name, RoundedCase(case), **changes)
    found = sizes_of_sums(run)
    with constant_factors(), scans_apart():
        terms = sizes_of_sums(run, also=("grad hidden_states",))
    return {key: torch.maximum(size, found.get(key, size)) for key, size in terms.items()}


@contextmanager
def constant_factors() -> Iterator[None]:
    """Within, the reference's norm of each head and softmax's denominator count as constant factors.

    The norm takes off what a gradient has along y. A text token that sees no other one has all of it there,
    so what is left for the scan is the rounding of what was taken off: that is the size to measure it by. The
    denominator does the same to the scores, for a token that is alone in its window.
    """

    def scaled(y: Tensor, weight: Tensor, eps: float) -> Tensor:
        factor = torch.rsqrt(y.detach().square().mean(-1, keepdim=True) + eps)
        return y * factor * weight.view(y.shape[2:])

    def attention(q: Tensor, k: Tensor, v: Tensor, window_id: Tensor) -> Tensor:
        mates = (window_id[:, :, None] == window_id[:, None, :]) & (window_id >= 0)[:, :, None]
        return among(mates, q, k, v)

    def text(q: Tensor, k: Tensor, v: Tensor, window: int, *, initial_state=None, **masks):
        seen, _ = pairs_and_rest(window, q.shape[1], len(q), **masks)
        _, state = sliding_window_attention(q, k, v, window, **masks)
        return among(seen, q, k, v), state

    def among(mates: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ratio = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(ratio, dim=2), v.repeat_interleave(ratio, dim=2)
        scores = q.shape[3] ** -0.5 * torch.einsum("bihn,bjhn->bhij", q, k)
        scores = scores.masked_fill(~mates[:, None], -torch.inf)
        denominator = scores.detach().logsumexp(-1, keepdim=True).nan_to_num(neginf=0.0)
        return torch.einsum("bhij,bjhp->bihp", (scores - denominator).exp(), v)

    norm = mock.patch.object(flex_ma, "rms_norm_per_head", scaled)
    windows = mock.patch.object(local_swin, "window_attention", attention)
    with norm, windows, mock.patch.object(local_swin, "sliding_window_attention", text):
        yield


@contextmanager
def scans_apart() -> Iterator[None]:
    """Within, the gate of the reference's scan has the gradient y_f ± y_r, one random sign a token, in the
    place of y_f - y_r: the mean of its square is then that of both terms.
    """
    signs = torch.Generator().manual_seed(0)

    def scan(x: Tensor, *others: Tensor, gate: Tensor, segment: Tensor | None, D: Tensor | None, **given):
        y, state = bidirectional_scan(x, *others, gate=gate.detach(), segment=segment, D=D, **given)
        if segment is None:
            return y, state
        with torch.no_grad():
            y_f, y_r = (
                bidirectional_scan(x, *others, gate=torch.full_like(gate, share), segment=segment, **given)[0]
                for share in (1.0, 0.0)
            )
            sign = 1 - 2 * torch.randint(0, 2, (*gate.shape, 1), generator=signs)
            apart = torch.where((segment >= 0)[..., None, None], y_f + sign * y_r, 0.0)
        return y + (gate - gate.detach())[..., None] * apart, state

    with mock.patch.object(flex_ma, "bidirectional_scan", scan):
        yield


class RoundedCase:
    """A case whose numbers are rounded to its dtype and handed out in float64."""

    def __init__(self, case: ModuleCase) -> None:
        self.case, self.layout, self.config = case, case.layout, case.config

    def hidden_states(self) -> Tensor:
        return self.case.hidden_states().double()

    def position_embeddings(self) -> tuple[Tensor, Tensor]:
        cos, sin = self.case.position_embeddings()
        return cos.double(), sin.double()

    def arguments(self, name: str) -> dict[str, Any]:
        return {**self.case.arguments(name), "position_embeddings": self.position_embeddings()}


def random_attention(case: ModuleCase, **changes: Any) -> nn.Module:
    """A teacher's attention layer: projections and q/k norms as the case's config describes them."""
    config = replace(case.config, **changes)
    torch.manual_seed(case.seed + 5)
    inner, grouped = config.heads * config.head_dim, config.groups * config.head_dim
    layer = nn.Module()
    layer.q_proj = nn.Linear(config.width, inner, bias=config.qkv_bias)
    layer.k_proj = nn.Linear(config.width, grouped, bias=config.qkv_bias)
    layer.v_proj = nn.Linear(config.width, grouped, bias=config.qkv_bias)
    layer.o_proj = nn.Linear(inner, config.width, bias=config.output_bias)
    if config.qk_norm:
        layer.q_norm, layer.k_norm = (nn.RMSNorm(config.head_dim, eps=config.norm_eps) for _ in range(2))
        for norm in (layer.q_norm, layer.k_norm):
            nn.init.normal_(norm.weight)
    return layer.to(case.torch_dtype)


def few_shapes() -> bool:
    """Whether `draw_few_shapes` was called."""
    return SHAPES["batch"] == FEW_SHAPES["batch"]


@st.composite
def configs(draw: st.DrawFn, **fixed: Any) -> LinMUConfig:
    few = few_shapes()
    heads, groups = draw(st.sampled_from(((4, 2),) if few else ((1, 1), (2, 1), (2, 2), (4, 2))))
    drawn = {
        "width": WIDTH,
        "heads": heads,
        "groups": groups,
        "head_dim": draw(st.sampled_from((6,) if few else (2, 4, 6))),
        "qkv_bias": draw(st.booleans()),
        "output_bias": draw(st.booleans()),
        "qk_norm": draw(st.booleans()),
        "norm_eps": draw(st.sampled_from((1e-6, 1e-2))),
        "window_thw": draw(st.sampled_from(((1, 2, 2), (2, 1, 3), (4, 8, 8)))),
        "text_window": draw(st.sampled_from((0, 3, 128, 1))),
        "conv_kernel": draw(st.sampled_from((4, 0, 1, 2))),
        "scan_rope": draw(st.booleans()),
        "output_gate": draw(st.booleans()),
        "head_norm": draw(st.booleans()),
        "reverse_scan": draw(st.sampled_from((True, True, False))),
        "rotary_major": draw(st.sampled_from((True, True, False))),
    }
    return LinMUConfig(**{**drawn, **fixed})


@st.composite
def module_cases(draw: st.DrawFn, names: Iterable[str] = EXACT, **fixed: Any) -> ModuleCase:
    """`fixed` holds fields of the case, or options of its configuration."""
    of_case = {key: fixed.pop(key) for key in ("layout", "layer_index") if key in fixed}
    drawn = {
        "layout": draw(layouts(few=few_shapes())),
        "config": draw(configs(**fixed)),
        "layer_index": draw(st.integers(0, 5)),
        "dtype": draw(dtypes(names)),
        "seed": draw(SEEDS),
    }
    return ModuleCase(**{**drawn, **of_case})
