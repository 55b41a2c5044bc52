"""The demo that watches: a film of digits, sources of frames, questions meanwhile, and a student taught."""

from __future__ import annotations

import re
import signal
from fractions import Fraction
from functools import partial
from itertools import islice
from queue import SimpleQueue

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

from linmu.optimized import convert, watch
from linmu.reference.demo import TEACHER, DigitsQuestions
from linmu.reference.demo.film import DRAWN_KINDS, FILM_KINDS, digits_film
from linmu.reference.demo.flags import without_traceback
from linmu.reference.demo.train_watcher import main as train
from linmu.reference.demo.watch import blocks, frames_of, main, play, play_digits, sampled
from linmu.reference.prompts.processors import load_processor

pytestmark = pytest.mark.trial_of_the_reference


@pytest.fixture(scope="module")
def student():
    return convert(AutoModelForImageTextToText.from_pretrained(TEACHER), {"scan_rope": True}).eval()


@pytest.fixture(scope="module")
def processor():
    return load_processor(TEACHER)


@pytest.fixture(scope="module")
def folder(student, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    student.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


# --- the film


def test_a_film_is_made_of_the_demos_questions_one_size_a_frame():
    scenes = list(islice(digits_film(seed=5), 40))
    again = list(islice(digits_film(seed=5), 40))
    asked = DigitsQuestions("heldout", 5, kinds=DRAWN_KINDS).texts(range(256))
    for scene, same in zip(scenes, again, strict=True):
        assert np.array_equal(scene.frames, same.frames)
        assert (scene.question, scene.answer) in asked
        assert scene.frames.shape[1:] == (32, 32, 3) and scene.frames.dtype == np.uint8
        assert len(scene.frames) in (2, 4, 6, 8) and scene.seconds == len(scene.frames) / 2
        assert np.array_equal(scene.frames[0::2], scene.frames[1::2])  # a moment is two frames
        assert scene.frames.max() > 100
    assert min(sum(scene.kind == kind for scene in scenes) for kind in FILM_KINDS) > 5
    assert scenes[0].question != next(digits_film(seed=6)).question


# --- sources


def shot(value: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (value, 0, 0))


def values(frames) -> list[int]:
    return [frame.convert("RGB").getpixel((0, 0))[0] for frame in frames]


def timed(times, pause=None):
    return [(partial(shot, i), time, pause) for i, time in enumerate(times)]


@pytest.mark.parametrize(
    ("frames", "wanted"),
    [
        (timed([Fraction(i, 8) for i in range(17)], Fraction(1, 8)), [0, 4, 8, 12, 16]),
        (timed([0.0, 1.0, 2.0], 1.0), [0, 0, 1, 1, 2, 2]),  # slower than asked for
        (timed([5.0, 5.5, 6.0]), [0, 1, 2]),  # begins late
        (timed([0.0, 0.1, 1.9], 0.1), [0, 1, 1, 1]),  # of uneven length
        (timed([None] * 3), [0, 1, 2]),
        ([], []),
    ],
)
def test_a_source_is_sampled_by_its_own_clock(frames, wanted):
    assert values(sampled(iter(frames), 2.0)) == wanted


def test_films_devices_and_folders_are_played(tmp_path):
    pytest.importorskip("av", reason="the extra for films is not installed")
    frames = list(frames_of("testsrc=size=64x48:rate=10:duration=3", 2.0, container="lavfi"))
    assert [frame.size for frame in frames] == [(64, 48)] * 6
    shot(0).save(tmp_path / "a.gif", save_all=True, append_images=[shot(80), shot(160)], duration=1000)
    assert values(frames_of(str(tmp_path / "a.gif"), 1.0)) == [0, 80, 160]
    with pytest.raises(
        ValueError, match="watch: the source must be a film, a folder or 'digits', got 'none'"
    ):
        frames_of("none", 2.0)


def test_a_folder_is_read_as_it_fills(tmp_path):
    shot(1).save(tmp_path / "1.png")
    (tmp_path / "2.txt").write_text("no picture")
    whole = tmp_path / "3.png"
    shot(3).save(whole)
    content = whole.read_bytes()
    whole.write_bytes(content[:-20])  # still being written
    frames = frames_of(str(tmp_path), 2.0, patience=1.0)
    assert values([next(frames)]) == [1]
    whole.write_bytes(content)
    shot(4).save(tmp_path / "4.png")
    assert values(frames) == [3, 4]


def test_blocks_hold_whole_moments():
    assert list(blocks(range(11), 4, 2)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert list(blocks(range(5), 4, 2)) == [[0, 1, 2, 3]]
    for count in (0, 1, 3):  # would lose all frames, or every third
        with pytest.raises(ValueError, match=f"--block.* must hold a multiple of 2 frames.*, got {count}"):
            blocks(range(5), count, 2)


# --- playing


def test_questions_are_asked_every_so_often_and_as_they_are_typed(student, processor, capsys):
    session, typed = watch(student, processor), SimpleQueue()
    typed.put("Read row 3.")
    typed.put("")
    scene = next(digits_film())
    frames = [scene.frames[0]] * 16
    play(session, blocks(frames, 4, 2), question="How?", every=4.0, typed=typed, max_new_tokens=2)
    out, err = capsys.readouterr()
    asked = [re.match(r"\[([\d.]+) s\] (How\?|Read row 3\.) ", line).groups() for line in out.splitlines()]
    assert asked == [("2.0", "Read row 3."), ("4.0", "How?"), ("8.0", "How?")]
    assert re.fullmatch(r"16 frames, 8\.0 s, state [\d,]+ bytes, [\d.]+ frames/s", err.splitlines()[-1])
    assert f"{session.state_bytes:,}" in err


def test_a_film_of_digits_is_asked_about_scene_by_scene(student, processor, monkeypatch):
    scenes = list(islice(digits_film(seed=3), 20))
    answers = iter([scene.answer if i % 2 else "never" for i, scene in enumerate(scenes)])
    session, seen = watch(student, processor), []
    asked = []

    def ask(self, question="", **_) -> str:
        seen.append(self.frames)
        asked.append(question)
        return next(answers)

    monkeypatch.setattr(watch, "ask", ask)
    rows = play_digits(session, 0.3, seed=3)
    watched = np.cumsum([0.0] + [scene.seconds for scene in scenes])
    count = int((watched < 18).sum())
    assert len(rows) == 12 and sum(row["asked"] for row in rows) == count == len(seen)
    assert seen == [2 * seconds for seconds in watched[1 : count + 1]]
    right = sum(row["asked"] * row["all"] for row in rows if row["asked"])
    assert right == pytest.approx(count // 2)
    assert set(asked) == {""}  # before the scene
    answers = iter(["never"] * 20)
    seen.clear(), asked.clear()
    play_digits(watch(student, processor), 0.1, seed=3, afresh=True, after=True)
    assert asked == [scene.question for scene in scenes[: len(seen)]]
    assert seen == [len(scene.frames) for scene in scenes[: len(seen)]]


def test_the_command_plays_asks_and_goes_on(folder, tmp_path, capsys):
    for i in range(6):
        shot(40 * i).resize((32, 32)).save(tmp_path / f"{i}.png")
    more = ["--session", str(tmp_path / "kept"), "--patience", "0.1", "--ask", "How?", "--every", "2"]
    for _ in range(2):
        main([str(folder), str(tmp_path), *more, "--max-new-tokens", "2"])
    out, err = capsys.readouterr()
    assert re.findall(r"^\[([\d.]+) s\] How\? ", out, re.MULTILINE) == ["2.0", "5.0"]
    assert re.findall(r"^(\d+ frames), ", err, re.MULTILINE) == ["6 frames", "12 frames"]
    main([str(folder), "digits", "--minutes", "0.1"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["minute", "asked", "all", *FILM_KINDS] and len(rows) == 12


def test_an_interruption_waits_for_the_block_and_keeps_the_session(
    folder, student, processor, tmp_path, monkeypatch
):
    """A camera has no other end."""
    for i in range(8):
        shot(20 * i).resize((32, 32)).save(tmp_path / f"{i}.png")
    see = watch.see

    def interrupted(self, block) -> None:
        if self.frames:
            signal.raise_signal(signal.SIGINT)
        see(self, block)

    monkeypatch.setattr(watch, "see", interrupted)
    kept = tmp_path / "kept" / "session"
    kept.parent.mkdir()
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            main([str(folder), str(tmp_path), "--session", str(kept), "--block", "2"])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    assert watch.open(kept, student, processor).frames == 4


def test_a_film_that_breaks_leaves_the_session_before_it(folder, student, processor, tmp_path):
    shot(0).save(
        tmp_path / "a.gif", save_all=True, append_images=[shot(9 * i) for i in range(9)], duration=500
    )
    whole = (tmp_path / "a.gif").read_bytes()
    (tmp_path / "a.gif").write_bytes(whole[: len(whole) * 2 // 3])
    kept = tmp_path / "session"
    with pytest.raises(ValueError, match=r"a.gif must be a film that can be decoded, got"):
        main([str(folder), str(tmp_path / "a.gif"), "--session", str(kept), "--block", "2"])
    assert 0 < watch.open(kept, student, processor).frames < 10
    with pytest.raises(ValueError, match=r"fps must be left out, or 2\.0 as .*session has it, got 5\.0"):
        main([str(folder), str(tmp_path / "a.gif"), "--session", str(kept), "--fps", "5"])


def test_a_session_that_could_not_be_saved_is_refused_before_the_film(folder, tmp_path):
    for session in (tmp_path / "none" / "session", tmp_path):
        with pytest.raises(ValueError, match="--session must be a file that can be written, got"):
            main([str(folder), "none", "--session", str(session)])


@pytest.mark.parametrize(
    ("error", "status"), [(ValueError("what is wrong"), "what is wrong"), (KeyboardInterrupt(), 130)]
)
def test_commands_end_without_a_traceback(error, status):
    with pytest.raises(SystemExit) as ended, without_traceback():
        raise error
    assert ended.value.code == status


# --- teaching


def test_teaching_moves_the_decoder_layers_alone_and_towards_the_answers(folder, tmp_path):
    train([str(folder), str(tmp_path), "--steps", "2", "--films", "1", "--scenes", "2"])
    before, after = (AutoModelForImageTextToText.from_pretrained(f).state_dict() for f in (folder, tmp_path))
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert moved and all("language_model.layers" in name for name in moved)
