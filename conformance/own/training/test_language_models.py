"""Teachers of text alone: documents and conversations, from a folder or a GGUF file to a measured student."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from linmu import optimized
from linmu.reference.demo import TEACHER
from linmu.reference.demo.documents import documents, pieces, text_of
from linmu.reference.demo.documents import main as write_documents
from linmu.reference.prompts.chat_collator import IGNORED, ChatCollator
from linmu.reference.prompts.processors import load_processor
from linmu.reference.prompts.text_processor import TextProcessor
from linmu.reference.training.commands.main import main
from linmu.reference.training.config import SampleSettings
from linmu.reference.training.data import open_data
from linmu.reference.training.data.conversations import BrokenSampleError
from linmu.reference.training.data.turns import document_of
from linmu.reference.training.evaluation.scores import Scores
from linmu.reference.training.presets import PRESETS
from linmu.reference.training.refusal import RefusedError
from linmu.reference.training.teacher import open_processor, open_teacher
from linmu.reference.training.token_groups import supervised

from ..student import tiny_families
from ..student.tiny_families import BUILDERS, byte_tokenizer
from .chat_templates import CHATML, LLAMA3, QWEN2
from .own_data import flags, row

pytestmark = pytest.mark.trial_of_the_reference

TURNS = ("<|im_start|>", "<|im_end|>")
DOCUMENTS = ["It rains.", "The sea is wide and blue.", "One cup of tea, please."]


@pytest.fixture(params=["qwen2", "llama"])
def teacher(request, monkeypatch, tmp_path) -> Path:
    """A tiny language model's folder, with the published chat template of its family."""
    written = {"qwen2": QWEN2, "llama": LLAMA3}[request.param]
    monkeypatch.setattr(tiny_families, "byte_tokenizer", lambda special, named=None: byte_tokenizer(
        (*CHATML, *written.special, *special), named))  # fmt: skip
    tiny = BUILDERS[request.param]()
    tiny.processor.chat_template = written.template
    for part in (tiny.teacher, tiny.processor):
        part.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


@pytest.fixture
def data(tmp_path) -> Path:
    """Documents and conversations in turns."""
    rows = [{"text": DOCUMENTS[i % 3]} if i % 2 else row("no", picture=None) for i in range(30)]
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def text_flags(teacher: Path, data: Path, output: Path) -> list[str]:
    """As `flags`, on a language model, with the preset for them but in float32."""
    arguments = [*flags(data, output), "--dtype", "float32", "--workers", "0"]
    arguments[arguments.index(str(TEACHER))] = str(teacher)
    arguments[arguments.index("smoke")] = "text"
    return arguments


def test_a_language_model_is_checked_distilled_measured_and_opened(teacher, data, tmp_path, capsys):
    arguments = text_flags(teacher, data, tmp_path / "run")
    main([*arguments, "--dry_run"])
    said = capsys.readouterr().out
    assert "training data" in said and "vision     0 to 0" in said
    rows = main(arguments)["rows"]
    student = str(tmp_path / "run" / "student")
    measured = main(["evaluate", student, "--data", str(data), "--cpu", "--teacher", str(teacher)])
    assert rows["stage iii"]["kl"] > 0 and measured["student"]["kl"] > 0 == measured["teacher"]["kl"]
    assert "perplexity" in capsys.readouterr().out
    tokens = AutoTokenizer.from_pretrained(student)("It", return_tensors="pt")
    opened = AutoModelForCausalLM.from_pretrained(student)
    assert opened.generate(**tokens, max_new_tokens=3, min_new_tokens=3).shape == (1, 5)


def test_perplexity_is_that_of_the_likelihoods_of_all_supervised_tokens(teacher, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS))
    model, tokenizer = (
        open_teacher(str(teacher), torch.float32).eval(),
        open_processor(str(teacher)).tokenizer,
    )
    student = optimized.convert(model, {"text_only": True})
    for part in (student, open_processor(str(teacher))):
        part.save_pretrained(tmp_path / "student")
    measured = main(["evaluate", str(tmp_path / "student"), "--data", str(path), "--cpu", "--teacher",
                     str(teacher), "--batch_size", "2"])  # fmt: skip
    for name, one in (("teacher", model), ("student", student)):
        nats = tokens = 0
        for text in DOCUMENTS:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                nats += cross_entropy(one(ids).logits[0, :-1], ids[0, 1:], reduction="sum").item()
            tokens += ids.shape[1] - 1
        assert measured[name]["perplexity"] == pytest.approx(math.exp(nats / tokens), rel=1e-5)


def test_a_document_is_supervised_throughout_and_padding_is_not(teacher):
    collator = ChatCollator(load_processor(str(teacher), padding_side="right"))
    items = [{"kind": "all", "text": text} for text in DOCUMENTS[:2]]
    batch = collator([collator.encode(items[0]), items[1]])
    decoded = [collator.processor.tokenizer.decode(ids[ids != IGNORED]) for ids in batch["labels"]]
    assert decoded == DOCUMENTS[:2]
    assert batch["attention_mask"].sum(1).tolist() == [len(text) for text in DOCUMENTS[:2]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_documents_and_pictures_may_share_a_batch_of_a_teacher_that_sees(side):
    collator = ChatCollator(load_processor(str(TEACHER), padding_side=side))
    seen = row()["messages"]
    seen[0]["content"][1]["image"] = Image.new("RGB", (48, 48))
    items = [{"kind": "all", "messages": seen}, {"kind": "all", "text": "read row 3. 1 2 3"}]
    batch, alone = collator(items), collator([items[1]])
    own = batch["attention_mask"][1].bool()
    assert batch["input_ids"].shape == batch["mm_token_type_ids"].shape == batch["labels"].shape
    assert batch["input_ids"][1][own].tolist() == alone["input_ids"][0].tolist()
    assert not batch["mm_token_type_ids"][1].any() and batch["mm_token_type_ids"][0].any()
    assert batch["labels"][1][own].tolist() == alone["labels"][0].tolist()


def test_broken_documents_are_refused_by_what_is_wrong(teacher, data):
    collator = ChatCollator(load_processor(str(teacher)), max_length=9)
    for text, says in (
        ("a" * 10, "at most 9 tokens, got 10"),
        ("<|im_end|>", "no placeholder or other"),
    ):
        with pytest.raises(ValueError, match=says):
            collator.encode({"kind": "all", "text": text})
    with pytest.raises(ValueError, match="must have a token to predict"):
        collator.encode({"kind": "all", "text": "a"})
    with pytest.raises(ValueError, match=r"a document must be text alone, got \['image'\]"):
        document_of({"text": "a", "image": "gone.png"})
    for text in ("", " ", 3, ["a"]):
        with pytest.raises(ValueError, match="a document's text must be a text that is not empty"):
            document_of({"text": text})
    for messages in ([{}], []):
        assert document_of({"text": "beside", "messages": messages}) is None  # a column of another use


def test_a_turns_end_that_is_not_called_special_is_refused_all_the_same(teacher):
    processor = load_processor(str(teacher))
    file = Tokenizer.from_str(no_longer_special(processor))
    plain = PreTrainedTokenizerFast(tokenizer_object=file, pad_token="<pad>")
    plain.chat_template = CHATML
    assert not set(TURNS) & set(plain.all_special_tokens)
    answer = {"role": "assistant", "content": "with <|im_end|> and more"}
    with pytest.raises(ValueError, match="no placeholder or other control token"):
        ChatCollator(TextProcessor(plain)).encode(
            {"kind": "all", "messages": [{"role": "user", "content": "hi"}, answer]}
        )


def no_longer_special(processor) -> str:
    """The tokenizer's file, ChatML's tokens added as ordinary ones."""
    saved = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    for token in saved["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in TURNS
    return json.dumps(saved)


@pytest.mark.parametrize("place", [0, 3, 7], ids=["held out", "first rows", "late"])
def test_a_missing_chat_template_is_no_fault_of_a_sample(tmp_path, monkeypatch, place):
    monkeypatch.setattr(open_data, "LOOKED_AT", 5)
    encoder = ChatCollator(TextProcessor(byte_tokenizer(CHATML)))
    path, documents = tmp_path / "d.jsonl", [{"text": text} for text in DOCUMENTS * 3]
    config = replace(PRESETS["text"], data=(str(path),), samples=SampleSettings(on_broken="skip"))

    def read(rows: list) -> int:
        path.write_text("\n".join(map(json.dumps, rows)))
        parts = open_data.open_data(config, encoder, None, 1)
        return len([part[i] for part in parts for i in range(len(part))])

    assert read(documents) == len(documents)
    conversation = row("no", picture=None)
    says = r'must have a chat template .*to read conversations, got none; .*rows {"text": \.\.\.}, or set'
    with pytest.raises(RefusedError, match=says) as error:
        read([*documents[:place], conversation, *documents])
    assert f"{path}, line {place + 1}" in str(error.value)
    assert not isinstance(error.value, BrokenSampleError)


@pytest.mark.parametrize("place", [0, 7], ids=["first rows", "late"])
def test_a_chat_template_of_no_use_is_no_fault_of_a_sample(tmp_path, monkeypatch, place):
    """It is named once, and refuses the run: --on_broken skip would leave out every conversation."""
    monkeypatch.setattr(open_data, "LOOKED_AT", 5)
    processor = TextProcessor(byte_tokenizer(CHATML))
    processor.tokenizer.chat_template = "{% for turn in messages %}{{ turn.role }}{% endfor %}"
    path, rows = tmp_path / "d.jsonl", [{"text": text} for text in DOCUMENTS * 3]
    path.write_text("\n".join(map(json.dumps, [*rows[:place], row("no", picture=None), *rows])))
    config = replace(PRESETS["text"], data=(str(path),), samples=SampleSettings(on_broken="skip"))
    says = rf"--teacher must have a chat template that reads {path}, line {place + 1}: .* write what is said"
    with pytest.raises(RefusedError, match=says) as error:
        parts = open_data.open_data(config, ChatCollator(processor), None, 1)
        [part[i] for part in parts for i in range(len(part))]
    assert not isinstance(error.value, BrokenSampleError)


def test_what_supervises_nothing_is_no_right_answer():
    scores = Scores(optimized.logit_loss)
    labels = torch.tensor([[IGNORED, IGNORED, IGNORED], [0, 1, 1]])
    positions, _ = supervised(labels)
    logits = torch.zeros(2, len(positions), 2)
    logits[..., 0] = 1  # never the label
    scores.add({"student": logits}, labels, ["all", "all"])
    assert scores.rows()["student"]["accuracy"] == 0


def test_the_preset_for_text_refuses_a_teacher_that_sees(data, tmp_path):
    arguments = text_flags(TEACHER, data, tmp_path / "run")
    with pytest.raises(RefusedError, match=r"--mixer\.text_only must be off for a teacher that sees"):
        main([*arguments, "--dry_run"])


def test_pictures_for_a_language_model_are_refused(teacher, tmp_path):
    collator = ChatCollator(load_processor(str(teacher)))
    asked = {"role": "user", "content": [{"type": "image", "image": None}]}
    answer = {"role": "assistant", "content": "1"}
    with pytest.raises(ValueError, match=r"a text decoder must be given text alone, got \['image'\]"):
        collator.encode({"kind": "all", "messages": [asked, answer]})


def test_a_gguf_file_that_does_not_open_is_refused_by_name(data, tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(RefusedError, match=r"--teacher must be a model .*, got .*model\.gguf"):
        main(text_flags(tmp_path / "model.gguf", data, tmp_path / "run"))


@pytest.mark.parametrize("name", ["nothere.gguf", "./a/nothere.gguf", "{}/b/nothere.gguf", "{}/nothere.gguf"])
def test_a_gguf_file_that_is_not_there_is_refused_by_its_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    name = name.format(tmp_path)
    with pytest.raises(RefusedError, match=f"^distill: --teacher must be a file that is there, got {name}$"):
        open_processor(name)
    monkeypatch.setattr("sys.argv", ["documents", name, str(tmp_path)])
    with pytest.raises(SystemExit, match=f"got {name}"):
        write_documents()


def test_a_gguf_file_is_unpacked_distilled_and_saved_as_a_plain_model(data, tmp_path):
    gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")
    path, vectors = write_gguf(gguf, tmp_path / "model.gguf")
    opened = open_teacher(str(path), torch.float32)
    assert torch.equal(opened.get_input_embeddings().weight.detach(), torch.from_numpy(vectors))
    main(text_flags(path, data, tmp_path / "run"))
    saved = json.loads((tmp_path / "run" / "student" / "config.json").read_text())
    assert "quantization_config" not in saved and saved["model_type"] == "linmu_llama"


def write_gguf(gguf, path: Path):
    """A Llama of random weights in float32, with a tokenizer of bytes."""
    tokenizer = byte_tokenizer(CHATML)
    vocabulary = [*sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get), "ab"]
    width, inner, heads, groups, layers = 16, 24, 2, 1, 2
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        ("context_length", 64), ("embedding_length", width), ("block_count", layers), ("head_count", heads),
        ("feed_forward_length", inner), ("head_count_kv", groups), ("layer_norm_rms_eps", 1e-5),
        ("rope_freq_base", 1e4), ("vocab_size", len(vocabulary)), ("tokenizer_model", "gpt2"),
        ("tokenizer_pre", "default"), ("token_list", vocabulary), ("token_merges", ["a b"]),
        ("token_types", [3 if name in tokenizer.all_special_tokens else 1 for name in vocabulary]),
        ("bos_token_id", 256), ("eos_token_id", 257), ("pad_token_id", 256),
        ("chat_template", QWEN2.template),
    ):  # fmt: skip
        getattr(writer, f"add_{add}")(value)
    generator = torch.Generator().manual_seed(0)

    def matrix(*size: int):
        return (torch.randn(*size, generator=generator) / 4).numpy()

    vectors = matrix(len(vocabulary), width)
    tensors = {
        "token_embd": vectors,
        "output": matrix(len(vocabulary), width),
        "output_norm": matrix(width) + 1,
    }
    for layer in range(layers):
        sizes = {"attn_q": (width, width), "attn_k": (width // 2, width), "attn_v": (width // 2, width)}
        sizes |= {"attn_output": (width, width), "ffn_gate": (inner, width), "ffn_up": (inner, width)}
        sizes |= {"ffn_down": (width, inner), "attn_norm": (width,), "ffn_norm": (width,)}
        tensors |= {f"blk.{layer}.{name}": matrix(*size) for name, size in sizes.items()}
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, vectors


def test_documents_are_read_from_folders_and_cut(teacher, tmp_path):
    folder = tmp_path / "docs"
    folder.mkdir()
    page = "<head><title>x</title></head><nav>menu</nav><p>one\n two</p><pre>a\n  b</pre>"
    (folder / "a.html").write_text(page)
    (folder / "b.md").write_text("abcdefghij<|im_end|>klmno")
    (folder / "c.md").write_text("abcdefghij<|im_end|>klmno")  # the same again
    (folder / "d.txt").write_text("\u4e00\u4e8c\u4e09")
    (folder / "e.py").write_text("pass")
    (folder / "f.txt.bak").write_text("an old copy")
    (folder / "g.md.gz").write_bytes(b"not gzip")
    assert text_of(folder / "g.md.gz") == ""
    (folder / "h.htm").write_text("<html><head><title>x</title><body><p>no end of head</p></body></html>")
    (folder / "h.htm").rename(tmp_path / "h.html")
    assert text_of(tmp_path / "h.html") == "no end of head"
    found = dict(documents([folder]))
    assert list(found) == ["a.html", "b.md"] and text_of(folder / "d.txt") == ""
    assert found["a.html"].split("\n") == ["one two", "", "a", "  b"]
    tokenizer = open_processor(str(teacher)).tokenizer
    assert list(pieces(found["b.md"], tokenizer, 4, ["<|im_end|>"]))[:2] == ["abcd", "efgh"]
    assert not any("<|im_end|>" in piece for piece in pieces(found["b.md"], tokenizer, 4, ["<|im_end|>"]))
