"""`visionzip visualize`, through its command line."""

import re

import numpy as np
import pytest
from PIL import Image

from tests.analysis.conftest import BAD
from tests.tiny import make_image
from visionzip import ZipConfig, attach
from visionzip.analysis.visualize import visualize
from visionzip.cli import main
from visionzip.images import decode_image
from visionzip.video import decode_video


def test_a_folder(model_folder, images, tmp_path, capsys):
    out = tmp_path / "look.html"
    assert (
        main(["visualize", str(model_folder), str(images), "--out", str(out), "--dominant", "5", "--contextual", "3"])
        == 0
    )
    said = capsys.readouterr()
    for name in ("a.jpg", "b & c.png", "more/a.jpg"):
        assert f"{name}: 8 of 16 tokens, holding " in said.out
    for name, reason in BAD.items():
        assert re.search(f"skipped {name}: .*{reason}", said.err)
    for ending in ("kept", "attention"):
        drawn = {
            path.relative_to(tmp_path / "look").as_posix() for path in (tmp_path / "look").rglob(f"*.{ending}.png")
        }
        assert drawn == {f"{name}.{ending}.png" for name in ("a.jpg", "b & c.png", "more/a.jpg")}
    with Image.open(tmp_path / "look" / "a.jpg.kept.png") as sheet:
        assert sheet.width > 4 * 400


def test_the_page_stands_alone(model_folder, images, tmp_path):
    out = tmp_path / "look.html"
    main(["visualize", str(model_folder), str(images), "--out", str(out), "--dominant", "5", "--contextual", "3"])
    page = out.read_text()
    assert page.count("<section>") == 1 + 3 + 1  # table, images, what was skipped
    assert page.count("<figure>") == 4 * 3
    assert "<script" not in page
    assert all(source.startswith("data:image/webp;base64,") for source in re.findall(r'src="([^"]*)"', page))
    assert all(address.startswith("#") for address in re.findall(r'href="([^"]*)"', page))
    assert "url(http" not in page
    assert "@import" not in page
    assert "b &amp; c.png" in page
    assert "empty.png: empty" in page
    assert "prefers-color-scheme: dark" in page


def test_a_video_frame_by_frame(model_folder, tmp_path, capsys):
    av = pytest.importorskip("av")
    path = tmp_path / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for place in range(12):
            frame = np.full((48, 64, 3), 20 * place, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    out = tmp_path / "video.html"
    arguments = [
        "visualize",
        str(model_folder),
        str(path),
        "--out",
        str(out),
        "--frames",
        "4",
        "--dominant",
        "5",
        "--contextual",
        "3",
    ]
    assert main(arguments) == 0
    assert "clip.mp4: 32 of 64 tokens" in capsys.readouterr().out
    sheets = sorted(found.name for found in (tmp_path / "video").glob("*.kept.png"))
    assert sheets == [f"clip.mp4.frame{number:02d}.kept.png" for number in (1, 2, 3, 4)]
    grey = [np.asarray(frame).mean() for frame in decode_video(path, 4)]
    assert np.abs(np.array(grey) - [0, 80, 140, 220]).max() < 12  # frames 0, 4, 7 and 11 of 12: as in training


def test_a_selector_without_attention_is_shown_with_it(model, processor, images, tmp_path):
    attach(model, processor, ZipConfig(dominant=5, contextual=0, selector="divprune"))
    result = visualize(model, images / "a.jpg", tmp_path / "x.html", progress=False)
    assert result.rows[0][2:4] == ("5", "16")
    assert result.rows[0][4].endswith("%")
    assert "merged into" not in result.page.read_text()


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_themes(model, processor, images, tmp_path, theme):
    from visionzip.analysis.draw import THEMES

    attach(model, processor, ZipConfig(dominant=5, contextual=3))
    result = visualize(model, images / "a.jpg", tmp_path / "x.html", theme=theme, progress=False)
    for path in result.images:
        with Image.open(path) as drawn:
            assert drawn.convert("RGB").getpixel((2, 2)) == THEMES[theme].background


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--dominant", "15", "--contextual", "3"], "the encoder makes 17 tokens per image"),
        (["--dominant", "0"], "dominant=0 can't be met"),
    ],
)
def test_impossible_budgets(model_folder, images, capsys, change, message):
    assert main(["visualize", str(model_folder), str(images), *change]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("what", ["nothing", "no images", "unreadable"])
def test_no_image_at_all(model_folder, tmp_path, capsys, what):
    place = tmp_path / "in"
    if what != "nothing":
        place.mkdir()
    if what == "unreadable":
        (place / "a.jpg").write_text("x")
    expected = {
        "nothing": "does not exist",
        "no images": "there is no image in",
        "unreadable": "none of the 1 file(s)",
    }
    assert main(["visualize", str(model_folder), str(place), "--out", str(tmp_path / "x.html")]) == 2
    assert expected[what] in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


def test_its_own_drawings_are_not_drawn(model, processor, images, tmp_path):
    attach(model, processor, ZipConfig(dominant=5, contextual=3))
    for _ in range(2):
        assert len(visualize(model, images, images / "report.html", progress=False).rows) == 3
    assert (images / "report" / "a.jpg.kept.png").exists()
    result = visualize(model, images / "a.jpg", tmp_path / "both", progress=False)  # a folder
    assert result.page == tmp_path / "both" / "report.html"
    assert result.images[0] == tmp_path / "both" / "images" / "a.jpg.kept.png"
    with pytest.raises(ValueError, match="the results would be written among the images"):
        visualize(model, images, f"{images}.html", progress=False)


def test_a_video_that_is_not_there(model_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("visionzip.load", None)  # it is said before a model is loaded
    assert main(["visualize", str(model_folder), str(tmp_path / "x.mp4")]) == 2
    assert f"{tmp_path / 'x.mp4'}: file missing" in capsys.readouterr().err


def test_no_model(images, tmp_path, capsys):
    assert main(["visualize", str(tmp_path), str(images)]) == 2
    assert f"the config of {tmp_path} can't be read" in capsys.readouterr().err


def test_nothing_attached(model, images, tmp_path):
    with pytest.raises(ValueError, match="nothing is attached"):
        visualize(model, images, tmp_path / "x.html")


def test_images_are_upright_rgb_on_white(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90°
    make_image(0, (20, 10)).save(tmp_path / "turned.jpg", exif=exif)
    assert decode_image(tmp_path / "turned.jpg").size == (10, 20)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert decode_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_a_huge_image_is_not_decoded(tmp_path):
    make_image(0, (10, 10)).save(tmp_path / "a.png")
    with pytest.raises(ValueError, match="10 × 10 pixels"):
        decode_image(tmp_path / "a.png", max_pixels=99)
