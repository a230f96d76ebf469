"""A file that is not what it should be is refused, each kind with its own message, and nothing in it is run."""

import importlib.util
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.conftest import BUDGET
from tests.export.reseal import rewrite
from tests.families.case import cases
from tests.tiny import tiny_llava, tiny_processor
from visionzip import ZipConfig, attach, attached, load, save
from visionzip.export import load_into, read_export
from visionzip.projector import projector_state

FILES = {
    "safetensors": "projector.safetensors",
    "llava": "mm_projector.bin",
    "merged": "model.safetensors",
    "peft": "adapter_model.safetensors",
}


@pytest.fixture(params=FILES)
def export(request, trained, tmp_path):
    """(name of the format, directory, the file with the tensors)"""
    options = {"vision_tower": "x"} if request.param == "llava" else {}
    out = save(trained, tmp_path / f"llava-{request.param}", request.param, **options)
    return request.param, out, out / FILES[request.param]


def key(state, ending):
    return next(name for name in state if name.endswith(ending))


SECOND = {"llava": "2.weight"}


def test_a_key_renamed(export):
    name, out, file = export

    def rename(state):
        wrong = key(state, f"projector.{SECOND.get(name, 'linear_2.weight')}")
        state[wrong.replace("projector.", "projectile.")] = state.pop(wrong)

    rewrite(file, rename)
    fresh = attach(tiny_llava(), tiny_processor(), BUDGET)
    with pytest.raises(
        ValueError, match=r"missing \['model.m.*weight'\], unknown|lacks 1 of the projector's tensors: \['model.m"
    ):
        load_into(fresh, out)


def test_a_shape_changed(export):
    name, out, file = export

    def cut(state):
        wrong = key(state, f"projector.{SECOND.get(name, 'linear_2.weight')}")
        state[wrong] = state[wrong][:-1].clone()

    rewrite(file, cut)
    fresh = attach(tiny_llava(), tiny_processor(), BUDGET)
    before = projector_state(fresh)
    with pytest.raises(
        ValueError,
        match=r"2.weight has shape \[47, 48\], the model's has \[48, 48\]|2.bias has shape \[48\], which fits no other; expected \[47\]",
    ):
        load_into(fresh, out)
    assert all(torch.equal(value, before[name]) for name, value in projector_state(fresh).items())


@pytest.mark.parametrize("ending", ["linear_2.weight", "layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("change", ["renamed", "cut", "another"])
def test_a_merged_model_is_loaded_whole_or_not_at_all(trained, tmp_path, ending, change):
    """transformers alone would go on with random weights in place of those that are missing."""
    out = save(trained, tmp_path / "out", "merged")

    def damage(state):
        name = key(state, ending)
        value = state.pop(name)
        changed = {"renamed": value, "cut": value[:-1].clone(), "another": value + 1}[change]
        state[name + "_" * (change == "renamed")] = changed

    rewrite(out / "model.safetensors", damage)
    messages = {
        "renamed": rf"lacks 1 of the projector's|1 weight missing \(model.*{ending}\)",
        "cut": rf"1 weight of another shape \(model.*{ending} \[\d+, 48\], expected \[\d+, 48\]\)",
        "another": r"(?s)trained for something else.*llm: ",
    }
    if (change, ending) == ("another", "linear_2.weight"):
        return  # a projector may be any; it is the frozen halves that are known
    with pytest.raises(ValueError, match=messages[change]):
        load(out, "cpu")


def test_a_merged_model_under_another_budget(trained, tmp_path):
    out = save(trained, tmp_path / "out", "merged")
    other = ZipConfig(dominant=6, contextual=2)
    with pytest.raises(ValueError, match=r"(?s)trained for something else.*ZipConfig.dominant: 5 there, 6 here"):
        load(out, "cpu", config=other)
    model, _ = load(out, "cpu", config=other, force=True)
    assert attached(model).config == other


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", "{}", "the processor in .* can't be read"),
        ("processor_config.json", "{", "not a valid JSON"),
        ("config.json", "{", "not a valid JSON"),
        ("visionzip.json", "{", "can't be read as JSON"),
    ],
)
def test_other_files_of_a_merged_model(trained, tmp_path, file, content, message):
    out = save(trained, tmp_path / "out", "merged")
    (out / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        load(out, "cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense", "auto"), "device nonsense can't be used here: "),
        (("cuda:77", "auto"), "device cuda:77 can't be used here: "),
        (("cpu", "float17"), "weights can't be of dtype float17; expected auto, float32, bfloat16 or float16"),
        (("cpu", torch.int8), "weights can't be of dtype torch.int8"),
    ],
)
def test_a_device_or_dtype_that_is_none(tmp_path, base, arguments, message):
    with pytest.raises(ValueError, match=message):
        load(base, *arguments, config=BUDGET)


@pytest.mark.skipif(importlib.util.find_spec("torchvision") is not None, reason="torchvision is here")
def test_a_model_that_takes_videos_says_what_to_install(tmp_path):
    """transformers' own video processors are made of torchvision."""
    from transformers import AutoModelForImageTextToText

    case = next(case for case in cases() if case.name == "Qwen2.5-VL")
    out = save(attach(case.model(), case.processor(), case.budget), tmp_path / "out", "merged")
    # as a processor is saved where torchvision is installed
    (out / "video_preprocessor_config.json").write_text('{"video_processor_type": "Qwen2VLVideoProcessor"}')
    with pytest.raises(
        ImportError, match=r"processor of .*requires the Torchvision library.*; pip install torchvision$"
    ):
        load(out, "cpu")
    with pytest.raises(ImportError, match="requires the Torchvision library"):
        AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)


def test_a_file_truncated(export):
    _, out, file = export
    content = file.read_bytes()
    for left in (0, 1, 10, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:left])
        with pytest.raises(ValueError, match="damaged"):
            read_export(out)
    with pytest.raises(ValueError, match="damaged"):
        load(out, "cpu")


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("form", ["zip", 2, 4])
def test_a_pickle_that_runs_code(trained, tmp_path, form):
    out = save(trained, tmp_path / "llava-x", "llava", vision_tower="x")
    Bomb.mark = tmp_path / "ran"
    state = torch.load(out / "mm_projector.bin", weights_only=True)
    content = {**state, "model.mm_projector.0.weight": Bomb()}
    if form == "zip":
        torch.save(content, out / "mm_projector.bin")
    else:
        (out / "mm_projector.bin").write_bytes(pickle.dumps(content, protocol=form))
    for use in (read_export, lambda path: load(path, "cpu")):
        with pytest.raises(
            ValueError, match=r"is a pickle that could run code when read \((posix\.system|a bare.*)\); nothing was run"
        ):
            use(out)
    assert not Bomb.mark.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "contains a list; expected a dict of tensors"),
        ({"a": 1}, "contains a dict of something else"),
        (
            {"model.mm_projector.weight": torch.ones(2, 2), "model.mm_projector.bias": torch.ones(2)},
            r"a projector of one layer \(LLaVA's mm_projector_type linear",
        ),
        ({"model.mm_projector.weight": torch.ones(2, 2)}, "is not a two-layer LLaVA projector"),
    ],
)
def test_a_bin_of_something_else(tmp_path, content, message):
    torch.save(content, tmp_path / "mm_projector.bin")
    with pytest.raises(ValueError, match=message):
        read_export(tmp_path)


def test_a_bin_of_llavas_own_says_nothing_of_its_origin(trained, base, tmp_path, caplog):
    save(trained, tmp_path / "llava-x", "llava", vision_tower="x")
    alone = tmp_path / "mm_projector.bin"
    (tmp_path / "llava-x" / "mm_projector.bin").rename(alone)
    with pytest.raises(ValueError, match="does not name its base model; pass base="):
        load(alone, "cpu")
    with pytest.raises(ValueError, match="does not say what to keep; pass config="):
        load(alone, "cpu", base=base)
    model, _ = load(alone, "cpu", base=base, config=BUDGET)
    assert "only names and shapes can be checked" in caplog.text
    expected = {name: value.half().float() for name, value in projector_state(trained).items()}
    assert all(torch.equal(value, expected[name]) for name, value in projector_state(model).items())


class TestNotes:
    @pytest.fixture
    def note(self, trained, tmp_path):
        return save(trained, tmp_path / "out", "peft") / "visionzip.json"

    def test_no_json(self, note):
        note.write_text("{")
        with pytest.raises(ValueError, match=r"visionzip.json can't be read as JSON"):
            read_export(note.parent)

    def test_not_an_object(self, note):
        note.write_text("[]")
        with pytest.raises(ValueError, match="contains a list; expected a JSON object"):
            read_export(note.parent)

    def test_a_budget_that_is_none(self, note):
        content = json.loads(note.read_text())
        content["zip"]["dominant"] = -4
        note.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"visionzip.json: zip.*dominant=-4 can't be met"):
            read_export(note.parent)

    def test_wrong_type(self, note):
        note.write_text(json.dumps({**json.loads(note.read_text()), "fingerprint": 3}))
        with pytest.raises(ValueError, match=r"visionzip.json: fingerprint: "):
            read_export(note.parent)

    def test_in_a_safetensors_header(self, trained, tmp_path):
        out = save(trained, tmp_path / "st") / FILES["safetensors"]
        from safetensors import safe_open

        with safe_open(out, "pt") as opened:
            header = opened.metadata()
        save_file(load_file(out), out, metadata={**header, "zip": "{"})
        with pytest.raises(ValueError, match="has a header that can't be read: zip: "):
            read_export(out)


class TestPeft:
    @pytest.fixture
    def out(self, trained, tmp_path):
        return save(trained, tmp_path / "out", "peft")

    def change(self, out, **changes):
        path = out / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    def test_another_kind(self, out):
        self.change(out, peft_type="IA3")
        with pytest.raises(ValueError, match="of type 'IA3'; expected LORA"):
            read_export(out)

    def test_no_weights(self, out):
        (out / "adapter_model.safetensors").rename(out / "adapter_model.bin")
        with pytest.raises(ValueError, match=r"no adapter_model.safetensors; adapters are read from safetensors only"):
            read_export(out)

    def test_names_of_something_else(self, out):
        rewrite(out / "adapter_model.safetensors", lambda state: state.__setitem__("x", torch.ones(1)))
        with pytest.raises(ValueError, match=r"contains x; expected names that start with base_model.model."):
            read_export(out)

    def test_a_key_of_another_version_of_peft(self, out, tmp_path):
        self.change(out, from_the_future=True)
        save(out, tmp_path / "again", "peft")

    def test_adapters_for_other_layers(self, adapted, tmp_path):
        out = save(adapted, tmp_path / "lora", "peft")
        rewrite(
            out / "adapter_model.safetensors",
            lambda state: state.pop(key(state, "layers.1.self_attn.v_proj.lora_B.weight")),
        )
        with pytest.raises(
            ValueError, match=r"adapters missing \['model.language_model.layers.1.self_attn.v_proj.lora_B.weight'\]"
        ):
            load(out, "cpu")


class TestLlava:
    def test_its_name_decides_in_llavas_loader(self, trained, tmp_path):
        for name in ("mine", "llava-lora-x", "llava-prompt"):
            with pytest.raises(
                ValueError, match=r"must contain 'llava' and neither 'lora' nor 'mpt'.*Choose one such as llava-"
            ):
                save(trained, tmp_path / name, "llava", vision_tower="x")

    def test_a_tower_that_llava_could_not_load(self, trained, tmp_path):
        with pytest.raises(ValueError, match="none is known for 3 layers of 32 at 32 pixels; pass vision_tower="):
            save(trained, tmp_path / "llava-x", "llava")

    def test_values_beyond_float16(self, trained, tmp_path):
        with torch.no_grad():
            trained.model.multi_modal_projector.linear_2.bias[0] = 1e5
        with pytest.raises(
            ValueError, match=r"mm_projector.2.bias has values that float16, which LLaVA loads, can't represent"
        ):
            save(trained, tmp_path / "llava-x", "llava", vision_tower="x")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"multimodal_projector_bias": False}, "two linear layers with biases; this projector lacks"),
            ({"projector_hidden_act": "relu"}, "GELU between its layers; .* has relu"),
        ],
    )
    def test_a_projector_that_llava_does_not_have(self, tmp_path, changes, message):
        model = tiny_llava(**changes)
        model.save_pretrained(tmp_path / "other")
        model.config._name_or_path = str(tmp_path / "other")
        with pytest.raises(ValueError, match=message):
            save(attach(model, tiny_processor(), BUDGET), tmp_path / "llava-x", "llava", vision_tower="x")

    def test_config_as_llava_wants_it(self, trained, tmp_path):
        out = save(trained, tmp_path / "llava-x", "llava", vision_tower="some/tower")
        assert sorted(path.name for path in out.iterdir()) == [
            "README.md",
            "config.json",
            "mm_projector.bin",
            "visionzip.json",
        ]
        config = json.loads((out / "config.json").read_text())
        expected = {
            "model_type": "llava_llama",
            "mm_projector_type": "mlp2x_gelu",
            "mm_vision_tower": "some/tower",
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "patch",
            "mm_hidden_size": 32,
            "hidden_size": 48,
            "mm_use_im_patch_token": False,
            "mm_use_im_start_end": False,
            "image_aspect_ratio": "pad",
            "use_mm_proj": True,
        }
        assert {name: config.get(name) for name in expected} == expected
        state = torch.load(out / "mm_projector.bin", weights_only=True)
        assert {name: (list(value.shape), value.dtype) for name, value in state.items()} == {
            "model.mm_projector.0.weight": ([48, 32], torch.float16),
            "model.mm_projector.0.bias": ([48], torch.float16),
            "model.mm_projector.2.weight": ([48, 48], torch.float16),
            "model.mm_projector.2.bias": ([48], torch.float16),
        }

    @pytest.mark.parametrize(("pad_images", "expected"), [("auto", "pad"), (True, "pad"), (False, "square")])
    def test_llava_prepares_images_as_in_training(self, trained, tmp_path, pad_images, expected):
        attachment = attached(trained)
        config = attachment.config.model_copy(update={"pad_images": pad_images})
        attach(trained, attachment.processor, config)
        out = save(trained, tmp_path / "llava-x", "llava", vision_tower="x")
        assert json.loads((out / "config.json").read_text())["image_aspect_ratio"] == expected

    def test_as_llavas_own_loader_reads_it(self, trained, tmp_path):
        """LLaVA's ``build_vision_projector`` for ``mlp2x_gelu`` and its loading of ``mm_projector.bin``, strictly."""
        out = save(trained, tmp_path / "llava-x", "llava", vision_tower="x")
        config = json.loads((out / "config.json").read_text())
        width, hidden = config["mm_hidden_size"], config["hidden_size"]
        theirs = torch.nn.Module()
        theirs.model = torch.nn.Module()
        layers = [torch.nn.Linear(width, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, hidden)]
        theirs.model.mm_projector = torch.nn.Sequential(*layers)
        stored = torch.load(out / "mm_projector.bin", map_location="cpu", weights_only=True)
        theirs.load_state_dict({name: value.to(torch.float16) for name, value in stored.items()}, strict=True)
        ours = load(out, "cpu")[0].model.multi_modal_projector
        tokens = torch.randn(5, width)
        assert torch.equal(theirs.model.mm_projector(tokens), ours(tokens))

    def test_sizes_of_the_published_7b(self):
        """Vocabulary without the rows Hugging Face adds; the tower by its name."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

        from visionzip.export.llava import llava_config

        vision = CLIPVisionConfig(
            image_size=336, patch_size=14, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16
        )
        config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(vocab_size=32064), image_token_id=32000)
        written = llava_config(config, {"model.mm_projector.0.weight": torch.empty(4096, 1024)}, None)
        assert written["vocab_size"] == 32000
        assert written["mm_vision_tower"] == "openai/clip-vit-large-patch14-336"


#: LlamaConfig's arguments in transformers 4.37: what a key that is not in the file becomes
DEFAULTS = {"rope_theta": 10000.0, "rope_scaling": None, "pad_token_id": None, "vocab_size": 32000}


class TestLlavaUnderTransformers437:
    """What LLaVA's own code, which runs on transformers 4.37, makes of config.json."""

    def read(self, tmp_path, **changes):
        """(rope_theta, rope_scaling, pad_token_id, vocab_size) as LlamaConfig of transformers 4.37 has them, checked as there."""
        model = tiny_llava()
        for name, value in changes.items():
            setattr(model.config.text_config, name, value)
        model.save_pretrained(tmp_path / "llm")
        model.config._name_or_path = str(tmp_path / "llm")
        out = save(attach(model, tiny_processor(), BUDGET), tmp_path / "llava-x", "llava", vision_tower="x")
        written = json.loads((out / "config.json").read_text())
        theta, scaling, pad, vocabulary = ({**DEFAULTS, **written}[name] for name in DEFAULTS)
        if scaling is not None:  # LlamaConfig._rope_scaling_validation
            assert set(scaling) == {"type", "factor"}
            assert scaling["type"] in ("linear", "dynamic")
            assert isinstance(scaling["factor"], float)
            assert scaling["factor"] > 1
        torch.nn.Embedding(vocabulary, 4, padding_idx=pad)  # LlamaModel.__init__
        return theta, scaling, pad, vocabulary

    @pytest.mark.parametrize(
        ("stored", "expected"),
        [
            ({"rope_type": "default", "rope_theta": 10000.0}, (10000.0, None)),
            ({"rope_type": "default", "rope_theta": 1e6}, (1e6, None)),
            ({"rope_type": "linear", "rope_theta": 10000.0, "factor": 4}, (10000.0, {"type": "linear", "factor": 4.0})),
            ({"rope_type": "dynamic", "rope_theta": 5e5, "factor": 2.0}, (5e5, {"type": "dynamic", "factor": 2.0})),
        ],
    )
    def test_rotary_positions(self, tmp_path, stored, expected):
        """transformers 5 writes rope_parameters alone, which 4.37 does not know: off by 5.8 in the logits, without a word."""
        assert self.read(tmp_path, rope_parameters=stored)[:2] == expected

    def test_positions_that_it_does_not_have(self, tmp_path):
        stored = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                  "original_max_position_embeddings": 16}  # fmt: skip
        with pytest.raises(ValueError, match="can't scale the rotary positions of a llama by 'llama3'"):
            self.read(tmp_path, rope_parameters=stored)
        assert not (tmp_path / "llava-x").exists()

    @pytest.mark.parametrize(("pad", "expected"), [(0, 0), (2, 2), (None, None), (19, None)])
    def test_a_pad_token_beyond_the_vocabulary(self, tmp_path, pad, expected):
        """<pad> is one of the rows that Hugging Face's version adds: 4.37 asserts that padding_idx fits."""
        assert self.read(tmp_path, pad_token_id=pad)[2:] == (expected, tiny_llava().config.image_token_id)
