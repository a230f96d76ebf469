"""Small files of the layout of those that `scripts.make_smol_llava` converts: a DINOv2 exported to ONNX with a head on it, and a GGUF."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, HEADS, DEPTH, PATCH, GRID, SIDE = 128, 2, 2, 14, 5, 42
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>"]


class OldSelfAttention(nn.Module):
    """As transformers wrote it before its version 5, which is what the exported names are of."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, states: Tensor) -> Tensor:
        query, key, value = (
            part(states).view(states.shape[0], -1, HEADS, WIDTH // HEADS).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        found = F.scaled_dot_product_attention(query, key, value)
        return found.transpose(1, 2).reshape(states.shape[0], -1, WIDTH)


class OldOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = nn.Linear(WIDTH, WIDTH)

    def forward(self, states: Tensor) -> Tensor:
        return self.dense(states)


class OldAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.output = OldSelfAttention(), OldOutput()

    def forward(self, states: Tensor) -> Tensor:
        return self.output(self.attention(states))


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.rand(WIDTH))

    def forward(self, states: Tensor) -> Tensor:
        return states * self.lambda1


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.activation, self.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, states: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(states)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attention, self.layer_scale1 = nn.LayerNorm(WIDTH, eps=1e-6), OldAttention(), Scale()
        self.norm2, self.mlp, self.layer_scale2 = nn.LayerNorm(WIDTH, eps=1e-6), Mlp(), Scale()

    def forward(self, states: Tensor) -> Tensor:
        states = states + self.layer_scale1(self.attention(self.norm1(states)))
        return states + self.layer_scale2(self.mlp(self.norm2(states)))


class PatchEmbeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Conv2d(3, WIDTH, PATCH, PATCH)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.projection(pixels).flatten(2).transpose(1, 2)


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position_embeddings = nn.Parameter(torch.randn(1, GRID * GRID + 1, WIDTH))
        self.patch_embeddings = PatchEmbeddings()

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embeddings(pixels)
        states = torch.cat((self.cls_token.expand(pixels.shape[0], -1, -1), patches), dim=1)
        place = self.position_embeddings[:, 1:].reshape(1, GRID, GRID, states.shape[-1])
        place = place.permute(0, 3, 1, 2)
        place = F.interpolate(
            place, size=(pixels.shape[2] // PATCH, pixels.shape[3] // PATCH), mode="bicubic", align_corners=False
        )
        place = place.permute(0, 2, 3, 1).reshape(1, -1, WIDTH)
        return states + torch.cat((self.position_embeddings[:, :1], place), dim=1)


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Layer() for _ in range(DEPTH))

    def forward(self, states: Tensor) -> Tensor:
        for layer in self.layer:
            states = layer(states)
        return states


class Backbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings, self.encoder, self.layernorm = Embeddings(), Layers(), nn.LayerNorm(WIDTH, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layernorm(self.encoder(self.embeddings(pixels)))


class WithHead(nn.Module):
    """The backbone, and something behind it that is no part of it."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.decoder = Backbone(), nn.Linear(WIDTH, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.decoder(self.backbone(pixels)[:, 1:])


def write_onnx(path: Path) -> Backbone:
    torch.manual_seed(0)
    model = WithHead().eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # the exporter keeps one of equal tensors
            nn.init.normal_(parameter, mean=float("weight" in name), std=0.2)
    torch.onnx.export(
        model, (torch.randn(1, 3, SIDE, SIDE),), str(path), input_names=["input_image"], dynamo=False,
        dynamic_axes={"input_image": {0: "batch_size"}},
    )  # fmt: skip
    return model.backbone


def write_gguf(path: Path) -> None:
    """A Llama of two layers whose tokens are bytes, and the specials of SmolLM2."""
    import gguf
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = SPECIALS + sorted(ByteLevel.alphabet()) + ["he"]
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)))
    writer.add_token_merges(["h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)

    def matrix(name: str, *shape: int) -> None:
        writer.add_tensor(name, (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32))

    matrix("token_embd.weight", len(tokens), 64)
    for layer in range(2):
        for name, rows, columns in (
            ("attn_q", 64, 64), ("attn_k", 32, 64), ("attn_v", 32, 64), ("attn_output", 64, 64),
            ("ffn_gate", 96, 64), ("ffn_up", 96, 64), ("ffn_down", 64, 96),
        ):  # fmt: skip
            matrix(f"blk.{layer}.{name}.weight", rows, columns)
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ones(64, dtype=np.float32))
    writer.add_tensor("output_norm.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
