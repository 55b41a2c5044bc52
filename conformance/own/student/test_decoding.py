"""What generate() adds to a forward: a cache that never grows, a compiled step, streams, and ways to stop."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import StoppingCriteria, StoppingCriteriaList, TextStreamer

from linmu.optimized import convert
from linmu.reference.student.cache import CACHE_NAME

from .tiny_checkpoint import build_teacher, every_kind, shake_mixers, words
from .tiny_families import Tiny, internvl


@pytest.fixture(scope="module")
def student():
    return shake_mixers(convert(build_teacher()))


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return internvl()


@pytest.fixture(scope="module")
def reader(tiny):
    """A student that shares a tokenizer with its prompts."""
    return shake_mixers(convert(tiny.teacher))


def cache_tensors(cache) -> list[Tensor]:
    return [tensor for layer in cache.layers for tensor in layer.state.tensors]


def cache_bytes(cache) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in cache_tensors(cache))


@torch.no_grad()
def test_the_cache_takes_as_many_bytes_after_10_000_tokens_as_after_10(student):
    sizes = []
    for length in (10, 10_000):
        output = student(input_ids=torch.tensor([words(length, 0)]), use_cache=True, logits_to_keep=1)
        sizes.append(cache_bytes(output[CACHE_NAME]))
        student(input_ids=torch.tensor([words(1, 1)]), **{CACHE_NAME: output[CACHE_NAME]})
        sizes.append(cache_bytes(output[CACHE_NAME]))
    config = student.get_decoder().layers[0].self_attn.config
    state = config.heads * config.head_dim**2 + (config.conv_kernel - 1) * config.conv_channels
    near = (config.text_window - 1) * 2 * config.groups * config.head_dim
    masks = config.text_window - 1  # a byte for each place of the window
    assert sizes == [3 * (4 * (state + near) + masks)] * 4  # layers, bytes of a float32


def steps(forward, prompt: dict[str, Tensor], cache, tokens: list[int]) -> list[Tensor]:
    """The logits of one decoding step after another, a padding mask growing with them."""
    mask, found = prompt["attention_mask"], []
    for token in tokens:
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        ids = torch.full((len(mask), 1), token)
        place = torch.full((3, len(mask), 1), mask.shape[1])  # which generate() passes, too
        given = {"attention_mask": mask, "position_ids": place, CACHE_NAME: cache}
        found.append(forward(input_ids=ids, **given).logits)
    return found


@torch.no_grad()
def test_the_decoding_step_compiles_to_one_graph_and_stays_compiled(student):
    """Once for the first step and once for any later one, as the number of tokens seen turns symbolic."""
    prompt, tokens = every_kind(), words(6, 9)
    cache = student(**prompt, use_cache=True)[CACHE_NAME]
    again = copy.deepcopy(cache)
    shapes = [tensor.shape for tensor in cache_tensors(cache)]
    wanted = steps(student, prompt, cache, tokens)
    torch._dynamo.reset()
    counter = CompileCounter()
    found = steps(torch.compile(student.forward, backend=counter, fullgraph=True), prompt, again, tokens)
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert counter.frame_count <= 2
    assert [tensor.shape for tensor in cache_tensors(again)] == shapes


def test_a_stream_says_what_generate_returns(tiny, reader, capsys):
    inputs = tiny.inputs("see {wide} now")
    tokenizer = tiny.processor.tokenizer
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    tokens = reader.generate(**inputs, max_new_tokens=8, do_sample=False, streamer=streamer)
    said = capsys.readouterr().out
    assert said.strip() == tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :]).strip()


class SawToken(StoppingCriteria):
    """Stop the rows that have drawn this token."""

    def __init__(self, token: int, start: int):
        self.token, self.start = token, start

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs) -> Tensor:
        return (input_ids[:, self.start :] == self.token).any(1)


def test_rows_stop_on_their_own_and_leave_the_others_as_they_are(tiny, reader):
    rows = ["see {wide} now", "{small}?", "no picture"]
    inputs = tiny.inputs(*rows)
    length = inputs["input_ids"].shape[1]
    whole = reader.generate(**inputs, max_new_tokens=8, do_sample=False)
    token = int(whole[0, length + 2])
    for options in (
        {"eos_token_id": token},
        {"stopping_criteria": StoppingCriteriaList([SawToken(token, length)]), "eos_token_id": 1 << 20},
    ):
        stopped = reader.generate(**inputs, max_new_tokens=8, do_sample=False, **options)
        for row, (short, long) in enumerate(zip(stopped, whole, strict=True)):
            answer = long[length:].tolist()
            end = answer.index(token) + 1 if token in answer else len(answer)
            assert short[length : length + end].tolist() == answer[:end], (row, options)


def test_a_stop_string_stops(tiny, reader):
    inputs = tiny.inputs("see {wide} now")
    tokenizer = tiny.processor.tokenizer
    length = inputs["input_ids"].shape[1]
    whole = reader.generate(**inputs, max_new_tokens=8, do_sample=False)[0, length:]
    letters = [tokenizer.decode([token]) for token in whole]
    stop = next((letter for letter in letters[1:] if letter.isascii() and letter.isprintable()), None)
    tokens = reader.generate(
        **inputs, max_new_tokens=8, do_sample=False, stop_strings=[stop], tokenizer=tokenizer
    )
    assert tokens.shape[1] - length == letters.index(stop) + 1
