"""`visionzip analyze`: right, resumable, and drawn."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.analysis.conftest import BAD
from visionzip import ZipConfig, attach
from visionzip.analysis import analyze as module
from visionzip.analysis.analyze import LINES, analyze, render_summary, summarize, write
from visionzip.analysis.trace import trace
from visionzip.cli import main
from visionzip.images import decode_image

BUDGET = ZipConfig(dominant=5, contextual=3)


@pytest.fixture
def ready(model, processor):
    return attach(model, processor, BUDGET)


def test_the_command(model_folder, images, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["analyze", str(model_folder), str(images), "--out", str(out), "--dominant", "5", "--contextual", "3"]
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "3 images, 16 patches per image" in said.out
    assert all(f"skipped {name}: " in said.err for name in BAD)
    names = {path.name for path in out.iterdir()}
    plots = {f"{name}.png" for name in ("spread", "budget", "layers", "agreement", "layer_maps")}
    assert names == {LINES, "analysis.json", "analysis.md", *plots}
    for name in plots:
        with Image.open(out / name) as drawn:
            assert len(np.unique(np.asarray(drawn.convert("L")))) > 20  # something is drawn
    facts = json.loads((out / "analysis.json").read_text())
    assert facts["skipped"].keys() == BAD.keys()
    assert main(arguments) == 0
    assert "measured before: 3 images" in capsys.readouterr().out


def test_budgets_are_those_of_the_scores(ready, images, tmp_path):
    facts = summarize(analyze(ready, images, tmp_path / "out", progress=False))
    needed = []
    for name in ("a.jpg", "b & c.png", "more/a.jpg"):
        best = (
            trace(ready, decode_image(images / name))
            .tiles[0]
            .attention.flatten()
            .sort(descending=True)
            .values.cumsum(0)
        )
        needed.append(int((best < 0.9).sum()) + 1)
    assert facts["budget_for"]["90%"]["patches"]["mean"] == pytest.approx(np.mean(needed))
    assert facts["kept_patches_per_tile"] == 4
    assert [layer["layer"] for layer in facts["layers"]] == [1, 2, 3]  # also the one the compressed model does not run
    assert np.diag(facts["agreement"]) == pytest.approx(1)
    assert sum(facts["spread"]["share_of_patches"]) == pytest.approx(1, abs=1e-3)
    assert facts["curve"][0] == 0
    assert facts["curve"][-1] == pytest.approx(1, abs=1e-4)
    assert f"| 90% | {np.median(needed):.0f} (" in render_summary(facts)


def test_goes_on_where_it_was_stopped(ready, images, tmp_path, monkeypatch):
    whole = summarize(analyze(ready, images, tmp_path / "whole", progress=False))

    measured = []
    plain = module.measure_image

    def stopping(attachment, name, image):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(name)
        return plain(attachment, name, image)

    monkeypatch.setattr(module, "measure_image", stopping)
    with pytest.raises(KeyboardInterrupt):
        analyze(ready, images, tmp_path / "out", progress=False)
    with open(tmp_path / "out" / LINES, "a") as file:
        file.write('{"name": "more/a.jpg", "ti')  # the kill fell on a line that was being written
    monkeypatch.setattr(module, "measure_image", lambda *a: (measured.append(a[1]), plain(*a))[1])
    found = analyze(ready, images, tmp_path / "out", progress=False)
    assert found.resumed == 2
    assert measured == ["a.jpg", "b & c.png", "more/a.jpg"]  # each once
    assert summarize(found) == whole


def test_refuses_to_mix(ready, processor, images, tmp_path):
    analyze(ready, images, tmp_path / "out", progress=False)
    attach(ready, processor, ZipConfig(dominant=6, contextual=3))
    with pytest.raises(ValueError, match="measured with another zip"):
        analyze(ready, images, tmp_path / "out", progress=False)


def test_more_images_than_before(ready, images, tmp_path):
    assert len(analyze(ready, images, tmp_path / "out", limit=2, progress=False).lines) == 2
    assert len(analyze(ready, images, tmp_path / "out", progress=False).lines) == 3
    assert len(analyze(ready, images, tmp_path / "out", limit=1, progress=False).lines) == 1


def test_another_image_of_the_same_name_is_measured(ready, images, tmp_path):
    one = analyze(ready, images, tmp_path / "out", limit=1, progress=False)
    (images / "a.jpg").write_bytes((images / "more" / "a.jpg").read_bytes())
    other = analyze(ready, images, tmp_path / "out", limit=1, progress=False)
    assert (other.resumed, len(other.lines)) == (0, 1)
    assert other.lines[0]["curve"] != one.lines[0]["curve"]
    assert analyze(ready, images, tmp_path / "out", limit=1, progress=False).lines == other.lines


@pytest.mark.parametrize("line", ["[]", "{garbage}", '{"name": "a.jpg"}'])
def test_a_damaged_file_of_measurements(ready, images, tmp_path, line):
    analyze(ready, images, tmp_path / "out", limit=1, progress=False)
    with open(tmp_path / "out" / LINES, "a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=rf"{LINES} is damaged .*delete it to measure again"):
        analyze(ready, images, tmp_path / "out", progress=False)


def test_its_own_plots_are_not_measured(model_folder, images, capsys):
    arguments = ["analyze", str(model_folder), str(images), "--dominant", "5", "--contextual", "3", "--out"]
    for _ in range(2):
        assert main([*arguments, str(images / "out")]) == 0
        assert "3 images, 16 patches per image" in capsys.readouterr().out
    assert main([*arguments, str(images)]) == 2
    assert "the results would be written among the images in" in capsys.readouterr().err


def test_nothing_to_analyze(ready, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_text("x")
    with pytest.raises(ValueError, match="none of the 1 file"):
        analyze(ready, tmp_path / "in", tmp_path / "out", progress=False)


def test_plots_and_table_say_the_same_numbers(ready, images, tmp_path, figures):
    """The table had medians where the plot had means: 61 patches in one, 60 in the other."""
    found = analyze(ready, images, tmp_path / "out", progress=False)
    for line, budgets in zip(found.lines, ([1, 5, 9], [2, 6, 10], [9, 13, 16]), strict=True):
        line["budgets"] = budgets
    write(found, name="tiny")
    curve = next(figure for figure in figures if figure.axes[0].get_xlabel().startswith("patches kept"))
    labels = [text.get_text() for text in curve.legends[0].get_texts()]
    lines = (tmp_path / "out" / "analysis.md").read_text().splitlines()
    for level, patches in (("80%", 2), ("90%", 6), ("95%", 10)):
        assert f"{level}: {patches} patches" in labels
        assert any(line.startswith(f"| {level} | {patches} (") for line in lines)
    ticks = [tick for figure in (curve,) for tick in figure.axes[0].get_xticks()]
    assert all(float(tick).is_integer() for tick in ticks)
    for figure in figures:
        assert any(
            "tiny, " in text.get_text() for text in figure.findobj(match=lambda artist: hasattr(artist, "get_text"))
        )
