"""`MMATE`: the two branches mixed, on text where it has a window; what a decoder layer sees."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.utils.checkpoint

from linmu import reference

from ..harness import second_formulation_modules
from ..harness.compare import assert_close, assert_exact, assert_same, assert_zero, quarters, report
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
    run_with_gradients,
    sizes,
)
from ..harness.module_checks import (
    A_WORD,
    ONE_CELL,
    TWO_ROWS,
    check_angles_of_one_row,
    check_batch_mates_change_nothing,
    check_causality,
    check_one_vision_token_behind_a_state,
    check_padding_changes_nothing,
    check_splitting_changes_nothing,
    check_step_behind_a_full_window,
    check_steps_equal_prefill,
    check_the_state_is_left,
    large_cases_of,
)
from ..harness.module_edges import (
    GATED,
    NORMED,
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
from ..harness.operator_cases import DTYPES, property_of
from ..harness.packed_rows import check_module_equals_samples_alone

mate = partial(property_of, "MMATE", share=0.4)
NAME = "MMATE"
TEXT_ONLY = Layout(((Text(9),), (Text(9),)))
LONG_TEXT = Layout(((Text(70), Pad(4)), (Text(11), Pad(2), Text(61))))
PROMPT = Layout(((Text(2), Vision(1, (1, 2, 3), "row"), Text(1), Vision(0, (2, 1, 2)), Text(2)),))


def branches(module, case: ModuleCase) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of the two branches by themselves."""
    flex = run(module.flex_ma, "FlexMA", case)["output"]
    return flex, run(module.local_swin, "LocalSwin", case)["output"]


@mate(cases=module_cases(DTYPES))
def test_m_mate_and_gradients_match_the_reference(backend, case: ModuleCase):
    """Output, state, and the gradients of the input and of every parameter, in every dtype."""
    module = random_module(backend, NAME, case)
    check_module(module, reference, NAME, case)


@mate(cases=module_cases(), share=0.2)
def test_m_mate_equals_the_samples_of_a_packed_row_alone(backend, case: ModuleCase):
    """Outputs, states and gradients; the layout tells of the samples."""
    check_module_equals_samples_alone(backend, NAME, case)


@mate(cases=module_cases(layout=LONG_TEXT), share=0.1)
def test_m_mate_equals_the_samples_of_packed_text_alone(backend, case: ModuleCase):
    """Without a layout the module is told of the samples itself."""
    check_module_equals_samples_alone(backend, NAME, case, has_layout=False)


@mate(cases=module_cases(["float64"]), share=1.0)
def test_m_mate_equals_its_second_formulation(backend, case: ModuleCase):
    """With every option on and off, to 1e-10."""
    module = random_module(backend, NAME, case)
    wanted = second_formulation_modules.m_mate(
        dict(module.named_parameters()),
        case.hidden_states(),
        case.layout.coords,
        case.layout.valid,
        case.position_embeddings(),
        case.config,
        case.layer_index,
    )
    kept = case.layout.valid[..., None]
    output = run(module, NAME, case)["output"]
    assert_close({"output": output * kept}, {"output": wanted * kept}, case, 1e-10)


def mixed_at(case: ModuleCase) -> torch.Tensor:
    """(B, L, 1) bool: where Local-Swin has an output."""
    return (case.layout.valid if case.config.text_window else case.layout.segment >= 0)[..., None]


@mate("FlexMA", "LocalSwin", "MMATE", cases=module_cases(text_window=0))
def test_text_without_a_window_is_pinned_to_flex_ma(backend, case: ModuleCase):
    """Bit for bit; the mix gets no gradient from text."""
    module = random_module(backend, NAME, case)
    flex, _ = branches(module, case)
    text = case.layout.segment < 0
    output = run(module, NAME, case)["output"]
    assert_exact(output[text].detach(), flex[text].detach(), case, "output on text")
    if text.any():
        found = torch.autograd.grad(output[text].sum(), module.mix_proj.weight, allow_unused=True)[0]
        assert_zero(torch.zeros(1) if found is None else found, case, "gradient of the mix on text")


@mate(cases=module_cases())
def test_m_mate_starts_half_and_half(backend, case: ModuleCase):
    """m = ½ wherever Local-Swin has an output, in every layer."""
    module = initial(backend, NAME, case)
    flex, local = branches(module, case)
    wanted = torch.where(mixed_at(case), (flex + local) / 2, flex)
    assert_same({"output": run(module, NAME, case)["output"]}, {"output": wanted}, case)


@mate(cases=module_cases(), share=0.1)
def test_gradients_at_the_start_match_the_reference(backend, case: ModuleCase):
    """Parameters that start at 0 are no absent ones: they learn."""
    check_module(initial(backend, NAME, case), reference, NAME, case)


@mate(cases=module_cases())
def test_the_mix_reaches_from_one_branch_to_the_other(backend, case: ModuleCase):
    """m = 1 is Flex-MA, m = 0 is Local-Swin, wherever that has an output."""
    module = random_module(backend, NAME, case)
    flex, local = branches(module, case)
    for bias, wanted in ((1e4, flex), (-1e4, torch.where(mixed_at(case), local, flex))):
        with torch.no_grad():
            module.mix_proj.bias.fill_(bias)
        assert_same({"output": run(module, NAME, case)["output"]}, {"output": wanted}, case)


@mate(cases=module_cases(("mixed", "float32"), layout=PROMPT, output_bias=True), share=0.3)
def test_the_branches_are_mixed_in_float32(backend, case: ModuleCase):
    """Branches that are each other's negative, and a mix of little more than a half: neither it, nor what it
    is projected from, nor a product with it is rounded."""
    module = random_module(backend, NAME, case)
    with torch.no_grad():
        for branch in (module.flex_ma, module.local_swin):
            branch.o_proj.weight.zero_()
        module.flex_ma.o_proj.bias.copy_(module.flex_ma.o_proj.bias.bfloat16())
        module.local_swin.o_proj.bias.copy_(-module.flex_ma.o_proj.bias)
        module.mix_proj.weight.fill_(4.0)
        module.mix_proj.bias.fill_(0.004 - 4 * WIDTH)
    half = module.flex_ma.o_proj.bias.float()
    wanted = (2 * torch.sigmoid(torch.tensor(0.004)) - 1) * half
    for context in WITH_AND_WITHOUT_AUTOCAST:
        with context():
            output = run(module, NAME, case, torch.ones_like(case.hidden_states()))["output"]
        error, size = (output - wanted)[:, case.layout.segment[0] >= 0].abs().max(), wanted.abs().max()
        line = f"output: must be that of a mix in float32, off by {error:.3e} of {size:.3e}"
        assert error < 0.01 * size, report(f"{line}, {context.__name__}", case)


@mate(cases=module_cases(WIDE_AND_HALF, layout=SMALL_PROMPT, head_norm=False), share=0.05)
def test_steps_at_both_ends_match_the_reference(backend, case: ModuleCase):
    """softplus has all its digits where it is a hundred-millionth, and a gradient where it is hundreds."""
    check_steps_at_both_ends(backend, NAME, case)


@mate(cases=module_cases(WIDE_AND_HALF, layout=SMALL_PROMPT, **GATED), share=0.05)
def test_gates_at_both_ends_match_the_reference(backend, case: ModuleCase):
    """Neither e^z nor e^-z overflows into a value or a gradient."""
    check_gates_at_both_ends(backend, NAME, case)


@mate(cases=module_cases(("float32", "float64"), layout=SHARED, **ROTATING), share=0.05)
def test_layers_may_share_a_layout(backend, case: ModuleCase):
    """What a backend keeps with it is that of no other layer, mask, angles or dtype."""
    check_layers_share_a_layout(backend, NAME, case)


@mate(cases=module_cases(layout=SMALL_PROMPT, scan_rope=True, text_window=3), share=0.05)
def test_the_halves_of_the_angles_may_differ(backend, case: ModuleCase):
    """RoPE reads all N columns of cos and sin, as the reference does."""
    check_angles_of_both_halves(backend, NAME, case)


@mate(cases=module_cases(("float16",), layout=SMALL_PROMPT, **NORMED), share=0.05)
def test_what_is_normed_may_have_any_size(backend, case: ModuleCase):
    """Squares of half precision overflow at 256 and have no digits at 1 / 500."""
    check_norms_at_both_ends(backend, NAME, case)


@mate(cases=module_cases(["float64"]), share=0.2)
def test_no_output_depends_on_what_its_block_does_not_see(backend, case: ModuleCase):
    """Causality: exactly zero gradient from every token to what comes after it and after its span."""
    check_causality(random_module(backend, NAME, case), NAME, case)


@mate(cases=module_cases())
def test_padding_changes_nothing(backend, case: ModuleCase):
    """More of it on both sides, with anything in it."""
    check_padding_changes_nothing(random_module(backend, NAME, case), NAME, case)


@mate(cases=module_cases())
def test_batch_mates_change_nothing(backend, case: ModuleCase):
    """Every row alone gives what it gives among others."""
    check_batch_mates_change_nothing(random_module(backend, NAME, case), NAME, case)


@mate(cases=module_cases(conv_kernel=4), share=0.3)
def test_splitting_outside_blocks_changes_nothing(backend, case: ModuleCase):
    """Prefill in pieces, the state handed over, gives outputs and state of prefill in one piece."""
    check_splitting_changes_nothing(random_module(backend, NAME, case), NAME, case)


test_sizes_that_people_run = large_cases_of(NAME)


@mate(cases=module_cases(layout=A_WORD, text_window=1030), share=0.1)
def test_a_step_reads_a_window_of_more_than_a_thousand_tokens(backend, case: ModuleCase):
    """All that are there, with gradients and without."""
    check_step_behind_a_full_window(backend, NAME, case)


@mate(cases=module_cases(layout=REMEMBERED, text_window=3), share=0.05)
def test_nothing_is_remembered_between_calls(backend, case: ModuleCase):
    """Parameters, however they change, layouts, masks, angles and states; results stay as they were."""
    check_nothing_is_remembered(backend, NAME, case)


@mate(cases=module_cases(("float32", "mixed"), text_window=3, qk_norm=False, qkv_bias=True), share=0.2)
def test_autocast_rounds_projections_and_nothing_else(backend, case: ModuleCase):
    """q, k, v, z and the output, as it does in the reference; values, states and gradients."""
    check_autocast(backend, NAME, case)


@mate(cases=module_cases(layout=ONE_CELL), share=0.2)
def test_one_vision_token_may_be_a_piece(backend, case: ModuleCase):
    """A prefill of one token of an image, behind a state, is read both ways."""
    check_one_vision_token_behind_a_state(backend, NAME, case)


@mate(cases=module_cases(layout=TWO_ROWS, scan_rope=True), share=0.2)
def test_angles_of_one_row_serve_all_rows(backend, case: ModuleCase):
    """Hugging Face may pass cos and sin with batch 1; each row scans in an order of its own."""
    check_angles_of_one_row(backend, NAME, case)


@mate(cases=module_cases(layout=TEXT_ONLY, conv_kernel=4), share=0.3)
def test_a_state_is_left_as_it_was(backend, case: ModuleCase):
    """A state that is handed over may be handed over again: beams, and a second answer."""
    check_the_state_is_left(random_module(backend, NAME, case), NAME, case)


@mate(cases=module_cases(layout=TEXT_ONLY, conv_kernel=4), share=0.3)
def test_steps_equal_prefill(backend, case: ModuleCase):
    """Decoding token by token, with a state whose size never changes."""
    check_steps_equal_prefill(random_module(backend, NAME, case), NAME, case)


@mate(cases=module_cases(layout=PROMPT))
def test_segment_numbers_change_nothing(backend, case: ModuleCase):
    """Ids only say what belongs together."""
    module = random_module(backend, NAME, case)
    renamed = reference.VisionLayout(case.layout.renumbered([40, 7]).coords)
    assert_same(run(module, NAME, case, layout=renamed), run(module, NAME, case), case)


@mate(cases=module_cases(layout=PROMPT), share=0.2)
def test_no_mask_means_all_valid(backend, case: ModuleCase):
    """Of text and of images."""
    module = random_module(backend, NAME, case)
    assert_same(run(module, NAME, case, valid=None), run(module, NAME, case), case)


@mate(cases=module_cases(layout=TEXT_ONLY))
def test_no_layout_means_all_text(backend, case: ModuleCase):
    """A text-only batch needs no coordinates, and angles for a text window or a rotated scan alone."""
    module = random_module(backend, NAME, case)
    rotates = case.config.scan_rope or case.config.text_window
    bare = {} if rotates else {"position_embeddings": None}
    assert_same(run(module, NAME, case, layout=None, **bare), run(module, NAME, case), case)


@mate(cases=module_cases(("float32", "bfloat16")))
def test_both_branches_start_from_attention(backend, case: ModuleCase):
    """Two copies, with biases, which then train apart."""
    module, teacher = initial(backend, NAME, case), random_attention(case)
    module.copy_attention(teacher)
    own = dict(module.named_parameters())
    for name, tensor in teacher.named_parameters():
        for branch in ("flex_ma", "local_swin"):
            assert_exact(own[f"{branch}.{name}"].detach(), tensor.detach(), case, f"{branch}.{name}")
    pointers = [parameter.data_ptr() for parameter in own.values()]
    assert len(set(pointers)) == len(pointers), f"the branches must not share memory: {case!r}"


@mate("FlexMA", "LocalSwin", "MMATE", cases=module_cases())
def test_state_dicts_are_interchangeable(backend, case: ModuleCase):
    """Same names, shapes and order in both directions, for every option."""
    for name in ("FlexMA", "LocalSwin", "MMATE"):
        ours, theirs = (initial(side, name, case) for side in (backend, reference))
        shapes = [{k: tuple(v.shape) for k, v in module.state_dict().items()} for module in (ours, theirs)]
        assert shapes[0] == shapes[1], f"{name}: {case!r}"
        ours.load_state_dict(theirs.state_dict())
        theirs.load_state_dict(ours.state_dict())


@mate("FlexMA", "LocalSwin", "MMATE", cases=module_cases(layout=TEXT_ONLY), share=0.2)
def test_a_decoder_of_text_alone_leaves_out_what_vision_needs(backend, case: ModuleCase):
    """`text_only`: the same parameters but for those, and the same results."""
    bare = case.with_options(text_only=True)
    for name in ("FlexMA", "MMATE"):
        whole, ours, theirs = (
            random_module(backend, name, case),
            initial(backend, name, bare),
            initial(reference, name, bare),
        )
        assert ours.state_dict().keys() == theirs.state_dict().keys(), f"{name}: {case!r}"
        ours.load_state_dict({key: whole.state_dict()[key] for key in ours.state_dict()})
        found, wanted = (run(each, name, case, layout=None) for each in (ours, whole))
        assert_same(found, wanted, case)


@mate(cases=module_cases(["float32"]), share=0.2)
def test_every_parameter_gets_a_gradient(backend, case: ModuleCase):
    """Nothing that an option brings is left untrained, on a prompt with images and text."""
    case = ModuleCase(PROMPT, case.config, case.layer_index, "float32", case.seed)
    results = run_with_gradients(random_module(backend, NAME, case), NAME, case)
    unused = {"flex_ma.scan_gate_proj"} if not case.config.reverse_scan else set()
    for key, gradient in results.items():
        name = key.removeprefix("grad ")
        if key.startswith("grad ") and name.rpartition(".")[0] not in unused:
            silent = name == "local_swin.k_proj.bias" and not case.config.qk_norm
            assert silent or gradient.abs().max() > 0, f"{name} must get a gradient: {case!r}"


@mate(cases=module_cases(["float32"], layout=PROMPT))
def test_strides_and_gradient_checkpointing_do_not_matter(backend, case: ModuleCase):
    """Token axis first in memory, and a forward that runs again in the backward."""
    module = random_module(backend, NAME, case)
    wanted = run_with_gradients(module, NAME, case)["grad hidden_states"]
    strided = case.hidden_states().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()

    def forward(hidden_states):
        return tuple(run(module, NAME, case, hidden_states).values())

    outputs = torch.utils.checkpoint.checkpoint(forward, strided, use_reentrant=False)
    asked = [output for output in outputs if output.requires_grad]
    cotangents = [quarters(output, i) for i, output in enumerate(asked)]
    (found,) = torch.autograd.grad(asked, strided, cotangents)
    of_sums = partial(sizes, reference, NAME, case, module.state_dict())
    key = "grad hidden_states"
    assert_same({key: found}, {key: wanted}, case, sizes=of_sums)


@pytest.mark.needs("MMATE")
def test_an_unknown_layer_is_refused(backend):
    """A negative layer has no scan order and no windows."""
    with pytest.raises(ValueError, match="layer_index"):
        backend.MMATE(reference.LinMUConfig(width=6, heads=2, groups=1, head_dim=2), -1)
