"""Every kind of image becomes upright RGB of a sane size, or says why not."""

from __future__ import annotations

import io
import os
import struct
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data import kit
from visionzip.images import LARGEST_PADDED_SIDE, ImageError, decode_image, enlarge, pad_to_square
from visionzip.video import decode_video, spread_evenly

MAX = 100_000_000


def encode(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def corner_colours(image: Image.Image) -> list[tuple[int, int, int]]:
    return [image.getpixel((0, 0)), image.getpixel((image.width - 1, image.height - 1))]


def red_then_blue(mode: str = "RGB", size: tuple[int, int] = (20, 10)) -> Image.Image:
    """Red in the left half, blue in the right."""
    image = Image.new("RGB", size, (255, 0, 0))
    image.paste((0, 0, 255), (size[0] // 2, 0, *size))
    return image.convert(mode)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("RGB", "PNG"),
        ("RGB", "BMP"),
        ("RGB", "WEBP"),
        ("CMYK", "JPEG"),
        ("CMYK", "TIFF"),
        ("P", "PNG"),
        ("P", "GIF"),
        ("RGBA", "PNG"),
    ],
)
def test_colours_survive_every_mode(mode, kind):
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    image = decode_image(encode(red_then_blue(mode), kind, **options), MAX)
    assert image.mode == "RGB"
    for found, expected in zip(corner_colours(image), [(255, 0, 0), (0, 0, 255)], strict=True):
        assert np.abs(np.subtract(found, expected)).max() <= 12


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    image = decode_image(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]), MAX)
    assert corner_colours(image)[0] == (255, 0, 0)


def test_transparency_is_put_on_white():
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert corner_colours(decode_image(encode(clear, "PNG"), MAX)) == [(255, 255, 255)] * 2
    half = Image.new("LA", (8, 8), (0, 128))
    assert corner_colours(decode_image(encode(half, "PNG"), MAX))[0] == (127, 127, 127)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert corner_colours(decode_image(encode(palette, "PNG", transparency=0), MAX))[0] == (255, 255, 255)


def test_sixteen_bits_are_scaled_not_clipped():
    values = np.array([[0, 128 * 257, 65535, 1000 * 64]], dtype=np.uint16).repeat(4, 0)
    image = decode_image(encode(Image.fromarray(values), "PNG"), MAX)
    assert [image.getpixel((x, 0))[0] for x in range(4)] == [0, 128, 255, 249]
    wide = Image.fromarray(values.astype(np.int32))
    assert decode_image(encode(wide, "TIFF"), MAX).getpixel((1, 0)) == (128, 128, 128)


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 0.5, 1.0], [0, 128, 255]), ([0.0, 100.0, 255.0], [0, 100, 255]), ([-1.0, 0.0, 1.0], [0, 128, 255])],
)
def test_floating_point_is_scaled(values, expected):
    array = np.array([values], dtype=np.float32).repeat(4, 0)
    image = decode_image(encode(Image.fromarray(array), "TIFF"), MAX)
    assert [image.getpixel((x, 0))[0] for x in range(3)] == expected


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(orientation):
    image = Image.new("L", (24, 16), 0)
    image.paste(255, (0, 0, 12, 8))  # white in the upper left when upright
    turned = {
        1: image,
        2: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: image.transpose(Image.Transpose.ROTATE_180),
        4: image.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: image.transpose(Image.Transpose.TRANSPOSE),
        6: image.transpose(Image.Transpose.ROTATE_90),
        7: image.transpose(Image.Transpose.TRANSVERSE),
        8: image.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = decode_image(encode(turned, "JPEG", quality=95, exif=exif), MAX)
    assert found.size == (24, 16)
    assert found.getpixel((3, 3))[0] > 200
    assert max(found.getpixel((20, 3))[0], found.getpixel((3, 13))[0]) < 50


def test_a_damaged_exif_block_is_ignored():
    whole = encode(red_then_blue(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert decode_image(whole, MAX).size == (20, 10)


def png_header(width: int, height: int) -> bytes:
    """A PNG that says it is so large; its pixels would be zeros."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


PHOTO = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)), "JPEG")
REFUSED = {
    "empty": (b"", "empty file"),
    "text": (b"<html>not found</html>", "unreadable image"),
    "truncated jpeg": (PHOTO[: len(PHOTO) // 2], "unreadable image"),
    "header alone": (PHOTO[:30], "unreadable image"),
    "truncated png": (encode(red_then_blue(), "PNG")[:60], "unreadable image"),
    "bomb": (png_header(60_000, 60_000), "image too large"),
    "large": (png_header(12_000, 12_000), "image too large"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n", "unreadable image"),
}


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED.keys())
@pytest.mark.parametrize("stored", ["file", "bytes"])
def test_what_is_refused_and_why(tmp_path, content, reason, stored):
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageError) as caught:
        decode_image(content if stored == "bytes" else str(tmp_path / "a.jpg"), MAX)
    assert caught.value.reason == reason


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for name in ("absent.jpg", "pipe", ".", "a" * 300):
        with pytest.raises(ImageError, match="file missing"):
            decode_image(str(tmp_path / name), MAX)


@pytest.mark.parametrize("there", ["NFC", "NFD"])
@pytest.mark.parametrize("asked", ["NFC", "NFD"])
def test_a_name_is_found_in_either_unicode_form_and_with_backslashes(tmp_path, there, asked):
    """Archives packed on macOS hold `é` as two characters; records written on Windows have `\\` between folders."""
    name = "bücher/café.png"
    path = tmp_path / unicodedata.normalize(there, name)
    path.parent.mkdir()
    path.write_bytes(encode(red_then_blue(), "PNG"))
    for separator in "/\\":
        given = unicodedata.normalize(asked, name).replace("/", separator)
        assert decode_image(f"{tmp_path}/{given}", MAX).size == red_then_blue().size
        folder = f"{tmp_path}/{unicodedata.normalize(asked, 'bücher')}{separator}"
        assert len(decode_video(folder, 4, MAX)) == 1
    with pytest.raises(ImageError, match="file missing"):
        decode_image(f"{tmp_path}/bücher\\absent.png", MAX)


def test_a_file_whose_own_name_has_a_backslash_is_that_file(tmp_path):
    (tmp_path / "a").mkdir()
    for name, size in {"a\\b.png": 9, "a/b.png": 11}.items():
        (tmp_path / name).write_bytes(encode(Image.new("RGB", (size, size)), "PNG"))
    assert decode_image(f"{tmp_path}/a\\b.png", MAX).size == (9, 9)


def test_a_very_wide_image_is_used(tmp_path):
    image = decode_image(encode(Image.new("RGB", (30_000, 40), "red"), "PNG"), MAX)
    assert image.size == (30_000, 40)
    square = pad_to_square(image, (1, 2, 3))
    assert square.size == (LARGEST_PADDED_SIDE, LARGEST_PADDED_SIDE)
    assert square.getpixel((0, 0)) == (1, 2, 3)
    assert square.getpixel((0, LARGEST_PADDED_SIDE // 2)) == (255, 0, 0)


@pytest.mark.parametrize("size", [(10, 4), (4, 10), (5, 5)])
def test_padding_puts_the_image_in_the_middle(size):
    square = np.asarray(pad_to_square(Image.new("RGB", size, "red"), (9, 8, 7)))
    side = max(size)
    expected = np.full((side, side, 3), (9, 8, 7))
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    expected[top : top + size[1], left : left + size[0]] = (255, 0, 0)
    assert np.array_equal(square, expected)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (3, 3), (200, 2)])
@pytest.mark.parametrize("pad", [True, False])
def test_tiny_images_pass_the_image_processor(tmp_path, size, pad):
    Image.new("RGB", size, (250, 10, 10)).save(tmp_path / "a.png")
    row = kit.record(0, "a.png")
    made = kit.dataset(tmp_path, kit.write_json(tmp_path / "a.json", [row]), pad_images=pad)[0]
    assert made["pixel_values"].shape == (1, 3, 32, 32)
    middle = made["pixel_values"][0, :, 16, 16]
    assert middle[0] > middle[1], "red must still be red"


def test_enlarge_leaves_others_alone():
    image = Image.new("RGB", (8, 100))
    assert enlarge(image) is image
    assert enlarge(Image.new("RGB", (2, 100))).size == (8, 100)


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(5, 8, [0, 1, 2, 3, 4]), (10, 1, [0]), (10, 2, [0, 9]), (9, 3, [0, 4, 8]), (100, 4, [0, 33, 66, 99])],
)
def test_spread_evenly(total, count, expected):
    assert spread_evenly(total, count) == expected


def test_a_folder_of_frames_is_a_video(tmp_path):
    for number in range(12):
        Image.new("RGB", (8, 8), (number * 20, 0, 0)).save(tmp_path / f"frame_{number}.png")
    (tmp_path / "notes.txt").write_text("not a frame")
    frames = decode_video(str(tmp_path), 4, MAX)
    assert [frame.getpixel((0, 0))[0] for frame in frames] == [0, 80, 140, 220]  # frame 10 comes after frame 2
    listed = [str(tmp_path / f"frame_{number}.png") for number in (3, 1)]
    assert [frame.getpixel((0, 0))[0] for frame in decode_video(listed, 8, MAX)] == [60, 20]


def test_an_empty_folder_is_no_video(tmp_path):
    with pytest.raises(ImageError, match="contains no frames"):
        decode_video(str(tmp_path), 4, MAX)
