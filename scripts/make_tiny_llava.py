"""Make `data/tiny-llava`: a real LLaVA of a few megabytes, trained from nothing on the embedded data set.

    python -m scripts.make_tiny_llava --out data/tiny-llava --threads 2

About half an hour on two cores. Three steps, as for a LLaVA of full size:

1. The vision tower learns *through its CLS token* which colour-shape pairs an image holds. That is what makes it a small CLIP: the
   CLS token has to gather the image, so what it attends to says what matters, and this is what VisionZip reads.
2. The tower is frozen; projector and language model learn to answer questions from all patch tokens of the penultimate layer.
3. Single questions about held-out images are answered, and everything is saved as Hugging Face files.

The same `--seed` and `--threads` on the same machine give the same weights; other machines differ in the last bits, and so, in the end,
in the weights, but not in how good the model is.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPImageProcessorPil, CLIPVisionModel, LlavaForConditionalGeneration, PreTrainedTokenizerFast

from data import shapes
from scripts.tiny_llava import BOS, EOS, IMAGE, PAD, PATCH, SYSTEM, WIDTH, make_model, make_processor, make_tokenizer

__all__ = ["BOS", "EOS", "IMAGE", "PAD", "PATCH", "SYSTEM", "make_model", "make_processor", "make_tokenizer"]

TRAINED = (*shapes.TYPES * 2, "count", "count")  # rounds of a conversation of step 2; counting is learnt last

# ---------------------------------------------------------------- images


@dataclass
class Images:
    """`pixels` (B, SIZE, SIZE, 3) uint8 as they come out of the JPEG, and their scenes."""

    scenes: list[shapes.Scene]
    pixels: Tensor


def render(split: str, seed: int, count: int, workers: int) -> Images:
    """Draw images ahead, in `workers` processes, so that training never waits for one."""
    seeds = [shapes.image_seed(split, seed, index) for index in range(count)]
    with ProcessPoolExecutor(workers) as pool:
        drawn = list(pool.map(_pixels, seeds, chunksize=256))
    return Images([shapes.make_scene(number) for number in seeds], torch.from_numpy(np.stack(drawn)))


def _pixels(seed: int) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(shapes.encode_jpeg(shapes.draw_scene(shapes.make_scene(seed))))))


def normalise(pixels: Tensor) -> Tensor:
    """(B, SIZE, SIZE, 3) uint8 → (B, 3, SIZE, SIZE), the values the image processor gives."""
    processor = CLIPImageProcessorPil()
    mean, std = torch.tensor(processor.image_mean), torch.tensor(processor.image_std)
    return ((pixels.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


# ---------------------------------------------------------------- training


class Optimizer:
    """Muon for the matrices inside the layers, AdamW for the rest; linear warm-up, then cosine to zero.

    With AdamW alone the language model needs about twice the steps before it begins to look at the image.
    """

    def __init__(self, parts: Sequence[nn.Module], steps: int, lr: float, muon_lr: float, warmup: int = 100):
        named = [item for part in parts for item in part.named_parameters()]
        matrices = [weight for name, weight in named if weight.ndim == 2 and ("layers" in name or "linear" in name)]
        self.parameters = [weight for _, weight in named]
        rest = [weight for weight in self.parameters if all(weight is not matrix for matrix in matrices)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=lr, weight_decay=0.01, betas=(0.9, 0.95)),
        ]

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

        self.rates = [torch.optim.lr_scheduler.LambdaLR(one, factor) for one in self.optimizers]

    def step(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for one in (*self.optimizers, *self.rates):
            one.step()
        for one in self.optimizers:
            one.zero_grad(set_to_none=True)


def epochs(count: int, batch: int, steps: int, seed: int) -> Iterator[tuple[int, Tensor]]:
    """`steps` batches of indices below `count`, each epoch in a new order; yields (epoch, indices)."""
    generator = torch.Generator().manual_seed(seed)
    done = 0
    for epoch in range(steps):
        for indices in torch.randperm(count, generator=generator).split(batch):
            if len(indices) < batch:
                continue
            yield epoch, indices
            done += 1
            if done == steps:
                return


class Progress:
    """A line every `every` steps, for a person watching: step, mean loss since the last line, seconds per step, minutes left."""

    def __init__(self, what: str, steps: int, every: int = 100):
        self.what, self.steps, self.every = what, steps, every
        self.start, self.losses = time.monotonic(), []

    def __call__(self, step: int, loss: Tensor) -> None:
        self.losses.append(loss.item())
        if (step + 1) % self.every == 0 or step + 1 == self.steps:
            each = (time.monotonic() - self.start) / (step + 1)
            mean = sum(self.losses) / len(self.losses)
            left = (self.steps - step - 1) * each / 60
            print(
                f"{self.what} {step + 1}/{self.steps}  loss {mean:.4f}  {each:.3f} s/step  {left:.1f} min left",
                flush=True,
            )
            self.losses.clear()


def train_vision(
    vision: CLIPVisionModel, images: Images, steps: int, batch: int, lr: float, muon_lr: float, seed: int
) -> None:
    """Step 1: from the CLS token alone, which colour-shape pairs are there.

    A tenth of the loss asks each patch, in the layer LLaVA reads, for its own place: CLS does not care where anything is, and
    without this the patches forget it too, so that nobody could tell from a few of them where a shape stands.
    """
    pairs = torch.zeros(len(images.scenes), len(shapes.PAIRS))
    for row, made in enumerate(images.scenes):
        pairs[row, made.pairs()] = 1
    patches = (shapes.SIZE // PATCH) ** 2
    from_cls, from_patch = nn.Linear(WIDTH, pairs.shape[1]), nn.Linear(WIDTH, patches)
    optimizer = Optimizer([vision, from_cls, from_patch], steps, lr, muon_lr)
    progress = Progress("vision tower", steps)
    vision.train()
    for step, (_, indices) in enumerate(epochs(len(pairs), batch, steps, seed)):
        output = vision(pixel_values=normalise(images.pixels[indices]), output_hidden_states=True)
        found = F.binary_cross_entropy_with_logits(from_cls(output.pooler_output), pairs[indices])
        places = from_patch(output.hidden_states[-2][:, 1:]).flatten(0, 1)
        lost = F.cross_entropy(places, torch.arange(patches).repeat(len(indices)))
        optimizer.step(found + 0.1 * lost)
        progress(step, found.detach())
    vision.eval().requires_grad_(False)


@torch.no_grad()
def patch_features(model: LlavaForConditionalGeneration, pixels: Tensor, batch: int = 256) -> Tensor:
    """(B, N - 1, D) float16: what the projector reads, of every image, computed once since the tower is frozen."""
    layer = model.config.vision_feature_layer
    return torch.cat(
        [
            model.model.vision_tower(normalise(part), output_hidden_states=True).hidden_states[layer][:, 1:].half()
            for part in pixels.split(batch)
        ]
    )


class Conversations:
    """Conversations as ids and labels, piece by piece as the chat template makes them (a test compares the two)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, patches: int):
        self.patches = patches
        self.ids = lru_cache(maxsize=None)(lambda text: tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))

    def encode(
        self, rounds: Sequence[shapes.Round], system: bool = False, answer: bool = True
    ) -> tuple[list[int], list[int]]:
        """ids and labels (-100: not supervised) of a conversation; with `answer=False` it ends where the last answer begins."""
        ids, labels = [BOS], [-100]
        for number, asked in enumerate(rounds):
            if number == 0:
                opening = f"{SYSTEM} USER: " if system else "USER: "
                prompt = [*self.ids(opening), *[IMAGE] * self.patches, *self.ids(f"\n{asked.question} ASSISTANT:")]
            else:
                prompt = [*self.ids(f"USER: {asked.question} ASSISTANT:")]
            reply = [*self.ids(f" {asked.answer}"), EOS] if answer or number + 1 < len(rounds) else []
            ids += prompt + reply
            labels += [-100] * len(prompt) + reply
        return ids, labels


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(B, L), padded on the right: with causal attention what stands on the right is never seen, so no mask is needed."""
    length = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (length - len(row))] for row in rows])


def hidden_states(model: LlavaForConditionalGeneration, ids: Tensor, features: Tensor) -> Tensor:
    """(B, L, D): the language model's last hidden states, with projected `features` (B, K, D) at the placeholders of `ids`."""
    embeddings = model.get_input_embeddings()(ids)
    visual = model.model.multi_modal_projector(features)
    embeddings = embeddings.masked_scatter((ids == IMAGE)[..., None], visual)
    return model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state


def train_language(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scenes: list[shapes.Scene],
    features: Tensor,
    steps: int,
    batch: int,
    lr: float,
    muon_lr: float,
    seed: int,
) -> None:
    """Step 2: projector and language model, on long conversations, one in eight of them with LLaVA's system prompt."""
    conversations = Conversations(tokenizer, features.shape[1])
    parts = [model.model.multi_modal_projector, model.model.language_model, model.lm_head]
    optimizer, progress = Optimizer(parts, steps, lr, muon_lr), Progress("language model", steps)
    model.train()
    for step, (epoch, indices) in enumerate(epochs(len(scenes), batch, steps, seed)):
        encoded = [
            conversations.encode(shapes.conversation(scenes[i], variant=epoch, types=TRAINED), system=step % 8 == 0)
            for i in indices.tolist()
        ]
        ids, labels = pad([ids for ids, _ in encoded], PAD), pad([labels for _, labels in encoded], -100)[:, 1:]
        hidden = hidden_states(model, ids, features[indices].float())[:, :-1]
        supervised = labels != -100
        loss = F.cross_entropy(model.lm_head(hidden[supervised]), labels[supervised])
        optimizer.step(loss)
        progress(step, loss.detach())
    model.eval()


@torch.no_grad()
def answer_questions(
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    scenes: list[shapes.Scene],
    features: Tensor,
    batch: int = 100,
) -> dict[str, float]:
    """Share of exactly right answers to single questions, `overall` and by type. Greedy, as `generate` would."""
    conversations = Conversations(tokenizer, features.shape[1])
    asked = [(row, one) for row, made in enumerate(scenes) for one in shapes.conversation(made)]
    right: dict[str, list[bool]] = {name: [] for name in shapes.TYPES}
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        rows = [conversations.encode([one], answer=False)[0] for _, one in part]
        seen = features[[row for row, _ in part]].float()
        prompts = [len(row) for row in rows]
        for _ in range(5):
            last = torch.tensor([len(row) - 1 for row in rows])
            hidden = hidden_states(model, pad(rows, PAD), seen)[torch.arange(len(rows)), last]
            rows = [[*row, token] for row, token in zip(rows, model.lm_head(hidden).argmax(-1).tolist(), strict=True)]
        for (_, one), row, prompt in zip(part, rows, prompts, strict=True):
            reply = row[prompt:]
            reply = reply[: reply.index(EOS)] if EOS in reply else reply
            right[one.type].append(tokenizer.decode(reply).strip() == one.answer)
    scores = {name: sum(values) / len(values) for name, values in right.items()}
    return {"overall": sum(map(sum, right.values())) / len(asked), **scores}


# ---------------------------------------------------------------- the whole


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.make_tiny_llava", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=Path("data/tiny-llava"))
    parser.add_argument(
        "--work", type=Path, help="keep the trained vision tower here, and start from the one found here"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1000, help="of weights and images (default: %(default)s)")
    parser.add_argument("--images", type=int, default=40_000)
    parser.add_argument("--held-out", type=int, default=400, help="held-out images, five questions each")
    parser.add_argument("--vision-batch", type=int, default=64)
    parser.add_argument("--vision-steps", type=int, default=1800)
    parser.add_argument("--vision-lr", type=float, default=1e-3)
    parser.add_argument("--vision-muon-lr", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--muon-lr", type=float, default=8e-3)
    return parser.parse_args(argv)


def prepare_vision(vision: CLIPVisionModel, images: Images, args: argparse.Namespace) -> None:
    """Step 1, or what an earlier run left of it in `--work`."""
    kept = args.work / "vision.pt" if args.work else None
    if kept and kept.exists():
        vision.load_state_dict(torch.load(kept, weights_only=True))
        vision.eval().requires_grad_(False)
        return
    train_vision(vision, images, args.vision_steps, args.vision_batch, args.vision_lr, args.vision_muon_lr, args.seed)
    if kept:
        kept.parent.mkdir(parents=True, exist_ok=True)
        torch.save(vision.state_dict(), kept)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(args.seed)
    processor, model = make_processor(tokenizer), make_model()
    started = time.monotonic()
    images = render("train", args.seed, args.images, args.threads)
    print(f"drew {len(images.scenes)} images in {time.monotonic() - started:.0f} s", flush=True)
    prepare_vision(model.model.vision_tower, images, args)
    features = patch_features(model, images.pixels)
    train_language(model, tokenizer, images.scenes, features, args.steps, args.batch, args.lr, args.muon_lr, args.seed)
    held_out = render("eval", args.seed, args.held_out, args.threads)
    scores = answer_questions(model, tokenizer, held_out.scenes, patch_features(model, held_out.pixels))

    model.save_pretrained(args.out)
    processor.save_pretrained(args.out)
    made = {
        "made_by": "python -m scripts.make_tiny_llava",
        "options": {name: value for name, value in vars(args).items() if name not in ("out", "work")},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "held_out": scores,
    }
    (args.out / "made.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(json.dumps(scores, indent=1))
    print(f"{args.out}: {size / 1e6:.2f} MB, {(time.monotonic() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
