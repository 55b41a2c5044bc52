"""A family from outside: the NVILA of student/README.md, on an imitation of that model with its layout."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from linmu.optimized import convert, load
from linmu.reference.student.cache import CACHE_NAME
from linmu.reference.student.families import FAMILIES, register_family

from .tiny_checkpoint import in_fresh_memory, shake, shake_mixers
from .tiny_families import TEXT

README = (Path(__file__).resolve().parents[3] / "reference/student/README.md").read_text()
IMAGE, VIDEO, NEWLINE = 60, 61, 62
SLOTS, SIDE, BLOCKS = 3, 16, (2, 1)


class NVILAConfig(PreTrainedConfig):
    """A text decoder and the placeholders, as NVILA's remote code has them."""

    model_type = "nvila"
    sub_configs = {"text_config": Qwen2Config}  # noqa: RUF012 - Hugging Face's own form
    image_token_id: int = IMAGE
    video_token_id: int = VIDEO
    text_config: dict | Qwen2Config | None = None

    def __post_init__(self, **kwargs):
        if isinstance(self.text_config, dict):
            self.text_config = Qwen2Config(**self.text_config)
        super().__post_init__(**kwargs)


class NVILAForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Brightness per token through a linear layer, and a whole Qwen2ForCausalLM at `llm`, as NVILA has it."""

    config_class = NVILAConfig
    base_model_prefix = "llm"
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        self.mm_projector = nn.Linear(1, config.text_config.hidden_size)
        self.llm = Qwen2ForCausalLM(config.text_config)
        self.post_init()

    def get_input_embeddings(self):
        return self.llm.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        block_sizes: list[tuple[int, int]] | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ):
        """Put the features of every token of every picture in the place of its placeholder."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None and block_sizes is not None:
            pixel_values = whole_images(pixel_values, block_sizes)
        for pixels, token_id in ((pixel_values, IMAGE), (pixel_values_videos, VIDEO)):
            if pixels is not None:
                features = self.mm_projector(pixels.reshape(-1, 1)).to(inputs_embeds)
                inputs_embeds = inputs_embeds.masked_scatter((input_ids == token_id)[..., None], features)
        return self.llm(inputs_embeds=inputs_embeds, **kwargs)


def whole_images(tiles: Tensor, block_sizes) -> Tensor:
    """The values of all tokens: of an image's 1 + 4 + rows * columns tiles, the last side by side."""
    images = []
    for rows, columns in torch.as_tensor(block_sizes).tolist():
        image, tiles = tiles[5 : 5 + rows * columns], tiles[5 + rows * columns :]
        images.append(image.view(rows, columns, SIDE, SIDE).transpose(1, 2).flatten())
    return torch.cat(images)


def module_of_readme(name: str, folder: Path):
    """A block of the README as a module."""
    (source,) = re.findall(rf"<!-- file: {name}.py -->\n```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in source.splitlines() if line.strip()]) <= 30
    path = folder / f"{name}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def nvila(tmp_path_factory):
    return module_of_readme("nvila", tmp_path_factory.mktemp("nvila"))


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    text = Qwen2Config(**TEXT, vocab_size=64)
    model = NVILAForConditionalGeneration(NVILAConfig(text_config=text)).eval()
    model.generation_config.suppress_tokens = [IMAGE, VIDEO, NEWLINE]
    model.generation_config.pad_token_id = 0
    return shake(model, ("bias",))


@pytest.fixture(scope="module")
def student(nvila, teacher):
    type(teacher).get_decoder = lambda self: self.llm.model
    register_family("nvila", type(teacher), nvila.NVILAPromptLayout())
    yield shake_mixers(convert(teacher))
    del FAMILIES[type(teacher)]


def film(frames: int = SLOTS) -> dict[str, Any]:
    """Text, a video with a newline after each frame, another of one frame, and an image in blocks."""
    frame, (rows, columns) = [VIDEO] * SIDE**2 + [NEWLINE], BLOCKS
    image = [IMAGE] * (rows * columns * SIDE**2) + [NEWLINE]
    ids = torch.tensor([[5, 6, 7, *frame * frames, 8, *frame, *image, 9, 10]])
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1 + 4 + rows * columns, SIDE, SIDE, generator=generator),
        "block_sizes": [BLOCKS],
        "pixel_values_videos": torch.randn(frames + 1, SIDE, SIDE, generator=generator),
    }


@pytest.mark.parametrize("frames", [1, 3, 4])
def test_frames_around_newlines_are_one_segment_and_blocks_one_grid(student, frames):
    inputs = film(frames)
    ids, coords = inputs["input_ids"][0], student.vision_layout(None, inputs).coords[0]
    videos = coords[ids == VIDEO].view(frames + 1, SIDE, SIDE, 4)
    assert videos[frames - 1, 3, 7].tolist() == [0, frames - 1, 3, 7]
    assert videos[frames, 15, 2].tolist() == [1, 0, 15, 2]
    assert (coords[ids == NEWLINE] == -1).all()
    image = coords[ids == IMAGE].view(BLOCKS[0] * SIDE, BLOCKS[1] * SIDE, 4)
    assert image[31, 5].tolist() == [2, 0, 31, 5]


def test_images_without_blocks_are_a_tile_each(student):
    image = [IMAGE] * SIDE**2 + [NEWLINE]
    inputs = {"input_ids": torch.tensor([[5, *image * 2]]), "pixel_values": torch.zeros(2, SIDE, SIDE)}
    coords = student.vision_layout(None, inputs).coords[0]
    assert coords[[1, SIDE**2, SIDE**2 + 2]].tolist() == [[0, 0, 0, 0], [0, 0, 15, 15], [1, 0, 0, 0]]


@torch.no_grad()
def test_beams_repeat_frames_and_tiles(student):
    inputs = film(2)
    options = {"max_new_tokens": 2, "do_sample": False, "num_beams": 2}
    assert student.generate(**inputs, **options).shape[1] == inputs["input_ids"].shape[1] + 2


class VILA(nn.Module):
    """One id for each image or video; expanded inside, padded on the left, as VILA's own class does."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.llm = shake(Qwen2ForCausalLM(Qwen2Config(**TEXT, vocab_size=64)).eval(), ("bias",))
        self.mm_projector = nn.Linear(1, TEXT["hidden_size"])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, media: dict[int, list[Tensor]], **kwargs):
        embed, remaining, rows = self.llm.get_input_embeddings(), {k: iter(v) for k, v in media.items()}, []
        for ids, valid in zip(input_ids, attention_mask.bool(), strict=True):
            parts = []
            for token in ids[valid]:
                if int(token) not in remaining:
                    parts.append(embed(token)[None])
                    continue
                for slot in next(remaining[int(token)]):
                    newline = embed(torch.tensor([NEWLINE]))
                    parts += [self.mm_projector(slot.reshape(-1, 1)), newline]
            rows.append(torch.cat(parts))
        embeds = nn.utils.rnn.pad_sequence(rows, True, padding_side="left")
        lengths = torch.tensor([len(row) for row in rows])[:, None]
        mask = (torch.arange(embeds.shape[1]) >= embeds.shape[1] - lengths).long()
        return self.llm(inputs_embeds=embeds, attention_mask=mask, **kwargs)


@torch.no_grad()
def test_the_decoder_alone_is_converted_where_ids_are_expanded_inside(tmp_path):
    media_coords = module_of_readme("vila", tmp_path).media_coords
    model, side = VILA(), 4
    ids = torch.tensor([[5, IMAGE, 6, VIDEO, 7], [8, VIDEO, 9, 0, 0]])
    mask = (ids > 0).long()
    image, *videos = (torch.randn(slots, side, side) for slots in (1, 3, 2))
    media = {IMAGE: [image], VIDEO: videos}
    grids = {IMAGE: [(1, side, side)], VIDEO: [(3, side, side), (2, side, side)]}
    coords = media_coords(ids, mask, grids)
    assert coords.shape == (2, 3 + 17 * 4, 4)
    assert coords[0, [0, 1, 16, 17, 19]].tolist() == [[-1] * 4, [0] * 4, [0, 0, 3, 3], [-1] * 4, [1, 0, 0, 0]]
    assert coords[1, -2].tolist() == [-1] * 4 and coords[1, -3].tolist() == [0, 1, 3, 3]
    assert coords[1, -35].tolist() == [0, 0, 0, 0] and (coords[1, :-35] == -1).all()
    model.llm = shake_mixers(convert(model.llm, {"text_only": False, "window_thw": (2, 2, 2)}))
    logits = model(ids, mask, media, linmu_coords=coords).logits
    second = {VIDEO: videos[1:]}
    alone = media_coords(ids[1:], mask[1:], {IMAGE: [], VIDEO: [(2, side, side)]})
    wanted = model(ids[1:], mask[1:], second, linmu_coords=alone).logits[0]
    torch.testing.assert_close(logits[1, -len(wanted) :], wanted, rtol=0, atol=1e-4)
    text = model(ids, mask, media, linmu_coords=torch.full_like(coords, -1)).logits
    assert (text[0] - logits[0]).abs().max() > 1e-2


@torch.no_grad()
def test_it_converts_generates_and_comes_back_like_any_other_family(student, teacher, tmp_path, monkeypatch):
    inputs = film()
    assert torch.equal(convert(teacher, layers=[])(**inputs).logits, teacher(**inputs).logits)
    options = {"max_new_tokens": 3, "do_sample": False, "output_logits": True}
    output = student.generate(**inputs, return_dict_in_generate=True, **options)
    length = inputs["input_ids"].shape[1]
    whole = inputs | {"input_ids": output.sequences, "attention_mask": torch.ones_like(output.sequences)}
    wanted = student(**whole, use_cache=False).logits[:, length - 1 : -1]
    torch.testing.assert_close(torch.stack(output.logits, dim=1), wanted, rtol=0, atol=1e-4)
    student.save_pretrained(tmp_path)
    assert torch.equal(in_fresh_memory(load(tmp_path))(**inputs).logits, student(**inputs).logits)
    monkeypatch.setenv("LINMU_BACKEND", "optimized")
    assert type(AutoModelForImageTextToText.from_pretrained(tmp_path)) is type(student)


@torch.no_grad()
def test_a_second_turn_works_where_forward_does_not_name_the_cache(student):
    inputs = film()
    options = {
        "max_new_tokens": 2,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    first = student.generate(**inputs, **options)
    ids = torch.cat([first.sequences, torch.tensor([[11, 12]])], dim=1)
    whole = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    second = student.generate(**whole, **{CACHE_NAME: first[CACHE_NAME]}, **options)
    longer = whole | {"input_ids": second.sequences, "attention_mask": torch.ones_like(second.sequences)}
    wanted = student(**longer, use_cache=False).logits[:, ids.shape[1] - 1 : -1]
    torch.testing.assert_close(torch.stack(second.logits, dim=1), wanted, rtol=0, atol=1e-4)


def test_a_name_is_given_once(teacher):
    with pytest.raises(ValueError, match="register_family: name must be new, got llama"):
        register_family("llama", type(teacher), None)


class HandWrittenConfig(PreTrainedConfig):
    """As remote code writes it: an `__init__` of its own, parts made from dictionaries there."""

    model_type = "hand_written"
    sub_configs = {"text_config": Qwen2Config}  # noqa: RUF012 - Hugging Face's own form

    def __init__(self, text_config=None, image_token_id=IMAGE, video_token_id=VIDEO, **kwargs):
        given = text_config.to_dict() if isinstance(text_config, Qwen2Config) else text_config or {}
        self.text_config = Qwen2Config(**given)
        self.image_token_id, self.video_token_id = image_token_id, video_token_id
        super().__init__(**kwargs)


class HandWritten(NVILAForConditionalGeneration):
    config_class = HandWrittenConfig


class HandWrittenTextConfig(Qwen2Config):
    """A text decoder's, whose arguments have other names than its attributes."""

    model_type = "hand_written_text"

    def __init__(self, width=32, **kwargs):
        super().__init__(**{"hidden_size": width} | kwargs)


class HandWrittenText(Qwen2ForCausalLM):
    config_class = HandWrittenTextConfig


def hand_written_teachers(nvila) -> dict[str, tuple[PreTrainedModel, Any]]:
    text = TEXT | {"vocab_size": 64}
    options = {name: value for name, value in text.items() if name != "hidden_size"}
    torch.manual_seed(0)
    return {
        "hand_written": (HandWritten(HandWrittenConfig(Qwen2Config(**text))), nvila.NVILAPromptLayout()),
        "hand_written_text": (HandWrittenText(HandWrittenTextConfig(TEXT["hidden_size"], **options)), None),
    }


@pytest.mark.parametrize("name", ["hand_written", "hand_written_text"])
@torch.no_grad()
def test_a_teacher_whose_configuration_has_an_init_of_its_own_is_converted(nvila, name, tmp_path):
    teacher, layout = hand_written_teachers(nvila)[name]
    type(teacher).get_decoder = lambda self: getattr(self, "llm", self).model
    register_family(name, type(teacher), layout)
    try:
        inputs = film() if layout else {"input_ids": torch.tensor([[5, 6, 7, 8]])}
        assert torch.equal(convert(teacher.eval(), layers=[])(**inputs).logits, teacher(**inputs).logits)
        student = shake_mixers(convert(teacher, layers=[0, 2]))
        student.save_pretrained(tmp_path)
        again = load(tmp_path)
        assert again.config.linmu == student.config.linmu
        assert torch.equal(again(**inputs).logits, student(**inputs).logits)
    finally:
        del FAMILIES[type(teacher)]
