"""One question about one image, answered and timed: time to the first token, total time, and number of tokens."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from visionzip.attach import attached
from visionzip.images import PadImages
from visionzip.inputs import batch_prompts, prompt_inputs, to_model
from visionzip.prompts import question, usual_template


@dataclass(frozen=True)
class Answer:
    """An answer. Times in seconds, starting from pixels: `first` to the first token (encoder and prefill), `seconds` in total."""

    text: str
    prompt_tokens: int
    new_tokens: int
    first: float
    seconds: float

    @property
    def decode_ms(self) -> float:
        """Milliseconds each token after the first took; 0 for a single one."""
        return 1000 * (self.seconds - self.first) / (self.new_tokens - 1) if self.new_tokens > 1 else 0.0


class Stopwatch(BaseStreamer):
    """A streamer for ``generate``, which passes it the prompt first and then each token as it is generated."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.times: list[float] = []
        self.start = self.now()

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def put(self, value: Tensor) -> None:
        self.times.append(self.now())

    def end(self) -> None:
        pass

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.times[1] - self.start if len(self.times) > 1 else 0.0

    @property
    def all(self) -> float:
        return self.times[-1] - self.start if self.times else 0.0


def ask(
    model: Any,
    processor: Any,
    image: Image.Image,
    text: str,
    *,
    max_new_tokens: int = 128,
    pad_images: PadImages | None = None,
) -> Answer:
    """Answer one question about one image greedily, asked as the processor's chat template says.

    Args:
        pad_images: None: as in the attached model's `ZipConfig`, or ``"auto"`` if nothing is attached.
    """
    if pad_images is None:
        attachment = attached(model)
        pad_images = attachment.config.pad_images if attachment else "auto"
    row = prompt_inputs(usual_template(processor), [question(text)], [image], pad_images)
    inputs = to_model(model, batch_prompts(processor, [row]))
    tokenizer = getattr(processor, "tokenizer", processor)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    watch = Stopwatch(model.device)
    with torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad, streamer=watch
        )
    length = inputs["input_ids"].shape[1]
    new = output[0, length:]
    return Answer(tokenizer.decode(new, skip_special_tokens=True).strip(), length, len(new), watch.first, watch.all)
