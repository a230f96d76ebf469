"""A projector file knows what it belongs to, and goes nowhere else."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import visionzip
from tests.tiny import make_image, tiny_llava, tiny_processor
from visionzip import ZipConfig, attach, load
from visionzip.export import load_into, read_export, save_projector
from visionzip.export.header import digest_of
from visionzip.export.safetensors import FILE, unpack
from visionzip.projector import projector_state

BUDGET = ZipConfig(dominant=5, contextual=3)


@pytest.fixture
def trained(model, processor, tmp_path):
    """An attached model whose projector is not the base's any more, and the directory of its base."""
    model.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    model.config._name_or_path = str(tmp_path / "base")
    attach(model, processor, BUDGET)
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


def test_round_trip_is_bit_exact_and_complete(trained, tmp_path):
    path = save_projector(trained, tmp_path / "out", {"steps": 7})
    assert [p.name for p in path.parent.iterdir()] == [FILE]
    assert load_file(path).keys() == {
        f"model.multi_modal_projector.linear_{n}.{kind}" for n in (1, 2) for kind in ("weight", "bias")
    }
    fresh = attach(tiny_llava(), tiny_processor(), BUDGET)
    header = load_into(fresh, tmp_path / "out")
    assert header.metadata == {"steps": 7}
    assert header.zip == BUDGET
    assert header.toolkit_version == visionzip.__version__
    for key, value in projector_state(trained).items():
        assert torch.equal(value, projector_state(fresh)[key])


def test_load_in_one_line(trained, processor, tmp_path):
    save_projector(trained, tmp_path / "out")
    model, new_processor = load(tmp_path / "out", device="cpu")
    for maker in (processor, new_processor):
        inputs = maker(text="USER: <image> what is this", images=make_image(), return_tensors="pt")
        assert inputs["input_ids"].shape[1] == 13
        with torch.no_grad():
            torch.testing.assert_close(model(**inputs).logits, trained(**inputs).logits)


def test_load_a_plain_model_needs_a_budget(trained, tmp_path):
    with pytest.raises(ValueError, match="does not say what to keep"):
        load(tmp_path / "base")
    model, _ = load(tmp_path / "base", device="cpu", config=BUDGET)
    assert visionzip.attached(model).config == BUDGET


def test_base_that_moved(trained, tmp_path):
    save_projector(trained, tmp_path / "out")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="pass base="):
        load(tmp_path / "out", device="cpu")
    load(tmp_path / "out", device="cpu", base=tmp_path / "elsewhere")


@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_another_base_is_refused(trained, tmp_path, part):
    save_projector(trained, tmp_path / "out")
    other = tiny_llava()
    setattr(other.model, part, getattr(tiny_llava(seed=1).model, part))
    attach(other, tiny_processor(), BUDGET)
    name = {"language_model": "llm", "vision_tower": "encoder"}[part]
    with pytest.raises(ValueError, match=rf"trained for something else:\n  {name}: \S+ has values"):
        load_into(other, tmp_path / "out")
    load_into(other, tmp_path / "out", force=True)
    assert torch.equal(*(next(iter(projector_state(m).values())) for m in (other, trained)))


@pytest.mark.parametrize("changes", [{"dominant": 6, "contextual": 2}, {"merge": "mean"}, {"layer": -1}])
def test_another_zip_config_is_refused(trained, tmp_path, changes):
    save_projector(trained, tmp_path / "out")
    other = attach(tiny_llava(), tiny_processor(), BUDGET.model_copy(update=changes))
    with pytest.raises(ValueError, match=f"ZipConfig.{next(iter(changes))}"):
        load_into(other, tmp_path / "out")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_same_base_in_another_dtype_is_the_same_base(trained, tmp_path, dtype):
    save_projector(trained, tmp_path / "out")
    load_into(attach(tiny_llava().to(dtype), tiny_processor(), BUDGET), tmp_path / "out")


def test_other_architecture_is_refused_even_by_force(trained, tmp_path):
    save_projector(trained, tmp_path / "out")
    other = attach(tiny_llava(multimodal_projector_bias=False), tiny_processor(), BUDGET)
    with pytest.raises(ValueError, match=r"unknown \['model.multi_modal_projector.linear_1.bias'"):
        load_into(other, tmp_path / "out", force=True)


class TestDamaged:
    @pytest.fixture
    def path(self, trained, tmp_path):
        return save_projector(trained, tmp_path / "out")

    def rewrite(self, path, change):
        with safe_open(path, "pt") as file:
            state, header = {k: file.get_tensor(k) for k in file.keys()}, file.metadata()  # noqa: SIM118
        change(state, header)
        header["digest"] = digest_of(unpack(header, path), state)  # a mistake of the writer, not damage
        save_file(state, path, metadata=header)

    def test_truncated(self, path, trained):
        path.write_bytes(path.read_bytes()[:-20])
        with pytest.raises(ValueError, match="damaged"):
            load_into(trained, path)

    def test_not_safetensors(self, path, trained):
        path.write_bytes(b"\x80\x04pickle")
        with pytest.raises(ValueError, match="damaged or no safetensors"):
            load_into(trained, path)

    def test_renamed_key(self, path, trained):
        key = "model.multi_modal_projector.linear_1.weight"
        self.rewrite(path, lambda state, _: state.__setitem__("model.mm_projector.0.weight", state.pop(key)))
        with pytest.raises(ValueError, match=rf"missing \['{key}'\], unknown \['model.mm_projector.0.weight'\]"):
            load_into(trained, path)

    def test_changed_shape_changes_nothing(self, path, trained):
        before = projector_state(trained)
        key = "model.multi_modal_projector.linear_2.weight"
        self.rewrite(path, lambda state, _: state.__setitem__(key, state[key][:-1].clone()))
        with pytest.raises(ValueError, match=r"linear_2.weight has shape \[47, 48\], the model's has \[48, 48\]"):
            load_into(trained, path)
        assert all(torch.equal(value, before[key]) for key, value in projector_state(trained).items())

    def test_someone_elses_file(self, path, trained):
        self.rewrite(path, lambda _, header: header.pop("format"))
        with pytest.raises(ValueError, match="expected a projector"):
            read_export(path)

    def test_nothing_there(self, trained, tmp_path):
        with pytest.raises(FileNotFoundError, match="there is nothing at"):
            load_into(trained, tmp_path / "nowhere")


def test_saving_needs_something_attached(model, tmp_path):
    with pytest.raises(ValueError, match="nothing is attached"):
        save_projector(model, tmp_path)


def test_a_failed_write_leaves_the_old_file(trained, tmp_path, monkeypatch):
    path = save_projector(trained, tmp_path / "out")
    before = path.read_bytes()
    monkeypatch.setattr("visionzip.export.files.sync", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_projector(trained, tmp_path / "out")
    assert path.read_bytes() == before
    assert json.loads(json.dumps(read_export(path).header.zip.model_dump())) == BUDGET.model_dump()


@torch.no_grad()
def test_a_device_map_that_leaves_the_llm_on_the_disk(trained, processor, tmp_path):
    """Its weights are passed over by the fingerprint; a projector there would lose what is put into it, and is refused."""
    save_projector(trained, tmp_path / "out")
    away = {"model.vision_tower": "cpu", "model.language_model": "disk", "lm_head": "disk"}
    for where in ("cpu", "disk"):
        given = {"device_map": {**away, "model.multi_modal_projector": where}, "offload_folder": tmp_path / where}
        if where == "disk":
            with pytest.raises(
                ValueError, match=r"linear_1.weight, which is not in memory: the device_map offloaded it"
            ):
                load(tmp_path / "out", **given)
            continue
        found, _ = load(tmp_path / "out", **given)
        assert {p.device.type for p in found.model.language_model.parameters()} == {"meta"}
        inputs = processor(text="USER: <image> what is this ASSISTANT:", images=[make_image()], return_tensors="pt")
        torch.testing.assert_close(found(**inputs).logits, trained(**inputs).logits)
