"""Write the embedded held-out data as a task for lmms-eval, so that its command line can be tried without a download.

python -m scripts.shapes_task --out runs/lmms-shapes --images 40
lmms-eval --include_path runs/lmms-shapes --tasks visionzip_shapes --model visionzip --model_args pretrained=data/tiny-llava,full=true
"""

from __future__ import annotations

import argparse
from pathlib import Path

from data import shapes

TASK = "visionzip_shapes"
YAML = """task: {name}
dataset_path: parquet
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: generate_until
doc_to_visual: !function shapes_utils.doc_to_visual
doc_to_text: !function shapes_utils.doc_to_text
doc_to_target: answer
process_results: !function shapes_utils.process_results
generation_kwargs:
  max_new_tokens: 16
  temperature: 0
  do_sample: false
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
{types}metadata:
  - version: 1.0
"""
METRIC = "  - metric: {name}\n    aggregation: !function shapes_utils.share\n    higher_is_better: true\n"
UTILS = '''"""Functions of the task {name}."""


def doc_to_visual(doc):
    return [doc["image"].convert("RGB")]


def doc_to_text(doc, lmms_eval_specific_kwargs=None):
    return doc["question"]


def plain(text):
    return " ".join(text.lower().split()).removesuffix(".").strip()


def process_results(doc, results):
    right = float(plain(results[0]) == plain(doc["answer"]))
    return {{"exact_match": right, doc["type"]: right}}


def share(values):
    return sum(values) / len(values)
'''


def write(out: str | Path, images: int, seed: int = 0) -> int:
    """Write the task into `out`; returns the number of questions."""
    from datasets import Dataset, Features, Image, Value

    rows: dict[str, list] = {"image": [], "question": [], "answer": [], "type": []}
    for record, image in shapes.records("eval", images, seed):
        said = record["conversations"]
        for kind, asked, answered in zip(record["types"], said[::2], said[1::2], strict=True):
            rows["image"].append(image)
            rows["question"].append(asked["value"].replace("<image>", "").strip())
            rows["answer"].append(answered["value"])
            rows["type"].append(kind)
    features = Features({"image": Image(), **{name: Value("string") for name in ("question", "answer", "type")}})
    folder = Path(out).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "shapes.parquet"
    Dataset.from_dict(rows, features=features).to_parquet(str(file))
    types = "".join(METRIC.format(name=name) for name in shapes.TYPES)
    (folder / f"{TASK}.yaml").write_text(YAML.format(name=TASK, file=file, types=types))
    (folder / "shapes_utils.py").write_text(UTILS.format(name=TASK))
    return len(rows["answer"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True)
    parser.add_argument("--images", type=int, default=40, help="five questions about each (default: 40)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(f"{write(arguments.out, arguments.images, arguments.seed)} questions in {arguments.out}")


if __name__ == "__main__":
    main()
