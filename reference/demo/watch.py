"""Play a film that need not end through a student, and ask it meanwhile.

    python -m linmu.reference.demo.watch STUDENT film.mp4            a film
    python -m linmu.reference.demo.watch STUDENT FOLDER              pictures, by name, as they come
    python -m linmu.reference.demo.watch STUDENT /dev/video0 --format v4l2      a camera
    python -m linmu.reference.demo.watch STUDENT digits              the film of digits, which asks of itself

In a terminal a line typed is a question. Answers go to stdout, progress to stderr. Ctrl-C ends it after the
block that is being seen, and --session has what was seen.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import islice
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from transformers import AutoModelForImageTextToText

from ..checks import require
from ..prompts.processors import load_processor
from ..student.watching import watch
from ..training.data.films import reader_of, upright
from .film import FILM_KINDS, digits_film
from .flags import without_traceback
from .questions import FRAMES_PER_SECOND

DIGITS = "digits"
POLL = 0.2  # seconds between two looks at a folder
BETWEEN_LINES = {True: 0.5, False: 10.0}  # seconds between progress lines, in a terminal and in a file
# In the film of digits: two hours of it. The teacher's configuration says 1,024, which is two minutes.
MAX_POSITION = 65_536
PARTS = 12  # of a digits film, whose accuracies are told


def frames_of(source: str, fps: float, *, container: str | None = None, patience: float = 10.0) -> Iterator:
    """Yield the pictures of a source, `fps` a second of its own time, one at a time.

    Args:
        source: a film or animation, a folder of pictures (each is a frame), or with `container` a device.
        fps: frames per second; a source with fewer shows some twice.
        container: FFmpeg's name of a device's format: v4l2, avfoundation, dshow.
        patience: seconds to wait for a folder's next picture before it counts as complete.
    Raises:
        ValueError: for a source that is not there.
    """
    if container is not None:
        return decoded(source, sampled(frames_of_device(source, container), fps))
    path = Path(source)
    require(path.exists(), "watch", "the source must be a film, a folder or 'digits'", repr(source))
    if path.is_dir():
        return frames_of_folder(path, patience)
    return decoded(source, sampled(reader_of(path)(), fps))


def decoded(source: str, frames: Iterator[Image.Image]) -> Iterator[Image.Image]:
    """Yield the frames, and name the source where it cannot be decoded.

    Raises:
        ValueError: there.
    """
    try:
        yield from frames
    except (OSError, ValueError) as error:
        raise ValueError(f"watch: {source} must be a film that can be decoded, got {error}") from error


def sampled(frames: Iterable[tuple], fps: float) -> Iterator[Image.Image]:
    """Yield what is shown at 0, 1/fps, 2/fps … seconds; frames without a time each once.

    Args:
        frames: (what makes the picture, its time, how long it is shown), the two in seconds or None.
        fps: samples per second.
    """
    count, shown, first, before, end = 0, None, None, None, 0.0
    for make_picture, start, pause in frames:
        picture = make_picture()  # now, as the next frame takes its place
        if start is None:
            yield picture
            continue
        first = start if first is None else first
        while shown is not None and count / fps < start - first:
            count += 1
            yield shown
        pause = pause or (start - before if before is not None else 1 / fps)
        shown, before, end = picture, start, start - first + pause
    while shown is not None and count / fps < end:
        count += 1
        yield shown


def frames_of_device(source: str, container: str) -> Iterator[tuple]:
    """Yield a device's frames, each with its time, as `frames_of_film` does."""
    import av

    with av.open(source, format=container) as device:
        for frame in device.decode(video=0):
            yield partial(upright, frame), frame.time, None


def frames_of_folder(folder: Path, patience: float) -> Iterator[Image.Image]:
    """Yield pictures in the order of their names, and wait for more; of the names only the last is kept."""
    last, waited = "", time.monotonic()
    while time.monotonic() - waited < patience:
        for name in sorted(entry.name for entry in folder.iterdir() if entry.name > last and entry.is_file()):
            try:
                with Image.open(folder / name) as picture:
                    frame = picture.convert("RGB")
            except UnidentifiedImageError:  # no picture
                last = name
                continue
            except OSError:  # not yet written to its end
                break
            last = name
            yield frame
            waited = time.monotonic()
        time.sleep(POLL)


def blocks(frames: Iterable, count: int, depth: int) -> Iterator[list]:
    """Return an iterator over lists of `count` frames; the last one is cut to a multiple of `depth`.

    Raises:
        ValueError: unless `count` is such a multiple: frames of every block would be lost.
    """
    must = f"a block (--block) must hold a multiple of {depth} frames, which one moment of the model takes"
    require(count >= 1 and count % depth == 0, "watch", must, count)
    frames = iter(frames)
    whole = iter(lambda: list(islice(frames, count)), [])
    return filter(None, (block[: len(block) // depth * depth] for block in whole))


class Progress:
    """One line on stderr: frames, seconds of the film, bytes of the state, frames a second."""

    def __init__(self) -> None:
        self.terminal = sys.stderr.isatty()
        self.begun = self.told = time.monotonic()
        self.frames = 0  # since then

    def tell(self, session: watch, frames: int = 0, last: bool = False) -> None:
        """Count frames that were seen, and write the line, if it is time."""
        self.frames += frames
        now = time.monotonic()
        if not last and now - self.told < BETWEEN_LINES[self.terminal]:
            return
        self.told = now
        rate = self.frames / max(now - self.begun, 1e-9)
        line = f"{session.frames} frames, {session.seconds:.1f} s, state {session.state_bytes:,} bytes, "
        end = "\r" if self.terminal and not last else "\n"
        print(f"{line}{rate:.1f} frames/s", end=end, file=sys.stderr, flush=True)


def typed_questions() -> SimpleQueue:
    """Collect lines typed into a terminal, on a thread of their own; nothing where there is no terminal."""
    lines: SimpleQueue = SimpleQueue()
    if sys.stdin.isatty():
        threading.Thread(target=lambda: [lines.put(line.strip()) for line in sys.stdin], daemon=True).start()
    return lines


@contextmanager
def interrupted_later() -> Iterator[None]:
    """Hold a first Ctrl-C back to the end: a session interrupted within a block is of no use."""
    came: list[int] = []

    def hold(number: int, frame: Any) -> None:
        came.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    in_main_thread = threading.current_thread() is threading.main_thread()
    if not in_main_thread or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # somebody else's handler, or none, as in a shell's background
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if came:
        raise KeyboardInterrupt


def play(
    session: watch,
    seen: Iterable[list],
    *,
    question: str = "",
    every: float = 10.0,
    typed: SimpleQueue | None = None,
    max_new_tokens: int = 64,
) -> None:
    """Show a session blocks of frames, and print its answers between them.

    Args:
        session: what watches.
        seen: blocks, as `watch.see` takes them.
        question: asked every `every` seconds of the film; "" = none.
        typed: questions that came meanwhile.
        max_new_tokens: of an answer.
    """
    progress, next_time = Progress(), session.seconds + every
    for block in seen:
        with interrupted_later():
            session.see(block)
        progress.tell(session, len(block))
        asked = []
        while question and session.seconds >= next_time:
            asked, next_time = [question], next_time + every
        while typed is not None:
            try:
                asked.append(typed.get_nowait())
            except Empty:
                break
        for each in filter(None, asked):
            answer = session.ask(each, max_new_tokens=max_new_tokens)
            print(f"[{session.seconds:.1f} s] {each} {answer}", flush=True)
    progress.tell(session, last=True)


def play_digits(
    session: watch, minutes: float, *, seed: int = 0, afresh: bool = False, after: bool = False
) -> list[dict[str, Any]]:
    """Show a film of digits; ask every scene's question before it, and its answer after it.

    Choice: the question first, as the bundled teacher was trained: then a state knows what to keep.

    Args:
        session: a fresh one.
        minutes: of film.
        seed: of the film.
        afresh: forget all before every scene: how good the student is on each alone.
        after: ask after the scene, so that all of it must be kept.
    Returns:
        a row for each twelfth of the film: `minute` that it begins at, `asked`, and by kind and in `all` how
        many answers are right, from 0 to 1.
    """
    progress, fresh = Progress(), session.fork()
    parts: list[list[tuple[str, bool]]] = [[] for _ in range(PARTS)]
    seconds, end = 0.0, 60 * minutes
    for scene in digits_film("heldout", seed):
        if seconds >= end:
            break
        if afresh:
            session = fresh.fork()
        before, now = ("", scene.question) if after else (scene.question, "")
        session.see(scene.frames, text=before)
        answer = session.ask(now, max_new_tokens=4, do_sample=False)
        if after:
            session.say(scene.question)
        session.say(answer, role="assistant")
        parts[int(PARTS * seconds / end)].append((scene.kind, answer == scene.answer))
        seconds += scene.seconds
        progress.tell(session, len(scene.frames))
    progress.tell(session, last=True)
    rows = []
    for part, answers in enumerate(parts):
        row: dict[str, Any] = {"minute": part * minutes / PARTS, "asked": len(answers)}
        for kind in ("all", *FILM_KINDS):
            right = [is_right for name, is_right in answers if kind in ("all", name)]
            row[kind] = float(np.mean(right)) if right else float("nan")
        rows.append(row)
    return rows


def print_accuracies(rows: list[dict[str, Any]]) -> None:
    """Print the rows of `play_digits` as a table."""
    names = ("all", *FILM_KINDS)
    print("minute   asked  " + "".join(f"{name:>9}" for name in names))
    for row in rows:
        print(f"{row['minute']:6.1f}{row['asked']:8d}  " + "".join(f"{row[name]:9.2f}" for name in names))


def main(arguments: list[str] | None = None) -> None:
    """Read the command line and play.

    Raises:
        ValueError, OSError: for a student, a source or a session that cannot be used.
        KeyboardInterrupt: of the user. In either case what was seen before is in the session's file.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("student", help="folder or Hub id of a student")
    parser.add_argument("source", help="a film, a folder of pictures, a device with --format, or 'digits'")
    parser.add_argument("--fps", type=float, help=f"frames per second to look at ({FRAMES_PER_SECOND})")
    parser.add_argument("--block", type=int, default=4, help="frames of a block, which is seen at once")
    parser.add_argument("--ask", default="", metavar="QUESTION", help="a question to ask again and again")
    parser.add_argument("--every", type=float, default=10.0, help="seconds of the film between two --ask")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--format", dest="container", help="FFmpeg's format of a device, v4l2 for instance")
    parser.add_argument(
        "--patience", type=float, default=10.0, help="seconds to wait for a folder's next picture"
    )
    parser.add_argument("--max-position", type=int, help="where positions are restarted; see watch()")
    parser.add_argument("--session", type=Path, help="file to go on from, if it is there, and to save to")
    parser.add_argument("--minutes", type=float, default=60.0, help="of the film of digits")
    parser.add_argument("--seed", type=int, default=0, help="of the film of digits")
    parser.add_argument(
        "--afresh", action="store_true", help="of the film of digits: forget before every scene"
    )
    parser.add_argument("--after", action="store_true", help="of the film of digits: ask after every scene")
    options = parser.parse_args(arguments)
    if options.session is not None:  # now, not after the film
        folder = options.session.absolute().parent
        is_open = folder.is_dir() and os.access(folder, os.W_OK) and not options.session.is_dir()
        require(is_open, "watch", "--session must be a file that can be written", options.session)
    student = AutoModelForImageTextToText.from_pretrained(options.student).eval()
    processor = load_processor(options.student)
    if options.source == DIGITS:
        most = options.max_position or MAX_POSITION
        session = watch(student, processor, FRAMES_PER_SECOND, max_position=most)
        how = {"seed": options.seed, "afresh": options.afresh, "after": options.after}
        print_accuracies(play_digits(session, options.minutes, **how))
        return
    if options.session is not None and options.session.exists():
        session = watch.open(options.session, student, processor)
        own = {
            "--fps": (options.fps, session.fps),
            "--max-position": (options.max_position, session.max_position),
        }
        for flag, (given, kept) in own.items():
            must = f"{flag} must be left out, or {kept} as {options.session} has it"
            require(given in (None, kept), "watch", must, given)
    else:
        rate = FRAMES_PER_SECOND if options.fps is None else options.fps
        session = watch(student, processor, rate, max_position=options.max_position)
    frames = frames_of(options.source, session.fps, container=options.container, patience=options.patience)
    try:
        play(
            session,
            blocks(frames, options.block, session.depth),
            question=options.ask,
            every=options.every,
            typed=typed_questions(),
            max_new_tokens=options.max_new_tokens,
        )
    finally:  # a device has no end but an interruption
        if options.session is not None and session.is_whole:
            session.save(options.session)


if __name__ == "__main__":
    with without_traceback():
        main()
