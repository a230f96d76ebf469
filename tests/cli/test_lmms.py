"""lmms-eval itself, through its own command line, on a local task over the embedded data; and what the plug-in does with a question."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from scripts.shapes_task import TASK, write
from tests.tiny import make_image, tiny_llava, tiny_processor
from visionzip import ZipConfig, attach, attached, load, save
from visionzip.cli import main

ROOT = Path(__file__).parents[2]
INSTALLED = ROOT / ".venv" / "lmms-eval"  # `make setup` puts it there
BUDGET = ZipConfig(dominant=5, contextual=3)


@pytest.fixture
def projector(tmp_path):
    """A projector that was trained, on a base that says words."""
    model, processor = tiny_llava(), tiny_processor()
    model.generation_config.max_length = None
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    attach(model, processor, BUDGET)
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.bias.normal_()
    return save(model, tmp_path / "projector")


@pytest.fixture
def lmms(monkeypatch):
    """`visionzip.lmms`, with lmms-eval behind the environment's own packages."""
    assert INSTALLED.is_dir(), f"{INSTALLED} is missing; run make setup"
    monkeypatch.setattr(sys, "path", [*sys.path, str(INSTALLED)])
    import visionzip.lmms

    return visionzip.lmms


def request(question, images, settings=None, doc=0):
    return SimpleNamespace(args=(question, settings or {"max_new_tokens": 5}, lambda shown: shown, doc, "task", "test"))


def test_it_takes_the_fields_of_a_config(lmms, projector):
    base = str(projector.parent / "base")
    asked = lmms.VisionZip(base, device="cpu", dominant=5, contextual=3, selector="focus", positions="original")
    assert attached(asked.model).config == ZipConfig(dominant=5, contextual=3, selector="focus", positions="original")
    with pytest.raises(ValueError, match=r"known: .*positions"):
        lmms.VisionZip(base, device="cpu", place="original")


def test_its_command_line(projector, tmp_path, capsys):
    assert write(tmp_path / "task", images=2) == 10
    environment = {
        **os.environ,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(INSTALLED),  # the toolkit is the installed one, found through its entry point
    }
    done = subprocess.run(
        [sys.executable, "-m", "lmms_eval", "--model", "visionzip", "--model_args", f"pretrained={projector}",
         "--include_path", tmp_path / "task", "--tasks", TASK, "--batch_size", "3",
         "--output_path", tmp_path / "out", "--log_samples"],
        env=environment, cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = list((tmp_path / "out").rglob("*_samples_*.jsonl"))
    assert len(found) == 1, done.stderr[-3000:]  # lmms-eval exits with 0 when it fails
    rows = [json.loads(line) for line in found[0].read_text().splitlines()]
    assert len(rows) == 10

    # the same questions, one by one, through the library
    from datasets import load_dataset

    model, processor = load(projector, "cpu")
    asked = load_dataset("parquet", data_files=str(tmp_path / "task" / "shapes.parquet"), cache_dir=str(tmp_path))[
        "train"
    ]
    answers = set()
    for row in rows:
        doc = asked[row["doc_id"]]
        text = (
            "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
            f"and polite answers to the user's questions. USER: <image>\n{doc['question']} ASSISTANT:"
        )
        inputs = processor(text=text, images=doc["image"], return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        expected = processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert "".join(row["filtered_resps"]).split() == expected.split()
        answers.add(expected)
    assert len(answers) > 1

    assert main(["table", f"mine={tmp_path / 'out'}"]) == 0
    assert f"| | {TASK} | average share |" in capsys.readouterr().out


class TestPlugIn:
    @pytest.fixture
    def model(self, lmms, projector):
        made = lmms.VisionZip(pretrained=str(projector), device="cpu")
        made.task_dict = {"task": {"test": [[make_image(0)], [make_image(1), make_image(2)], []]}}
        return made

    def test_a_batch_answers_as_single_questions_do(self, lmms, model):
        questions = [request("what", [], doc=0), request("is this <image> a <image>", [], doc=1), request("how many", [], doc=2),
                     request("what is this", [], {"max_new_tokens": 3}, doc=0)]  # fmt: skip
        alone = [model.generate_until([question])[0] for question in questions]
        model.batch_size = 4
        assert model.generate_until(questions) == alone
        assert len(set(alone)) > 2

    def test_all_tokens(self, lmms, projector, model):
        whole = lmms.VisionZip(pretrained=str(projector), device="cpu", full=True)
        whole.task_dict = model.task_dict
        for made, tokens in ((whole, 16), (model, 8)):
            ids = made.processor(text="<image>", images=make_image(), return_tensors="pt")["input_ids"]
            assert ids.shape[1] == 1 + tokens
        whole.generate_until([request("what", [], doc=1)])

    def test_loglikelihood(self, model):
        def ask(answer):
            return SimpleNamespace(args=("what is this", answer, lambda shown: shown, 0, "task", "test"))

        likely = model.generate_until([request("what is this", [], {"max_new_tokens": 1})])[0]
        words = ["red", "blue", "circle", "square", "yes", "no", "two"]
        found = dict(zip(words, model.loglikelihood([ask(word) for word in words]), strict=True))
        assert all(score < 0 for score, _ in found.values())
        assert [word for word, (_, greedy) in found.items() if greedy] == ([likely] if likely in words else [])
        best, greedy = model.loglikelihood([ask(likely)])[0]
        assert greedy
        assert best >= max(score for score, _ in found.values())

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"budgets": 64}, "budgets not known; known: pretrained, budget, dominant"),
            ({"budget": 64, "full": True}, "budget sets dominant, contextual and full"),
            ({"budget": 64}, "can't be met"),
            ({"template": "v2"}, "template=v2; expected one of chat, llava_v1"),
            ({"dominant": 6, "contextual": 2}, "trained for something else"),
        ],
    )
    def test_wrong_arguments(self, lmms, projector, arguments, message):
        with pytest.raises(ValueError, match=message):
            lmms.VisionZip(pretrained=str(projector), device="cpu", **arguments)

    def test_no_video(self, model):
        model.task_dict = {"task": {"test": [["film.mp4"]]}}
        with pytest.raises(ValueError, match="answers questions about images; the task gave a str"):
            model.generate_until([request("what", [])])

    def test_prompts(self, lmms, model):
        def render(question, images):
            return model.template.render([lmms.message_of(question, images)], ["<image>"] * images)

        assert render("what?", 1).startswith("A chat between a curious user and")
        assert render("what?", 1).endswith(" questions. USER: <image>\nwhat? ASSISTANT:")
        assert render("a <image> b <image>", 2).endswith(" questions. USER: a <image> b <image> ASSISTANT:")
        assert render("a <image> b", 2).endswith(" questions. USER: <image><image>\na  b ASSISTANT:")
        model.processor.chat_template = (
            "{% for m in messages %}{% for p in m.content %}"
            "{% if p.type == 'image' %}<image>{% else %}[{{ p.text }}]{% endif %}{% endfor %}{% endfor %}"
        )
        model.template = lmms.usual_template(model.processor)
        assert render("a <image> b", 1) == "[a ]<image>[ b]"
        assert render("a b", 0) == "[a b]"
        assert render("a b", 2) == "<image><image>[a b]"

    def test_ids_are_those_llavas_own_evaluation_gives(self, lmms, model):
        """LLaVA tokenizes what stands before and behind an image on its own, so a `▁` comes before the newline behind it."""
        from tests.data import kit

        model.processor = kit.processor()
        model.template = lmms.get_template("llava_v1", model.processor)
        row = model._row("What colour is the bus?", [make_image(0)])
        tokenizer = model.processor.tokenizer
        before, behind = model.template.render([lmms.question("What colour is the bus?")], ["<image>"]).split("<image>")
        expected = [1, *(tokenizer(text, add_special_tokens=False)["input_ids"] for text in (before, behind))]
        image = tokenizer.convert_tokens_to_ids("<image>")
        assert row["input_ids"].tolist() == [1, *expected[1], *[image] * kit.PLACEHOLDERS, *expected[2]]
        assert tokenizer.convert_ids_to_tokens(expected[2][0]) == "▁"

    def test_nothing_of_an_image_is_cut_off(self, lmms, model, projector):
        wide, square = Image.new("RGB", (30, 10), "white"), Image.new("RGB", (30, 30), "white")
        cropping = lmms.VisionZip(pretrained=str(projector), device="cpu", pad_images=False)
        found = [made._row("what", [image])["pixel_values"] for made in (model, cropping) for image in (wide, square)]
        padded, of_square, cropped, same_square = found
        assert torch.equal(cropped, of_square)
        assert torch.equal(same_square, of_square)
        assert not torch.equal(padded, of_square)
        whole = lmms.VisionZip(pretrained=str(projector), device="cpu", full=True)
        assert torch.equal(whole._row("what", [wide])["pixel_values"], padded), "with all tokens, too"

    def test_settings(self, lmms):
        assert lmms.sampling({"max_new_tokens": 4, "temperature": 0, "top_p": 0.5, "until": ["x"]}) == {
            "max_new_tokens": 4,
            "do_sample": False,
        }
        assert lmms.sampling({"temperature": 0.7, "top_p": 0.5}) == {
            "max_new_tokens": 1024,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.5,
        }
        assert lmms.cut(" yes\n\nno. ", ["\n\n"]) == "yes"
        assert lmms.cut("yes", None) == "yes"
