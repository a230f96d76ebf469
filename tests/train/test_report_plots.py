"""The plots of a run say what they are of, how sure they are, and nothing lies over the bars."""

import math

import pytest
from PIL import Image

from tests.tiny import make_image, tiny_llava, tiny_processor
from train.config import parse_config
from train.report_plots import describe_run, draw_accuracy, draw_kept, draw_loss, standard_error
from train.scores import Scores
from train.sweep_results import Group, draw_sweep
from visionzip import ZipConfig, attach
from visionzip.analysis.trace import trace

FACTS = {"tokens": 16, "of_tokens": 81, "questions": 400}
ONE_TYPE = {
    name: Scores({"count": (right, 400)})
    for name, right in (("full", 396), ("training_free", 240), ("fine_tuned", 360))
}
TWO_TYPES = {
    name: Scores({"count": (100, 100), "colour": (right, 300)}) for name, right in (("full", 296), ("fine_tuned", 150))
}


@pytest.fixture
def about():
    config = {"output_dir": "x", "model": {"path": "data/tiny-llava"}, "zip": {"dominant": 13, "contextual": 3},
              "data": {"sources": [{"path": "x.json"}]}}  # fmt: skip
    return describe_run(parse_config(config), FACTS)


def texts(figure):
    from matplotlib.text import Text

    return " ".join(text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize("scores", [ONE_TYPE, TWO_TYPES])
def test_the_legend_is_beside_the_bars(scores, about, tmp_path, figures):
    draw_accuracy(tmp_path / "a.png", scores, FACTS, about)
    (figure,) = figures
    (legend,) = figure.legends
    assert figure.axes[0].get_legend() is None
    assert not legend.get_window_extent().overlaps(figure.axes[0].get_window_extent())


def test_every_bar_has_its_standard_error(about, tmp_path, figures):
    draw_accuracy(tmp_path / "a.png", ONE_TYPE, FACTS, about)
    axes = figures[0].axes[0]
    lines = [bars.errorbar.lines[2][0].get_segments()[0] for bars in axes.containers if hasattr(bars, "errorbar")]
    heights = [(line[1][1] - line[0][1]) / 2 for line in lines]
    assert heights == pytest.approx([100 * math.sqrt(p * (1 - p) / 400) for p in (0.99, 0.6, 0.9)])
    assert standard_error(0, 0) == 0


def test_titles_name_model_budget_and_questions(about, tmp_path, figures):
    draw_accuracy(tmp_path / "a.png", ONE_TYPE, FACTS, about)
    draw_loss(tmp_path / "l.png", [{"step": step, "loss": 1 / step} for step in range(1, 4)], about)
    for figure in figures:
        assert "tiny-llava, 16 of 81 visual tokens (13 + 3, visionzip)" in texts(figure)
    assert "400 questions" in texts(figures[0])
    assert all(float(tick).is_integer() for tick in figures[1].axes[0].get_xticks())


@pytest.mark.parametrize(("seeds", "spread", "half"), [(3, 0.02, 2.0), (1, None, 100 * math.sqrt(0.8 * 0.2 / 400))])
def test_a_sweep_shows_spread_over_seeds_or_standard_errors(seeds, spread, half, tmp_path, figures):
    group = Group({"selector": "visionzip", "budget": "16"}, 16, seeds, 0.5, 0.8, spread)
    draw_sweep(tmp_path / "s.png", [group], 0.99, 81, 400, "tiny-llava, ")
    (figure,) = figures
    free, tuned = (next(c.lines[2][0].get_segments()[0] for c in axes.containers) for axes in figure.axes)
    assert (tuned[1][1] - tuned[0][1]) / 2 == pytest.approx(half)
    assert (free[1][1] - free[0][1]) / 2 == pytest.approx(100 * math.sqrt(0.5 * 0.5 / 400))
    assert "tiny-llava, 400 questions" in texts(figure)


def test_kept_patches_come_with_question_and_answers(tmp_path, monkeypatch):
    from data.questions import Question
    from visionzip.analysis import draw

    said = []
    panel = draw.draw_panel
    monkeypatch.setattr(
        draw, "draw_panel", lambda views, title, note: said.extend((title, note)) or panel(views, title, note)
    )
    model, processor = tiny_llava(), tiny_processor()
    attach(model, processor, ZipConfig(dominant=5, contextual=3))
    question = Question("7/0", "eval", "colour", "What colour is it?", "red", {})
    path = draw_kept(
        tmp_path / "k.png", trace(model, make_image(0)).tiles[0], question, {"full": "red", "fine_tuned": ""}
    )
    assert said[0] == "What colour is it?"
    assert said[1].splitlines()[0] == "expected: red · full tokens: red · fine-tuned: (nothing)"
    with Image.open(path) as sheet:
        assert sheet.width > 4 * 320
