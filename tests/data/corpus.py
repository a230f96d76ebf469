"""One record for every way input goes wrong, and what is to become of it. `docs/data.md` lists the same."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.data.test_media import png_header
from tests.data.test_video import clip


@dataclass(frozen=True)
class Case:
    """`record` is a dict, or the bytes of a line. `reason` is None where it is used."""

    name: str
    record: Any
    reason: str | None

    def line(self) -> bytes:
        return self.record if isinstance(self.record, bytes) else json.dumps(self.record).encode()


def corpus(folder: Path) -> list[Case]:
    """Write the images into `folder/images` and return the cases, each with the id `c<number>`."""
    images = folder / "images"
    images.mkdir()
    write_images(images)
    cases = [*image_cases(), *records()]
    (folder / "secret.png").write_bytes((images / "good.png").read_bytes())
    numbered = []
    for number, case in enumerate(cases):
        row = case.record
        if isinstance(row, dict):
            row = {"id": f"c{number}", **row}
        numbered.append(Case(case.name, row, case.reason))
    return numbered


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def shown(file: str) -> dict[str, Any]:
    return {"image": file, "conversations": turns("<image>\nWhat is it?", "A cat.")}


def write_images(images: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    jpeg = io.BytesIO()
    noise.save(jpeg, "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    sixteen = np.linspace(0, 65535, 1600).reshape(40, 40).astype(np.uint16)
    saved: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "good.png": (noise, {}),
        "a.gif": (noise.convert("P"), {"save_all": True, "append_images": [noise.convert("P")]}),
        "cmyk.jpg": (noise.convert("CMYK"), {}),
        "sixteen.png": (Image.fromarray(sixteen), {}),
        "palette.png": (noise.convert("P"), {}),
        "alpha.png": (noise.convert("RGBA"), {}),
        "rotated.jpg": (noise, {"exif": exif}),
        "wide.png": (Image.new("RGB", (30_000, 10), "red"), {}),
        "dot.png": (Image.new("RGB", (1, 1), "red"), {}),
        "caf\u00e9.png": (noise, {}),
        "phone.jpg": (noise, {"format": "MPO", "save_all": True, "append_images": [noise]}),
    }
    for name, (image, options) in saved.items():
        image.save(images / name, **options)
    (images / "truncated.jpg").write_bytes(jpeg.getvalue()[:900])
    (images / "empty.jpg").write_bytes(b"")
    (images / "page.jpg").write_bytes(b"<html>404</html>")
    (images / "bomb.png").write_bytes(png_header(50_000, 50_000))
    (images / "clip.mp4").write_bytes(clip(12))
    (images / "broken.mp4").write_bytes(clip(12)[:300])
    (images / "frames").mkdir()
    for number in range(3):
        noise.save(images / "frames" / f"{number}.jpg")
    os.mkfifo(images / "pipe.jpg")


def image_cases() -> list[Case]:
    video = turns("<video>\nWhat happens?", "Nothing.")
    return [
        Case("a good image", shown("good.png"), None),
        Case("missing file", shown("absent.jpg"), "file missing"),
        Case("a folder or a pipe in place of a file", shown("pipe.jpg"), "file missing"),
        Case("truncated JPEG", shown("truncated.jpg"), "unreadable image"),
        Case("zero-byte file", shown("empty.jpg"), "empty file"),
        Case("not an image (an error page)", shown("page.jpg"), "unreadable image"),
        Case("GIF", shown("a.gif"), None),
        Case("CMYK", shown("cmyk.jpg"), None),
        Case("16 bits a channel", shown("sixteen.png"), None),
        Case("palette", shown("palette.png"), None),
        Case("alpha", shown("alpha.png"), None),
        Case("EXIF rotation", shown("rotated.jpg"), None),
        Case("30,000 pixels wide", shown("wide.png"), None),
        Case("1×1", shown("dot.png"), None),
        Case("decompression bomb", shown("bomb.png"), "image too large"),
        Case("a good video", {"video": "clip.mp4", "conversations": video}, None),
        Case("a folder of frames", {"video": "frames", "conversations": video}, None),
        Case("unreadable video", {"video": "broken.mp4", "conversations": video}, "unreadable video"),
        Case("a path that climbs out of the image root", shown("../secret.png"), "path outside the image root"),
        Case("an absolute path outside of it", shown("/etc/hostname"), "path outside the image root"),
        Case("one that climbs with backslashes", shown("..\\secret.png"), "path outside the image root"),
        Case("backslashes between folders", shown("frames\\1.jpg"), None),
        Case("a name in the other Unicode form", shown("cafe\u0301.png"), None),
        Case("an image followed by a preview (MPO)", shown("phone.jpg"), None),
        Case("broken base64", shown("data:image/png;base64,é"), "unreadable image"),
        Case("a URL", shown("https://example.org/a.png"), "remote image"),
    ]


def records() -> list[Case]:
    def of(*roles: str) -> dict[str, Any]:
        return {"conversations": [{"from": role, "value": "Some words."} for role in roles]}

    return [
        Case(
            "broken JSON line", b'{"id": "c0", "conversations": [{"from": "human", "value": "never clo', "broken JSON"
        ),
        Case("non-UTF-8 bytes", b'{"conversations": [{"from": "human", "value": "caf\xe9"}]}', "not UTF-8"),
        Case("half a surrogate pair", {"conversations": turns("Hi \ud83d", "Hello.")}, "not UTF-8"),
        Case("half a surrogate pair in an id", {"id": "\ud83d", "conversations": turns("Hi", "Hello.")}, None),
        Case("nested ten thousand deep", b"[" * 10_000 + b"]" * 10_000, "broken JSON"),
        Case("not an object", b'["a", 1]', "wrong type"),
        Case("wrong types", {"conversations": [{"from": "human", "value": 5}]}, "wrong type"),
        Case("an image that is a number", {"image": 5, "conversations": turns("<image>", "A cat.")}, "wrong type"),
        Case("unknown columns", {"prompt": "a", "completion": "b"}, "unknown layout"),
        Case("unknown role", of("human", "tool"), "unknown role"),
        Case("empty conversation", {"conversations": []}, "empty conversation"),
        Case("two turns of the same side in a row", of("human", "human", "gpt"), "turn order"),
        Case("first turn by the assistant", of("gpt", "human", "gpt"), None),
        Case("no answer", of("human"), "no answer"),
        Case("a last question without an answer", of("human", "gpt", "human"), None),
        Case("empty answer", {"conversations": turns("What?", "")}, "empty answer"),
        Case("empty question", {"conversations": turns("", "A cat.")}, "empty question"),
        Case(
            "fewer images than markers",
            {"image": "good.png", "conversations": turns("<image> <image>", "A")},
            "image count",
        ),
        Case(
            "more images than markers",
            {"image": ["good.png"] * 2, "conversations": turns("<image>", "A")},
            "image count",
        ),
        Case("a marker and no image", {"conversations": turns("<image>\nWhat?", "A cat.")}, "image count"),
        Case("images and no marker", {"image": "good.png", "conversations": turns("What?", "A cat.")}, None),
        Case("an image in a system message", misplaced(), "misplaced image"),
        Case("special-token text in a user's message", {"conversations": turns("</s> <s> <|im_end|>", "Sure.")}, None),
        Case("special-token text in an answer", {"conversations": turns("Hi", "<image></s>")}, None),
        Case("over-long answer", {"conversations": turns("Tell!", "word " * 3000)}, None),
        Case("over-long question", {"conversations": turns("word " * 3000, "Yes.")}, "too long"),
        Case("more images than fit", crowd(), "too long"),
        Case("more rounds than fit", rounds(), None),
        Case("duplicate ids", {"id": "twice", "conversations": turns("One?", "Yes.")}, None),
        Case("duplicate ids", {"id": "twice", "conversations": turns("Two?", "Yes.")}, None),
        Case("blank caption turn", {"image": "good.png", "conversations": turns("<image>", "A cat.")}, None),
    ]


def misplaced() -> dict[str, Any]:
    return {
        "image": "good.png",
        "messages": [
            {"role": "system", "content": "<image>"},
            {"role": "user", "content": "What?"},
            {"role": "assistant", "content": "A cat."},
        ],
    }


def crowd() -> dict[str, Any]:
    """Forty images of 16 tokens in one turn: cutting would go through one."""
    return {"image": ["good.png"] * 40, "conversations": turns("<image>" * 40 + "How many?", "Forty.")}


def rounds() -> dict[str, Any]:
    """An image a round: cut before the first round whose image no longer fits."""
    texts = [text for _ in range(30) for text in ("<image>\nWhat is it?", "A cat.")]
    return {"image": ["good.png"] * 30, "conversations": turns(*texts)}
