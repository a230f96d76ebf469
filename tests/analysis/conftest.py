"""A model on disk and a folder of images, some of them unreadable, as a user has them."""

from __future__ import annotations

import pytest

from tests.tiny import make_image, tiny_llava, tiny_processor


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llava().save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture
def images(tmp_path):
    """Three good images, one of them in a subfolder, and four files that are not images."""
    folder = tmp_path / "images"
    (folder / "more").mkdir(parents=True)
    for place, name in enumerate(("a.jpg", "b & c.png", "more/a.jpg")):
        make_image(place, (60, 48)).save(folder / name)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    (folder / "torn.png").write_bytes((folder / "b & c.png").read_bytes()[:400])
    (folder / "notes.txt").write_text("not looked at")
    return folder


BAD = {"empty.png": "empty file", "text.jpg": "unreadable image", "torn.png": "unreadable image"}
