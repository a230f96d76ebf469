"""Result files of lmms-eval → the paper's table."""

import json

import pytest

from visionzip.cli import main
from visionzip.table import BENCHMARKS, FULL, ROWS, Benchmark, build_rows, read_published, read_scores

# The averages the paper prints, to check the rows it prints them for.
PRINTED = {
    (192, False): 98.5,
    (192, True): 99.1,
    (128, False): 97.6,
    (128, True): 98.4,
    (64, False): 94.0,
    (64, True): 95.2,
}


def results(path, scores, model_args="pretrained=x"):
    """A file as lmms-eval writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tasks = {}
    for task, metrics in scores.items():
        tasks[task] = {"alias": task}
        for name, value in metrics.items():
            tasks[task] |= {f"{name},none": value, f"{name}_stderr,none": "N/A"}
    path.write_text(json.dumps({"results": tasks, "config": {"model_args": model_args}}))
    return path


PAPER = {
    "gqa": {"exact_match": 0.619},
    "mme": {"mme_perception_score": 1500.0, "mme_cognition_score": 362.0},
    "pope": {"pope_accuracy": 0.87, "pope_f1_score": 0.859},
    "mmbench_en_dev": {"gpt_eval_score": 64.7, "submission": None},
}


@pytest.mark.parametrize(("row", "average"), PRINTED.items())
def test_published_averages_follow_from_the_published_scores(row, average):
    published = read_published()
    shares = [score / published[FULL, False][name] for name, score in published[row].items()]
    assert 100 * sum(shares) / len(shares) == pytest.approx(average, abs=0.06)  # the paper rounds


def test_scores_in_the_papers_units(tmp_path):
    results(tmp_path / "a" / "1_results.json", PAPER)
    scores, full = read_scores(tmp_path / "a")
    assert scores == {"GQA": pytest.approx(61.9), "MMB": 64.7, "MME": 1862.0, "POPE": pytest.approx(85.9)}
    assert not full


def test_several_files_and_the_newest_of_a_task(tmp_path):
    import os

    old = results(tmp_path / "b_results.json", {"gqa": {"exact_match": 0.1}, "mmmu_val": {"mmmu_acc": 0.3}})
    results(tmp_path / "a_results.json", {"gqa": {"exact_match": 0.5}})
    os.utime(old, (1, 1))
    assert read_scores(tmp_path)[0] == {"GQA": 50.0, "MMMU": 30.0}


def test_shares_of_the_run_with_all_tokens(tmp_path):
    results(tmp_path / "full_results.json", {"gqa": {"exact_match": 0.6}}, "pretrained=x,full=True")
    results(tmp_path / "ft_results.json", {"gqa": {"exact_match": 0.57}})
    rows, of = build_rows({"ft": tmp_path / "ft_results.json", "full": tmp_path / "full_results.json"}, budget=64)
    assert [row.label for row in rows] == [
        "ft",
        "full",
        "published, 576 tokens",
        "published, 64 tokens",
        "published, 64 tokens ‡",
    ]
    assert of == "full, measured here"
    assert rows[0].average == pytest.approx(0.95)
    assert rows[3].average == pytest.approx(55.1 / 61.9)  # over what was measured, and of its own row


def test_shares_without_one(tmp_path):
    rows, of = build_rows({"ft": results(tmp_path / "ft_results.json", {"gqa": {"exact_match": 0.57}})})
    assert rows[0].average == pytest.approx(57 / 61.9)
    assert "published uncompressed LLaVA-1.5-7B" in of
    assert len(rows) == 1 + len(ROWS)


def test_as_a_command(tmp_path, capsys):
    ft = results(tmp_path / "ft_results.json", {**PAPER, "mine": {"acc": 0.25}})
    assert main(["table", f"ft={ft}", "--budget", "64", "--out", str(tmp_path / "table.md")]) == 0
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "| | GQA | MMB | MME | POPE | mine | average share |"
    assert lines[2] == "| ft | 61.9 (100.0 %) | 64.7 (100.0 %) | 1862 (100.0 %) | 85.9 (100.0 %) | 25.0 | **100.0 %** |"
    assert lines[5].startswith(
        "| published, 64 tokens ‡ | 57.0 (92.1 %) | 61.5 (95.1 %) | 1756 (94.3 %) | 80.9 (94.2 %) | – | **93.9 %**"
    )
    assert main(["table", str(ft), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["scores"]["mine"] == 25.0


def test_refusals(tmp_path, capsys):
    good = results(tmp_path / "a" / "x_results.json", PAPER)
    (tmp_path / "bad_results.json").write_text("{")
    (tmp_path / "numbers_results.json").write_text('{"results": {"gqa": 3}}')
    results(tmp_path / "less" / "x_results.json", {"pope": {"pope_accuracy": 0.8}})
    for arguments, message in (
        ([tmp_path / "nowhere"], "there is no result file of lmms-eval in"),
        ([tmp_path / "bad_results.json"], "is not a result file of lmms-eval (JSONDecodeError"),
        ([tmp_path / "less"], "pope has no pope_f1_score among its results"),
        ([tmp_path / "numbers_results.json"], "is not a result file of lmms-eval (TypeError"),
        ([results(tmp_path / "o" / "x_results.json", {})], "contains no score: its results are of no task"),
        ([good, "--full", "other"], "--full other: expected one of x_results.json"),
        ([f"a={good}", f"a={good}"], "two results are called a"),
    ):
        assert main(["table", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err


def test_the_papers_benchmarks_are_columns():
    names = ["GQA", "MMB", "MME", "POPE", "SQA", "VQAv2", "TextVQA", "MMMU", "SEED", "MMVet", "LLaVA-B"]
    assert [benchmark.name for benchmark in BENCHMARKS] == names
    assert all(list(scores) == names for scores in read_published().values())


def test_a_new_benchmark_is_one_entry(tmp_path, monkeypatch, capsys):
    """A task of lmms-eval that the paper does not have: its own metrics and scale, a column in its place, no published score."""
    monkeypatch.setattr(
        "visionzip.table.BENCHMARKS",
        [*BENCHMARKS[:1], Benchmark("Charts", ("chartqa",), ("relaxed",)), *BENCHMARKS[1:]],
    )
    ft = results(tmp_path / "ft_results.json", {**PAPER, "chartqa": {"acc": 0.1, "relaxed": 0.625}})
    assert main(["table", f"ft={ft}", "--budget", "64", "--out", str(tmp_path / "table.md")]) == 0
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0] == "| | GQA | Charts | MMB | MME | POPE | average share |"
    assert lines[2].startswith("| ft | 61.9 (100.0 %) | 62.5 | 64.7 (100.0 %)")
    assert lines[5].startswith("| published, 64 tokens ‡ | 57.0 (92.1 %) | – | 61.5 (95.1 %)")
