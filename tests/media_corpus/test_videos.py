"""Every kind of video shows the right frames, each compared with what was written; every damaged one fails with its reason."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from media_corpus.damaged_videos import DAMAGED_KINDS, undetectable_damage
from media_corpus.video_writing import CONTAINERS, Video
from media_corpus.videos import KINDS, container_codec_pairs
from pipeline.data.media import midpoint_frames, open_frames

TOLERANCE = 24  # mean difference, for lossy codecs; another number in the stripes of a frame differs by at least 255 / 6
PAIRS = {"mp4": 12, "mov": 30, "matroska": 15, "webm": 3, "avi": 40}  # at least so many codecs are written into each container


def shows(path: Path, wanted: Iterable[np.ndarray], num_frames: int) -> bool:
    """Say whether the sampled frames of a clip are the wanted pictures."""
    pairs = zip(open_frames(path, num_frames), wanted, strict=True)
    return all(
        (image.height, image.width) == picture.shape[:2] and np.abs(np.asarray(image, np.float32) - picture).mean() < TOLERANCE
        for image, picture in pairs
    )


def wrong_videos(videos: Iterable[Video], folder: Path) -> list[str]:
    """Return what is wrong with each video that does not show its frames."""
    wrong = []
    for video in videos:
        path = folder / video.name
        path.write_bytes(video.data)
        try:
            length = len(video.frames)
            few = [video.frames[position] for position in midpoint_frames(3, length)]
            if not (shows(path, video.frames, length) and shows(path, few, 3)):
                wrong.append(f"{video.name}: wrong frames")
        except ValueError as error:
            wrong.append(str(error))
    return wrong


def reason_of(video: Video, folder: Path, num_frames: int) -> str:
    """Return the error of opening a video, "" if there is none."""
    path = folder / video.name
    path.write_bytes(video.data)
    try:
        open_frames(path, num_frames)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("form", CONTAINERS)
def test_every_codec_of_every_container(form: str, tmp_path: Path) -> None:
    videos = list(container_codec_pairs(form))
    assert wrong_videos(videos, tmp_path) == []
    assert len(videos) >= PAIRS[form]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_shows_its_frames(kind: str, tmp_path: Path) -> None:
    videos = list(KINDS[kind]())
    assert wrong_videos(videos, tmp_path) == []
    assert len(videos) >= 3


@pytest.mark.parametrize("kind", DAMAGED_KINDS)
def test_damaged_videos_fail_with_the_reason(kind: str, tmp_path: Path) -> None:
    videos = list(DAMAGED_KINDS[kind]())
    for num_frames in (1, 8):
        reasons = [(video, reason_of(video, tmp_path, num_frames)) for video in videos]
        wrong = [text or video.name for video, text in reasons if not re.search(f": .*({video.reason})", text)]
        assert wrong == []
    assert len(videos) >= 3


def test_damage_that_nothing_tells_gives_whole_frames_or_a_reason(tmp_path: Path) -> None:
    for video in undetectable_damage():
        reason = reason_of(video, tmp_path, 3)
        assert reason.startswith(f"{video.name}: ") or reason == ""
