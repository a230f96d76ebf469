"""Every format gives back what was put in, and the model that comes out of it answers as the trained one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import visionzip
from tests.export.conftest import BUDGET, add_lora, answers
from tests.tiny import tiny_llava, tiny_processor
from visionzip import attach, attached, load, save
from visionzip.export import FORMATS, load_into, read_export, recognise
from visionzip.projector import fingerprint, projector_state

NAMES = ("safetensors", "llava", "merged", "peft")
OPTIONS = {"llava": {"vision_tower": "some/tower"}}


def written(model, tmp_path, name, **more):
    return save(model, tmp_path / f"llava-{name}", name, **OPTIONS.get(name, {}), **more)


def same(a, b, dtype=torch.float32):
    assert a.keys() == b.keys()
    return all(torch.equal(a[key].to(dtype), b[key].to(dtype)) for key in a)


def test_these_are_the_formats():
    assert FORMATS.names() == sorted((*NAMES, "onnx"))  # which can't be read back: tests/export/test_onnx.py


@pytest.mark.parametrize("name", NAMES)
class TestRoundTrip:
    def test_read_gives_back_what_was_trained(self, trained, tmp_path, name):
        out = written(trained, tmp_path, name, metadata={"steps": 7, "data": ["shapes"]})
        assert recognise(out).name == name
        back = read_export(out)
        dtype = torch.float16 if name == "llava" else torch.float32
        assert same(back.projector, projector_state(trained), dtype)
        assert back.header.zip == BUDGET
        assert back.header.fingerprint == fingerprint(trained)
        assert back.header.metadata == {"steps": 7, "data": ["shapes"]}
        assert back.header.toolkit_version == visionzip.__version__
        assert back.modules == ["model.multi_modal_projector"]

    def test_a_loaded_model_answers_the_same(self, trained, tmp_path, name):
        model, processor = load(written(trained, tmp_path, name), "cpu")
        if name == "llava":  # what LLaVA makes of it, too
            for parameter in trained.model.multi_modal_projector.parameters():
                parameter.data = parameter.data.half().float()
        assert attached(model).config == BUDGET
        assert torch.equal(answers(model, processor), answers(trained, attached(trained).processor))

    def test_it_is_the_start_of_a_run(self, trained, tmp_path, name):
        fresh = attach(tiny_llava(), tiny_processor(), BUDGET)
        header = load_into(fresh, written(trained, tmp_path, name))
        assert header.zip == BUDGET
        assert same(
            projector_state(fresh), projector_state(trained), torch.float16 if name == "llava" else torch.float32
        )

    def test_another_base_or_budget_is_refused_with_what_differs(self, trained, tmp_path, name):
        out = written(trained, tmp_path, name)
        other = attach(tiny_llava(seed=1), tiny_processor(), dominant=6, contextual=2)
        before = projector_state(other)
        with pytest.raises(
            ValueError, match=r"(?s)trained for something else.*ZipConfig.dominant.*encoder.*llm.*force"
        ):
            load_into(other, out)
        assert same(projector_state(other), before)
        load_into(other, out, force=True)
        assert not same(projector_state(other), before)

    def test_files_hold_no_frozen_weight(self, trained, tmp_path, name):
        out = written(trained, tmp_path, name)
        count = sum(value.numel() for value in projector_state(trained).values())
        sizes = [path.stat().st_size for path in out.iterdir() if path.suffix in (".safetensors", ".bin")]
        frozen = sum(value.numel() for value in trained.state_dict().values())
        assert sum(sizes) < 4 * count + 20_000 if name != "merged" else sum(sizes) > 4 * frozen

    def test_nothing_is_left_when_writing_fails(self, trained, tmp_path, name, monkeypatch):
        def full(*args, **kwargs):
            raise OSError("No space left on device")

        monkeypatch.setattr("visionzip.loading.write_card", full)
        with pytest.raises(OSError, match="No space"):
            written(trained, tmp_path, name)
        assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("there", NAMES)
@pytest.mark.parametrize("here", NAMES)
def test_any_format_converts_into_any_other(trained, tmp_path, here, there):
    first = written(trained, tmp_path, here, metadata={"steps": 7})
    second = save(first, tmp_path / f"llava-2-{there}", there, **OPTIONS.get(there, {}))
    dtype = torch.float16 if "llava" in (here, there) else torch.float32
    back = read_export(second)
    assert same(back.projector, projector_state(trained), dtype)
    told = {"zip": BUDGET, "fingerprint": fingerprint(trained), "metadata": {"steps": 7}}
    assert {name: getattr(back.header, name) for name in told} == told
    assert back.header.base_model == read_export(first).header.base_model == trained.config._name_or_path
    if there != "llava":
        load(second, "cpu")


def test_a_projector_keeps_its_precision_in_a_merged_half_precision_model(base, tmp_path):
    tiny_llava().to(torch.bfloat16).save_pretrained(base)
    model, processor = load(base, "cpu", config=BUDGET)
    exact = {name: torch.randn_like(value.float()) for name, value in projector_state(model).items()}
    model.model.multi_modal_projector.float()
    model.load_state_dict(exact, strict=False)
    save(model, tmp_path / "a", processor=processor)
    for number, name in enumerate(("merged", "peft", "safetensors")):
        save(tmp_path / "a" if number == 0 else tmp_path / str(number - 1), tmp_path / str(number), name)
        assert same(read_export(tmp_path / str(number)).projector, exact)
    assert load(tmp_path / "0", "cpu")[0].dtype == torch.bfloat16


class TestAdapters:
    def test_peft_round_trip(self, adapted, tmp_path):
        model, processor = load(written(adapted, tmp_path, "peft"), "cpu")
        assert torch.equal(answers(model, processor), answers(adapted, attached(adapted).processor))
        again = save(model, tmp_path / "again", "peft")
        one, two = read_export(tmp_path / "llava-peft"), read_export(again)
        assert len(one.adapters) == 8
        assert same(one.adapters, two.adapters)
        assert same(one.projector, two.projector)

    def test_merged(self, adapted, tmp_path):
        model, processor = load(written(adapted, tmp_path, "merged"), "cpu")
        assert not any("lora" in name for name, _ in model.named_parameters())
        expected = answers(adapted, attached(adapted).processor)
        torch.testing.assert_close(answers(model, processor), expected, rtol=1e-4, atol=1e-5)
        # its projector now belongs to the merged LLM, not to the base's
        with pytest.raises(ValueError, match="llm: "):
            load_into(attach(tiny_llava(), tiny_processor(), BUDGET), tmp_path / "llava-merged")

    def test_merging_from_the_file_gives_the_same(self, adapted, tmp_path):
        save(written(adapted, tmp_path, "peft"), tmp_path / "merged", "merged")
        written(adapted, tmp_path, "merged")
        one, two = (load(tmp_path / name, "cpu")[0].state_dict() for name in ("merged", "llava-merged"))
        assert same(one, two)

    @pytest.mark.parametrize("name", ["safetensors", "llava"])
    def test_formats_that_would_lose_them_refuse(self, adapted, tmp_path, name):
        with pytest.raises(ValueError, match=r"8 adapter tensors were trained too.*choose peft, or merged"):
            written(adapted, tmp_path, name)

    def test_they_are_no_start_of_a_run(self, adapted, tmp_path):
        out = written(adapted, tmp_path, "peft")
        with pytest.raises(ValueError, match="Export it as merged first"):
            load_into(attach(tiny_llava(), tiny_processor(), BUDGET), out, adapters=False)

    def test_in_the_projector(self, trained, tmp_path):
        plain = projector_state(trained)
        base = {key: value.clone() for key, value in trained.state_dict().items()}
        add_lora(trained, ["linear_1", "linear_2"])
        merged = projector_state(trained)
        assert merged.keys() == plain.keys()
        assert not same(merged, plain)
        torch.testing.assert_close(
            trained.model.multi_modal_projector(torch.ones(1, 32)),
            torch.nn.functional.linear(
                torch.nn.functional.gelu(torch.ones(1, 32) @ merged[n("1.weight")].T + merged[n("1.bias")]),
                merged[n("2.weight")],
                merged[n("2.bias")],
            ),
        )
        assert same(read_export(written(trained, tmp_path, "safetensors")).projector, merged)
        # as an adapter it stays one, on the projector it was trained on
        source = attached(trained).model.config._name_or_path
        other = tiny_llava()
        other.load_state_dict(base)
        other.save_pretrained(source)
        model, processor = load(written(trained, tmp_path, "peft"), "cpu")
        assert torch.equal(answers(model, processor), answers(trained, attached(trained).processor))
        save(tmp_path / "llava-peft", tmp_path / "merged", "merged")
        assert same(read_export(tmp_path / "merged").projector, merged)


def n(rest):
    return f"model.multi_modal_projector.linear_{rest}"


class TestPeftWithoutThisToolkit:
    @pytest.mark.parametrize("which", ["trained", "adapted"])
    def test_peft_loads_it(self, request, tmp_path, which):
        from peft import PeftModel

        model = request.getfixturevalue(which)
        processor = attached(model).processor
        expected = answers(model, processor)
        out = written(model, tmp_path, "peft")
        base = attach(tiny_llava(), tiny_processor(), BUDGET)
        wrapped = PeftModel.from_pretrained(base, out)
        assert torch.equal(answers(wrapped, attached(wrapped).processor), expected)
        assert same(projector_state(wrapped), projector_state(model))
        again = save(wrapped, tmp_path / "again", "peft", processor=processor)
        assert same(read_export(again).adapters, read_export(out).adapters)


class TestMergedCompressesByItself:
    SCRIPT = """
import sys, torch
from transformers import AutoModelForImageTextToText, AutoProcessor
trust = {"trust_remote_code": True} if sys.argv[2] == "trust" else {}
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1], **trust)
processor = AutoProcessor.from_pretrained(sys.argv[1], **trust)
sys.path.insert(0, sys.argv[3])
from tests.tiny import make_image
inputs = processor(text="USER: <image> what is <image> this", images=[make_image(1, (40, 40)), make_image(2, (40, 40))], return_tensors="pt")
with torch.no_grad():
    torch.save({"ids": inputs["input_ids"], "logits": model(**inputs).logits, "kind": type(model).__name__}, sys.argv[4])
if trust:
    import visionzip
    visionzip.attach(model, processor, dominant=3, contextual=1)
    assert processor(text="<image>", images=make_image(), return_tensors="pt")["input_ids"].shape[1] == 5
    visionzip.detach(model)
    assert processor(text="<image>", images=make_image(), return_tensors="pt")["input_ids"].shape[1] == 17
    model.save_pretrained(sys.argv[4] + "-again")
"""

    def run(self, out, tmp_path, trust, **environment):
        import os

        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", self.SCRIPT, out, trust, root, tmp_path / "result.pt"],
            cwd=tmp_path,  # the installed toolkit, not the one in the working directory
            env={
                **os.environ,
                "HF_HOME": str(tmp_path / "home"),
                "PYTHONPATH": "",
                "OMP_NUM_THREADS": "1",
                **environment,
            },
            capture_output=True,
            text=True,
        )
        return done

    def test_with_trust_it_compresses(self, trained, tmp_path):
        out = written(trained, tmp_path, "merged")
        done = self.run(out, tmp_path, "trust")
        assert done.returncode == 0, done.stderr
        result = torch.load(tmp_path / "result.pt", weights_only=True)
        assert result["kind"] == "LlavaForConditionalGeneration"
        assert result["ids"].shape[1] == 5 + 2 * 8
        assert torch.equal(result["logits"], answers(trained, attached(trained).processor))
        assert "auto_map" not in json.loads((tmp_path / "result.pt-again/config.json").read_text())

    def test_without_trust_it_is_a_plain_model(self, trained, tmp_path):
        out = written(trained, tmp_path, "merged")
        done = self.run(out, tmp_path, "plain")
        assert done.returncode == 0, done.stderr
        assert torch.load(tmp_path / "result.pt", weights_only=True)["ids"].shape[1] == 5 + 2 * 16
        assert "Without `trust_remote_code=True`" in (out / "README.md").read_text()

    def test_where_the_toolkit_is_missing_it_says_what_to_install(self, trained, tmp_path):
        out = written(trained, tmp_path, "merged")
        theirs = tmp_path / "theirs" / "visionzip"  # the authors' package has the same import name
        theirs.mkdir(parents=True)
        # an editable install answers for submodules of any package called visionzip
        (theirs / "__init__.py").write_text(
            "import sys\nsys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in getattr(f, '__module__', '')]\n"
        )
        done = self.run(out, tmp_path, "trust", PYTHONPATH=str(theirs.parent))
        assert done.returncode != 0
        assert "pip install visionzip-ft (the package called just `visionzip` is another one)" in done.stderr


class TestPlaces:
    def test_the_base_is_found_from_where_the_run_lies(self, trained, base, tmp_path, monkeypatch):
        trained.config._name_or_path = "base"
        save(trained, tmp_path / "runs" / "demo" / "projector")
        monkeypatch.chdir("/")
        load(tmp_path / "runs" / "demo" / "projector", "cpu")

    def test_a_place_that_is_taken(self, trained, tmp_path):
        save(trained, tmp_path / "out")
        with pytest.raises(FileExistsError, match="not empty"):
            save(trained, tmp_path / "out", "peft")
        save(trained, tmp_path / "out", "peft", overwrite=True)
        assert recognise(tmp_path / "out").name == "peft"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out"]

    def test_only_an_export_is_replaced(self, trained, base, tmp_path):
        (tmp_path / "notes").mkdir()
        (tmp_path / "notes" / "mine.txt").write_text("x")
        for place in (base, tmp_path / "notes", tmp_path / "notes" / "mine.txt"):
            before = sorted(tmp_path.rglob("*"))
            with pytest.raises(FileExistsError, match="is not an export and will not be replaced"):
                save(trained, place, overwrite=True)
            assert sorted(tmp_path.rglob("*")) == before

    def test_nothing_there(self, tmp_path):
        with pytest.raises(ValueError, match="there is nothing at"):
            load(tmp_path / "nowhere")
        with pytest.raises(ValueError, match="there is nothing at"):
            save(str(tmp_path / "nowhere"), tmp_path / "x")

    def test_not_an_export(self, base, tmp_path):
        with pytest.raises(ValueError, match=r"is not an export. Known formats: llava: .*safetensors: "):
            save(str(base), tmp_path / "x", "peft")

    def test_unknown_format(self, trained, tmp_path):
        with pytest.raises(
            ValueError, match="no export format is called 'gguf'; known: llava, merged, onnx, peft, safetensors"
        ):
            save(trained, tmp_path / "x", "gguf")
