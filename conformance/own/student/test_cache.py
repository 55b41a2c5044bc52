"""The cache of a student: constant in size, float32, and a good citizen of Hugging Face's cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from linmu.reference import MMATEState, WindowState, convert
from linmu.reference.student.cache import CACHE_NAMES, LinMUCacheLayer, cache_slot

from .tiny_checkpoint import IMAGE, build_teacher, picture, prompt, shake_mixers, words

TOKENS = 4 + 8 + 3


@pytest.fixture(scope="module")
def student():
    return shake_mixers(convert(build_teacher().to(torch.bfloat16), layers=[0, 2]))


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    return prompt(words(4, 0), picture(IMAGE, (1, 3, 2)), words(3, 1))


@torch.no_grad()
def filled(student, inputs) -> DynamicCache:
    return student(**inputs, use_cache=True).past_key_values


def states(cache) -> list[Tensor]:
    slots = [layer for layer in cache.layers if isinstance(layer, LinMUCacheLayer)]
    return [tensor for layer in slots for tensor in layer.state.tensors]


def slot(rows: int = 3) -> LinMUCacheLayer:
    """A filled slot whose row i holds i."""
    layer = LinMUCacheLayer()
    number = torch.arange(rows, dtype=torch.float32)
    conv, scan = number.view(-1, 1, 1).expand(-1, 3, 8), number.view(-1, 1, 1, 1).expand(-1, 2, 4, 4)
    near = number.view(-1, 1, 1, 1).expand(-1, 6, 2, 4)
    window = WindowState(near, near + 0.5, number[:, None] > torch.arange(6).flip(0))
    layer.store(MMATEState(conv, scan, window), 5)
    return layer


def rows_of(layer: LinMUCacheLayer) -> list[list[float]]:
    """The first number of every row, of each tensor; and how many tokens the window has."""
    *tensors, present = layer.state.tensors
    return [*(tensor.flatten(1)[:, 0].tolist() for tensor in tensors), present.sum(1).tolist()]


def test_states_do_not_grow_and_only_the_text_window_is_bfloat16_in_a_bfloat16_model(student, inputs):
    cache = filled(student, inputs)
    before = [(tensor.shape, tensor.dtype) for tensor in states(cache)]
    token = torch.tensor([words(1, 9)])
    for step in range(3):
        assert cache.get_seq_length() == TOKENS + step
        with torch.no_grad():
            student(input_ids=token, past_key_values=cache, use_cache=True)
    assert [(tensor.shape, tensor.dtype) for tensor in states(cache)] == before
    kinds = [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.bool]
    assert [dtype for _, dtype in before] == kinds * 2  # two converted layers


def test_converted_layers_and_attention_share_one_cache(student, inputs):
    cache = filled(student, inputs)
    kinds = [isinstance(layer, LinMUCacheLayer) for layer in cache.layers]
    assert kinds == [True, False, True]
    assert [cache.get_seq_length(index) for index in range(3)] == [TOKENS] * 3
    assert [cache.get_mask_sizes(2, index) for index in range(3)] == [(TOKENS + 2, 0)] * 3
    assert cache.layers[1].keys.shape[2] == TOKENS


def test_a_slot_answers_as_a_cache_layer():
    layer = slot()
    assert (layer.get_seq_length(), layer.get_mask_sizes(2), layer.get_max_length()) == (5, (7, 0), -1)
    assert not (layer.is_compileable or layer.is_croppable)


def test_beams_reorder_every_state():
    layer = slot()
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    assert rows_of(layer) == [[2, 0, 0]] * 3 + [[2.5, 0.5, 0.5], [2, 0, 0]]


def test_rows_are_repeated_and_selected():
    layer = slot()
    layer.batch_repeat_interleave(2)
    twice = [0, 0, 1, 1, 2, 2]
    assert rows_of(layer) == [twice] * 3 + [[row + 0.5 for row in twice], twice]
    layer.batch_select_indices(torch.tensor([1, 4]))
    assert rows_of(layer) == [[0, 2]] * 3 + [[0.5, 2.5], [0, 2]]


def test_a_reset_cache_starts_anew(inputs):
    student = shake_mixers(convert(build_teacher()))
    with torch.no_grad():
        cache = filled(student, inputs)
        wanted = student(**inputs, use_cache=False).logits
        cache.reset()
        assert cache.get_seq_length() == 0
        assert torch.equal(student(**inputs, past_key_values=cache, use_cache=True).logits, wanted)


def test_cropping_is_refused(student, inputs):
    with pytest.raises(RuntimeError, match=r"LinMUCacheLayer\.crop: tokens cannot be taken out"):
        filled(student, inputs).crop(-1)


def test_keys_and_values_are_refused():
    with pytest.raises(RuntimeError, match="got keys and values"):
        slot().update(torch.zeros(1), torch.zeros(1))


def test_a_teachers_cache_is_refused(student, inputs):
    teacher = build_teacher().to(torch.bfloat16)
    with torch.no_grad():
        cache = teacher(**inputs, use_cache=True).past_key_values
        with pytest.raises(
            ValueError, match="layer 0 of the cache must be unused or hold this model's state"
        ):
            student(input_ids=torch.tensor([words(1, 9)]), past_key_values=cache, use_cache=True)


def test_a_cache_without_slots_is_filled_as_needed():
    cache = DynamicCache()
    layer = cache_slot(cache, 2)
    assert len(cache.layers) == 3
    assert cache_slot(cache, 2) is layer


def test_a_static_cache_is_refused(student):
    cache = StaticCache(config=student.config, max_cache_len=32)
    with pytest.raises(ValueError, match="the cache must be a DynamicCache, got StaticCache"):
        cache_slot(cache, 0)


@torch.no_grad()
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_the_cache_is_taken_by_its_old_and_by_its_new_name(student, inputs, name):
    cache = filled(student, inputs)
    student(input_ids=torch.tensor([words(1, 9)]), **{name: cache})
    assert cache.get_seq_length() == TOKENS + 1
    student.generate(torch.tensor([words(TOKENS + 3, 9)]), max_new_tokens=1, **{name: cache})
    assert cache.get_seq_length() == TOKENS + 3


def test_two_caches_are_refused(student, inputs):
    caches = dict.fromkeys(CACHE_NAMES, filled(student, inputs))
    with pytest.raises(ValueError, match="name_cache: the cache must be given once"):
        student(input_ids=torch.tensor([words(1, 9)]), **caches)
