"""Frames of video files: the right ones, however the file is made, and a reason where there are none."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from data.images import PixelImages
from data.sample import Media, Sample
from tests.data import kit
from visionzip import video
from visionzip.images import ImageError
from visionzip.video import decode_video

MAX = 100_000_000


def clip(frames: int, kind: str = "mp4", codec: str = "mpeg4", gop: int = 12, options: dict | None = None) -> bytes:
    """Frame `n` is a grey of `n`·200/frames + 20."""
    file = io.BytesIO()
    with av.open(file, "w", format=kind) as container:
        stream = container.add_stream(codec, rate=10, options=options or {})
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 32, 32, "yuv420p", gop
        stream.time_base = Fraction(1, 10)
        for number in range(frames):
            image = av.VideoFrame.from_image(Image.new("RGB", (32, 32), (grey(number, frames),) * 3))
            image.pts = number
            container.mux(stream.encode(image))
        container.mux(stream.encode())
    return file.getvalue()


def grey(number: int, frames: int) -> int:
    return number * 200 // frames + 20


def greys(images: list[Image.Image]) -> list[float]:
    return [float(np.asarray(image).mean()) for image in images]


@pytest.mark.parametrize("kind", ["mp4", "matroska", "avi"])
@pytest.mark.parametrize("total", [40, 3, 1])
def test_frames_are_taken_uniformly(tmp_path, kind, total):
    (tmp_path / "a.video").write_bytes(clip(total, kind))
    images = decode_video(str(tmp_path / "a.video"), 5, MAX)
    numbers = video.spread_evenly(total, 5)
    assert len(images) == min(total, 5)
    assert np.allclose(greys(images), [grey(number, total) for number in numbers], atol=4)


def test_seeking_finds_the_same_frames_as_decoding_all(monkeypatch):
    content = clip(200, options={"bf": "2"})  # with frames that are stored out of order
    monkeypatch.setattr(video, "FAR", 10**9)
    decoded = greys(video.decode_video(content, 6, MAX))
    monkeypatch.setattr(video, "FAR", 5)
    assert greys(video.decode_video(content, 6, MAX)) == decoded
    assert np.allclose(decoded, [grey(number, 200) for number in video.spread_evenly(200, 6)], atol=4)


@pytest.mark.parametrize("count", [5, 39, 100])
@pytest.mark.parametrize(
    ("kind", "codec", "options"),
    [
        ("avi", "mpeg4", {"bf": "2"}),
        ("avi", "libx264", {}),
        ("mpegts", "libx264", {}),
        ("h264", "libx264", {}),
        ("mov", "libx264", {"bf": "3"}),
    ],
)
def test_containers_whose_times_are_missing_or_of_storage(kind, codec, options, count):
    images = video.decode_video(clip(40, kind, codec, options=options), count, MAX)
    assert np.allclose(greys(images), [grey(number, 40) for number in video.spread_evenly(40, count)], atol=6)


def test_an_image_size_told_wrong_is_found_at_the_frame(monkeypatch):
    monkeypatch.setattr(
        video, "_check_size", lambda image, _, check=video._check_size: check(image, _frame_limit(image))
    )
    with pytest.raises(ImageError) as caught:
        video.decode_video(clip(4), 4, MAX)
    assert caught.value.reason == "image too large"


def _frame_limit(image) -> int:
    """Room for the stream as it says, none for a frame."""
    return 0 if isinstance(image, av.VideoFrame) else MAX


@pytest.mark.parametrize(
    "content",
    [b"", b"not a video", clip(20)[:200], clip(20, "matroska")[:300]],
    ids=["empty", "text", "cut mp4", "cut matroska"],
)
def test_an_unreadable_video_is_refused(content):
    with pytest.raises(ImageError) as caught:
        decode_video(content, 4, MAX)
    assert caught.value.reason == "unreadable video"


def test_a_video_cut_short_gives_the_frames_it_has():
    whole = clip(60, "matroska")
    images = video.decode_video(whole[: len(whole) * 2 // 3], 4, MAX)
    assert len(images) == 4
    assert np.allclose(greys(images)[0], grey(0, 60), atol=4)


def test_a_file_with_sound_alone_is_no_video():
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ImageError, match="no video stream"):
        video.decode_video(file.getvalue(), 4, MAX)


def test_a_video_of_too_many_pixels_is_refused_unread():
    with pytest.raises(ImageError) as caught:
        video.decode_video(clip(4), 4, max_pixels=1000)
    assert caught.value.reason == "image too large"


def test_where_the_processor_takes_no_videos_a_frame_is_an_image(tmp_path):
    """Eight frames, one after the other where the video stands: as LLaVA-style models without a video tower are run."""
    (tmp_path / "a.mp4").write_bytes(clip(30))
    row = {**kit.record(0), "video": "a.mp4"}
    row["conversations"][0]["value"] = "<video>\nWhat happens?"
    path = kit.write_json(tmp_path / "a.json", [row])
    for template in ("llava_v1", "chat"):
        data = kit.dataset(tmp_path, path, template=template, frames=8)
        item = data[0]
        image = data.encoder.processor.tokenizer.convert_tokens_to_ids("<image>")
        assert item["pixel_values"].shape[0] == 8
        assert int((item["input_ids"] == image).sum()) == 8 * kit.PLACEHOLDERS


class VideoProcessor:
    """A stand-in with the interface of transformers' video processors, which can't be built without torchvision."""

    def __call__(self, videos, do_sample_frames, return_metadata, return_tensors):
        assert (do_sample_frames, return_metadata, return_tensors) == (False, True, "pt")
        pixels = np.stack([[np.asarray(frame) for frame in frames] for frames in videos])
        return {"pixel_values_videos": pixels, "video_metadata": [object() for _ in videos]}


def test_where_the_processor_takes_videos_it_gets_the_frames(tmp_path):
    (tmp_path / "a.mp4").write_bytes(clip(30))
    using = kit.processor()
    using.video_token, using.video_processor = "<video>", VideoProcessor()
    using.replace_video_token = lambda inputs, index: "<video>" * inputs["pixel_values_videos"][index].shape[0]
    images = PixelImages(kit.data_config(tmp_path, "a.json", frames=6), using)
    sample = Sample("a", [], [Media("video", str(tmp_path / "a.mp4"))])
    found = images(sample)
    assert found.placeholders == ["<video>" * 6]
    assert set(found.inputs) == {"pixel_values_videos"}
    assert found.inputs["pixel_values_videos"].shape == (1, 6, 32, 32, 3)
