"""Pictures and films as they lie on people's disks: which way up, how many, how fast, of what type."""

from __future__ import annotations

import base64
import io
import re
import struct
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers.image_utils import load_image

from linmu.reference.training.data import films
from linmu.reference.training.data.films import TURNS, mean_rate
from linmu.reference.training.data.media import Media, shortened

pytestmark = pytest.mark.trial_of_the_reference

WIDTH, HEIGHT = 48, 32


def corners() -> Image.Image:
    """Four quarters of different colours, so that each of the eight orientations looks different."""
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[: HEIGHT // 2, : WIDTH // 2] = (250, 0, 0)
    pixels[: HEIGHT // 2, WIDTH // 2 :] = (0, 250, 0)
    pixels[HEIGHT // 2 :, : WIDTH // 2] = (0, 0, 250)
    return Image.fromarray(pixels)


def write_film(
    path: Path,
    frames: list[Image.Image],
    rate: int = 4,
    times: list[int] | None = None,
    codec: str = "mpeg4",
    **options: str,
):
    """A film; `times` are those of the frames, in ticks of 1 / rate."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height = frames[0].size
        for i, frame in enumerate(frames):
            made = av.VideoFrame.from_image(frame)
            made.pts = i if times is None else times[i]
            container.mux(stream.encode(made))
        container.mux(stream.encode())


def shades(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (WIDTH, HEIGHT), (10 * i, 10 * i, 10 * i)) for i in range(count)]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_taught_as_transformers_opens_it(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"phone.{kind.lower()}"
    corners().save(path, kind, exif=exif)
    want = np.asarray(load_image(str(path)))
    assert (want.shape[0] > want.shape[1]) == (orientation > 4)
    media = Media(tmp_path)
    for given in (path.name, path.read_bytes(), {"bytes": path.read_bytes(), "path": None}, Image.open(path)):
        assert np.array_equal(np.asarray(media.image(given)), want)
    assert media.video([path.name])["video"][0].size == (want.shape[1], want.shape[0])


def set_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Overwrite the matrix in an MP4's track header; its layout is that of ISO/IEC 14496-12, 8.3.2."""
    content = bytearray(path.read_bytes())
    header = content.index(b"tkhd")
    start = header + 8 + (32 if content[header + 4] else 20) + 16
    one = 1 << 16
    content[start : start + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


@pytest.mark.parametrize("matrix", TURNS, ids=str)
def test_a_film_is_turned_as_its_display_matrix_says(tmp_path, matrix):
    write_film(tmp_path / "film.mp4", [corners()] * 3)
    lying = np.asarray(Media(tmp_path).video("film.mp4")["video"][0])
    set_display_matrix(tmp_path / "film.mp4", *matrix)
    a, b, c, d = matrix
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    across, down = a * x + c * y, b * x + d * y  # where the standard shows each pixel
    across, down = across - across.min(), down - down.min()
    want = np.zeros((down.max() + 1, across.max() + 1, 3), np.uint8)
    want[down, across] = lying
    video = Media(tmp_path).video("film.mp4")
    assert len(video["video"]) == 3 and video["fps"] == 4.0
    assert all(np.array_equal(np.asarray(frame), want) for frame in video["video"])


def test_a_film_turned_by_less_than_a_quarter_is_refused(tmp_path):
    write_film(tmp_path / "film.mp4", [corners()])
    set_display_matrix(tmp_path / "film.mp4", 1, 1, -1, 1)
    with pytest.raises(ValueError, match=r"film.mp4 must be a video.*not by quarter turns"):
        Media(tmp_path).video("film.mp4")


@pytest.mark.parametrize("kind", ["gif", "webp", "png"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "bytes"])
def test_the_rate_of_an_animation_is_the_mean_over_the_whole(tmp_path, kind, named):
    pauses = [100] * 9 + [3000]
    path = tmp_path / f"film.{kind}"
    frames = shades(10)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=pauses)
    source = path.name if named else {"bytes": path.read_bytes(), "path": None}
    whole = Media(tmp_path).video(source)
    assert len(whole["video"]) == 10 and whole["fps"] == pytest.approx(10 / 3.9)
    thinned = Media(tmp_path, max_frames=5).video(source)
    assert len(thinned["video"]) == 5 and thinned["fps"] == pytest.approx(5 / 3.9)
    for got, want in zip(thinned["video"], whole["video"][::2], strict=True):
        assert np.array_equal(np.asarray(got), np.asarray(want))


def test_the_picture_for_those_who_cannot_play_an_animation_is_no_frame(tmp_path):
    path = tmp_path / "film.png"
    corners().save(path, save_all=True, default_image=True, append_images=shades(3), duration=500)
    for most in (0, 3):
        video = Media(tmp_path, max_frames=most).video("film.png")
        assert [frame.getpixel((0, 0))[0] for frame in video["video"]] == [0, 10, 20]
        assert video["fps"] == 2.0


@pytest.mark.parametrize("pause", [0, 20])
def test_a_pause_of_nothing_is_shown_for_a_tenth_of_a_second(tmp_path, pause):
    frames = shades(4)
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:], duration=[pause] * 4)
    assert Media(tmp_path).video("film.gif")["fps"] == (50.0 if pause else 10.0)
    frames[0].save(tmp_path / "pages.tiff", save_all=True, append_images=frames[1:])
    assert Media(tmp_path).video("pages.tiff").keys() == {"video"}


def test_the_rate_of_a_film_is_the_mean_over_the_whole(tmp_path):
    times = [*range(10), 30, 31, 50, 75]  # phones film with variable frame rates
    write_film(tmp_path / "film.mp4", shades(14), rate=10, times=times)
    video = Media(tmp_path).video("film.mp4")
    assert len(video["video"]) == 14 and video["fps"] == pytest.approx(14 / 7.6, rel=0.02)


def test_mean_rates():
    known = [
        ((0, 1), (9, 1), 1.0),
        ((5, None), (14, None), 1.0),
        ((0, 4), (0, 4), 2.5),
        ((0, 1), (9, 11), 0.5),
    ]
    for first, last, rate in known:
        assert mean_rate(10, first, last) == rate
    for first, last in [((None, None), (None, None)), ((0, None), (0, None)), ((5, None), (2, 1))]:
        assert mean_rate(10, first, last) is None


@pytest.mark.parametrize("name", ["whole.mp4", "fragmented.mp4", "film.mkv", "film.avi"])
@pytest.mark.parametrize("most", [0, 7, 100])
def test_frames_are_counted_by_decoding_them(tmp_path, name, most):
    options = {"movflags": "frag_keyframe"} if name == "fragmented.mp4" else {}
    write_film(tmp_path / name, shades(40 if most == 0 else 20), **options)
    video = Media(tmp_path, max_frames=most).video(name)
    count = 40 if most == 0 else min(20, most)
    assert len(video["video"]) == count
    assert video["fps"] == pytest.approx(4.0 * count / (40 if most == 0 else 20), rel=0.02)


@pytest.mark.parametrize(
    "name", ["a.mp4", "faststart.mp4", "fragmented.mp4", "a.mov", "a.mkv", "a.webm", "a.avi"]
)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.999])
def test_a_film_whose_end_is_missing_is_refused(tmp_path, name, share):
    """Such as a download that broke off: its first frames would be taken for all of it."""
    flags = {"faststart.mp4": "faststart", "fragmented.mp4": "frag_keyframe"}
    options = {"movflags": flags[name]} if name in flags else {}
    codec = "libvpx" if name == "a.webm" else "mpeg4"
    write_film(tmp_path / name, shades(40), codec=codec, **options)
    whole = (tmp_path / name).read_bytes()
    cut = whole[: int(share * len(whole))]
    (tmp_path / f"cut-{name}").write_bytes(cut)
    for good in (name, whole):
        assert len(Media(tmp_path).video(good)["video"]) == 40
    for bad in (f"cut-{name}", cut):
        with pytest.raises(ValueError, match="must be a video that can be decoded, got "):
            Media(tmp_path).video(bad)


def test_a_film_recorded_live_states_no_size_and_is_played(tmp_path):
    write_film(tmp_path / "live.mkv", shades(12), live="1")
    write_film(tmp_path / "stream.ts", shades(12))
    write_film(tmp_path / "unfinished.avi", shades(12))
    content = bytearray((tmp_path / "unfinished.avi").read_bytes())
    content[4:8] = bytes(4)
    (tmp_path / "unfinished.avi").write_bytes(content)
    for name in ("live.mkv", "stream.ts", "unfinished.avi"):
        assert len(Media(tmp_path).video(name)["video"]) == 12, name


def test_a_header_that_claims_two_billion_frames_is_not_believed(tmp_path):
    path = tmp_path / "film.avi"
    write_film(path, shades(6))
    content = bytearray(path.read_bytes())
    header = content.index(b"avih") + 8
    content[header + 16 : header + 20] = struct.pack("<I", 1_960_000_000)  # dwTotalFrames
    stream = content.index(b"strh") + 8
    content[stream + 32 : stream + 36] = struct.pack("<I", 1_960_000_000)  # dwLength
    path.write_bytes(content)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames > 10**9
    for most, count in ((0, 6), (3, 3)):
        assert len(Media(tmp_path, max_frames=most).video("film.avi")["video"]) == count


def test_a_film_holds_no_more_frames_in_memory_than_are_kept(tmp_path, monkeypatch):
    write_film(tmp_path / "film.mp4", shades(24))
    made = []
    turn = films.upright
    monkeypatch.setattr(films, "upright", lambda frame: made.append(frame.pts) or turn(frame))
    assert len(Media(tmp_path, max_frames=3).video("film.mp4")["video"]) == 3 == len(made)
    monkeypatch.setattr("linmu.reference.training.data.media.MOST_PIXELS", 10 * WIDTH * HEIGHT)
    with pytest.raises(ValueError, match=r"film.mp4 must.*more than .* in 11 frames; set max_frames"):
        Media(tmp_path).video("film.mp4")


PIXELS = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)


@pytest.mark.parametrize("form", [np.asarray, np.ndarray.tolist, torch.from_numpy, Image.fromarray])
def test_pixels_are_one_image_in_every_form(form):
    assert np.array_equal(np.asarray(Media(Path()).image(form(PIXELS))), PIXELS)
    assert len(Media(Path()).video([form(PIXELS)] * 4)["video"]) == 4


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (PIXELS / 255, "uint8.*got float64"),
        ((PIXELS / 255).tolist(), "uint8.*got float64"),
        (PIXELS.astype(np.float32), "uint8.*got float32"),
        (PIXELS.astype(np.uint16), "uint8.*got uint16"),
        (PIXELS.astype(np.int64), "uint8.*got int64"),
        (PIXELS > 9, "uint8.*got bool"),
        ((PIXELS > 9).tolist(), "uint8.*got bool"),
        (torch.from_numpy(PIXELS).bfloat16(), "uint8.*got torch.bfloat16"),
        ([[[300, 0, 0]]], "uint8.*got 0 to 300 in a list of int64"),
        ([[[-1, 0, 0]]], "uint8.*got -1 to 0"),
        ([[[float("nan")] * 3]], "uint8.*got float64"),
        ([[["7", "7", "7"]]], "uint8.*got <U1"),
        ([[[1, 2, 3]], [[1, 2]]], "ragged"),
        (PIXELS[..., 0], r"\(height, width, 3\), got \(16, 20\)"),
        (PIXELS.transpose(2, 0, 1), r"got \(3, 16, 20\)"),
        (PIXELS[:0], r"got \(0, 20, 3\)"),
    ],
)
def test_pixels_of_another_type_or_shape_are_refused_by_name(pixels, says):
    with pytest.raises(ValueError, match=says):
        Media(Path()).image(pixels)
    with pytest.raises(ValueError, match=says):
        Media(Path()).video([pixels])


def saved(image: Image.Image, path: Path, **options) -> Path:
    image.save(path, **options)
    return path


def test_modes_of_pictures_keep_their_brightness(tmp_path):
    grey = np.linspace(0, 255, WIDTH * HEIGHT).astype(np.uint8).reshape(HEIGHT, WIDTH)
    image = Image.fromarray(grey)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    files = {
        "grey.png": image,
        "deep.png": deep,
        "deep.tiff": deep,
        "alpha.png": image.convert("LA"),
        "palette.png": image.convert("P"),
        "four.png": image.convert("RGBA"),
        "print.tiff": image.convert("CMYK"),
    }
    for name, made in files.items():
        got = np.asarray(Media(tmp_path).image(saved(made, tmp_path / name)))
        assert got.shape == (HEIGHT, WIDTH, 3)
        assert np.abs(got.astype(int) - grey[..., None]).max() <= 1, name
    for mode in ("I", "F"):
        wide = Image.fromarray(grey.astype({"I": np.int32, "F": np.float32}[mode]))
        with pytest.raises(ValueError, match=f"wide.tiff must be an image.*8 or 16 bits.*mode {mode}"):
            Media(tmp_path).image(saved(wide, tmp_path / "wide.tiff"))


def test_every_way_to_name_a_file_opens_it(tmp_path):
    folder = tmp_path / "mes photos é"
    folder.mkdir()
    path = saved(corners(), folder / "a b.png")
    text = base64.b64encode(path.read_bytes()).decode()
    (tmp_path / "link.png").symlink_to(path)
    names = [
        path, str(path), "mes photos é/a b.png", "mes photos é\\a b.png", "link.png", f"file://{path}",
        f"file://localhost{path}", path.as_uri(), f"data:image/png;base64,{text}",
        f"data:;base64,{base64.encodebytes(path.read_bytes()).decode()}", text,
        {"path": str(path), "bytes": None}, {"url": str(path)},
    ]  # fmt: skip
    for name in names:
        assert np.array_equal(np.asarray(Media(tmp_path).image(name)), np.asarray(corners())), name


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("zero.png", b"", "zero.png must be an image.*an empty file"),
        ("phone.jpg", HEIC, "phone.jpg must be an image.*HEIC.*convert it"),
        (
            "lfs.png",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:7\n",
            "lfs.png must be an image.*git lfs",
        ),
        ("text.jpg", b"<html>404</html>", "text.jpg must be an image"),
        ("folder.png", None, "folder.png must be an image"),
    ],
)
def test_what_is_no_picture_is_named(tmp_path, name, content, says):
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        Media(tmp_path).image(name)
    with pytest.raises(ValueError, match=says.replace("an image", "a video")):
        Media(tmp_path).video(name)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_half_a_picture_is_refused(tmp_path, kind, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = saved(noise, tmp_path / "whole", format=kind).read_bytes()
    (tmp_path / "half").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(ValueError, match="half must be an image"):
        Media(tmp_path).image("half")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (
            "https://example.org/cat.png",
            "on this machine, got https://example.org/cat.png; download it first",
        ),
        ("s3://bucket/cat.png", "on this machine"),
        ("gone.png", "gone.png must exist"),
        ("file:///gone.png", "gone.png must exist"),
        ("C:\\photos\\gone.png", "gone.png must exist"),
        ("a" * 5000, r"\(5000 characters\)"),
        ("data:image/png;base64,####" + "A" * 9000, r"must be base64"),
        ("data:image/png;base64," + "A" * 9000, r"… \(9022 characters\) must be"),
        ("", "got ''"),
        (None, "got None"),
        (7, "got int"),
        (float("nan"), "got float"),
        ({}, "got None"),
    ],
)
def test_what_cannot_be_opened_says_so_briefly(tmp_path, source, says):
    for opened in (Media(tmp_path).image, Media(tmp_path).video):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            opened(source)
        message = str(caught.value)
        assert len(message) < 400
        assert re.search(says, message), message


@pytest.mark.parametrize(
    "fps", [0, -2, float("nan"), float("inf"), True, "2", [2.0], 10**400], ids=lambda fps: f"{fps!r:.9}"
)
def test_a_rate_is_a_finite_number_above_zero(fps):
    with pytest.raises(ValueError, match="fps must be a finite number > 0"):
        Media(Path()).video([PIXELS] * 2, fps)


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"sound.mp4 must be a video.*without moving pictures"):
        Media(tmp_path).video("sound.mp4")


def test_one_frame_is_a_video(tmp_path):
    write_film(tmp_path / "one.mp4", shades(1))
    assert Media(tmp_path).video("one.mp4")["fps"] == 4.0
    stills = [f"one.{kind}" for kind in ("png", "jpg", "webp", "gif", "tiff", "bmp")]
    for name in stills:
        saved(corners(), tmp_path / name)
        still = Media(tmp_path).video(name)
        assert len(still["video"]) == 1 and "fps" not in still
    for source in ("one.mp4", *stills, ["one.png"]):
        assert len(Media(tmp_path, max_frames=4).video(source)["video"]) == 1


def test_frames_of_several_sizes_are_refused():
    with pytest.raises(ValueError, match=r"of one size, got \[\(16, 16\), \(20, 16\)\]"):
        Media(Path()).video([PIXELS, PIXELS[:, :16]])


def test_bounds_of_a_block_hold_beside_the_runs(tmp_path):
    media = Media(tmp_path, max_pixels=2000, max_frames=6)
    wide = Image.new("RGB", (100, 25))
    assert media.bounded({"max_pixels": 400}).image(wide).size == (40, 10)
    assert media.bounded({"max_pixels": 2400}).image(wide).size == media.image(wide).size
    assert len(media.bounded({"max_frames": 2}).video([PIXELS] * 8)["video"]) == 2
    assert Media(tmp_path).bounded({"min_pixels": 10_000}).image(wide).size == (200, 50)
    assert media.bounded({"min_pixels": 10_000}).image(wide).size == media.image(wide).size
    for bound in (0, -5, 2.5, "400", True, float("nan"), float("inf"), [400]):
        with pytest.raises(ValueError, match="max_pixels must be a whole number > 0"):
            media.bounded({"max_pixels": bound})


def test_a_picture_of_too_many_pixels_breaks_itself(tmp_path, monkeypatch):
    saved(corners(), tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for opened in (Media(tmp_path).image, Media(tmp_path).video):
        with pytest.raises(ValueError, match=r"bomb.png must be .*decompression bomb"):
            opened("bomb.png")


def test_a_long_text_is_cut():
    assert shortened("abc", 3) == "abc" and shortened("abcd", 3) == "abc… (4 characters)"
    buffer = io.BytesIO()
    corners().save(buffer, "PNG")
    assert Media(Path()).image(buffer.getvalue()).size == (WIDTH, HEIGHT)
