"""`FlexMA`: the global branch as a whole, its starting point, its options, its state."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from linmu import reference
from linmu.reference import LinMUConfig, VisionLayout

from ..harness import second_formulation_modules
from ..harness.compare import assert_close, assert_exact, assert_negligible, assert_same, assert_zero, report
from ..harness.layouts import Layout, Pad, Text, Vision
from ..harness.module_autocast import WITH_AND_WITHOUT_AUTOCAST, check_autocast
from ..harness.module_cases import (
    WIDTH,
    ModuleCase,
    check_module,
    initial,
    module_cases,
    random_attention,
    random_module,
    run,
)
from ..harness.module_checks import (
    ONE_CELL,
    TWO_ROWS,
    WITHOUT_A_GAP,
    check_a_gap_is_as_if_absent,
    check_angles_of_one_row,
    check_batch_mates_change_nothing,
    check_causality,
    check_one_vision_token_behind_a_state,
    check_padding_changes_nothing,
    check_splitting_changes_nothing,
    check_steps_equal_prefill,
    check_the_state_is_left,
    large_cases_of,
)
from ..harness.module_edges import (
    GATED,
    NORMED,
    PLAIN,
    ROTATING,
    SHARED,
    SMALL_PROMPT,
    WIDE_AND_HALF,
    check_angles_of_both_halves,
    check_gates_at_both_ends,
    check_layers_share_a_layout,
    check_norms_at_both_ends,
    check_steps_at_both_ends,
)
from ..harness.module_memory import REMEMBERED, check_nothing_is_remembered
from ..harness.operator_cases import DTYPES, Numbers, property_of
from ..harness.packed_rows import check_module_equals_samples_alone

flex = partial(property_of, "FlexMA", share=0.4)
NAME = "FlexMA"
ONE_WORD = Layout(((Text(1),), (Text(1),)))
TEXT_ONLY = Layout(((Text(9),), (Text(9),)))
LONG_TEXT = Layout(((Text(70), Pad(4)), (Text(11), Pad(2), Text(61))))
TWO_CELLS = Layout(((Vision(0, (1, 1, 2)),),))
BARE = PLAIN | {"head_norm": False, "qk_norm": False}
A_GAP = Layout(tuple((Text(3), Vision(0, (1, 2, 4), "row", gap), Text(2)) for gap in (Text(300), Pad(300))))
PROMPT = Layout(((Text(2), Vision(0, (2, 2, 3), "frame"), Text(2)),))


@flex(cases=module_cases(DTYPES))
def test_flex_ma_and_gradients_match_the_reference(backend, case: ModuleCase):
    """Output, state, and the gradients of the input and of every parameter, in every dtype."""
    module = random_module(backend, NAME, case)
    check_module(module, reference, NAME, case)


@flex(cases=module_cases(), share=0.2)
def test_flex_ma_equals_the_samples_of_a_packed_row_alone(backend, case: ModuleCase):
    """Outputs, states and gradients; the layout tells of the samples."""
    check_module_equals_samples_alone(backend, NAME, case)


@flex(cases=module_cases(layout=LONG_TEXT), share=0.1)
def test_flex_ma_equals_the_samples_of_packed_text_alone(backend, case: ModuleCase):
    """Without a layout the module is told of the samples itself."""
    check_module_equals_samples_alone(backend, NAME, case, has_layout=False)


@flex(cases=module_cases(["float64"]), share=1.0)
def test_flex_ma_equals_its_second_formulation(backend, case: ModuleCase):
    """With every option on and off: matrices instead of loops, to 1e-10."""
    module = random_module(backend, NAME, case)
    parameters = dict(module.named_parameters())
    wanted = second_formulation_modules.flex_ma(
        parameters,
        case.hidden_states(),
        case.layout.coords,
        case.layout.valid,
        case.position_embeddings(),
        case.config,
        case.layer_index,
    )
    output = run(module, NAME, case)["output"]
    kept = case.layout.valid[..., None]
    assert_close({"output": output * kept}, {"output": wanted * kept}, case, 1e-10)


@flex(cases=module_cases(["float64"]), share=0.2)
def test_no_output_depends_on_what_its_block_does_not_see(backend, case: ModuleCase):
    """Causality: exactly zero gradient from every token to what comes after it and after its span."""
    check_causality(random_module(backend, NAME, case), NAME, case)


@flex(cases=module_cases())
def test_padding_changes_nothing(backend, case: ModuleCase):
    """More of it on both sides, with anything in it."""
    check_padding_changes_nothing(random_module(backend, NAME, case), NAME, case)


@flex(cases=module_cases())
def test_batch_mates_change_nothing(backend, case: ModuleCase):
    """Every row alone gives what it gives among others."""
    check_batch_mates_change_nothing(random_module(backend, NAME, case), NAME, case)


@flex(cases=module_cases(conv_kernel=4), share=0.3)
def test_splitting_outside_blocks_changes_nothing(backend, case: ModuleCase):
    """Prefill in pieces, the state handed over, gives outputs and state of prefill in one piece."""
    check_splitting_changes_nothing(random_module(backend, NAME, case), NAME, case)


test_sizes_that_people_run = large_cases_of(NAME)


@flex(cases=module_cases(layout=REMEMBERED, conv_kernel=4), share=0.05)
def test_nothing_is_remembered_between_calls(backend, case: ModuleCase):
    """Parameters, however they change, layouts, masks, angles and states; results stay as they were."""
    check_nothing_is_remembered(backend, NAME, case)


@flex(cases=module_cases(("float32", "mixed"), qk_norm=False, qkv_bias=True), share=0.2)
def test_autocast_rounds_projections_and_nothing_else(backend, case: ModuleCase):
    """q, k, v, z and the output, as it does in the reference; values, states and gradients."""
    check_autocast(backend, NAME, case)


@pytest.mark.needs(NAME)
@pytest.mark.parametrize("packed", (False, True))
def test_gaps_longer_than_a_chunk_are_crossed(backend, packed):
    """300 tokens of text, or of padding, in the middle of a picture: its reverse scan goes on behind them."""
    config = LinMUConfig(width=WIDTH, heads=2, groups=1, head_dim=2, conv_kernel=4, scan_rope=True)
    case = ModuleCase(A_GAP, config, 1, "float32", 3)
    numbers = (torch.arange(case.layout.shape[1]) >= 2).long().expand(case.layout.shape)
    layout = VisionLayout(case.layout.coords, numbers if packed else None)
    check_module(random_module(backend, NAME, case), reference, NAME, case, layout=layout)


@flex(cases=module_cases(("float32",), layout=WITHOUT_A_GAP, conv_kernel=4), share=0.05)
def test_thousands_of_masked_tokens_are_as_if_absent(backend, case: ModuleCase):
    """In a picture and in text: states and taps reach over them."""
    check_a_gap_is_as_if_absent(backend, NAME, case)


@flex(cases=module_cases(layout=ONE_CELL), share=0.2)
def test_one_vision_token_may_be_a_piece(backend, case: ModuleCase):
    """A prefill of one token of an image, behind a state, is read both ways."""
    check_one_vision_token_behind_a_state(backend, NAME, case)


@flex(cases=module_cases(layout=TWO_ROWS, scan_rope=True), share=0.2)
def test_angles_of_one_row_serve_all_rows(backend, case: ModuleCase):
    """Hugging Face may pass cos and sin with batch 1; each row scans in an order of its own."""
    check_angles_of_one_row(backend, NAME, case)


@flex(cases=module_cases(layout=TEXT_ONLY, conv_kernel=4), share=0.3)
def test_a_state_is_left_as_it_was(backend, case: ModuleCase):
    """A state that is handed over may be handed over again: beams, and a second answer."""
    check_the_state_is_left(random_module(backend, NAME, case), NAME, case)


@flex(cases=module_cases(layout=TEXT_ONLY, conv_kernel=4), share=0.3)
def test_steps_equal_prefill(backend, case: ModuleCase):
    """Decoding token by token, with a state whose size never changes."""
    check_steps_equal_prefill(random_module(backend, NAME, case), NAME, case)


@flex(cases=module_cases(("bfloat16", "mixed", "float32"), conv_kernel=4))
def test_the_state_is_float32_and_constant_in_size(backend, case: ModuleCase):
    """(B, K-1, channels) and (B, H, N, P), whatever the length."""
    results = run(random_module(backend, NAME, case), NAME, case)
    config, batch = case.config, case.layout.shape[0]
    channels = (2 * config.groups + config.heads) * config.head_dim
    assert results["conv state"].shape == (batch, 3, channels)
    assert results["scan state"].shape == (batch, config.heads, config.head_dim, config.head_dim)
    assert {results[name].dtype for name in ("conv state", "scan state")} == {torch.float32}


@flex(cases=module_cases(head_norm=True, conv_kernel=4))
def test_flex_ma_starts_at_its_initial_values(backend, case: ModuleCase):
    """dt = 1, gate ½, D = 0, norm weight 1, identity convolution, half-lives log-spaced from 64 to 8192, or
    as the configuration has them."""
    heads = case.config.heads
    for options in ({}, {"half_life": (3.0, 50.0)}):
        own = case.with_options(**options)
        p, (shortest, longest) = dict(initial(backend, NAME, own).named_parameters()), own.config.half_life
        half_lives = math.log(2) / p["A_log"].double().exp()
        spaced = [shortest * (longest / shortest) ** (h / max(heads - 1, 1)) for h in range(heads)]
        assert half_lives.tolist() == pytest.approx(spaced, rel=1e-5)
    assert torch.nn.functional.softplus(p["dt_proj.bias"].double()).tolist() == pytest.approx([1.0] * heads)
    for name in ("dt_proj.weight", "scan_gate_proj.weight", "scan_gate_proj.bias", "D", "conv_bias"):
        assert_zero(p[name].detach(), case, name)
    assert_exact(p["norm_weight"].detach(), torch.ones_like(p["norm_weight"]), case, "norm weight")
    taps = torch.tensor([0.0, 0, 0, 1]).to(p["conv_weight"]).expand_as(p["conv_weight"])
    assert_exact(p["conv_weight"].detach(), taps, case, "convolution")


@flex(cases=module_cases(conv_kernel=4))
def test_the_convolution_starts_as_the_identity(backend, case: ModuleCase):
    """Bit for bit what no convolution gives."""
    with_taps = initial(backend, NAME, case)
    without = initial(backend, NAME, case.with_options(conv_kernel=0))
    without.load_state_dict({k: v for k, v in with_taps.state_dict().items() if not k.startswith("conv_")})
    plain = run(without, NAME, case)["output"]
    assert_exact(run(with_taps, NAME, case)["output"].detach(), plain.detach(), case, "output")


@flex(cases=module_cases(["float32"], output_gate=True))
def test_the_output_gate_starts_open(backend, case: ModuleCase):
    """silu(z) = 1: what no output gate gives."""
    gated = initial(backend, NAME, case)
    plain = initial(backend, NAME, case.with_options(output_gate=False))
    plain.load_state_dict({k: v for k, v in gated.state_dict().items() if not k.startswith("z_proj")})
    assert_same(
        {"output": run(gated, NAME, case)["output"]}, {"output": run(plain, NAME, case)["output"]}, case
    )


@flex(cases=module_cases(["float64"], conv_kernel=4, head_norm=False, output_gate=False, scan_rope=False))
def test_flex_ma_starts_from_attention(backend, case: ModuleCase):
    """C from q, B from k, x from v, out from o, with biases and norms: attention with decay for softmax."""
    module, teacher = initial(backend, NAME, case), random_attention(case)
    module.copy_attention(teacher)
    config, u = case.config, case.hidden_states()
    q, k, v = (getattr(teacher, f"{n}_proj")(u).unflatten(-1, (-1, config.head_dim)) for n in "qkv")
    if config.qk_norm:
        q, k = teacher.q_norm(q), teacher.k_norm(k)
    ratio = config.heads // config.groups
    k, v = k.repeat_interleave(ratio, dim=2), v.repeat_interleave(ratio, dim=2)
    age = torch.arange(u.shape[1])[:, None] - torch.arange(u.shape[1])
    half_life = torch.tensor(
        [64.0 * 128.0 ** (h / max(config.heads - 1, 1)) for h in range(config.heads)]
    ).double()
    decay = (0.5 ** (age / half_life[:, None, None])) * (age >= 0)
    scores = torch.einsum("blhn,bshn->bhls", q, k) * config.head_dim**-0.5 * decay
    wanted = teacher.o_proj(torch.einsum("bhls,bshp->blhp", scores, v).flatten(2))
    output, _ = module(u)
    assert_close(
        {"output": output}, {"output": wanted}, case, 1e-6
    )  # the half-lives are stored in float32 first


@flex(
    cases=module_cases(("mixed", "float32", "bfloat16"), layout=ONE_WORD, qk_norm=True, conv_kernel=0),
    share=0.3,
)
def test_steps_are_projected_in_float32(backend, case: ModuleCase):
    """One token after which e^-16 of a state is left: a step that is rounded to the dtype of the model is an
    error of some per cent."""
    module, config = random_module(backend, NAME, case), case.config
    with torch.no_grad():
        module.A_log.fill_(math.log(16.0))
        module.dt_proj.bias.fill_(0.6)
        module.dt_proj.weight.mul_(0.02)
    size = (2, config.heads, config.head_dim, config.head_dim)
    scan = 100 * math.exp(16) * Numbers(case.seed + 9).normal(*size, dtype=torch.float32)
    channels = config.conv_channels
    state = reference.FlexMAState(torch.zeros(2, 0, channels), scan)
    truth, u = initial(reference, NAME, case), case.hidden_states()
    truth.load_state_dict(module.state_dict())
    wanted = run(truth.float(), NAME, case, u.float(), layout=None, state=state)["scan state"]
    for context in WITH_AND_WITHOUT_AUTOCAST:
        with context():
            found = run(module, NAME, case, layout=None, state=state)["scan state"]
        error, size = (found - wanted).abs().max(), wanted.abs().max()
        line = f"scan state: must be that of steps in float32, off by {error:.3e} of {size:.3e}"
        assert error < 2e-3 * size, report(f"{line}, {context.__name__}", case)


@flex(cases=module_cases(["float64"]), share=0.1)
def test_steps_may_have_any_size(backend, case: ModuleCase):
    """From millionths to hundreds: no limit stops them, nor their gradients."""
    module = random_module(backend, NAME, case)
    for bias in (-12.0, 200.0):
        with torch.no_grad():
            module.dt_proj.bias.fill_(bias)
        check_module(module, reference, NAME, case, strong=bias > 20)


@flex(cases=module_cases(WIDE_AND_HALF, layout=SMALL_PROMPT, head_norm=False), share=0.1)
def test_steps_at_both_ends_match_the_reference(backend, case: ModuleCase):
    """softplus has all its digits where it is a hundred-millionth, and a gradient where it is hundreds."""
    check_steps_at_both_ends(backend, NAME, case)


@flex(cases=module_cases(WIDE_AND_HALF, layout=SMALL_PROMPT, **GATED), share=0.05)
def test_gates_at_both_ends_match_the_reference(backend, case: ModuleCase):
    """Neither e^z nor e^-z overflows into a value or a gradient."""
    check_gates_at_both_ends(backend, NAME, case)


@flex(cases=module_cases(("float32", "float64"), layout=SHARED, **ROTATING), share=0.05)
def test_layers_may_share_a_layout(backend, case: ModuleCase):
    """What a backend keeps with it is that of no other layer, mask, angles or dtype."""
    check_layers_share_a_layout(backend, NAME, case)


@flex(cases=module_cases(layout=SMALL_PROMPT, scan_rope=True), share=0.1)
def test_the_halves_of_the_angles_may_differ(backend, case: ModuleCase):
    """RoPE reads all N columns of cos and sin, as the reference does."""
    check_angles_of_both_halves(backend, NAME, case)


@flex(cases=module_cases(("float16",), layout=SMALL_PROMPT, **NORMED), share=0.05)
def test_what_is_normed_may_have_any_size(backend, case: ModuleCase):
    """Squares of half precision overflow at 256 and have no digits at 1 / 500."""
    check_norms_at_both_ends(backend, NAME, case)


@flex(cases=module_cases(("mixed", "float32"), layout=TWO_CELLS, reverse_scan=True, **BARE), share=0.5)
def test_the_scan_gate_is_projected_in_float32(backend, case: ModuleCase):
    """A gate that all but shuts out a reverse scan thousands of times as large: what is left of it shows each
    rounding, of the gate and of a projection whose terms cancel."""
    module = random_module(backend, NAME, case)
    u = case.hidden_states().abs() * torch.tensor([1.0, 64.0]).view(1, 2, 1).to(case.torch_dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.split(".")[0] in ("q_proj", "k_proj", "v_proj", "o_proj"):
                parameter.abs_()  # nothing else cancels
        module.dt_proj.weight.zero_()
        module.scan_gate_proj.weight.fill_(16.0)
        module.scan_gate_proj.bias.fill_(8.3 - 16 * u[0, 0].float().sum().item())
    truth = initial(reference, NAME, case)
    truth.load_state_dict(module.state_dict())
    wanted = run(truth.float(), NAME, case, u.float())["output"][:, 0]
    for context in WITH_AND_WITHOUT_AUTOCAST:
        with context():
            found = run(module, NAME, case, u)["output"][:, 0]
        error, size = (found - wanted).abs().max(), wanted.abs().max()
        line = f"output: must be that of a gate in float32, off by {error:.3e} of {size:.3e}"
        assert error < 0.05 * size, report(f"{line}, {context.__name__}", case)


@flex(cases=module_cases(("mixed", "float32"), layout=TEXT_ONLY, **{**BARE, "head_norm": True}), share=0.3)
def test_the_norm_of_a_head_is_taken_in_float32(backend, case: ModuleCase):
    """A head whose numbers are equal comes out as ones, to the last bit of half precision."""
    module, dim = random_module(backend, NAME, case), case.config.head_dim
    with torch.no_grad():
        for parameter in (*module.q_proj.parameters(), *module.k_proj.parameters()):
            parameter.abs_()
        for parameter in module.v_proj.parameters():
            parameter.copy_(parameter[::dim].abs().repeat_interleave(dim, 0))
        for name, parameter in module.o_proj.named_parameters():
            parameter.copy_(torch.eye(*parameter.shape) if name == "weight" else torch.zeros_like(parameter))
        module.D.abs_()
        module.norm_weight.fill_(1.0)
    for context in WITH_AND_WITHOUT_AUTOCAST:
        with context():
            output = run(module, NAME, case, case.hidden_states().abs() + 1)["output"]
        error = (output[..., : min(output.shape[-1], case.config.heads * dim)] - 1).abs().max()
        line = f"output: a norm in float32 must give 1, off by {error:.3e}, {context.__name__}"
        assert error < 2**-10, report(line, case)


@flex(cases=module_cases(("float32", "bfloat16")))
def test_attention_is_copied_with_its_biases(backend, case: ModuleCase):
    """Bit for bit, every tensor the teacher has."""
    module, teacher = initial(backend, NAME, case), random_attention(case)
    module.copy_attention(teacher)
    own = dict(module.named_parameters())
    for name, tensor in teacher.named_parameters():
        assert_exact(own[name].detach(), tensor.detach(), case, name)


@flex(cases=module_cases(qkv_bias=True, output_bias=True), share=0.2)
def test_a_teacher_with_other_tensors_is_refused(backend, case: ModuleCase):
    """A lost bias or a lost norm is an error on either side, not a silent default."""
    for changes in (
        {"qkv_bias": False},
        {"output_bias": False},
        {"qk_norm": not case.config.qk_norm},
        {"head_dim": 8},
    ):
        with pytest.raises(ValueError, match="must"):
            initial(backend, NAME, case).copy_attention(random_attention(case, **changes))


@flex(cases=module_cases(head_norm=True, conv_kernel=4, norm_eps=1e-30, layout=PROMPT))
def test_the_norm_takes_the_place_of_softmaxs_denominator(backend, case: ModuleCase):
    """Values eight times as large leave the output as it was."""
    module = random_module(backend, NAME, case)
    with torch.no_grad():
        module.conv_bias.zero_()
        before = run(module, NAME, case)["output"]
        for parameter in module.v_proj.parameters():
            parameter.mul_(8)
        after = run(module, NAME, case)["output"]
    assert_same({"output": after}, {"output": before}, case, factor=20)


@flex(cases=module_cases(["float64"], reverse_scan=False, rotary_major=False))
def test_without_reverse_scan_in_raster_order_all_is_causal(backend, case: ModuleCase):
    """The ablation leaves no way to the right, in any layer: every token sees the past only."""
    module = random_module(backend, NAME, case)
    u = case.hidden_states().requires_grad_()
    output = run(module, NAME, case, u)["output"]
    for t in range(0, u.shape[1], 4):
        (found,) = torch.autograd.grad(output[:, t].sum(), u, retain_graph=True)
        assert_negligible(found[:, t + 1 :], found, case, f"gradient from token {t} to later ones")


@flex(cases=module_cases(["float64"], reverse_scan=True, conv_kernel=0, layout=PROMPT))
def test_vision_sees_its_whole_segment_both_ways(backend, case: ModuleCase):
    """The first vision token reads the last and the other way round; text before the image reads neither."""
    module = random_module(backend, NAME, case)
    u = case.hidden_states().requires_grad_()
    output = run(module, NAME, case, u)["output"]
    vision = (case.layout.segment[0] >= 0).nonzero().squeeze(-1).tolist()
    for t in vision:
        (found,) = torch.autograd.grad(output[:, t].sum(), u, retain_graph=True)
        seen = found[0].abs().amax(-1) > 0
        assert seen[vision].all(), f"token {t} must read all of its segment: {case!r}"


@flex(cases=module_cases(layout=PROMPT, reverse_scan=False))
def test_layers_scan_in_rotating_orders_unless_told_otherwise(backend, case: ModuleCase):
    """Four layers, four orders; `rotary_major` off gives every layer the first."""
    base = random_module(backend, NAME, case).state_dict()

    def output(layer_index: int, rotary_major: bool):
        module = backend.FlexMA(case.with_options(rotary_major=rotary_major).config, layer_index).to(
            case.torch_dtype
        )
        module.load_state_dict(base)
        return run(module, NAME, case)["output"].detach()

    raster = [output(layer, rotary_major=False) for layer in range(4)]
    rotating = [output(layer, rotary_major=True) for layer in range(4)]
    for layer in range(4):
        assert_exact(raster[layer], raster[0], case, f"raster order in layer {layer}")
        others = [rotating[other] for other in range(layer)]
        assert not any(torch.equal(rotating[layer], other) for other in others), f"layer {layer}: {case!r}"
    assert_exact(rotating[0], raster[0], case, "layer 0")


@flex(cases=module_cases(layout=TEXT_ONLY))
def test_no_layout_means_all_text(backend, case: ModuleCase):
    """A text-only batch needs no coordinates."""
    module = random_module(backend, NAME, case)
    assert_same(run(module, NAME, case, layout=None), run(module, NAME, case), case)


@flex(cases=module_cases(scan_rope=True), share=0.2)
def test_rope_on_the_scan_needs_angles(backend, case: ModuleCase):
    """An option that cannot work says so."""
    with pytest.raises(ValueError, match="position_embeddings"):
        run(random_module(backend, NAME, case), NAME, case, position_embeddings=None)
