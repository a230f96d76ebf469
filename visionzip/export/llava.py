"""`llava`: mm_projector.bin and config.json for LLaVA's own load_pretrained_model, float16

LLaVA casts the file to float16 and loads it with ``strict=False``: a wrong key would be ignored there without a word, so names
and shapes are checked here. It goes by the directory's name, which must contain "llava", and neither "lora" nor "mpt" ("prompt", say).
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from visionzip.export.base import FORMATS, Format, Trained
from visionzip.export.files import NOTE, read_note, unpickle, write_file, write_json
from visionzip.export.header import open_header
from visionzip.pretrained import read_config
from visionzip.projector import check_finite

WEIGHTS = "mm_projector.bin"
PREFIX = "model.mm_projector."
OURS = "model.multi_modal_projector."
LAYERS = {"0": "linear_1", "2": "linear_2"}  # `mlp2x_gelu` is Sequential(Linear, GELU, Linear)
NAMES = {f"{PREFIX}{a}.{kind}": f"{OURS}{b}.{kind}" for a, b in LAYERS.items() for kind in ("weight", "bias")}
LLM_TYPES = {"llama": ("llava_llama", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM")}
#: (image size, patch, width, layers) → the tower LLaVA knows it by
TOWERS = {
    (336, 14, 1024, 24): "openai/clip-vit-large-patch14-336",
    (224, 14, 1024, 24): "openai/clip-vit-large-patch14",
}
OTHER_MODELS = ("lora", "mpt")  # in a directory's name, these make LLaVA's loader expect other files
SCALINGS = {"llama": ("linear", "dynamic")}  # of rotary positions, in transformers 4.37
THETA = 10000.0  # of rotary positions, where a config says nothing
ADDED = 64  # Hugging Face's LLaVA pads the vocabulary behind its two added tokens to a multiple of this


class Llava(Format):
    name = "llava"
    summary = f"{WEIGHTS} and config.json for LLaVA's own loader, float16"
    what = f"a projector for LLaVA's own loader ({WEIGHTS})"
    markers = (WEIGHTS,)
    usage = """In LLaVA's own repository, as any projector that was trained there (the directory's name must keep its "llava"):

```python
from llava.model.builder import load_pretrained_model

tokenizer, model, image_processor, _ = load_pretrained_model("{here}", "<the base LLM>", "llava")
```

LLaVA does not compress by itself; the authors' package does: `from visionzip import visionzip; model = visionzip(model, {budget})`.
With Hugging Face's version of the base model: `visionzip.load("{here}")` (`pip install visionzip-ft`)."""

    def recognises(self, path: Path) -> bool:
        return super().recognises(path) or (path.is_file() and path.suffix == ".bin")

    def read(self, path: Path) -> Trained:
        file = path if path.is_file() else path / WEIGHTS
        stored = unpickle(file)
        if stored.keys() == {f"{PREFIX}weight", f"{PREFIX}bias"}:
            raise ValueError(
                f"{file} is a projector of one layer (LLaVA's mm_projector_type linear, of its first version); Hugging Face's "
                f"LLaVA has two (mlp2x_gelu), so no supported model has such a projector"
            )
        missing, unknown = sorted(NAMES.keys() - stored), sorted(stored.keys() - NAMES)
        if missing or unknown:
            raise ValueError(f"{file} is not a two-layer LLaVA projector: missing {missing[:4]}, unknown {unknown[:4]}")
        check_shapes(stored, str(file))
        tensors = {NAMES[name]: value.contiguous() for name, value in stored.items()}
        header = open_header(read_note(file.parent), tensors, file, file.parent / NOTE)
        return Trained(header.model_copy(update={"modules": [OURS[:-1]]}), tensors)

    def write(self, trained: Trained, out: Path, *, model: Any = None, processor: Any = None, **options: Any) -> None:
        """Options: ``vision_tower``, the name LLaVA loads the encoder by, where its geometry does not tell."""
        name = str(options.get("name", out.name))
        if "llava" not in name.lower() or any(other in name.lower() for other in OTHER_MODELS):
            raise ValueError(
                f"LLaVA's loader decides by the directory's name, which must contain 'llava' and neither 'lora' nor 'mpt'; "
                f"{name!r} does not qualify. Choose one such as llava-visionzip-64"
            )
        if trained.header.zip is not None and trained.header.zip.positions == "original":
            raise ValueError(
                "LLaVA's own code numbers visual tokens consecutively, and this projector was trained with zip.positions=original; "
                "choose another format, or train with positions=compact"
            )
        state = trained.only_projector("LLaVA's mm_projector.bin")
        missing, unknown = sorted(set(NAMES.values()) - state.keys()), sorted(state.keys() - set(NAMES.values()))
        if missing or unknown:
            raise ValueError(
                f"LLaVA's mlp2x_gelu is two linear layers with biases; this projector lacks {missing[:4]} and has {unknown[:4]}"
            )
        check_finite(state, "nothing is exported")
        stored = {name: state[ours].to(torch.float16) for name, ours in NAMES.items()}
        large = [name for name, value in stored.items() if not bool(value.isfinite().all())]
        if large:
            raise ValueError(f"{large[0]} has values that float16, which LLaVA loads, can't represent")
        check_shapes(stored, "the projector")
        config = base_config(trained.header.base_model, options.get("base"))
        written = llava_config(config, stored, options.get("vision_tower"))
        if config.model_type == "llava" and trained.header.zip is not None and trained.header.zip.pad_images is False:
            written["image_aspect_ratio"] = "square"  # LLaVA's word for: cropped by the image processor
        content = io.BytesIO()  # torch.save says of a full disk that a file is "corrupted"
        torch.save(stored, content)
        write_file(out / WEIGHTS, content.getvalue())
        write_json(out / "config.json", written)
        facts = trained.header.sealed("llava", {ours: stored[name] for name, ours in NAMES.items()})
        write_json(out / NOTE, facts)


def check_shapes(state: dict[str, Tensor], source: str) -> None:
    """Raise ``ValueError`` unless the two layers fit each other."""
    first, second = state[f"{PREFIX}0.weight"], state[f"{PREFIX}2.weight"]
    wanted = {f"{PREFIX}0.bias": [first.shape[0]], f"{PREFIX}2.weight": [second.shape[0], first.shape[0]],
              f"{PREFIX}2.bias": [second.shape[0]]}  # fmt: skip
    for name, shape in wanted.items():
        if list(state[name].shape) != shape:
            raise ValueError(
                f"{source}: {name} has shape {list(state[name].shape)}, which fits no other; expected {shape}"
            )


def base_config(base_model: str, base: Any = None) -> Any:
    """The config of the model the projector was trained in; no weights are loaded.

    Raises:
        ValueError: when it can't be found or LLaVA knows no such model.
    """
    where = str(base or base_model)
    if not where:
        raise ValueError(
            "the projector does not name its base model, whose sizes LLaVA's config.json repeats; pass base=… (--base)"
        )
    try:
        config = read_config(where)
    except ValueError as error:
        raise ValueError(f"the base model can't be read: {error}. Pass base=… (--base) if it is elsewhere") from error
    llm = getattr(getattr(config, "text_config", None), "model_type", None)
    if config.model_type not in ("llava", "llava_next") or llm not in LLM_TYPES:
        raise ValueError(
            f"LLaVA's own code has no model like {where} ({config.model_type} on {llm}); choose another format"
        )
    if getattr(config, "projector_hidden_act", "gelu") != "gelu":
        raise ValueError(f"LLaVA's projector has GELU between its layers; {where} has {config.projector_hidden_act}")
    return config


def llava_config(config: Any, state: dict[str, Tensor], vision_tower: str | None) -> dict[str, Any]:
    """LLaVA's ``config.json``: the LLM's own, and where images come in.

    Raises:
        ValueError: when the tower has no name LLaVA could load it by.
    """
    vision, text = config.vision_config, config.text_config
    tower = vision_tower or TOWERS.get(
        (vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers)
    )
    if tower is None:
        raise ValueError(
            f"LLaVA loads the vision tower by name, and none is known for {vision.num_hidden_layers} layers of "
            f"{vision.hidden_size} at {vision.image_size} pixels; pass vision_tower=… (--vision-tower; an id or a directory)"
        )
    kind, architecture = LLM_TYPES[text.model_type]
    added_behind = text.vocab_size - ADDED <= config.image_token_id < text.vocab_size
    # without the rows that Hugging Face's version adds for <image> and <pad>
    vocabulary = config.image_token_id if added_behind else text.vocab_size
    pad = text.pad_token_id
    next_only = {} if config.model_type == "llava" else {
        "mm_patch_merge_type": "spatial_unpad",
        "image_grid_pinpoints": config.image_grid_pinpoints,
    }  # fmt: skip
    return {
        **text.to_diff_dict(),
        **rope_settings(text),
        "model_type": kind,
        "architectures": [architecture],
        "vocab_size": vocabulary,
        # the embedding's padding_idx; <pad> is one of the added rows
        "pad_token_id": pad if pad is not None and 0 <= pad < vocabulary else None,
        "torch_dtype": "float16",
        "use_mm_proj": True,
        "mm_projector_type": "mlp2x_gelu",
        "mm_hidden_size": state[f"{PREFIX}0.weight"].shape[1],
        "mm_vision_tower": tower,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "patch" if config.vision_feature_select_strategy == "default" else "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad" if config.model_type == "llava" else "anyres",
        "tokenizer_model_max_length": 2048,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": True,
        "freeze_mm_mlp_adapter": False,
        **next_only,
    }


def rope_settings(text: Any) -> dict[str, Any]:
    """Rotary positions by the two keys of transformers before 5, which LLaVA runs on: ``rope_theta``, ``rope_scaling``.

    Raises:
        ValueError: for a scaling that transformers 4.37 does not have, or a head size it would get wrong.
    """
    stored = dict(text.rope_parameters or {})
    kind, scaling = stored.get("rope_type", "default"), None
    if kind != "default":
        if kind not in SCALINGS.get(text.model_type, ()):
            raise ValueError(
                f"LLaVA's own code can't scale the rotary positions of a {text.model_type} by {kind!r}; choose another format"
            )
        scaling = {"type": kind, "factor": float(stored["factor"])}
    heads = text.num_attention_heads
    if getattr(text, "head_dim", None) not in (None, text.hidden_size // heads):
        raise ValueError(
            f"LLaVA's own code has heads of hidden_size / heads = {text.hidden_size // heads}; this model's have "
            f"{text.head_dim}. Choose another format"
        )
    if getattr(text, "mlp_bias", False):
        raise ValueError("LLaVA's own code has no biases in the MLPs of its LLM; choose another format")
    return {"rope_theta": float(stored.get("rope_theta", THETA)), "rope_scaling": scaling}


FORMATS.register("llava")(Llava())
