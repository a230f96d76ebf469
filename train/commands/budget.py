"""which budget do I need? accuracy, prefill time and KV memory at several, on your own questions

  visionzip budget runs/demo/projector runs/demo/data/eval.json
  visionzip budget runs/elastic questions.jsonl --images photos/ --budgets 8,16,32,64,all --plot budget.png --json budget.json

<data> is a file of questions with their answers, in any layout that training reads. The knee of the curve is marked: the smallest
budget beyond which more tokens buy little. The model is loaded once and answers at every budget; without --budgets these are the
ones that its projector was trained for, and all tokens.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from data.storage import storage_message
from visionzip.argument_types import at_least
from visionzip.commands import _model
from visionzip.commands._outputs import check_outputs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _model.add_arguments(parser)
    parser.add_argument("data", help="questions and answers: .json, .jsonl, Parquet, or a hub data set")
    parser.add_argument("--images", help="root of relative image paths (default: the file's own folder)")
    parser.add_argument("--template", help="template of the prompts (default: the processor's own, else llava_v1)")
    parser.add_argument("--budgets", help="32, 27+5, 0.1 or all, separated by commas")
    parser.add_argument(
        "--max-questions",
        type=at_least(1),
        default=500,
        help="ask at most this many questions, the first ones (default: 500)",
    )
    parser.add_argument("--batch-size", type=at_least(1), default=8, help="questions asked at once (default: 8)")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=32, help="longest answer (default: 32)")
    parser.add_argument("--metric", default="exact_match", help="how an answer is scored (train/metrics/)")
    parser.add_argument(
        "--repeats", type=at_least(1), default=3, help="timed runs, of which the median is reported (default: 3)"
    )
    parser.add_argument("--json", help="write all numbers to this JSON file")
    parser.add_argument("--plot", help="write a plot to this PNG file")
    parser.add_argument("--theme", choices=("light", "dark"), default="light", help="theme of the plot")


def run(arguments: argparse.Namespace) -> int:
    try:
        show_curve(arguments)
    except (ValueError, ImportError, OSError) as error:
        message = storage_message(error)
        print(f"visionzip budget: {message or error}", file=sys.stderr)
        return 74 if message else 2
    return 0


def show_curve(arguments: argparse.Namespace) -> None:
    """Measure and print.

    Raises:
        ValueError: for a model, data or budget that can't be used.
    """
    from visionzip.analysis import style
    from visionzip.budgets import parse_budgets

    if arguments.budgets is not None:
        parse_budgets(arguments.budgets)  # a mistake is found before a model is loaded
    check_outputs(arguments)
    from data.config import DataConfig, EvalSection, SourceConfig
    from data.images import PixelImages
    from data.questions import Question, build_questions
    from train import budget_curve
    from train.held_out import image_inputs
    from train.metrics import METRICS
    from visionzip import attached
    from visionzip.prompts import usual_template_name

    METRICS[arguments.metric]
    source = SourceConfig(path=arguments.data, images=arguments.images)
    section = EvalSection.model_validate(
        {
            "sources": [source],
            "batch_size": arguments.batch_size,
            "max_new_tokens": arguments.max_new_tokens,
            "metric": arguments.metric,
        }
    )
    model, processor = _model.load(arguments)
    attachment = attached(model)
    assert attachment is not None
    template = arguments.template or usual_template_name(processor)
    data = DataConfig.model_validate(
        {"sources": [source], "pad_images": attachment.config.pad_images, "template": template}
    )
    questions = build_questions(data, processor, arguments.max_questions, PixelImages(data, processor))
    asked = (questions[number] for number in range(len(questions)))
    first = next((one for one in asked if isinstance(one, Question) and image_inputs(one)), None)
    if first is None:
        raise ValueError(
            f"{arguments.data} has no usable question with an image ({len(questions.rejections)} records rejected)"
        )
    stock = attachment.token_counts(**image_inputs(first))[0][0]
    budgets = (
        arguments.budgets.split(",") if arguments.budgets is not None else budget_curve.default_budgets(model, stock)
    )
    points = budget_curve.measure_budgets(
        model, processor, questions, section, [budget.strip() for budget in budgets], repeats=arguments.repeats,
        report=lambda doing: print(f"  {doing}", file=sys.stderr, flush=True),
    )  # fmt: skip
    about = (
        f"{arguments.model}, {len(questions)} questions of {Path(arguments.data).name}, {model.device.type}, batch 1"
    )
    print(f"{about}\n\n{budget_curve.render_points(points)}")
    if arguments.json:
        found = budget_curve.facts(
            points, model=arguments.model, data=arguments.data, questions=len(questions), metric=arguments.metric
        )
        Path(arguments.json).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if arguments.plot:
        with style.style(arguments.theme):
            style.save_figure(budget_curve.draw_points(points, about), arguments.plot)
