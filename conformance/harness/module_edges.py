"""Numbers at both ends of what modules meet: steps, gates, heads, angles; and a layout that layers share.

Each check takes a backend, the name of a module and a case.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from linmu import reference

from .compare import assert_same
from .layouts import Layout, Text, Vision
from .module_cases import ModuleCase, branches_of, check_module, random_module, run, run_with_gradients, sizes
from .module_checks import check_steps_equal_prefill
from .operator_cases import Numbers

WIDE_AND_HALF = ("float32", "mixed", "float16")
SMALL_PROMPT = Layout(((Text(1), Vision(0, (1, 2, 3)), Text(1)), (Vision(0, (1, 1, 3)), Text(5))))
ONE_WORD = Layout(((Text(1),), (Text(1),)))
A_FEW_WORDS = Layout(((Text(7),), (Text(7),)))
SHARED = Layout(((Text(1), Vision(0, (2, 2, 3)), Text(1)),))
ROTATING = {"window_thw": (1, 1, 2), "rotary_major": True, "reverse_scan": True}
PLAIN = {"conv_kernel": 0, "output_gate": False, "scan_rope": False, "norm_eps": 1e-6}
NORMED = PLAIN | {"head_norm": True, "qk_norm": True}
GATED = {"head_norm": True, "norm_eps": 1e-2, "output_gate": True}  # no gradient is too large for float16
STEPS, STEPS_OF_FLOAT16 = (-18.4, 200.0), (-11.5, 200.0)  # of softplus
SMALL = 0.125  # of B and x in float16, whose range ends soon
END = 100.0  # e^100 is no float32
SHUT = -12.0  # silu is -7e-5 there; e^12 is no float16
LARGE = 512.0  # its square is no float16, that of its inverse is there without digits


def check_steps_at_both_ends(backend: Any, name: str, case: ModuleCase) -> None:
    """dt of hundred-millionths and of hundreds, B and x such that what is written has size 1 or 1/64: values,
    states and gradients, of a prompt and of a step of decoding."""
    narrow = case.dtype == "float16"
    for rate in STEPS_OF_FLOAT16 if narrow else STEPS:
        module = random_module(backend, name, case)
        flex, step = branches_of(module)[0], F.softplus(torch.tensor(rate, dtype=torch.float64)).item()
        scaled = flex.k_norm if case.config.qk_norm else flex.k_proj
        with torch.no_grad():
            flex.dt_proj.bias.fill_(rate)
            flex.D.zero_()
            for parameter in (*scaled.parameters(), *flex.v_proj.parameters()):
                parameter.mul_(step**-0.5 * (SMALL if narrow else 1))
        check_module(module, reference, name, case, strong=step > 20)
        word = replace(case, layout=ONE_WORD)
        check_module(module, reference, name, word, layout=None, state=random_state(name, word))


def random_state(name: str, case: ModuleCase) -> Any:
    """What a scan and a convolution may leave behind; without a text window."""
    config, batch, numbers = case.config, case.layout.shape[0], Numbers(case.seed + 11)
    wide = torch.float64 if case.dtype == "float64" else torch.float32
    conv = numbers.normal(batch, max(config.conv_kernel - 1, 0), config.conv_channels, dtype=wide)
    scan = numbers.normal(batch, config.heads, config.head_dim, config.head_dim, dtype=wide)
    kind = reference.FlexMAState if name == "FlexMA" else reference.MMATEState
    return kind(conv, scan)


def check_gates_at_both_ends(backend: Any, name: str, case: ModuleCase) -> None:
    """The gate of the scan, that of the output and the mix, all open, all shut, and the output's all but
    shut, which the output projection makes up for: values and gradients."""
    ends = [
        (case, END),
        (case, -END),
        *((replace(case, dtype=kind), SHUT) for kind in ("float32", "float16")),
    ]
    for each, bias in ends:
        module = random_module(backend, name, each)
        flex = branches_of(module)[0]
        with torch.no_grad():
            flex.z_proj.bias.fill_(bias)
            flex.o_proj.weight.mul_({END: 2**-7, -END: 1, SHUT: 2**11}[bias])
            if bias == SHUT:
                flex.z_proj.weight.mul_(0.1)
            else:
                for gate in (flex.scan_gate_proj, getattr(module, "mix_proj", None)):
                    if gate is not None:
                        gate.bias.fill_(bias)
        check_module(module, reference, name, each)


def check_norms_at_both_ends(backend: Any, name: str, case: ModuleCase) -> None:
    """q, k and heads of hundreds and of thousandths, each under a norm: values and gradients."""
    for size in (LARGE, 1 / LARGE):
        module = random_module(backend, name, case)
        with torch.no_grad():
            for branch in branches_of(module):
                for projection in (branch.q_proj, branch.k_proj):
                    for parameter in projection.parameters():
                        parameter.mul_(size)
                if hasattr(branch, "dt_proj"):  # y is about x
                    branch.D.fill_(1.0)
                    branch.dt_proj.weight.zero_()
                    branch.dt_proj.bias.fill_(-2.0)
                    for parameter in branch.v_proj.parameters():
                        parameter.mul_(size)
        check_module(module, reference, name, case)


def check_angles_of_both_halves(backend: Any, name: str, case: ModuleCase) -> None:
    """cos and sin whose halves differ: each is read where it stands, in a prompt and in steps."""
    case = replace(case, equal_halves=False)
    check_module(random_module(backend, name, case), reference, name, case)
    words = replace(case, layout=A_FEW_WORDS)
    check_steps_equal_prefill(random_module(backend, name, words), name, words)


def check_layers_share_a_layout(backend: Any, name: str, case: ModuleCase) -> None:
    """One `VisionLayout` for four layers, for one of other heads and windows, for other numbers in another
    dtype and for another mask: in training, and from last to first without gradients, each gives what it
    gives with a layout of its own."""
    few, others = case.config.heads > 1, "float32" if case.dtype == "float64" else "float64"
    options = {"heads": 1 if few else 2, "groups": 1, "window_thw": (2, 1, 3), "reverse_scan": False}
    options |= {"text_window": 0 if case.config.text_window else 2, "rotary_major": False}
    layers = [replace(case, layer_index=case.layer_index + more) for more in range(4)]
    layers += [layers[1].with_options(**options), replace(case, dtype=others, seed=case.seed + 1), case]
    masks = [case.layout.valid] * (len(layers) - 1) + [other_mask(case)]
    source, shared = "the same backend with a layout of its own", case.vision_layout
    calls = []
    for layer, mask in zip(layers, masks, strict=True):
        module = random_module(backend, name, layer)
        alone = run_with_gradients(module, name, layer, valid=mask)
        found = run_with_gradients(module, name, layer, layout=shared, valid=mask)
        of_sums = partial(sizes, reference, name, layer, module.state_dict(), valid=mask)
        assert_same(found, alone, layer, sizes=of_sums, source=source)
        calls.append((module, layer, mask, alone))
    for layout in (shared, case.vision_layout):
        for module, layer, mask, alone in calls[::-1]:
            with torch.no_grad():
                found = run(module, name, layer, layout=layout, valid=mask)
            assert_same(found, {key: alone[key] for key in found}, layer, source=source)


def other_mask(case: ModuleCase) -> Tensor:
    """(B, L) bool: the last token is padding."""
    return torch.arange(case.layout.shape[1]).expand(case.layout.shape) < case.layout.shape[1] - 1
