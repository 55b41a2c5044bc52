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

from .tiny_checkpoint import shake, shake_mixers
from .tiny_families import TEXT

README = (Path(__file__).resolve().parents[3] / "reference/student/README.md").read_text()
IMAGE, VIDEO, NEWLINE = 60, 61, 62
SLOTS, SIDE = 32, 16


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
        inputs_embeds: Tensor | None = None,
        **kwargs,
    ):
        """Put the features of every token of every picture in the place of its placeholder."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        for pixels, token_id in ((pixel_values, IMAGE), (pixel_values_videos, VIDEO)):
            if pixels is not None:
                features = self.mm_projector(pixels.reshape(-1, 1)).to(inputs_embeds)
                inputs_embeds = inputs_embeds.masked_scatter((input_ids == token_id)[..., None], features)
        return self.llm(inputs_embeds=inputs_embeds, **kwargs)


@pytest.fixture(scope="module")
def nvila(tmp_path_factory):
    """The README's block as a module."""
    (source,) = re.findall(r"<!-- file: nvila.py -->\n```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in source.splitlines() if line.strip()]) <= 30
    path = tmp_path_factory.mktemp("nvila") / "nvila.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("nvila", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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
    nvila.register_nvila(teacher)
    yield shake_mixers(convert(teacher))
    del FAMILIES[type(teacher)]


def film(seed: int = 0) -> dict[str, Tensor]:
    """Text, a video of 32 slots with a newline after each, and text; then an image."""
    slot = [VIDEO] * SIDE**2 + [NEWLINE]
    ids = torch.tensor([[5, 6, 7, *slot * SLOTS, 8, *[IMAGE] * SIDE**2, NEWLINE, 9, 10]])
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, 1, SIDE, SIDE, generator=generator),
        "pixel_values_videos": torch.randn(1, SLOTS, SIDE, SIDE, generator=generator),
    }


def test_its_video_is_one_segment_of_32_frames_around_newlines(student):
    inputs = film()
    coords = student.vision_layout(None, inputs).coords[0]
    video = coords[inputs["input_ids"][0] == VIDEO].view(SLOTS, SIDE, SIDE, 4)
    assert video[5, 3, 7].tolist() == [0, 5, 3, 7] and video[31, 15, 15].tolist() == [0, 31, 15, 15]
    assert (coords[inputs["input_ids"][0] == NEWLINE] == -1).all()
    assert coords[inputs["input_ids"][0] == IMAGE][-1].tolist() == [1, 0, 15, 15]


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
    assert torch.equal(load(tmp_path)(**inputs).logits, student(**inputs).logits)
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
