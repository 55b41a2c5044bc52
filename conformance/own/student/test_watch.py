"""Watching: a session equals one prompt with the same blocks, and does not grow."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3VLProcessor

from linmu import optimized
from linmu.reference import convert, watch
from linmu.reference.prompts.qwen_processing import FrameProcessor, _WithFrames
from linmu.reference.student.watching import fingerprint, turn_back

from .tiny_checkpoint import shake_mixers
from .tiny_families import PATCH, Tiny, internvl, qwen_vl, text_decoder

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
TOLERANCE = 1e-4  # in logits of magnitude 6 to 9, float32
TEMPLATE = """\
{% for message in messages %}{% if loop.first and message['role'] != 'system' %}\
<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{% for block in message['content'] %}{% if block['type'] == 'video' %}\
<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ block['text'] }}{% endif %}{% endfor %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


VIDEO = {"type": "video"}


class Qwen3FramesProcessor(_WithFrames, Qwen3VLProcessor):
    """Qwen3-VL's processor without torchvision: frames in memory that need no resizing."""


def with_videos(tiny: Tiny) -> Any:
    """A family's processor, with videos in patches of the tiny checkpoint's and Qwen2-VL's template."""
    old, tokenizer = tiny.processor, tiny.processor.tokenizer
    names = ("<|im_start|>", "<|im_end|>")
    tokenizer.add_tokens([name for name in names if name not in tokenizer.get_vocab()], special_tokens=True)
    kind = Qwen3FramesProcessor if tiny.name == "qwen3_vl" else type(old)
    processor = kind(old.image_processor, tokenizer, chat_template=TEMPLATE)
    processor.video_processor = FrameProcessor(patch_size=PATCH, min_pixels=64, max_pixels=4096)
    return processor


def watching_student(tiny: Tiny, **options: Any):
    """A student in which everything has a weight, with rows for the chat template's tokens."""
    processor = with_videos(tiny)
    tiny.teacher.resize_token_embeddings(len(processor.tokenizer))
    tiny.teacher.generation_config.suppress_tokens = list(range(256, len(processor.tokenizer)))
    return shake_mixers(convert(tiny.teacher, {"text_window": 8} | options)), processor


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return watching_student(qwen_vl(request.param), scan_rope=True)


@pytest.fixture(scope="module")
def plain():
    """A student without RoPE in its scan, whose positions can be restarted exactly."""
    return watching_student(qwen_vl("qwen2_5_vl"))


def clip(seed: int, frames: int = 4, size: tuple[int, int] = (16, 24)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), dtype=np.uint8)


def one_prompt(student, processor, turns, clips, fps: float = 2.0) -> dict[str, Tensor]:
    """The inputs of a whole conversation, opened for an answer; VIDEO stands for the next clip."""
    messages = [
        {"role": role, "content": [b if b is VIDEO else {"type": "text", "text": b} for b in blocks]}
        for role, *blocks in turns
    ]
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    metadata, start = [], 0
    for frames in clips:
        indices = list(range(start, start := start + len(frames)))
        metadata.append({"total_num_frames": len(frames), "fps": fps, "frames_indices": indices})
    inputs = processor(text=[text], videos=list(clips), video_metadata=metadata, return_tensors="pt")
    return {**inputs, "mm_token_type_ids": student.placeholder_types(inputs["input_ids"])}


def one_prompt_of_text(processor, text: str) -> Tensor:
    messages = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    whole = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return processor.tokenizer(whole, return_tensors="pt")["input_ids"]


@torch.no_grad()
def of_one_prompt(student, *conversation) -> Tensor:
    """Logits of an answer's first token, from one forward over a whole conversation."""
    return student(**one_prompt(student, *conversation), use_cache=False).logits[0, -1]


def assert_near(got: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    assert wanted.abs().max() > 1
    torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance)


def test_a_session_equals_one_prompt_with_the_same_blocks(family):
    student, processor = family
    clips = [clip(0), clip(1, 2), clip(2, 6)]
    session = watch(student, processor, fps=4)
    session.say("Be brief.", role="system")
    session.see(clips[0], text="look ")
    session.see(clips[1])
    turns = [("system", "Be brief."), ("user", "look ", VIDEO, VIDEO, "what?")]
    assert_near(session.logits("what?"), of_one_prompt(student, processor, turns, clips[:2], 4))
    session.say("Hm", role="assistant")
    session.see(clips[2])
    turns = [("system", "Be brief."), ("user", "look ", VIDEO, VIDEO), ("assistant", "Hm")]
    turns += [("user", VIDEO, "\nand now?")]
    assert_near(session.logits("\nand now?"), of_one_prompt(student, processor, turns, clips, 4))
    assert (session.frames, session.seconds) == (12, 3.0)


def test_a_question_may_be_said_before(plain):
    student, processor = plain
    session = watch(student, processor)
    session.say("how many?")
    ids = one_prompt_of_text(processor, "how many?")
    with torch.no_grad():
        assert_near(session.logits(), student(input_ids=ids).logits[0, -1])
    session.see(clip(0))
    turns = [("user", "how many?"), ("user", VIDEO)]
    assert_near(session.logits(), of_one_prompt(student, processor, turns, [clip(0)]))


def test_an_answer_is_generates_own_and_disturbs_nothing(family):
    student, processor = family
    session = watch(student, processor)
    session.see(clip(0))
    before = [tensor.clone() for state in states(session) for tensor in state.tensors]
    answer = session.ask("what?", max_new_tokens=6, do_sample=False)
    after = [tensor for state in states(session) for tensor in state.tensors]
    assert all(map(torch.equal, before, after))
    inputs = one_prompt(student, processor, [("user", VIDEO, "what?")], [clip(0)])
    tokens = student.generate(**inputs, max_new_tokens=6, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer == processor.tokenizer.decode(tokens) and len(answer) > 2
    assert isinstance(session.ask("what?", max_new_tokens=2, do_sample=False, num_beams=2), str)


def states(session) -> list:
    return [slot.state for slot in session.cache.layers]


def test_nothing_grows(plain, monkeypatch):
    student, processor = plain
    session = watch(student, processor, max_position=120)
    lengths, sizes = set(), set()
    forward = type(student).forward

    def note(self, **kwargs):
        lengths.add((kwargs["input_ids"].shape[1], "attention_mask" in kwargs, kwargs["position_ids"].shape))
        assert session.cache.get_seq_length() == 0
        return forward(self, **kwargs)

    monkeypatch.setattr(type(student), "forward", note)
    for index in range(16):
        session.see(clip(index, 2))
        session.say("ok", role="assistant")
        if index > 1:
            sizes.add((session.state_bytes, session.unread, session.size))
        assert session.position <= session.max_position + 1  # of the next token
    assert len(sizes) == 1 and len(lengths) == 3  # the first block, later ones, what is said
    assert session.frames == 32


def test_positions_restart_without_a_trace(plain):
    student, processor = plain
    session, whole = watch(student, processor, max_position=60), watch(student, processor)
    starts = set()
    for index in range(8):
        session.see(clip(index, 2))
        whole.see(clip(index, 2))
        starts.add(session.position < whole.position)
    assert starts == {False, True}
    assert_near(session.logits("so?"), whole.logits("so?"))
    assert_near(session.fork().logits("so?"), whole.logits("so?"))


def test_a_scan_with_rope_is_turned_back_exactly_if_pairs_share_their_taps(family):
    student, processor = family
    sessions = [watch(student, processor) for _ in range(2)]
    kept = {}
    for index, layer in enumerate(student.get_decoder().layers):
        mixer = layer.self_attn.flex_ma
        kept[index] = mixer.conv_weight.detach().clone(), mixer.conv_bias.detach().clone()
        inner = mixer.config.groups * mixer.config.head_dim
        with torch.no_grad():
            keys = mixer.conv_weight[inner:].unflatten(0, (-1, 2, mixer.config.head_dim // 2))
            keys[:, 1] = keys[:, 0]
            mixer.conv_bias[inner:] = 0
    try:
        for session in sessions:
            session.see(clip(0))
        turn_back(student, sessions[0].cache, 37)
        sessions[0].position -= 37
        for session in sessions:
            session.see(clip(1))
        assert_near(sessions[0].logits("so?"), sessions[1].logits("so?"))
        sessions[0].position += 3  # the comparison sees positions
        assert (sessions[0].logits("so?") - sessions[1].logits("so?")).abs().max() > 0.01
    finally:
        for index, layer in enumerate(student.get_decoder().layers):
            mixer = layer.self_attn.flex_ma
            mixer.conv_weight.data, mixer.conv_bias.data = kept[index]


def test_time_stamps_go_on_and_begin_anew():
    student, processor = watching_student(qwen_vl("qwen3_vl"))
    session, clock = watch(student, processor), watch(student, processor, clock_seconds=2)
    told = []
    decode = processor.tokenizer.decode

    class Spy:
        def __getattr__(self, name):
            return getattr(processor, name)

        def __call__(self, **kwargs):
            inputs = processor(**kwargs)
            text = decode(inputs["input_ids"][0])
            told.append([part.split(" seconds>")[0] for part in text.split("<") if " seconds>" in part])
            return inputs

    for watcher in (session, clock):
        watcher.processor = Spy()
        for index in range(3):
            watcher.see(clip(index, 4))
    assert told[:3] == [["0.2", "1.2"], ["2.2", "3.2"], ["4.2", "5.2"]]
    assert told[3:] == [["0.2", "1.2"]] * 3


def test_several_streams_are_seen_in_one_forward(family, monkeypatch):
    student, processor = family
    together, alone = ([watch(student, processor, max_position=56) for _ in range(2)] for _ in range(2))
    for one, other in (together, alone):
        one.see(clip(9)), other.see(clip(8, 2))  # positions, and restarts, of their own
    rows, forward = [], type(student).forward

    def noted(self, **kwargs):
        rows.append(len(kwargs["input_ids"]))
        return forward(self, **kwargs)

    monkeypatch.setattr(type(student), "forward", noted)
    for index in range(2):
        clips = [clip(2 * index + stream, 2) for stream in range(2)]
        watch.see_together(together, clips)
        for session, frames in zip(alone, clips, strict=True):
            session.see(frames)
    assert rows == [2, 1, 1] * 2
    for session, other in zip(together, alone, strict=True):
        assert_near(session.logits("so?"), other.logits("so?"))
        assert (session.frames, session.position) == (other.frames, other.position)
        assert session.state_bytes == other.state_bytes
        assert all(
            t.untyped_storage().nbytes() == t.nbytes for state in states(session) for t in state.tensors
        )


def test_streams_that_do_not_fit_are_refused_and_stay_as_they_were(plain):
    sessions = [watch(*plain) for _ in range(2)]
    watch.see_together(sessions, [clip(0), clip(1)])  # the first blocks of both
    before = sessions[0].logits("so?")
    for wrong, message in (
        ((sessions, [clip(0)]), "frames for each session"),
        ((sessions[:1] * 2, [clip(0)] * 2), "different ones"),
        ((sessions, [clip(0), clip(0, 2)]), "as many tokens"),
        (([sessions[0], watch(*plain)], [clip(0), clip(0)]), "as many tokens"),
    ):
        with pytest.raises(ValueError, match=rf"^watch\.see_together: .*{message}"):
            watch.see_together(*wrong)
    assert torch.equal(sessions[0].logits("so?"), before)


def test_a_fork_goes_its_own_way(plain):
    session = watch(*plain)
    session.see(clip(0))
    fork = session.fork()
    wanted = session.logits("so?")
    fork.see(clip(1))
    assert torch.equal(session.logits("so?"), wanted)
    session.see(clip(1))
    assert torch.equal(session.logits("so?"), fork.logits("so?"))


@pytest.mark.parametrize("text_window", [0, 8])
def test_a_session_is_kept_on_disk(tmp_path, text_window):
    student, processor = watching_student(qwen_vl("qwen2_5_vl"), text_window=text_window)
    session = watch(student, processor, fps=3, max_position=100, clock_seconds=60)
    session.save(tmp_path / "fresh")
    assert watch.open(tmp_path / "fresh", student, processor).frames == 0
    session.see(clip(0))
    session.say("ok", role="assistant")
    session.save(tmp_path / "session")
    assert abs((tmp_path / "session").stat().st_size - session.state_bytes) < 4000
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".part"] == []
    same = watch.open(tmp_path / "session", student, processor)
    for each in (session, same):
        each.see(clip(1))
    assert torch.equal(session.logits("so?"), same.logits("so?"))
    settings = ("fps", "max_position", "clock_seconds", "frames", "size", "position")
    assert all(getattr(session, name) == getattr(same, name) for name in settings)
    kept = (tmp_path / "session").read_bytes()
    with pytest.raises(OSError, match=r"watch.save: .*session must fit on its disk, got"):
        session.save(tmp_path / "none" / "session")
    (tmp_path / "session").write_bytes(kept[:-1])
    with pytest.raises(ValueError, match=r"watch.open: the file must be a saved session, got"):
        watch.open(tmp_path / "session", student, processor)


def test_a_session_of_one_backend_goes_on_in_the_other(tmp_path):
    tiny = qwen_vl("qwen2_5_vl")
    student, processor = watching_student(tiny)
    fast = optimized.convert(tiny.teacher, {"text_window": 8})
    fast.load_state_dict(student.state_dict())
    for number, (first, second) in enumerate([(student, fast), (fast, student)]):
        session = watch(first, processor)
        session.see(clip(0))
        session.save(tmp_path / str(number))
        session.see(clip(1))
        other = optimized.watch.open(tmp_path / str(number), second, processor)
        other.see(clip(1))
        assert_near(other.logits("so?"), session.logits("so?"))


def test_all_forms_of_frames_are_the_same(plain):
    frames = clip(0, 2)
    pictures = [Image.fromarray(frame) for frame in frames]
    forms = [frames, torch.from_numpy(frames), pictures, list(frames), {"video": pictures, "fps": 2.0}]
    results = []
    for form in forms:
        session = watch(*plain)
        session.see(form)
        results.append(session.logits("so?"))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (clip(0, 3), "frames must come in multiples of 2, .* got 3; keep the last ones"),
        (clip(0, 2, (24, 24)), r"frames must be \(height, width\) = \(16, 24\) as before, got \(24, 24\)"),
        (clip(0).astype(np.float32), "got float32 of shape"),
        (clip(0)[..., :1], r"got uint8 of shape \(4, 16, 24, 1\)"),
        (clip(0)[0], r"got uint8 of shape \(16, 24, 3\)"),
        ([], "frames must be PIL images, .* got an empty list"),
        ("film.mp4", "got str"),
        (["a.png", "b.png"], "got str"),
        ({"image": 1}, r"got a mapping with \['image'\]"),
        ([clip(0)[0], clip(0, 1, (8, 8))[0]], "frames of one call must be of one size"),
    ],
)
def test_wrong_frames_are_refused_and_leave_the_session_as_it_was(plain, frames, message):
    session = watch(*plain)
    session.see(clip(0))
    wanted = session.logits("so?")
    with pytest.raises(ValueError, match=r"^watch\.see: .*" + message):
        session.see(frames)
    assert torch.equal(session.logits("so?"), wanted)
    assert session.frames == 4


def test_control_tokens_and_misplaced_turns_are_refused(plain):
    session = watch(*plain)
    with pytest.raises(ValueError, match=r"^watch\.ask: there must be a question"):
        session.ask()
    with pytest.raises(ValueError, match=r"^watch\.say: the first turn's role must be among .*got assistant"):
        session.say("no", role="assistant")
    session.say("yes")
    with pytest.raises(ValueError, match=r"^watch\.say: a later turn's role must be among .*got system"):
        session.say("no", role="system")
    for name in ("say", "ask", "logits"):
        with pytest.raises(ValueError, match=rf"^watch\.{name}: a text must hold no control token"):
            getattr(session, name)("so<|im_end|>")
    with pytest.raises(ValueError, match=r"^watch\.ask: generate_kwargs must leave the prompt"):
        session.ask("so?", num_return_sequences=2)


def test_an_interrupted_session_says_so(plain, monkeypatch, tmp_path):
    student, processor = plain
    session = watch(student, processor)
    session.see(clip(0))

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    layer = student.get_decoder().layers[1].self_attn
    monkeypatch.setattr(layer, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        session.see(clip(1))
    monkeypatch.undo()
    for use in (lambda: session.see(clip(1)), session.fork, lambda: session.save(tmp_path / "x")):
        with pytest.raises(ValueError, match="must not have been interrupted inside a block"):
            use()


def test_what_cannot_watch_is_refused(plain, tmp_path):
    student, processor = plain
    tiny = qwen_vl("qwen2_5_vl")
    with pytest.raises(ValueError, match=r"^watch: the model must be a student, got Qwen2_5_VL"):
        watch(tiny.teacher, processor)
    with pytest.raises(ValueError, match=r"^watch: no decoder layer may keep attention, got layers \[1\]"):
        watch(convert(tiny.teacher, layers=[0, 2]), processor)
    for other in (text_decoder(), internvl()):
        with pytest.raises(ValueError, match=r"^watch: the family must be Qwen2-VL, .* got linmu_"):
            watch(convert(other.teacher), processor)
    del (bare := with_videos(tiny)).video_processor
    with pytest.raises(ValueError, match=r"^watch: the processor must take videos"):
        watch(student, bare)
    for name, value in (("fps", 0), ("fps", float("inf")), ("fps", "2"), ("max_position", 0)):
        with pytest.raises(ValueError, match=f"^watch: {name} must be"):
            watch(student, processor, **{name: value})
    with pytest.raises(ValueError, match=r"^watch: clock_seconds must be"):
        watch(student, processor, clock_seconds=0.1)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the processor must have a chat template"),
        (TEMPLATE.replace("{% else %}", "{{ loop.index }}{% else %}"), "every video must be rendered alike"),
        (
            TEMPLATE.replace("<|im_end|>\n{% endfor", "<|im_end|>{{ loop.index }}{% endfor"),
            "a second user turn",
        ),
        (TEMPLATE.replace("<|im_end|>\n{% endfor", "{{ loop.last }}<|im_end|>{% endfor"), "alike wherever"),
        (TEMPLATE.replace("{{ block['text'] }}", "{{ block['text'] * 2 }}"), "texts must be rendered once"),
    ],
)
def test_a_template_that_cannot_be_cut_is_refused(plain, template, message):
    student, _ = plain
    other = with_videos(qwen_vl("qwen2_5_vl"))
    other.chat_template = template
    with pytest.raises(ValueError, match=r"^chat_pieces: .*" + message):
        watch(student, other)


def test_other_files_and_other_students_are_refused(plain, tmp_path):
    student, processor = plain
    session = watch(student, processor)
    session.see(clip(0))
    session.save(tmp_path / "session")
    save_file(load_file(tmp_path / "session"), tmp_path / "bare")
    with pytest.raises(ValueError, match=r"^watch\.open: the file must be a saved session"):
        watch.open(tmp_path / "bare", student, processor)
    with pytest.raises(FileNotFoundError):
        watch.open(tmp_path / "none", student, processor)
    other = convert(qwen_vl("qwen2_5_vl").teacher, {"text_window": 8})
    assert fingerprint(other) != fingerprint(student)
    with pytest.raises(ValueError, match=r"^watch\.open: the student must be the session's own"):
        watch.open(tmp_path / "session", other, processor)
