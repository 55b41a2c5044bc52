"""generate() of a student: a cache gives what the whole sequence gives, in logits and not in tokens."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from linmu.reference import convert

from .tiny_checkpoint import (
    IMAGE,
    VIDEO,
    batch,
    build_teacher,
    picture,
    prompt,
    shake_mixers,
    student_backend,
    words,
)

pytestmark = pytest.mark.needs("MMATE")

STUDENTS = {
    "qwen2_5_vl": ("qwen2_5_vl", None),
    "qwen2_5_vl, attention in layer 1": ("qwen2_5_vl", [0, 2]),
    "qwen2_vl, attention in layers 0 and 2": ("qwen2_vl", [1]),
}
STEPS = 4


def image_prompt(seed: int = 0) -> dict[str, Tensor]:
    return prompt(words(5, seed), picture(IMAGE, (1, 3, 4)), words(4, seed + 1), seed=seed)


def video_prompt(seed: int = 10) -> dict[str, Tensor]:
    return prompt(words(2, seed), picture(VIDEO, (3, 2, 3)), words(6, seed + 1), seed=seed)


def album_prompt(seed: int = 20) -> dict[str, Tensor]:
    pictures = [picture(IMAGE, (1, 2, 2)), picture(VIDEO, (2, 2, 2)), picture(IMAGE, (1, 5, 1))]
    return prompt(
        pictures[0], words(3, seed), pictures[1], words(2, seed + 1), pictures[2], words(2, seed + 2)
    )


def text_prompt(seed: int = 30) -> dict[str, Tensor]:
    return prompt(words(7, seed))


PROMPTS = {"image": image_prompt, "video": video_prompt, "album": album_prompt, "text": text_prompt}


@pytest.fixture(scope="module", params=STUDENTS.values(), ids=STUDENTS.keys())
def student(backend, request):
    family, layers = request.param
    return shake_mixers(
        convert(build_teacher(family).double(), layers=layers, backend=student_backend(backend))
    )


@pytest.fixture(scope="module")
def converted(backend):
    """One student with all layers converted, for what does not depend on the family."""
    return shake_mixers(convert(build_teacher().double(), backend=student_backend(backend)))


def assert_logits(got: Tensor, want: Tensor) -> None:
    """Equal up to the float32 in which generate() returns logits."""
    want = want.to(torch.float64)
    torch.testing.assert_close(got.to(torch.float64), want, rtol=0, atol=1e-6 * want.abs().max().item())


def run(student, inputs: dict[str, Tensor], steps: int = STEPS, **options: Any):
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True} | options
    return student.generate(**inputs, max_new_tokens=steps, **options)


def step_logits(output) -> Tensor:
    """(B, steps, vocabulary)."""
    return torch.stack(output.logits, dim=1)


def continued(inputs: dict[str, Tensor], sequences: Tensor) -> dict[str, Tensor]:
    """The inputs of a forward over prompt and answer."""
    new = sequences.shape[1] - inputs["input_ids"].shape[1]
    longer = {
        "input_ids": sequences,
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, new), value=1),
        "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, new)),
    }
    return inputs | longer


@torch.no_grad()
def uncached(student, inputs: dict[str, Tensor], sequences: Tensor) -> Tensor:
    """(B, steps, vocabulary): the logits before each generated token, from one forward over everything."""
    logits = student(**continued(inputs, sequences), use_cache=False).logits
    return logits[:, inputs["input_ids"].shape[1] - 1 : -1]


@pytest.mark.parametrize("make", PROMPTS.values(), ids=PROMPTS.keys())
def test_every_step_of_generation_equals_the_uncached_forward(student, make):
    inputs = make()
    output = run(student, inputs)
    assert_logits(step_logits(output), uncached(student, inputs, output.sequences))


def test_vision_changes_the_students_answer(student):
    inputs = image_prompt()
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
    one, two = (step_logits(run(student, given, steps=1)) for given in (inputs, other))
    assert (one - two).abs().max() > 1e-2


def test_generation_without_a_cache_gives_the_same_logits(student):
    inputs = image_prompt()
    with_cache, without = run(student, inputs), run(student, inputs, use_cache=False)
    assert_logits(step_logits(without), step_logits(with_cache))


def test_image_video_and_text_in_one_left_padded_batch_give_what_each_gives_alone(student):
    rows = [image_prompt(), text_prompt(), album_prompt(), video_prompt()]
    together = step_logits(run(student, batch(rows)))
    for row, logits in zip(rows, together, strict=True):
        assert_logits(logits[None], step_logits(run(student, row)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_in_a_training_forward_changes_nothing(student, side):
    rows = [image_prompt(), text_prompt(), video_prompt()]
    joined = batch(rows, side)
    with torch.no_grad():
        logits = student(**joined, use_cache=False).logits
        for row, found, mask in zip(rows, logits, joined["attention_mask"].bool(), strict=True):
            assert_logits(found[mask][None], student(**row, use_cache=False).logits)


def test_beam_search_scores_its_sequences_as_the_uncached_forward_does(student):
    inputs = batch([image_prompt(), text_prompt()])
    output = run(student, inputs, num_beams=3, num_return_sequences=2, output_scores=True, length_penalty=1.0)
    for index, sequence in enumerate(output.sequences):
        row = [image_prompt(), text_prompt()][index // 2]
        answer = sequence[inputs["input_ids"].shape[1] :]
        whole = torch.cat([row["input_ids"], answer[None]], dim=1)
        log_probability = uncached(student, row, whole).log_softmax(-1)[0]
        score = log_probability.gather(-1, answer[:, None]).sum() / STEPS
        assert abs(score.item() - output.sequences_scores[index].item()) < 1e-5


def test_sampled_sequences_of_one_prompt_each_equal_the_uncached_forward(student):
    torch.manual_seed(0)
    inputs = image_prompt()
    output = run(student, inputs, do_sample=True, num_return_sequences=3, temperature=3.0)
    assert len({tuple(sequence) for sequence in output.sequences.tolist()}) > 1
    for sequence, logits in zip(output.sequences, step_logits(output), strict=True):
        assert_logits(logits[None], uncached(student, inputs, sequence[None]))


def second_turn(first: dict[str, Tensor], answer: Tensor, turn: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of the whole conversation."""
    length = first["input_ids"].shape[1]
    whole = continued(first, torch.cat([answer, turn["input_ids"]], dim=1))
    whole["mm_token_type_ids"][:, -turn["input_ids"].shape[1] :] = turn["mm_token_type_ids"]
    for name in ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw"):
        parts = [given[name] for given in (first, turn) if name in given]
        whole |= {name: torch.cat(parts)} if parts else {}
    assert torch.equal(whole["input_ids"][:, :length], first["input_ids"])
    return whole


@pytest.mark.parametrize(
    "turn", [image_prompt(40), video_prompt(50), text_prompt(60)], ids=["image", "video", "text"]
)
def test_a_second_turn_continues_from_the_cache_as_from_the_whole_conversation(student, turn):
    first = album_prompt()
    opening = run(student, first)
    run(student, video_prompt(70), steps=1)  # another conversation in between
    whole = second_turn(first, opening.sequences, turn)
    output = run(student, whole, past_key_values=opening.past_key_values)
    assert_logits(step_logits(output), uncached(student, whole, output.sequences))


def test_a_third_turn_without_pictures_may_bring_the_earlier_ones_along(converted):
    first = image_prompt()
    opening = run(converted, first)
    second = second_turn(first, opening.sequences, video_prompt(50))
    answer = run(converted, second, past_key_values=opening.past_key_values)
    third = second_turn(second, answer.sequences, text_prompt(60))
    output = run(converted, third, past_key_values=answer.past_key_values)
    assert_logits(step_logits(output), uncached(converted, third, output.sequences))


def test_a_second_turn_with_pictures_but_without_the_earlier_tokens_is_refused(converted):
    opening = run(converted, image_prompt())
    turn = image_prompt(40)
    seen = opening.past_key_values.get_seq_length()
    turn["attention_mask"] = torch.nn.functional.pad(turn["attention_mask"], (seen, 0), value=1)
    with pytest.raises(ValueError, match="input_ids must be the whole conversation"):
        run(converted, turn, past_key_values=opening.past_key_values)


def chunk(inputs: dict[str, Tensor], start: int, end: int, positions: Tensor) -> dict[str, Tensor]:
    """The text arguments of a forward over [start, end)."""
    return {
        "input_ids": inputs["input_ids"][:, start:end],
        "attention_mask": inputs["attention_mask"][:, :end],
        "position_ids": positions[..., start:end],
    }


@torch.no_grad()
def test_prefill_split_outside_the_spans_equals_prefill_in_one_piece(student):
    inputs = image_prompt()
    grids = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    whole = student(**inputs, use_cache=False).logits
    positions, _ = student.model.get_rope_index(**inputs)
    logits, cache = [], None
    for start, end, vision in ((0, 3, {}), (3, 19, grids), (19, 20, {}), (20, 23, {})):
        part = student(
            **chunk(inputs, start, end, positions), **vision, past_key_values=cache, use_cache=True
        )
        cache = part.past_key_values
        logits.append(part.logits)
    assert_logits(torch.cat(logits, dim=1), whole)


@torch.no_grad()
def test_a_forward_that_ends_inside_a_span_is_refused(converted):
    inputs = image_prompt()
    grids = {name: inputs[name] for name in ("pixel_values", "image_grid_thw")}
    positions, _ = converted.model.get_rope_index(**inputs)
    with pytest.raises(ValueError, match=r"a span must be whole.*split anywhere but inside"):
        converted(**chunk(inputs, 0, 9, positions), **grids, use_cache=True)


def encodes_first(student) -> bool:
    """Whether this transformers encodes pictures before a prefill in chunks; older ones lose them."""
    return "mm_encoder_outputs" in inspect.signature(student.forward).parameters


@pytest.mark.parametrize("size", [7, 20])
def test_generate_prefills_in_chunks_only_where_that_is_sound(converted, size):
    """20 splits after the image, 7 inside it; transformers that would lose the image refuse both."""
    inputs = image_prompt()
    if size == 20 and encodes_first(converted):
        output = run(converted, inputs, prefill_chunk_size=size)
        assert_logits(step_logits(output), uncached(converted, inputs, output.sequences))
    else:
        with pytest.raises(ValueError, match="prefill"):
            run(converted, inputs, prefill_chunk_size=size)


def test_speculation_and_static_caches_are_refused(converted):
    inputs = image_prompt()
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        run(converted, inputs, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="assisted generation is not supported"):
        run(converted, inputs, assistant_model=converted)
    with pytest.raises(ValueError, match="cache_implementation must be dynamic"):
        run(converted, inputs, cache_implementation="static")


def test_embeddings_need_coordinates_and_then_give_the_same_logits(converted):
    inputs = text_prompt()
    embeds = converted.get_input_embeddings()(inputs["input_ids"]).detach()
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    with pytest.raises(ValueError, match="linmu_coords must come with inputs_embeds"):
        run(converted, given)
    coords = torch.full((*embeds.shape[:2], 4), -1)
    assert_logits(
        step_logits(run(converted, given | {"linmu_coords": coords})), step_logits(run(converted, inputs))
    )


@torch.no_grad()
def test_given_coordinates_replace_the_grids(converted):
    inputs = image_prompt()
    coords = torch.full((*inputs["input_ids"].shape, 4), -1)
    image = inputs["input_ids"][0] == IMAGE
    coords[0, image, 0], coords[0, image, 1] = 7, 0
    coords[0, image, 2:] = torch.cartesian_prod(torch.arange(3), torch.arange(4))
    wanted = converted(**inputs).logits
    assert_logits(converted(**inputs, linmu_coords=coords).logits, wanted)
    coords[0, image, 2:] = coords[0, image, 2:].flip(0)
    assert (converted(**inputs, linmu_coords=coords).logits - wanted).abs().max() > 1e-2


def test_pictures_without_grids_are_refused(converted):
    inputs = image_prompt()
    del inputs["image_grid_thw"], inputs["pixel_values"]
    with pytest.raises(ValueError, match="every run of image tokens must have a grid"):
        converted(**inputs)


@torch.no_grad()
def test_text_before_an_image_never_sees_it_and_no_span_sees_what_follows(converted):
    inputs = image_prompt()
    wanted = converted(**inputs).logits
    repainted = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
    assert torch.equal(converted(**repainted).logits[:, :6], wanted[:, :6])
    longer = inputs["input_ids"].clone()
    longer[:, 20] += 1
    changed = converted(**inputs | {"input_ids": longer}).logits
    assert torch.equal(changed[:, :20], wanted[:, :20])
    assert not torch.equal(changed[:, 20:], wanted[:, 20:])


def test_a_row_that_drew_a_placeholder_does_not_take_another_rows_picture(converted):
    """Its token type says that it is text."""
    image = prompt([7, 8], picture(IMAGE, (1, 1, 1)), [9])
    drawn = {"input_ids": torch.tensor([[7, 8, IMAGE, 9, 9, 9]])}
    ids = torch.cat([drawn["input_ids"], image["input_ids"]])
    types = torch.cat([torch.zeros(1, 6), image["mm_token_type_ids"]])
    inputs = image | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": types}
    layout = converted.vision_layout(None, inputs)
    assert layout.is_vision.tolist() == [[False] * 6, [False, False, False, True, False, False]]


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"num_return_sequences": 2, "do_sample": True}])
@pytest.mark.parametrize("seconds", [torch.tensor([0.5]), [0.5]], ids=["tensor", "list"])
def test_copies_of_a_row_keep_the_pace_of_its_video(converted, settings, seconds):
    """Qwen2.5-VL's processor gives `second_per_grid_ts`, which stays when grids are encoded."""
    inputs = video_prompt() | {"second_per_grid_ts": seconds}
    torch.manual_seed(0)
    output = run(converted, inputs, **settings)
    for row, sequence in enumerate(output.sequences):
        whole = inputs | {"input_ids": sequence[None], "attention_mask": torch.ones_like(sequence[None])}
        types = torch.zeros_like(sequence[None])
        types[:, : inputs["input_ids"].shape[1]] = inputs["mm_token_type_ids"]
        with torch.no_grad():
            wanted = converted(**whole | {"mm_token_type_ids": types}, use_cache=False).logits
        if "num_beams" not in settings:
            got = torch.stack(output.logits, dim=1)[row]
            assert_logits(got, wanted[0, inputs["input_ids"].shape[1] - 1 : -1])
