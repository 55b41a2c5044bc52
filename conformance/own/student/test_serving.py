"""What servers ask of a student: names, refusals, and, where one can run, answers to a client over HTTP."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image
from transformers.cli.serving.model_manager import ModelManager
from transformers.utils.import_utils import is_serve_available

from linmu.optimized import convert
from linmu.optimized.serving.__main__ import REFUSED, check_arguments

from .tiny_checkpoint import shake_mixers
from .tiny_families import BUILDERS

PRINTABLE = 94  # the tokenizer's first ids are the bytes from ! to ~
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}:"
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Students with processors in folders, by name of their family."""
    folders = {}
    for name in ("qwen2_5_vl", "llama"):
        tiny = BUILDERS[name]()
        settings, size = tiny.teacher.generation_config, tiny.teacher.config.get_text_config().vocab_size
        settings.suppress_tokens = list(range(PRINTABLE, size))  # so that no answer ends inside a letter
        folders[name] = str(tmp_path_factory.mktemp(name))
        shake_mixers(convert(tiny.teacher)).save_pretrained(folders[name])
        tiny.processor.chat_template = TEMPLATE
        tiny.processor.save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="module")
def loaded(folders):
    """Model and processor as the server of transformers opens them."""
    manager = ModelManager(device="cpu", force_model=None)
    named = {name: manager.process_model_name(folder) for name, folder in folders.items()}
    yield {name: manager.load_model_and_processor(folder) for name, folder in named.items()}
    manager.shutdown()


@pytest.mark.parametrize(("name", "modality"), [("qwen2_5_vl", "VLM"), ("llama", "LLM")])
def test_the_server_of_transformers_opens_a_students_folder(loaded, name, modality):
    model, processor = loaded[name]
    assert type(model).__name__.startswith("LinMU")
    found = ModelManager.get_model_modality(model, processor=processor)
    assert found.name in (modality, "MULTIMODAL" if modality == "VLM" else modality)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "llama"])
def test_continuous_batching_is_refused_with_the_reason(loaded, name):
    with pytest.raises(ValueError, match=r"generate_batch: continuous batching needs .*padded"):
        loaded[name][0].generate_batch([[1, 2, 3], [4, 5]], max_new_tokens=2)


@pytest.mark.parametrize("option", REFUSED)
def test_options_that_no_student_has_are_refused(option):
    with pytest.raises(ValueError, match=f"got {option}; "):
        check_arguments(["folder", f"{option}=1"])


def test_other_options_reach_the_server():
    check_arguments(["folder", "--port", "8001", "--device=cpu"])


@pytest.mark.skipif(not is_serve_available(), reason="pip install 'linmu[serve]' brings the server")
@pytest.mark.parametrize("stream", [False, True])
def test_a_stock_client_gets_the_answer_of_generate(folders, loaded, stream):
    from fastapi.testclient import TestClient
    from openai import OpenAI

    picture = Image.effect_noise((32, 16), 80).convert("RGB")
    file = io.BytesIO()
    picture.save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    model, processor = loaded["qwen2_5_vl"]
    prompt = "see <|vision_start|><|image_pad|><|vision_end|>:"
    inputs = processor(text=[prompt], images=[[picture]], return_tensors="pt")
    with torch.no_grad():
        tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)[
            0, inputs["input_ids"].shape[1] :
        ]
    with TestClient(application(folders["qwen2_5_vl"]), base_url="http://testserver") as http:
        client = OpenAI(base_url="http://testserver/v1", api_key="none", http_client=http)
        content = [{"type": "text", "text": "see "}, {"type": "image_url", "image_url": {"url": url}}]
        asked = {"model": folders["qwen2_5_vl"], "max_tokens": 6, "temperature": 0, "stream": stream}
        answer = client.chat.completions.create(messages=[{"role": "user", "content": content}], **asked)
        if stream:
            parts = [chunk.choices[0].delta.content or "" for chunk in answer if chunk.choices]
            text = "".join(parts)
        else:
            text = answer.choices[0].message.content
    assert text == processor.decode(tokens, skip_special_tokens=True)


def application(folder: str):
    """The server's ASGI application, as `transformers serve` builds it."""
    import uvicorn
    from transformers.cli.serve import Serve

    applications = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn.Server, "run", lambda server: applications.append(server.config.app))
        Serve(force_model=folder, device="cpu")
    return applications[0]
