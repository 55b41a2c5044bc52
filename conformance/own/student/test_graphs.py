"""`optimized.accelerate`: graphs give what the eager forward gives, and where they cannot run, it is said.

On a CPU a tape stands for a CUDA graph: all but the capture itself is the product's.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linmu import optimized, reference
from linmu.optimized import engine, graphs
from linmu.optimized.graphs import decoder as graphed
from linmu.optimized.graphs import static_layout
from linmu.optimized.layout.segments import next_segment, openings_of, vision_mask
from linmu.reference.student.cache import CACHE_NAME

from .tape import tape
from .test_generation import PROMPTS, assert_logits
from .tiny_checkpoint import (
    IMAGE,
    batch,
    build_teacher,
    every_kind,
    picture,
    prompt,
    shake_mixers,
    words,
)
from .tiny_families import idefics3, internvl, llava_onevision, text_decoder

LIMITS = graphed.Limits((8, 16, 32, 64), 8, 256, 32)
STEPS = 3


@dataclass
class Both:
    """One student twice, over weights of their own: as it is, and from graphs."""

    eager: nn.Module
    fast: nn.Module

    @property
    def graphs(self) -> dict[tuple, graphed.Graph]:
        """Those captured so far."""
        return self.fast.get_decoder().forward.graphs


def both(student: nn.Module) -> Both:
    student = shake_mixers(student.double())
    return Both(student, graphs.install(copy.deepcopy(student), LIMITS, lambda: tape))


STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "qwen2_5_vl": lambda: optimized.convert(build_teacher()),
    "qwen2_vl": lambda: optimized.convert(build_teacher("qwen2_vl")),
    "no text window": lambda: optimized.convert(build_teacher(num_hidden_layers=2), {"text_window": 0}),
    "qwen2": lambda: optimized.convert(text_decoder().teacher),
    "llama": lambda: optimized.convert(text_decoder(llama=True).teacher),
}


@pytest.fixture(scope="module", params=STUDENTS)
def pair(request) -> Both:
    return both(STUDENTS[request.param]())


@pytest.fixture(scope="module")
def vision() -> Both:
    return both(STUDENTS["qwen2_5_vl"]())


@pytest.fixture(scope="module")
def one_layer() -> nn.Module:
    return shake_mixers(optimized.convert(build_teacher(num_hidden_layers=1)).double())


@pytest.fixture
def few(one_layer) -> Both:
    """One of its own, that a test may change."""
    student = copy.deepcopy(one_layer)
    return Both(student, graphs.install(copy.deepcopy(student), LIMITS, lambda: tape))


def prompts_of(pair: Both) -> list[dict[str, Tensor]]:
    """Prompts of different kinds and lengths that share buckets, and batches padded on the left."""
    texts = [prompt(words(length, seed)) for length, seed in ((7, 1), (3, 2), (16, 3))]
    rows = batch(texts[:2])
    if pair.fast.prompt_layout is None:
        return [{n: t for n, t in each.items() if n != "mm_token_type_ids"} for each in (*texts, rows)]
    return [*(PROMPTS[kind]() for kind in ("image", "video", "text")), rows, every_kind()]


def tokens(student: nn.Module, steps: int = STEPS, **inputs: Any):
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    return student.generate(**options | inputs, max_new_tokens=steps, min_new_tokens=steps)


def cache_of(output: Any) -> Any:
    return output[CACHE_NAME]


def assert_same_tokens(pair: Both, **inputs: Any) -> None:
    got, want = tokens(pair.fast, **inputs), tokens(pair.eager, **inputs)
    assert_logits(torch.stack(got.logits), torch.stack(want.logits))


def assert_same_forward(pair: Both, **inputs: Any) -> None:
    with torch.no_grad():
        torch.testing.assert_close(pair.fast(**inputs).logits, pair.eager(**inputs).logits)


def test_generate_gives_the_same_from_graphs(pair):
    """Each prompt twice, the others between: what one leaves in the buffers must not reach another."""
    prompts = prompts_of(pair)
    want = [torch.stack(tokens(pair.eager, **inputs).logits) for inputs in prompts]
    for _ in range(2):
        for inputs, logits in zip(prompts, want, strict=True):
            assert_logits(torch.stack(tokens(pair.fast, **inputs).logits), logits)
    kinds = {key[:2] for key in pair.graphs}
    assert {("token", 1), ("token", 2), ("prompt", 1)} <= kinds


@pytest.mark.parametrize("make", [llava_onevision, internvl, idefics3], ids=lambda make: make.__name__)
def test_families_on_these_decoders_give_the_same_from_graphs(make):
    tiny = make()
    pair = both(optimized.convert(tiny.teacher))
    inputs = tiny.inputs(f"a{{{next(iter(tiny.sizes))}}}b")
    assert_same_tokens(pair, **{n: t.double() if t.is_floating_point() else t for n, t in inputs.items()})
    assert {key[0] for key in pair.graphs} == {"prompt", "token"}


def test_a_second_turn_gives_the_same_from_graphs(pair):
    more = torch.tensor([words(5, 9)])
    for inputs in prompts_of(pair)[:2]:
        found = []
        for student in (pair.fast, pair.eager):
            first = tokens(student, **inputs)
            second = {"input_ids": torch.cat([first.sequences, more], dim=1), CACHE_NAME: cache_of(first)}
            found.append(torch.stack(tokens(student, **inputs | second | {"attention_mask": None}).logits))
        assert_logits(*found)
    assert any(key[0] == "prompt" and key[-1] for key in pair.graphs)


SEARCHES = {"beams": {"num_beams": 3}, "samples": {"do_sample": True, "num_return_sequences": 3}}


@pytest.mark.parametrize("options", SEARCHES.values(), ids=SEARCHES)
def test_beams_and_samples_give_the_same_from_graphs(vision, options):
    found = []
    for student in (vision.fast, vision.eager):
        torch.manual_seed(0)
        found.append(tokens(student, **PROMPTS["image"](), **options))
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert_logits(torch.stack(found[0].logits), torch.stack(found[1].logits))


def test_two_conversations_may_take_turns(vision):
    """Both decode with one graph, whose buffers hold the states of one at a time."""
    ids = [torch.tensor([words(6, seed)]) for seed in (1, 2)]
    given = [torch.tensor([[token]]) for token in words(8, 3)]
    found = []
    with torch.no_grad():
        for student in (vision.fast, vision.eager):
            caches = [student(input_ids=each, use_cache=True)[CACHE_NAME] for each in ids]
            logits = []
            for place, token in enumerate(given):
                cache = caches[place // 2 % 2]
                if place == 5:
                    caches[1] = copy.deepcopy(cache) if cache is caches[1] else caches[1]
                    cache = caches[place // 2 % 2]
                logits.append(student(input_ids=token, use_cache=True, **{CACHE_NAME: cache}).logits)
            found.append(torch.cat(logits))
            assert caches[0].get_seq_length() == 10
    torch.testing.assert_close(*found)


def test_an_eager_token_between_leaves_the_other_cache_alone(vision):
    """An eager step puts new tensors beside the graph's own into the slots: both must be given back."""
    ids = [torch.tensor([words(6, seed)]) for seed in (1, 2)]
    found = []
    with torch.no_grad():
        for student in (vision.fast, vision.eager):
            first, second = (student(input_ids=each, use_cache=True)[CACHE_NAME] for each in ids)
            logits = []
            for place, cache in enumerate((first, first, second, first, first)):
                watching = place in (1, 3)
                layer = student.get_decoder().layers[0]
                hook = layer.register_forward_hook(lambda *_: None) if watching else None
                token = torch.tensor([[10 + place]])
                logits.append(student(input_ids=token, use_cache=True, **{CACHE_NAME: cache}).logits)
                if hook is not None:
                    hook.remove()
            found.append(torch.cat(logits))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_forward_gives_the_same_from_graphs(vision, side):
    inputs, before = every_kind(side), len(vision.graphs)
    for options in ({}, {"logits_to_keep": 1}, {"use_cache": False}):
        assert_same_forward(vision, **inputs, **options)
    assert len(vision.graphs) >= max(before, 1)


def test_a_prompt_as_long_as_its_bucket_runs_without_a_mask(vision):
    inputs = prompt(words(16, 5))
    assert_same_forward(vision, **inputs)
    assert ("prompt", 1, torch.float64, 16, False, False, False) in vision.graphs


# ------------------------------------------------------------------------------------------------------------
# Bugs that graphs are prone to: each must be noticed by the comparison above.


def stale(name: str) -> Callable:
    """`Graph.take_tokens` with one buffer that keeps what the first prompt brought."""
    own = graphed.Graph.take_tokens

    def take_tokens(self, tokens):
        buffer = self.tokens.get(name)
        kept = None if buffer is None or self.hidden is None else buffer.clone()
        own(self, tokens)
        if kept is not None:
            buffer.copy_(kept)

    return take_tokens


def plant_stale_mask(monkeypatch):
    monkeypatch.setattr(graphed.Graph, "take_tokens", stale("valid"))


def plant_stale_positions(monkeypatch):
    monkeypatch.setattr(graphed.Graph, "take_tokens", stale("positions"))


def plant_stale_coordinates(monkeypatch):
    monkeypatch.setattr(graphed.Graph, "take_tokens", stale("coords"))


def plant_padding_that_keeps_old_tokens(monkeypatch):
    own = graphed.Graph.take_tokens

    def take_tokens(self, tokens):
        self.blank = 64
        own(self, tokens)

    monkeypatch.setattr(graphed.Graph, "take_tokens", take_tokens)


def plant_a_layout_found_once(monkeypatch):
    own, kept = static_layout.StaticLayout.window_plan, {}

    def window_plan(self, *arguments):
        return kept.setdefault(self.coords.shape, own(self, *arguments))

    monkeypatch.setattr(static_layout.StaticLayout, "window_plan", window_plan)


def plant_states_of_another_prompt(monkeypatch):
    graph, own = graphed.Graph, graphed.Graph.lend_states
    monkeypatch.setattr(graph, "lend_states", lambda self, slots, values: own(self, slots, self.states))


def plant_states_left_where_the_next_prompt_writes(monkeypatch):
    monkeypatch.setattr(graphed.GraphedDecoder, "keep", lambda *_: None)


def plant_lent_states_that_are_not_given_back(monkeypatch):
    monkeypatch.setattr(graphed.Graph, "give_back", lambda self, slots: None)


def plant_a_step_that_keeps_the_old_state(monkeypatch):
    own = graphed.GraphedDecoder.record
    monkeypatch.setattr(
        graphed.GraphedDecoder, "record", lambda self, graph, keeps_states: own(self, graph, 0)
    )


def plant_a_capture_that_counts_as_a_token(monkeypatch):
    monkeypatch.setattr(graphed, "copies", list)


def plant_a_frozen_length(monkeypatch):
    own = graphed.GraphedDecoder.decode

    def decode(self, request, slots):
        hidden = own(self, request, slots)
        for slot in slots:
            slot.seen_tokens -= 1
        return hidden

    monkeypatch.setattr(graphed.GraphedDecoder, "decode", decode)


def by_hand(student: nn.Module, first: list[int], second: list[int]) -> list[Tensor]:
    """Two prompts with pictures, then tokens in turn, positions left to the model."""
    with torch.no_grad():
        caches, logits = [], []
        for height, before in ((3, first), (2, second)):
            inputs = prompt(before, picture(IMAGE, (1, height, 2)), words(2, 1), seed=height)
            output = student(**inputs, use_cache=True)
            caches.append(output[CACHE_NAME])
            logits.append(output.logits)
        for place in range(6):
            token = torch.tensor([[10 + place]])
            cache = caches[place // 2 % 2]
            logits.append(student(input_ids=token, use_cache=True, **{CACHE_NAME: cache}).logits)
    return logits + [torch.tensor(cache.get_seq_length()) for cache in caches]


PLANTS = [plant for name, plant in list(globals().items()) if name.startswith("plant_")]


@pytest.mark.parametrize("plant", [None, *PLANTS], ids=lambda plant: plant.__name__ if plant else "none")
def test_planted_bugs_are_noticed(few, monkeypatch, plant):
    prompts = words(5, 1), words(4, 2)  # the second is shorter, of the same bucket
    want = by_hand(few.eager, *prompts)
    if plant is None:
        torch.testing.assert_close(by_hand(few.fast, *prompts), want)
        return
    plant(monkeypatch)
    try:
        got = by_hand(few.fast, *prompts)
    except RuntimeError:  # a bug may also break the run
        return
    with pytest.raises(AssertionError):
        torch.testing.assert_close(got, want)


def test_what_is_frozen_at_capture_stays_frozen_on_the_tape():
    """The stand-in is as blind as a graph: Python's numbers, and tensors that are no buffers."""
    number, buffer = [2.0], torch.ones(2)
    replay, result = tape(lambda: buffer * number[0])
    number[0] = 3.0
    buffer.fill_(5.0)
    replay()
    assert result.tolist() == [10.0, 10.0]


@pytest.mark.parametrize("ask", [lambda x: x.item(), lambda x: bool(x > 0), lambda x: x.nonzero()])
def test_what_waits_for_the_device_cannot_be_taped(ask):
    with pytest.raises(RuntimeError, match="waits for the device"):
        tape(lambda: ask(torch.ones(1)))


# ------------------------------------------------------------------------------------------------------------
# Where graphs stay away.


def with_hook(pair: Both) -> dict[str, Any]:
    pair.fast.get_decoder().layers[0].mlp.register_forward_hook(lambda *_: None)
    return {}


def with_adapter(pair: Both) -> dict[str, Any]:
    pair.fast.get_decoder().layers[0].mlp.active_adapters = ["default"]
    return {}


def with_offloading(pair: Both) -> dict[str, Any]:
    pair.fast.get_decoder().layers[0].mlp._hf_hook = object()
    return {}


WATCHED = {
    "hooks": with_hook,
    "adapters": with_adapter,
    "offloaded": with_offloading,
    "output_hidden_states": lambda pair: {"output_hidden_states": True},
    "output_attentions": lambda pair: {"output_attentions": True},
    "longer than the largest": lambda pair: prompt(words(65, 1)),
    "most_rows": lambda pair: batch([prompt(words(3, 1))] * 9),
    "most_tokens": lambda pair: batch([prompt(words(33, 1))] * 5),
    "a cache with use_cache=False": lambda pair: {
        CACHE_NAME: pair.eager(input_ids=torch.tensor([[7, 8]]), use_cache=True)[CACHE_NAME],
        "use_cache": False,
        "attention_mask": torch.ones(1, 9).long(),
    },
    "linmu_sequence": lambda pair: packed(),
}


def packed() -> dict[str, Any]:
    """A row of two samples, told by positions that start anew beside a mask of ones."""
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])
    return {"position_ids": positions.expand(4, 1, 7), "use_cache": False}


@pytest.mark.parametrize("reason", WATCHED)
def test_what_watches_or_does_not_fit_runs_eagerly_and_is_said_once(few, monkeypatch, capsys, reason):
    monkeypatch.setattr(engine, "_announced", {"torch"})
    with torch.no_grad():
        inputs = prompt(words(7, 1)) | WATCHED[reason](few)
        got = [few.fast(**inputs | cache_copy(inputs)) for _ in range(2)]
        want = few.eager(**inputs)
    assert torch.equal(got[1].logits, want.logits)
    assert not few.graphs
    said = capsys.readouterr().err
    assert said.count("without CUDA graphs") == 1
    assert reason in said


def cache_copy(inputs: dict[str, Any]) -> dict[str, Any]:
    """A cache of its own, where there is one."""
    return {CACHE_NAME: copy.deepcopy(inputs[CACHE_NAME])} if CACHE_NAME in inputs else {}


def test_hooks_that_hidden_states_leave_behind_do_not_keep_graphs_away(few):
    inputs = prompt(words(7, 1))
    with torch.no_grad():
        few.fast(**inputs, output_hidden_states=True)
    assert any(few.fast.get_decoder().forward.watch.hooks)
    assert_same_forward(few, **inputs)
    assert few.graphs


def test_a_hook_is_noticed_as_long_as_it_is_there(few):
    inputs, called = prompt(words(7, 1)), []
    assert_same_forward(few, **inputs)
    mlp = few.fast.get_decoder().layers[0].mlp
    for _ in range(2):
        hook = mlp.register_forward_hook(lambda *_: called.append(1))
        assert_same_forward(few, **inputs)
        assert_same_forward(few, **inputs)
        hook.remove()
        assert_same_forward(few, **inputs)
    assert len(called) == 4


def test_a_member_of_a_module_that_had_none_is_noticed(few):
    inputs = prompt(words(7, 1))
    assert_same_forward(few, **inputs)
    watch = few.fast.get_decoder().forward.watch
    few.fast.get_decoder().layers[0].mlp.register_buffer("more", torch.ones(2))
    assert_same_forward(few, **inputs)
    assert few.fast.get_decoder().forward.watch is not watch


def test_gradients_are_as_without_graphs(few, monkeypatch, capsys):
    monkeypatch.setattr(engine, "_announced", {"torch"})
    for student in (few.fast, few.eager):
        student(**prompt(words(7, 1))).logits.square().sum().backward()
    got, want = (dict(student.named_parameters()) for student in (few.fast, few.eager))
    for name, parameter in want.items():
        assert (parameter.grad is None) == (got[name].grad is None)
        if parameter.grad is not None:
            torch.testing.assert_close(got[name].grad, parameter.grad)
    assert not few.graphs
    assert "gradients are recorded" in capsys.readouterr().err


def test_masks_of_four_axes_are_refused_as_without_graphs(few):
    inputs = prompt(words(7, 1)) | {"attention_mask": torch.ones(1, 1, 7, 7, dtype=torch.bool)}
    for student in (few.fast, few.eager):
        with torch.no_grad(), pytest.raises(ValueError, match="attention_mask must be"):
            student(**inputs)


def test_weights_that_change_are_noticed(few):
    """In their place a graph reads them; in other memory, and as other modules, they are captured again."""
    inputs = prompt(words(7, 1))
    for change in (
        lambda layer: layer.mlp.up_proj.weight.data.mul_(1.5),
        lambda layer: setattr(layer.mlp.up_proj.weight, "data", layer.mlp.up_proj.weight.data * 1.5),
        lambda layer: setattr(layer.mlp, "up_proj", halved(layer.mlp.up_proj)),
        lambda layer: setattr(layer.mlp, "forward", nn.Identity()),
    ):
        for student in (few.fast, few.eager):
            with torch.no_grad():
                change(student.get_decoder().layers[0])
        assert_same_forward(few, **inputs)
        assert few.graphs


def halved(linear: nn.Linear) -> nn.Linear:
    other = copy.deepcopy(linear)
    other.weight.data /= 2
    return other


def test_graphs_are_bounded_and_the_oldest_goes_first(few):
    graphs.install(few.fast, graphed.Limits((8, 16, 32), 8, 256, 2), lambda: tape)
    for length in (5, 12, 6, 20, 7):
        assert_same_forward(few, **prompt(words(length, 1)))
    assert [key[3] for key in few.graphs] == [32, 8]
    assert few.fast.get_decoder().forward.nbytes > 0


def test_a_fault_says_how_to_turn_graphs_off(few):
    def broken(function):
        raise torch.OutOfMemoryError("no room")

    graphs.install(few.fast, LIMITS, lambda: broken)
    inputs = prompt(words(7, 1))
    with torch.no_grad():
        with pytest.raises(RuntimeError, match=r"no room; .*unaccelerate\(student\) turns the graphs off"):
            few.fast(**inputs)
        optimized.unaccelerate(few.fast)
        assert torch.equal(few.fast(**inputs).logits, few.eager(**inputs).logits)


@pytest.mark.parametrize("pad", [0, 5])
def test_a_graphs_layout_is_the_padded_prompts(pad):
    """Found by bounds of its numbers, taped, from coordinates that came later."""
    coords = torch.full((2, 40 + pad, 4), -1)
    grid = torch.cartesian_prod(*map(torch.arange, (3, 2, 2)))
    coords[0, pad + 3 : pad + 15] = torch.cat([torch.zeros(12, 1).long(), grid], 1)
    coords[1, pad + 20 : pad + 32] = coords[0, pad + 3 : pad + 15] + torch.tensor([1, 0, 2, 5])
    valid = torch.rand(2, 40 + pad, generator=torch.Generator().manual_seed(0)) > 0.3
    valid[:, :pad] = False
    buffer, windows = torch.full_like(coords, -1), [((2, 2, 2), index) for index in (0, 1)]
    want = optimized.VisionLayout(coords)

    def found(layout):
        plans = [layout.window_plan(*each) for each in windows]
        return [layout.scan_rows, layout.order(2), layout.vision_row, *(t for plan in plans for t in plan)]

    def run():
        layout = static_layout.StaticLayout(buffer)
        ids = [layout.windows(*each) for each in windows]
        return [*found(layout), layout.openings_among(None)], layout.openings_among(valid), ids

    replay, (got, openings, ids) = tape(run)
    buffer.copy_(coords)
    replay()
    for one, other in zip(got, [*found(want), want.openings], strict=True):
        assert torch.equal(one, other)
    for chunk in (16, 64, 128):
        vision = vision_mask(want.segment, valid)
        next_one = next_segment(want.segment, vision, chunk)
        assert torch.equal(openings_of(openings, coords.shape[1], chunk), next_one)
    for each, number in zip(windows, ids, strict=True):
        own = want.windows(*each)
        assert torch.equal(number >= 0, own >= 0)
        for row, other in zip(number, own, strict=True):  # other numbers, the same windows
            pairs = torch.stack([row, other])[:, row >= 0]
            assert len(pairs.unique(dim=1)[0]) == len(row[row >= 0].unique()) == len(other[row >= 0].unique())


def test_coordinates_beyond_a_graphs_bounds_run_eagerly(few, capsys, monkeypatch):
    monkeypatch.setattr(engine, "_announced", {"torch"})
    ids = torch.tensor([words(9, 1)])
    for first in (0, static_layout.LARGEST_PLACE - 1):
        place = torch.arange(3)
        coords = torch.full((1, 9, 4), -1)
        coords[0, 2:5] = torch.stack([0 * place, 0 * place, 0 * place, first + place], 1)
        found = []
        with torch.no_grad():
            for student in (few.fast, few.eager):
                embeds = student.get_input_embeddings()(ids)
                found.append(student(inputs_embeds=embeds, linmu_coords=coords, use_cache=False).logits)
        torch.testing.assert_close(*found)
        assert len(few.graphs) == 1
    assert "very large numbers" in capsys.readouterr().err


@pytest.mark.parametrize("batch", [1, 64, 2**14])
def test_all_keys_within_the_bounds_are_narrow(batch):
    """What is not would have to be numbered first, which waits for the device."""
    coords = torch.full((1, 1, 4), -1).expand(batch, -1, -1)
    assert static_layout.StaticLayout(coords).sorted.narrow


def test_a_weight_of_one_number_that_is_replaced_by_its_equal_is_noticed(few):
    mixer = few.fast.get_decoder().layers[0].self_attn
    assert mixer.mix_proj.bias.numel() == 1
    inputs = prompt(words(3, 1), picture(IMAGE, (1, 2, 2)), words(2, 1))
    assert_same_forward(few, **inputs)
    for student in (few.fast, few.eager):
        linear = student.get_decoder().layers[0].self_attn.mix_proj
        linear.bias = nn.Parameter(linear.bias.detach().clone())
    assert_same_forward(few, **inputs)
    with torch.no_grad():
        for student in (few.fast, few.eager):
            student.get_decoder().layers[0].self_attn.mix_proj.bias += 2
    assert_same_forward(few, **inputs)


def test_copies_and_pickles_begin_without_graphs(few):
    inputs = prompt(words(7, 1))
    assert_same_forward(few, **inputs)
    other = copy.deepcopy(few.fast)
    assert other.get_decoder().forward.module is other.get_decoder()
    assert not other.get_decoder().forward.graphs
    with torch.no_grad():
        other.get_decoder().norm.weight *= 2
        few.eager.get_decoder().norm.weight *= 2
        torch.testing.assert_close(other(**inputs).logits, few.eager(**inputs).logits)
    assert "forward" not in few.fast.state_dict()
    for module in (few.fast.get_decoder(), few.fast.model.visual):
        module.forward.new_capture = graphs.CudaCapture  # a lambda has no pickle
    buffer = io.BytesIO()
    torch.save(few.fast, buffer)
    buffer.seek(0)
    opened = torch.load(buffer, weights_only=False)
    assert opened.get_decoder().forward.limits == LIMITS
    assert opened.model.visual.forward.module is opened.model.visual


REFUSED = {
    "must be on a GPU": lambda: optimized.convert(build_teacher(num_hidden_layers=1)),
    "must be a student": build_teacher,
}


@pytest.mark.parametrize("reason", REFUSED)
def test_accelerate_refuses_what_it_cannot_capture(reason):
    with pytest.raises(ValueError, match=reason):
        optimized.accelerate(REFUSED[reason]())


UNFIT = {
    "all 2 layers must be": lambda: optimized.convert(build_teacher(num_hidden_layers=2), layers=[1]),
    "all 1 layers must be": lambda: reference.convert(build_teacher(num_hidden_layers=1)),
    "rope_type must be": lambda: optimized.convert(
        build_teacher(num_hidden_layers=1, rope_parameters=DYNAMIC | {"mrope_section": [1, 1, 2]})
    ),
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


@pytest.mark.parametrize("reason", UNFIT)
def test_students_that_do_not_fit_are_refused(reason):
    with pytest.raises(ValueError, match=reason):
        graphs.install(UNFIT[reason](), LIMITS, lambda: tape)
