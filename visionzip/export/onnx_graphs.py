"""The two graphs of an ONNX export, made by transformers' own exporter, quantised by ONNX Runtime's tools, and their file of weights."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import logging
import operator
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from visionzip.attach import Attachment
from visionzip.budgets import format_budget
from visionzip.config import ZipConfig

OLDEST_OPSET = 20
PRECISIONS = ("float32", "float16", "int8", "int4")
BLOCK = 32
"""Weights that share a scale, under int8 and int4."""
INLINE = 1024
"""Bytes of the largest tensor that is kept in a graph itself."""
PAGE = 4096
"""Tensors in the file of weights begin at multiples of it, so that a runtime can map them into memory."""


@dataclass
class VisionGraph:
    """`program`: pixels → ``embeddings`` and ``kept``; `tokens` per image; `split`: dominant and contextual, where it compresses."""

    program: Any
    tokens: int
    split: dict[str, int]


@dataclass
class LanguageGraph:
    """`program`: ids, visual tokens, cache → logits of the last position, cache; `sizes`: what `Package.language` lists."""

    program: Any
    sizes: dict[str, int]


class Vision(nn.Module):
    """``(B, 3, height, width)`` → embeddings ``(B, K, hidden)``, kept ``(B, dominant)`` int64."""

    def __init__(self, attachment: Attachment, config: ZipConfig | None) -> None:
        super().__init__()
        self.family, self.zip = attachment.family, config
        self.model = attachment.model  # so that its parameters are found

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        if self.zip is None:
            return self.keep_all(pixel_values)
        found = self.family.compress_batch(self.zip, pixel_values)
        return {"embeddings": self.project(found.tokens), "kept": found.kept}

    def project(self, tokens: Tensor) -> Tensor:
        return self.model.get_submodule(self.family.projectors[0])(tokens)

    def keep_all(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """As the untouched model: every token but CLS."""
        family = cast(Any, self.family)
        config = ZipConfig.model_validate({"dominant": 1.0, "contextual": 0, "selector": "uniform"})
        found = family.compress_batch(config, pixel_values)
        stock = family.stock_count()
        return {"embeddings": self.project(found.tokens[:, -stock:]), "kept": found.kept[:, -stock:]}


class Language(nn.Module):
    """Ids ``(1, L)``, visual tokens ``(V, hidden)`` for the placeholders among them, cache → logits ``(1, 1, vocabulary)``, cache.

    Embedding and head are in one graph, so that tied weights are stored once; the placeholder is never predicted.
    """

    def __init__(self, attachment: Attachment) -> None:
        super().__init__()
        self.llm = attachment.model.get_submodule(attachment.family.llm)
        self.lm_head = cast(Any, attachment.model).lm_head
        self.config = attachment.model.config.get_text_config()
        self.image_id = attachment.family.image_token_id

    def forward(self, input_ids: Tensor, image_embeds: Tensor, past_key_values: Any) -> dict[str, Any]:
        embeds = cast(Any, self.llm).get_input_embeddings()(input_ids)
        images = input_ids == self.image_id
        places = (images.flatten().cumsum(0) - 1).clamp(min=0)
        embeds = torch.where(images.unsqueeze(-1), image_embeds[places].view_as(embeds), embeds)
        found = self.llm(inputs_embeds=embeds, past_key_values=past_key_values, use_cache=True)
        logits = self.lm_head(found.last_hidden_state[:, -1:])
        logits[..., self.image_id] = float("-inf")
        return {"logits": logits, "past_key_values": found.past_key_values}


def vision_graph(attachment: Attachment, config: ZipConfig | None, side: int, opset: int) -> VisionGraph:
    """The vision side under one budget (None: all tokens), for batches of any size.

    Raises:
        ValueError: for a budget the model can't have, or a selector whose result has no fixed shape.
    """
    if config is not None:
        attachment.family.check(config)
    elif attachment.family.encoder.registers(attachment.family.encoder_module):
        raise ValueError(
            "all tokens of an encoder with registers can't be exported: the untouched model reads the registers too"
        )
    module = Vision(attachment, config).eval()
    pixels = torch.rand(2, 3, side, side)
    with torch.no_grad():
        embeddings = module(pixels)["embeddings"]
    try:
        program = export_program(
            module, {"pixel_values": pixels}, {"pixel_values": {0: torch.export.Dim("batch", min=1, max=1024)}}, opset
        )
    except Exception as error:  # torch.export has many, none of one base class
        name = "uniform" if config is None else config.selector
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ValueError(
            f"the selector {name!r} with the budget {format_budget(config)} can't be written as a graph: what it keeps has to have the "
            f"same shape for every image ({type(error).__name__}: {reason})"
        ) from error
    if program.graph.outputs[0].shape[1] != embeddings.shape[1]:  # a symbol where it is known from the image alone
        raise ValueError(
            f"the selector {config.selector if config else 'uniform'!r} keeps a number of tokens that depends on the image, which a graph "
            f"can't"
        )
    split = {}
    if config is not None:
        dominant, contextual = attachment.family.budget(config)
        split = {"dominant": dominant, "contextual": contextual}
    return VisionGraph(program, embeddings.shape[1], split)


def language_graph(attachment: Attachment, opset: int) -> LanguageGraph:
    """The LLM with its KV cache, for one conversation.

    Raises:
        ValueError: for an LLM whose attention slides over a window, or that can't be exported.
    """
    from transformers import DynamicCache

    module = Language(attachment).eval()
    config = module.config
    if any(getattr(DynamicCache(config=config), "is_sliding", [])):
        raise ValueError(
            f"the attention of {config.model_type} slides over a window, which the runtime's cache does not support"
        )
    heads, head_dim = (
        config.num_key_value_heads,
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        cache.update(torch.zeros(1, heads, 4, head_dim), torch.zeros(1, heads, 4, head_dim), layer)
    limit = int(config.max_position_embeddings)
    past, length, visual = (
        torch.export.Dim(name, min=least, max=limit) for name, least in (("past", 0), ("length", 1), ("visual", 1))
    )
    inputs = {
        "input_ids": torch.tensor([[0, module.image_id, module.image_id, 0, 0]]),
        "image_embeds": torch.zeros(3, config.hidden_size),
        "past_key_values": cache,
    }
    shapes = {
        "input_ids": {1: length},
        "image_embeds": {0: visual},
        "past_key_values": [{2: past}] * (2 * config.num_hidden_layers),
    }
    try:
        program = export_program(module, inputs, shapes, opset)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise ValueError(
            f"the LLM ({config.model_type}) can't be written as a graph ({type(error).__name__}: {reason})"
        ) from error
    for value in (*program.graph.inputs, *program.graph.outputs):
        value.name = tensor_name(value.name)
    sizes = {
        "layers": config.num_hidden_layers,
        "kv_heads": heads,
        "head_dim": head_dim,
        "hidden": config.hidden_size,
        "limit": limit,
    }
    return LanguageGraph(program, sizes)


def tensor_name(name: str) -> str:
    """transformers' ``input.past_key_values.layers.0.keys`` → ``past.0.key``; its outputs → ``present.0.key``."""
    parts = name.split(".")
    if "past_key_values" not in parts:
        return name
    return f"{'past' if parts[0] == 'input' else 'present'}.{parts[-2]}.{parts[-1].removesuffix('s')}"


def export_program(module: nn.Module, inputs: dict[str, Any], shapes: dict[str, Any], opset: int) -> Any:
    """An `onnx_ir.Model` with ONNX Runtime's fused operators.

    Raises:
        ImportError: when the exporter's packages are not installed.
    """
    try:
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
        from transformers.exporters import OnnxConfig
        from transformers.exporters.exporter_onnx import OnnxExporter
    except ImportError as error:
        raise ImportError(
            f"exporting to ONNX needs packages that are not installed: pip install 'visionzip-ft[onnx]' ({error})"
        ) from error
    describe_sorts()
    config = OnnxConfig(
        dynamic=True,
        dynamic_shapes=shapes,
        prefer_deferred_runtime_asserts_over_guards=True,
        opset_version=opset,
        ort_fusions="cpu",
    )
    with silence():
        return OnnxExporter().export(cast(Any, module), inputs, config).program


@functools.cache
def describe_sorts() -> None:
    """transformers' exporter puts ``sort`` in place of a stable one (ONNX's TopK is stable) without saying what it returns, which the
    translation asks for; and ONNX Runtime's TopK does not support uint8, so that is sorted as int32. Registered once a process."""
    from transformers.exporters.utils import register_fx_node_fix

    @register_fx_node_fix("onnx")
    def describe_sort(module: Any, node: Any) -> bool:
        sort: Any = node.args[0] if node.target is operator.getitem else None
        if getattr(sort, "target", None) is torch.ops.aten.sort.default and "val" not in sort.meta:
            source, *how = sort.args
            if source.meta["val"].dtype is torch.uint8:
                with module.graph.inserting_before(sort):
                    wider = module.graph.call_function(
                        torch.ops.aten._to_copy.default, (source,), {"dtype": torch.int32}
                    )
                wider.meta["val"] = source.meta["val"].to(torch.int32)
                sort.args = (wider, *how)
            sort.meta["val"] = torch.ops.aten.sort.default(sort.args[0].meta["val"], *how)
        return False


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Exporters print their progress and warn of what is no concern of who uses them; one sets up logging for the whole process."""
    root, disabled = logging.getLogger(), logging.root.manager.disable
    level, handlers = root.level, list(root.handlers)
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        root.handlers[:] = handlers
        root.setLevel(level)


def quantize(program: Any, precision: str) -> Any:
    """`program` with weights of another precision, by ONNX Runtime's own tools; inputs and outputs stay float32.

    int8 and int4 are weights of matrix products in blocks of `BLOCK` (``MatMulNBits``), products taken in int8; what is no product
    (norms, the table of embeddings, the convolution that makes patches) stays as it is, or becomes float16.
    """
    if precision == "float32":
        return program
    import onnx_ir
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with silence():
        if precision == "float16":
            model = convert_float_to_float16(onnx_ir.to_proto(program), keep_io_types=True, disable_shape_infer=True)
            return onnx_ir.from_proto(model)
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer

        untranspose(program)
        how = DefaultWeightOnlyQuantConfig(
            block_size=BLOCK, is_symmetric=True, accuracy_level=4, bits=int(precision[3:])
        )
        quantizer = MatMulNBitsQuantizer(onnx_ir.to_proto(program), algo_config=how)
        quantizer.process()
        program = onnx_ir.from_proto(quantizer.model.model)
        halve_tables(program)
        return program


def untranspose(program: Any) -> None:
    """Weights that a graph transposes (a head tied to the embeddings) as the product takes them: only constants are quantised."""
    import onnx_ir

    for node in list(program.graph.all_nodes()):
        value = node.inputs[0] if node.op_type == "Transpose" else None
        if value is None or value.const_value is None:
            continue
        perm = node.attributes.get_ints("perm") if "perm" in node.attributes else None
        array = value.const_value.numpy().transpose(perm).copy()
        made = onnx_ir.Value(name=f"{value.name}.transposed", const_value=onnx_ir.tensor(array))
        made.dtype, made.shape = onnx_ir.DataType.FLOAT, onnx_ir.Shape(array.shape)
        program.graph.register_initializer(made)
        node.outputs[0].replace_all_uses_with(made)
        program.graph.remove(node, safe=True)
        if not value.uses():
            del program.graph.initializers[value.name]


def halve_tables(program: Any) -> None:
    """Tables that rows are taken from in float16: the embeddings of an LLM are the largest tensor that is no matrix product."""
    import numpy
    import onnx_ir

    for node in list(program.graph.all_nodes()):
        table = node.inputs[0] if node.op_type == "Gather" else None
        if (
            table is None
            or table.const_value is None
            or table.dtype != onnx_ir.DataType.FLOAT
            or table.const_value.size < 1 << 14
        ):
            continue
        array = table.const_value.numpy().astype(numpy.float16)
        half = onnx_ir.Value(name=f"{table.name}.float16", const_value=onnx_ir.tensor(array))
        half.dtype, half.shape = onnx_ir.DataType.FLOAT16, onnx_ir.Shape(array.shape)
        program.graph.register_initializer(half)
        row = node.outputs[0]
        cast_node = onnx_ir.node("Cast", [row], attributes={"to": int(onnx_ir.DataType.FLOAT)})
        cast_node.outputs[0].dtype, cast_node.outputs[0].shape = onnx_ir.DataType.FLOAT, row.shape
        row.replace_all_uses_with(cast_node.outputs[0])
        cast_node.replace_input_with(0, row)
        node.replace_input_with(0, half)
        row.dtype = onnx_ir.DataType.FLOAT16
        program.graph.insert_after(node, cast_node)
        if not table.uses():
            del program.graph.initializers[table.name]


class Weights:
    """One file for the tensors of several graphs, in which equal ones are stored once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open(path, "wb")  # noqa: SIM115 (closed by `close`)
        self._known: dict[bytes, int] = {}

    def save(self, program: Any, path: Path) -> None:
        """Write a graph beside the file, its large tensors in it."""
        import onnx_ir

        for value in program.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < INLINE:
                continue
            content = tensor.tobytes()
            value.const_value = onnx_ir.ExternalTensor(
                self.path.name,
                self._place(content),
                len(content),
                tensor.dtype,
                shape=tensor.shape,
                name=value.name,
                base_dir=str(self.path.parent),
            )
        self._file.flush()
        onnx_ir.save(program, str(path))

    def _place(self, content: bytes) -> int:
        key = hashlib.sha256(content).digest()
        if key not in self._known:
            self._file.write(b"\0" * (-self._file.tell() % PAGE))
            self._known[key] = self._file.tell()
            self._file.write(content)
        return self._known[key]

    def close(self) -> None:
        self._file.close()
