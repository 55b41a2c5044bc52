"""`LocalSwin`: the teacher's own attention, in shifted windows of one segment and in a window of text."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from linmu import reference

from ..harness import second_formulation, second_formulation_modules
from ..harness.compare import assert_close, assert_exact, assert_same, assert_zero
from ..harness.layouts import Layout, Pad, Text, Vision
from ..harness.module_autocast import check_autocast
from ..harness.module_cases import (
    ModuleCase,
    check_module,
    initial,
    module_cases,
    random_attention,
    random_module,
    run,
    run_with_gradients,
)
from ..harness.module_checks import (
    A_WORD,
    TWO_ROWS,
    check_angles_of_one_row,
    check_batch_mates_change_nothing,
    check_padding_changes_nothing,
    check_splitting_changes_nothing,
    check_step_behind_a_full_window,
    check_steps_equal_prefill,
    large_cases_of,
)
from ..harness.module_edges import (
    NORMED,
    ROTATING,
    SHARED,
    SMALL_PROMPT,
    check_angles_of_both_halves,
    check_layers_share_a_layout,
    check_norms_at_both_ends,
)
from ..harness.module_memory import REMEMBERED, check_nothing_is_remembered
from ..harness.operator_cases import DTYPES, property_of
from ..harness.packed_rows import check_module_equals_samples_alone
from ..harness.second_sliding_window import pairs_and_rest

swin = partial(property_of, "LocalSwin", share=0.4)
NAME = "LocalSwin"
TEXT_ONLY = Layout(((Text(9),), (Text(9),)))
LONG_TEXT = Layout(((Text(70), Pad(4)), (Text(11), Pad(2), Text(61))))
PROMPT = Layout(((Text(2), Vision(0, (1, 3, 3), "row"), Text(2)),))


@swin(cases=module_cases(DTYPES))
def test_local_swin_and_gradients_match_the_reference(backend, case: ModuleCase):
    """Output, and the gradients of the input and of every parameter, in every dtype."""
    module = random_module(backend, NAME, case)
    check_module(module, reference, NAME, case)


@swin(cases=module_cases(text_window=3), share=0.2)
def test_local_swin_equals_the_samples_of_a_packed_row_alone(backend, case: ModuleCase):
    """Outputs, states and gradients; the layout tells of the samples."""
    check_module_equals_samples_alone(backend, NAME, case)


@swin(cases=module_cases(layout=LONG_TEXT, text_window=3), share=0.1)
def test_local_swin_equals_the_samples_of_packed_text_alone(backend, case: ModuleCase):
    """Without a layout the module is told of the samples itself."""
    check_module_equals_samples_alone(backend, NAME, case, has_layout=False)


@swin(cases=module_cases(["float64"]), share=1.0)
def test_local_swin_equals_its_second_formulation(backend, case: ModuleCase):
    """Attention over the whole row under a mask of window mates and of the text window, to 1e-10."""
    module = random_module(backend, NAME, case)
    wanted = second_formulation_modules.local_swin(
        dict(module.named_parameters()),
        case.hidden_states(),
        case.layout.coords,
        case.layout.valid,
        case.position_embeddings(),
        case.config,
        case.layer_index,
    )
    assert_close({"output": run(module, NAME, case)["output"]}, {"output": wanted}, case, 1e-10)


test_sizes_that_people_run = large_cases_of(NAME)


@swin(cases=module_cases(layout=A_WORD, text_window=1030), share=0.1)
def test_a_step_reads_a_window_of_more_than_a_thousand_tokens(backend, case: ModuleCase):
    """All that are there, with gradients and without."""
    check_step_behind_a_full_window(backend, NAME, case)


@swin(cases=module_cases(layout=REMEMBERED, text_window=3), share=0.05)
def test_nothing_is_remembered_between_calls(backend, case: ModuleCase):
    """Parameters, however they change, layouts, masks, angles and states; results stay as they were."""
    check_nothing_is_remembered(backend, NAME, case)


@swin(cases=module_cases(("float32", "mixed"), text_window=3, qk_norm=False, qkv_bias=True), share=0.2)
def test_autocast_rounds_projections_and_nothing_else(backend, case: ModuleCase):
    """q, k, v, z and the output, as it does in the reference; values, states and gradients."""
    check_autocast(backend, NAME, case)


@swin(cases=module_cases(output_bias=True, text_window=0))
def test_text_without_a_window_gets_zero_and_gives_nothing(backend, case: ModuleCase):
    """Exactly, an output bias notwithstanding; no gradient reaches text or padding."""
    results = run_with_gradients(random_module(backend, NAME, case), NAME, case)
    text = case.layout.segment < 0
    for key in ("output", "grad hidden_states"):
        assert_zero(results[key][text], case, f"{key} on text")


@swin(cases=module_cases(["float64"], layout=PROMPT))
def test_a_token_sees_its_window_and_nothing_else(backend, case: ModuleCase):
    """Every window mate, odd layers shifted; from text the last tokens; exactly zero elsewhere."""
    module = random_module(backend, NAME, case)
    u = case.hidden_states().requires_grad_()
    output = run(module, NAME, case, u)["output"]
    shifted = case.layer_index % 2 == 1
    mates = second_formulation.same_window(case.layout.coords, case.config.window_thw, shifted)
    if case.config.text_window:
        text = case.layout.segment < 0
        mates = mates | pairs_and_rest(case.config.text_window, u.shape[1], len(u), text)[0]
    for t in range(u.shape[1]):
        (found,) = torch.autograd.grad(output[:, t].sum(), u, retain_graph=True)
        assert_exact(found.abs().amax(-1) > 0, mates[:, t], case, f"tokens that token {t} reads")


@swin(cases=module_cases(["float64"], window_thw=(4, 8, 8), layout=PROMPT))
def test_one_window_over_an_image_is_the_teachers_attention(backend, case: ModuleCase):
    """Weights, biases, norms and RoPE of the teacher; without a causal mask, over the image alone."""
    module, teacher = initial(backend, NAME, case), random_attention(case)
    module.copy_attention(teacher)
    image, config = case.layout.segment[0] >= 0, case.config
    u = case.hidden_states()[:, image]
    q, k, v = (
        getattr(teacher, f"{n}_proj")(u).unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for n in "qkv"
    )
    if config.qk_norm:
        q, k = teacher.q_norm(q), teacher.k_norm(k)
    cos, sin = (angle[:, None, image] for angle in case.position_embeddings())
    q, k = (
        z * cos + torch.cat([-z[..., z.shape[-1] // 2 :], z[..., : z.shape[-1] // 2]], -1) * sin
        for z in (q, k)
    )
    attended = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2)
    found = run(module, NAME, case)["output"][:, image]
    assert_close({"output": found}, {"output": teacher.o_proj(attended)}, case, 1e-10)


@swin(cases=module_cases(["float64"]))
def test_only_differences_of_angles_matter(backend, case: ModuleCase):
    """RoPE is relative: turning all tokens by one angle changes nothing."""
    module = random_module(backend, NAME, case)
    cos, sin = case.position_embeddings()
    turn = torch.tensor(0.7, dtype=cos.dtype)
    turned = (cos * turn.cos() - sin * turn.sin(), sin * turn.cos() + cos * turn.sin())
    results = (run(module, NAME, case, **given) for given in ({"position_embeddings": turned}, {}))
    assert_same(*({"output": result["output"]} for result in results), case, factor=10)


@swin(cases=module_cases(text_window=3))
def test_padding_changes_nothing(backend, case: ModuleCase):
    """More of it on both sides, with anything in it: the text window counts valid tokens."""
    check_padding_changes_nothing(random_module(backend, NAME, case), NAME, case)


@swin(cases=module_cases(text_window=5), share=0.3)
def test_splitting_outside_blocks_changes_nothing(backend, case: ModuleCase):
    """The text window is handed over; it may hold vision."""
    check_splitting_changes_nothing(random_module(backend, NAME, case), NAME, case)


@swin(cases=module_cases(layout=TEXT_ONLY, text_window=4), share=0.3)
def test_steps_equal_prefill(backend, case: ModuleCase):
    """Token by token, in a state whose size never changes."""
    check_steps_equal_prefill(random_module(backend, NAME, case), NAME, case)


@swin(cases=module_cases(("float32", "bfloat16"), text_window=128))
def test_the_text_window_is_kept_in_the_dtype_of_the_model(backend, case: ModuleCase):
    """Keys after RoPE, and values, of the last 127 valid tokens."""
    state = run(random_module(backend, NAME, case), NAME, case)
    counted = case.layout.valid.sum(1)
    assert_exact(state["window's present state"].sum(1), counted, case, "tokens in the state")
    for name in ("window's k state", "window's v state"):
        assert state[name].dtype == case.torch_dtype and state[name].shape[1] == 127, f"{name}: {case!r}"


@swin(cases=module_cases())
def test_batch_mates_change_nothing(backend, case: ModuleCase):
    """Every row alone gives what it gives among others."""
    check_batch_mates_change_nothing(random_module(backend, NAME, case), NAME, case)


@swin(cases=module_cases(layout=TWO_ROWS), share=0.2)
def test_angles_of_one_row_serve_all_rows(backend, case: ModuleCase):
    """Hugging Face may pass cos and sin with batch 1."""
    check_angles_of_one_row(backend, NAME, case)


@swin(cases=module_cases(("float32", "float64"), layout=SHARED, **ROTATING), share=0.05)
def test_layers_may_share_a_layout(backend, case: ModuleCase):
    """What a backend keeps with it is that of no other layer, mask, angles or dtype."""
    check_layers_share_a_layout(backend, NAME, case)


@swin(cases=module_cases(layout=SMALL_PROMPT, text_window=3), share=0.1)
def test_the_halves_of_the_angles_may_differ(backend, case: ModuleCase):
    """RoPE reads all N columns of cos and sin, as the reference does."""
    check_angles_of_both_halves(backend, NAME, case)


@swin(cases=module_cases(("float16",), layout=SMALL_PROMPT, **NORMED), share=0.05)
def test_what_is_normed_may_have_any_size(backend, case: ModuleCase):
    """Squares of half precision overflow at 256 and have no digits at 1 / 500."""
    check_norms_at_both_ends(backend, NAME, case)


@swin(cases=module_cases(("float32", "bfloat16")))
def test_attention_is_copied_with_its_biases(backend, case: ModuleCase):
    """Bit for bit, and a teacher with other tensors is refused."""
    module, teacher = initial(backend, NAME, case), random_attention(case)
    module.copy_attention(teacher)
    own = dict(module.named_parameters())
    assert own.keys() == dict(teacher.named_parameters()).keys()
    for name, tensor in teacher.named_parameters():
        assert_exact(own[name].detach(), tensor.detach(), case, name)
    with pytest.raises(ValueError, match="must"):
        module.copy_attention(random_attention(case, qkv_bias=not case.config.qkv_bias))


@swin(cases=module_cases(), share=0.2)
def test_missing_angles_are_an_error(backend, case: ModuleCase):
    """Attention without its positions would be a different function."""
    module = random_module(backend, NAME, replace(case, dtype="float32"))
    with pytest.raises(ValueError, match="position_embeddings"):
        run(module, NAME, replace(case, dtype="float32"), position_embeddings=None)
