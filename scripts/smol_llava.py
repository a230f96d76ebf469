"""The parts of `scripts.make_smol_llava`: a pretrained DINOv2 out of an ONNX file, SmolLM2 out of a GGUF file, and a LLaVA of the two."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

HEAD_SIZE = 64  # of every DINOv2
LAYER = -2  # of the encoder's hidden states, as LLaVA reads CLIP's; the last one has single values twenty times as large as the rest
IMAGE_TOKEN = "<image>"
#: An unused token of SmolLM2 (there are 17 specials, most for code corpora) stands for <image>: no embedding is added.
REPLACED_TOKEN = "<repo_name>"
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, which DINOv2 was trained with
#: Typical size of a value of the hidden state that is read.
FEATURE_SCALE = 0.55
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message.role != 'system' %}{{ '<|im_start|>user\\n' }}{% else %}{{ '<|im_start|>' + message.role + '\\n' }}{% endif -%}
{%- if message.content is string %}{{ message.content }}{% else -%}
{%- for part in message.content %}{% if part.type == 'image' %}{{ '<image>\\n' }}{% endif %}{% endfor -%}
{%- for part in message.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor -%}
{%- endif %}{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif -%}
"""


class MissingPart(RuntimeError):
    """Something that is needed is not there, or is not what it should be; the message says what to do."""


# ---------------------------------------------------------------- DINOv2 out of ONNX


def read_vision(path: str | Path, side: int) -> Dinov2Model:
    """The backbone of an ONNX file as a `Dinov2Model` for images of `side` pixels, in float32.

    Exported graphs keep the names of vectors, but matrices that multiply from the right are anonymous and transposed; they are
    found by the name of the node that uses them. Positions are interpolated to `side` once, as the encoder itself would for each
    image, so that the config says the size that is used.

    Raises:
        MissingPart: no `onnx` package, or a file that does not hold such a backbone.
    """
    weights = _onnx_weights(Path(path))
    try:
        width = weights["embeddings.cls_token"].shape[-1]
        patch = weights["embeddings.patch_embeddings.projection.weight"].shape[-1]
        positions = weights["embeddings.position_embeddings"]
        inner = weights["encoder.layer.0.mlp.fc1.weight"].shape[0]
    except KeyError as missing:
        raise MissingPart(f"{path}: no DINOv2 backbone in it ({missing.args[0]} is missing)") from None
    grid = round((positions.shape[1] - 1) ** 0.5)
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("encoder.layer.")),
        "num_attention_heads": width // HEAD_SIZE,
        "mlp_ratio": inner // width,
        "patch_size": patch,
        "use_mask_token": False,
    }
    made = Dinov2Model(Dinov2Config(image_size=grid * patch, **sizes))
    _load(made, weights, path)
    if side == grid * patch:
        return made.eval()
    with torch.no_grad():
        patches = torch.empty(1, 1 + (side // patch) ** 2, width)
        weights["embeddings.position_embeddings"] = made.embeddings.interpolate_pos_encoding(patches, side, side)
    resized = Dinov2Model(Dinov2Config(image_size=side, **sizes))
    _load(resized, weights, path)
    return resized.eval()


def _onnx_weights(path: Path) -> dict[str, Tensor]:
    """Weights under the names that transformers has for them."""
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError:
        raise MissingPart("reading the encoder needs the package onnx; pip install 'visionzip-ft[real]'") from None
    try:
        graph = onnx.load(str(path)).graph
    except Exception as error:  # protobuf's and onnx's own errors
        raise MissingPart(f"{path} can't be read as ONNX: {error}") from None
    arrays = {each.name: torch.from_numpy(numpy_helper.to_array(each).copy()) for each in graph.initializer}
    found = {name.removeprefix("backbone."): value for name, value in arrays.items() if name.startswith("backbone.")}
    positions: dict[str, Tensor] = {}
    for node in graph.node:
        constants = [arrays[name] for name in node.input if name in arrays]
        if not node.name.startswith("/backbone/") or not constants:
            continue
        if node.op_type == "MatMul":
            module = node.name.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{module}.weight"] = constants[0].T.contiguous()
        elif node.name.startswith("/backbone/embeddings/") and constants[0].ndim == 3:
            if node.op_type == "Reshape":
                positions["patches"] = constants[0]
            elif node.op_type == "Concat" and constants[0].shape[1] == 1:
                positions["cls"] = constants[0]
    if len(positions) == 2:
        found["embeddings.position_embeddings"] = torch.cat((positions["cls"], positions["patches"]), dim=1)
    return {_modern(name): value for name, value in found.items()}


def _modern(name: str) -> str:
    """The names of before transformers 5 → today's."""
    for old, new in (
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
    ):
        name = name.replace(old, new)
    return name


def _load(model: nn.Module, weights: dict[str, Tensor], path: str | Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise MissingPart(f"{path}: its backbone does not fit: {' '.join(str(error).split())[:400]}") from None


@torch.no_grad()
def compare_vision(model: Dinov2Model, path: str | Path, images: int = 2) -> float:
    """Largest absolute difference between the model and the file run by onnxruntime, after the final norm, on random images.

    Raises:
        MissingPart: no `onnxruntime`, or a file whose graph has no such output.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError:
        raise MissingPart("checking the encoder needs onnxruntime; pip install 'visionzip-ft[real]'") from None
    proto = onnx.load(str(path))
    nodes = [node for node in proto.graph.node if node.name.startswith("/backbone/layernorm/")]
    if not nodes:
        raise MissingPart(f"{path}: no backbone in it")
    output = nodes[-1].output[0]
    del proto.graph.output[:]
    proto.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(
        images, 3, model.config.image_size, model.config.image_size, generator=torch.Generator().manual_seed(0)
    )
    expected = session.run([output], {proto.graph.input[0].name: pixels.numpy()})[0]
    return (model(pixels).last_hidden_state - torch.from_numpy(expected)).abs().max().item()


# ---------------------------------------------------------------- SmolLM2 out of GGUF


def read_language(path: str | Path) -> tuple[Any, Any]:
    """The language model of a GGUF file in float32, and its tokenizer.

    Raises:
        MissingPart: no `gguf` package, or a file that can't be read.
    """
    path = Path(path)
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise MissingPart(
            "reading the language model needs the package gguf; pip install 'visionzip-ft[real]'"
        ) from None
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, KeyError) as error:
        raise MissingPart(f"{path} can't be read as GGUF: {error}") from None
    model.is_quantized, model.hf_quantizer = False, None  # the weights are plain float32 now; else they can't be saved
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval(), tokenizer


@torch.no_grad()
def greedy(model: Any, tokenizer: Any, question: str, tokens: int = 24) -> str:
    """What a language model answers, in the chat form of SmolLM2."""
    text = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    made = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)


# ---------------------------------------------------------------- one model of the two


def with_image_token(tokenizer: Any) -> Any:
    """The tokenizer with `REPLACED_TOKEN` renamed to ``<image>``: the ids and the size of the vocabulary stay."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    plain = json.loads(tokenizer.backend_tokenizer.to_str())
    place = plain["model"]["vocab"].pop(REPLACED_TOKEN, None)
    if place is None:
        raise MissingPart(f"the language model's tokenizer has no {REPLACED_TOKEN} that could stand for {IMAGE_TOKEN}")
    plain["model"]["vocab"][IMAGE_TOKEN] = place
    for token in plain["added_tokens"]:
        token["content"] = IMAGE_TOKEN if token["content"] == REPLACED_TOKEN else token["content"]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(plain)),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        model_max_length=2048,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        add_bos_token=False,
    )


def make_processor(tokenizer: Any, side: int, patch: int) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=BitImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=MEAN, image_std=STD
        ),
        tokenizer=tokenizer,
        patch_size=patch,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def assemble(vision: Dinov2Model, language: Any, tokenizer: Any, seed: int = 0) -> LlavaForConditionalGeneration:
    """LLaVA of an encoder and a language model, with a fresh projector (float32)."""
    text = language.config
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=(vision.config.image_size // vision.config.patch_size) ** 2,
        vision_feature_layer=LAYER,
        vision_feature_select_strategy="default",
        tie_word_embeddings=text.tie_word_embeddings,
    )
    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    for part in (config, config.text_config):
        for name, value in special.items():
            setattr(part, name, value)
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(vision.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.lm_head.load_state_dict(language.lm_head.state_dict())
    model.tie_weights()
    start_projector(model)
    model.generation_config = GenerationConfig(**special, max_new_tokens=32, do_sample=False)
    return model.eval()


def start_projector(model: LlavaForConditionalGeneration) -> None:
    """Draw the projector so that visual tokens begin about as large as embeddings of words.

    The final norm of the encoder is not part of the hidden state that LLaVA reads; the scale it would have given is put into the
    first layer.
    """
    projector = model.model.multi_modal_projector
    words = model.get_input_embeddings().weight
    for linear, gain in ((projector.linear_1, 1 / FEATURE_SCALE), (projector.linear_2, 1.6 * words.std().item())):
        nn.init.normal_(linear.weight, std=gain * linear.in_features**-0.5)
        nn.init.zeros_(linear.bias)


# ---------------------------------------------------------------- what was trained

SCALE = 2.0  # alpha / r of configs/smol-llava/base.yaml


def pack_base(checkpoints: Sequence[str | Path], file: str | Path) -> int:
    """The projector and the low-rank adapter of a checkpoint, in bfloat16, as one safetensors file; returns its bytes.

    Of several, each trained on top of the one before it, the adapters become one whose rank is their sum; the projector is the last's.

    Raises:
        MissingPart: no such checkpoint.
    """
    weights: dict[str, Tensor] = {}
    for checkpoint in checkpoints:
        parts = sorted(Path(checkpoint).glob("tensors-*.safetensors"))
        if not parts:
            raise MissingPart(f"{checkpoint} is no checkpoint of train.py: it has no tensors-*.safetensors")
        for name, value in ((name, value) for part in parts for name, value in load_file(part).items()):
            if not name.startswith("weight/"):
                continue  # of the optimizer
            name = name.removeprefix("weight/").replace(".default.weight", "")
            value = value.to(torch.bfloat16)
            if name in weights and ".lora_" in name:
                value = torch.cat((weights[name], value), dim=0 if name.endswith("A") else 1)
            weights[name] = value.contiguous()
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, str(file), metadata={"format": "pt"})
    return Path(file).stat().st_size


@torch.no_grad()
def add_base(model: LlavaForConditionalGeneration, file: str | Path) -> None:
    """Put what `pack_base` (or `scripts.align_smol_llava`) wrote into a model: the projector replaced, the adapter merged.

    Raises:
        MissingPart: no such file, or one that does not fit the model.
    """
    try:
        weights = load_file(file)
    except (OSError, SafetensorError) as error:
        raise MissingPart(f"the base projector {file} can't be read: {error}") from None
    parameters = dict(model.named_parameters())
    try:
        for name, value in weights.items():
            if name.endswith(".lora_A"):
                change = SCALE * weights[name.removesuffix("A") + "B"].float() @ value.float()
                parameters[name.removesuffix(".lora_A") + ".weight"] += change
            elif not name.endswith(".lora_B"):
                parameters[name].copy_(value)
    except (KeyError, RuntimeError) as error:
        raise MissingPart(f"{file} does not fit the model: {error}") from None
