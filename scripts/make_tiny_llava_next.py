"""Make `data/tiny-llava-next`: the embedded model's tiled sibling, a real LLaVA-NeXT of a few megabytes.

    python -m scripts.make_tiny_llava_next --base data/tiny-llava --out data/tiny-llava-next --threads 2

Vision tower, projector and language model are those of `data/tiny-llava`, which knows one image of 81 tokens; the last two go on
learning, with the newline, on what transformers' LLaVA-NeXT makes of the same images: the whole one and two tiles, 180 tokens.
About a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import (
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)
from transformers.models.llava_next.modeling_llava_next import unpad_image

from data import shapes
from scripts import make_tiny_llava as make

PINPOINTS = [[shapes.SIZE, 2 * shapes.SIZE], [2 * shapes.SIZE, shapes.SIZE], [2 * shapes.SIZE, 2 * shapes.SIZE]]
SIDE = shapes.SIZE // make.PATCH


def make_processor(base: Path) -> LlavaNextProcessor:
    stock = AutoProcessor.from_pretrained(base)
    edge = {"height": shapes.SIZE, "width": shapes.SIZE}
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": shapes.SIZE}, crop_size=edge, image_grid_pinpoints=PINPOINTS
        ),
        tokenizer=stock.tokenizer,
        patch_size=make.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=stock.chat_template,
    )


def make_model(base: Path) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT with the weights of a LLaVA; only its newline is new."""
    donor = LlavaForConditionalGeneration.from_pretrained(base)
    config = LlavaNextConfig(
        vision_config=donor.config.vision_config,
        text_config=donor.config.text_config,
        image_token_index=donor.config.image_token_id,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=donor.config.image_seq_length,
        vision_feature_layer=donor.config.vision_feature_layer,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    config.bos_token_id, config.eos_token_id, config.pad_token_id = make.BOS, make.EOS, make.PAD
    model = LlavaNextForConditionalGeneration(config)
    missing, unexpected = model.load_state_dict(donor.state_dict(), strict=False)
    if missing != ["model.image_newline"] or unexpected:
        raise SystemExit(f"{base} is no LLaVA this can be made of: missing {missing}, unexpected {unexpected}")
    model.generation_config = donor.generation_config
    model.model.vision_tower.eval().requires_grad_(False)
    return model


class WithNewlines(nn.Module):
    """The projector, and the newline in the places where `layout` has none of the image's patches.

    So that the sibling's training loop, which knows a projector alone, serves a LLaVA-NeXT as it is.
    """

    def __init__(self, projector: nn.Module, newline: nn.Parameter, layout: Tensor):
        super().__init__()
        self.projector, self.newline = projector, newline
        self.register_buffer("here", (layout < 0).unsqueeze(-1))  # (L, 1)

    def forward(self, features: Tensor) -> Tensor:
        return torch.where(self.here, self.newline, self.projector(features))


def layout() -> Tensor:
    """(L,): which patch, of base and tiles one after the other, stands where in an image's sequence; −1 is a newline."""
    rows, columns = 1, 2
    patches = torch.arange((rows * columns + 1) * SIDE**2)
    grid = patches[SIDE**2 :].view(rows, columns, SIDE, SIDE).transpose(1, 2).reshape(1, rows * SIDE, columns * SIDE)
    grid = unpad_image(grid, (shapes.SIZE, shapes.SIZE))[0]
    return torch.cat([patches[: SIDE**2], nn.functional.pad(grid, (0, 1), value=-1).flatten()])


@torch.no_grad()
def features_of(
    model: LlavaNextForConditionalGeneration, processor: LlavaNextProcessor, pixels: Tensor, batch: int = 64
) -> Tensor:
    """(B, L, D) float16: what the projector reads of every image, zeros where a newline stands."""
    places, found = layout(), []
    for some in pixels.split(batch):
        tiles = processor.image_processor(list(some.numpy()), return_tensors="pt")["pixel_values"]  # (B, 3, 3, h, w)
        output = model.model.vision_tower(tiles.flatten(0, 1), output_hidden_states=True)
        patches = output.hidden_states[model.config.vision_feature_layer][:, 1:]
        patches = patches.unflatten(0, (len(some), -1)).flatten(1, 2)
        found.append(torch.where((places < 0).unsqueeze(-1), 0, patches[:, places.clamp(min=0)]).half())
    return torch.cat(found)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.make_tiny_llava_next", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--base", type=Path, default=Path("data/tiny-llava"))
    parser.add_argument("--out", type=Path, default=Path("data/tiny-llava-next"))
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=2000, help="of images (default: %(default)s)")
    parser.add_argument("--images", type=int, default=12_000)
    parser.add_argument("--held-out", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--muon-lr", type=float, default=2e-3)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    started = time.monotonic()
    processor, model = make_processor(args.base), make_model(args.base)
    images = make.render("train", args.seed, args.images, args.threads)
    features = features_of(model, processor, images.pixels)
    print(f"{len(features)} images of {features.shape[1]} tokens in {time.monotonic() - started:.0f} s", flush=True)

    projector = model.model.multi_modal_projector
    model.model.multi_modal_projector = WithNewlines(projector, model.model.image_newline, layout())
    tokenizer = processor.tokenizer
    make.train_language(
        model, tokenizer, images.scenes, features, args.steps, args.batch, args.lr, args.muon_lr, args.seed
    )
    held_out = make.render("eval", args.seed, args.held_out, args.threads)
    scores = make.answer_questions(model, tokenizer, held_out.scenes, features_of(model, processor, held_out.pixels))
    print(json.dumps(scores, indent=1))
    model.model.multi_modal_projector = projector
    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    made = {
        "made_by": "python -m scripts.make_tiny_llava_next",
        "options": {
            name: str(value) if name == "base" else value for name, value in vars(args).items() if name != "out"
        },
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "held_out": scores,
    }
    (args.out / "made.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"{args.out}: {size / 1e6:.2f} MB, {(time.monotonic() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
