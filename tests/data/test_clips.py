"""The right frames of every kind of clip are returned; a file that is not a whole clip is an error with a reason."""

from __future__ import annotations

import contextlib
import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from helpers.encoder_cases import write_animation, write_video
from helpers.malformed_media import sound_file
from PIL import Image

from pipeline.data import media
from pipeline.data.media import midpoint_frames, open_frames

GREYS = [16, 38, 60, 82, 104, 126, 148, 170, 192, 214]
VIDEOS = {"h264.mp4": "libx264", "vp8.webm": "libvpx", "vp9.webm": "libvpx-vp9", "h264.mkv": "libx264", "mpeg4.avi": "mpeg4"}
NOISE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)


def greys(path: Path, num_frames: int) -> list[int]:
    frames = open_frames(path, num_frames)
    assert {(frame.mode, frame.size) for frame in frames} == {("RGB", (48, 32))}
    return [int(np.asarray(frame).mean().round()) for frame in frames]


def write_noise(path: Path, codec: str) -> Path:
    """Write forty frames of noise, which does not compress well, so that a file that is cut short still holds some of them."""
    with av.open(str(path), mode="w", options={"movflags": "faststart"} if path.suffix == ".mp4" else {}) as container:
        stream = container.add_stream(codec, rate=Fraction(10))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for step in range(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.roll(NOISE, 3 * step, 1), format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("length", [1, 2, 7, 10, 97])
@pytest.mark.parametrize("num_frames", [1, 3, 8, 10])
def test_frames_are_the_midpoints_of_equal_segments(num_frames: int, length: int) -> None:
    """Frame k is shown from time k to k + 1: find the frame that is shown at the middle of each segment."""
    middles = [Fraction(length, num_frames) * (i + Fraction(1, 2)) for i in range(num_frames)]
    assert midpoint_frames(num_frames, length) == [next(k for k in range(length) if k <= middle < k + 1) for middle in middles]


@pytest.mark.parametrize("name", VIDEOS)
def test_videos(tmp_path: Path, name: str) -> None:
    path = write_video(tmp_path / name, VIDEOS[name], GREYS)
    for num_frames, expected in ((10, GREYS), (5, GREYS[1::2]), (1, GREYS[5:6]), (20, sorted(2 * GREYS))):
        assert greys(path, num_frames) == pytest.approx(expected, abs=4)


@pytest.mark.parametrize("name", ["x.gif", "x.webp", "x.png"])
def test_animations(tmp_path: Path, name: str) -> None:
    path = write_animation(tmp_path / name, GREYS, duration=[20, 500] * 5)
    assert greys(path, 10) == GREYS
    assert greys(path, 5) == GREYS[1::2]  # frames are counted, their durations do not matter
    assert greys(path, 20) == sorted(2 * GREYS)


def test_the_content_of_a_file_decides_not_its_name(tmp_path: Path) -> None:
    write_video(tmp_path / "video.webm", "libvpx", GREYS).rename(tmp_path / "video.mp4")
    write_animation(tmp_path / "animation.webp", GREYS).rename(tmp_path / "animation.avi")
    for name in ("video.mp4", "animation.avi"):
        assert greys(tmp_path / name, 2) == pytest.approx([GREYS[2], GREYS[7]], abs=4)


def test_one_picture_is_a_clip_of_one_frame(tmp_path: Path) -> None:
    Image.new("RGB", (48, 32), (7, 7, 7)).save(tmp_path / "still.webp", lossless=True)
    assert greys(tmp_path / "still.webp", 3) == [7, 7, 7]


def test_transparent_parts_are_white_and_the_fallback_of_a_png_is_no_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGBA", (48, 32), (grey, grey, grey, 0 if grey == 20 else 255)) for grey in (10, 20, 30)]
    frames[0].save(tmp_path / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert greys(tmp_path / "x.webp", 3) == [10, 255, 30]
    frames[0].save(tmp_path / "x.png", save_all=True, append_images=frames[1:], default_image=True, blend=0)
    assert greys(tmp_path / "x.png", 2) == [255, 30]


def test_videos_are_turned_upright(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "x.mp4"), mode="w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(10))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        picture = np.full((32, 64, 3), 255, np.uint8)
        picture[:, :32] = 0  # the left half is black
        container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    data = (tmp_path / "x.mp4").read_bytes()
    lying, turned = (struct.pack(">9i", *m, 0, 0, 1 << 30) for m in ((65536, 0, 0, 0, 65536, 0), (0, 65536, 0, -65536, 0, 0)))
    at = data.index(lying, data.index(b"tkhd"))  # replace the matrix of the track: turn by 90 degrees clockwise
    (tmp_path / "x.mp4").write_bytes(data[:at] + turned + data[at + len(turned) :])
    upright = np.asarray(open_frames(tmp_path / "x.mp4", 1)[0])
    assert upright.shape == (64, 32, 3)
    assert upright[:28].max() < 20
    assert upright[36:].min() > 235


@pytest.mark.parametrize("name", VIDEOS)
def test_videos_that_are_cut_short_say_so(tmp_path: Path, name: str) -> None:
    path = write_noise(tmp_path / name, VIDEOS[name])
    data = path.read_bytes()
    for share in (0.9, 0.5, 0.1):
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(ValueError, match=rf"^{name}: .*(cut short|not a whole video|no frame)"):
            open_frames(path, 2)


def test_damage_is_found(tmp_path: Path) -> None:
    path = write_noise(tmp_path / "x.mp4", "libx264")
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 400] = bytes(400)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"^x\.mp4: (damaged|not a whole video)"):
        open_frames(path, 8)


def test_sound_files_are_not_clips(tmp_path: Path) -> None:
    """Music with a cover image is not a clip either."""
    for name, with_cover in (("sound.mkv", False), ("music.mp4", True)):
        sound_file(tmp_path / name, with_cover)
        with pytest.raises(ValueError, match=rf"^{name}: there is no video in it, but audio"):
            open_frames(tmp_path / name, 2)


def test_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.webm").write_text("no video")
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    write_video(tmp_path / "secret.mp4", "mpeg4", GREYS)
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {tmp_path / 'secret.mp4'}\n")
    (tmp_path / "stream.mp4").write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path / 'secret.mp4'}\n")
    (tmp_path / "cut.webp").write_bytes(write_animation(tmp_path / "x.webp", GREYS).read_bytes()[:300])
    (tmp_path / "cut.gif").write_bytes(write_animation(tmp_path / "x.gif", GREYS).read_bytes()[:-40])
    for name in ("empty.mp4", "text.webm", "folder.mp4", "pipe.mp4", "list.mp4", "stream.mp4", "cut.webp", "cut.gif", "no.mp4"):
        with pytest.raises(ValueError, match=f"^{name}: "):
            open_frames(tmp_path / name, 2)


def test_very_narrow_clips_are_refused(tmp_path: Path) -> None:
    videos = [write_video(tmp_path / "x.avi", "rawvideo", GREYS, (4, 404), "bgr24")]
    Image.new("RGB", (1, 101)).save(tmp_path / "x.webp", lossless=True)
    for path in (*videos, tmp_path / "x.webp"):
        with pytest.raises(ValueError, match=rf"^{path.name}: .* one side is more than 100 times the other"):
            open_frames(path, 2)


def test_very_long_clips_and_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    video, animation = write_video(tmp_path / "x.mkv", "mpeg4", GREYS), write_animation(tmp_path / "x.gif", GREYS)
    monkeypatch.setattr(media, "MAX_FRAMES", 9)
    for path in (video, animation):
        with pytest.raises(ValueError, match="more than 9 frames"):
            open_frames(path, 2)
    monkeypatch.undo()
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for path in (video, animation):
        with pytest.raises(ValueError, match="exceed"):
            open_frames(path, 2)


def test_damaged_files_give_whole_frames_or_a_reason(tmp_path: Path) -> None:
    """240 files with one bit flipped or the end cut off give whole frames, or a `ValueError` that names the file."""
    rng = np.random.default_rng(1)
    sources = [write_noise(tmp_path / name, codec) for name, codec in VIDEOS.items()]
    sources += [write_animation(tmp_path / name, GREYS) for name in ("x.gif", "x.webp", "x.png")]
    for trial in range(240):
        source = sources[trial % len(sources)]
        data = bytearray(source.read_bytes())
        at = int(rng.integers(len(data) if trial % 3 else 200))  # headers too
        if trial % 2:
            data[at] ^= 1 << int(rng.integers(8))
        else:
            del data[at:]
        path = tmp_path / f"damaged{source.suffix}"
        path.write_bytes(data)
        with contextlib.suppress(ValueError):
            assert len(open_frames(path, 3)) == 3
            continue
        with pytest.raises(ValueError, match=f"^damaged{source.suffix}: "):
            open_frames(path, 3)
