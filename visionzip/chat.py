"""A conversation with a compressed model that keeps its KV cache: an image is encoded and prefilled once, however long it goes on.

Every turn the whole conversation is rendered as in training (`visionzip.prompts`) and compared with what the cache holds; what they have in
common is not computed again. So the prompt is always what the template makes of it, whatever a tokenizer does at the seams.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from visionzip.attach import attached, unwrap
from visionzip.images import prepare_image
from visionzip.inputs import ImageInputs, merge_image_inputs, process_images, to_model
from visionzip.projector import required
from visionzip.prompts import Message, Slot, usual_template
from visionzip.switch import set_budget


@dataclass
class Turn:
    """One answer and what it took.

    Attributes:
        images: (tokens now, tokens of the untouched model) of each image this turn brought.
        prompt: tokens of the conversation before the answer.
        prefilled: how many of them were computed in this turn; the others came from the cache.
        encoded: images that went through the encoder in this turn.
        first: seconds from the question to the first token of the answer.
        seconds: … to the last.
        tokens: generated.
    """

    text: str
    images: list[tuple[int, int]]
    prompt: int
    prefilled: int
    encoded: int
    first: float
    seconds: float
    tokens: int


@dataclass
class Chat:
    """State of a conversation. `model` is attached with `processor`."""

    model: Any
    processor: Any
    max_new_tokens: int = 512
    temperature: float = 0.0
    messages: list[Message] = field(default_factory=list)
    images: list[Any] = field(default_factory=list)
    waiting: list[Any] = field(default_factory=list)
    _cache: Any = None
    _held: Tensor | None = None  # ids of what the cache holds, (L,)
    _counted: dict[int, tuple[int, int]] = field(default_factory=dict)
    _encoded: dict[int, list[Any]] = field(default_factory=dict)
    _inputs: dict[int, ImageInputs] = field(default_factory=dict)
    _budgets: dict[int, Any] = field(default_factory=dict)  # of images that have one of their own

    def __post_init__(self) -> None:
        attachment = attached(self.model)
        if attachment is None:
            raise ValueError("nothing is attached to this model; load it with visionzip.load, or attach it first")
        self.config, self.family = attachment.config, attachment.family
        self._template = usual_template(self.processor)

    def show(self, image: Any, budget: Any = None) -> None:
        """Put an image (PIL) before the next question; nothing of it is cut off.

        Args:
            budget: this image's own (`visionzip.budgets.as_config`), whatever the current budget is; not while all tokens are used.

        Raises:
            ValueError: for a budget that this image can't have.
        """
        if budget is not None:
            required(self.model).at(budget)
        self.waiting.append(prepare_image(image, self.processor, self.config.pad_images))
        if budget is not None:
            self._budgets[id(self.waiting[-1])] = budget

    def reset(self) -> None:
        """Forget the conversation and its images."""
        self.messages, self.images, self.waiting, self._counted, self._encoded, self._inputs = [], [], [], {}, {}, {}
        self._budgets = {}
        self._forget()

    def budget(self, budget: Any) -> None:
        """Go on with another budget (`visionzip.set_budget`), or with all tokens (None). The conversation stays; its images are encoded again.

        Raises:
            ValueError: when the model can't have that budget; the old one stays.
        """
        set_budget(self.model, "all" if budget is None else budget)
        attachment = attached(self.model)
        self.config = attachment.config if attachment is not None else self.config
        self._counted, self._encoded, self._inputs = {}, {}, {}
        self._forget()

    def ask(self, question: str, write: Callable[[str], None] = lambda text: None) -> Turn:
        """Answer, passing text to `write` as it is generated.

        Raises:
            ValueError: when the conversation does not fit into the model any more, or the question holds the text that
            stands for an image; nothing has changed then.
        KeyboardInterrupt: passed on; what was said until then is kept.
        """
        start = time.perf_counter()
        if self.processor.image_token in question:
            raise ValueError(
                f"{self.processor.image_token} stands for an image and can't be part of a question; show one first"
            )
        images = [*self.images, *self.waiting]
        shown: list[str | Slot] = [Slot("image", index) for index in range(len(self.images), len(images))]
        messages = [*self.messages, Message("user", [*shown, f"\n{question}" if shown else question])]
        ids = self._prompt(messages, images)
        self._check_length(len(ids))
        counts = [self._count(image) for image in images]
        known, old = self._common(ids, [now for now, _ in counts])
        given: dict[str, Any] = {}
        if old < len(images):
            given = self._visual(images[old:])
        if known < self._length():
            self._crop(known)
        streamer = _Streamer(self.processor.tokenizer, write)
        try:
            with torch.inference_mode():
                output = self.model.generate(
                    input_ids=ids[None],
                    attention_mask=torch.ones_like(ids)[None],
                    past_key_values=self._cache,
                    max_new_tokens=self.max_new_tokens,
                    do_sample=self.temperature > 0,
                    **({"temperature": self.temperature} if self.temperature > 0 else {}),
                    suppress_tokens=self.family.placeholder_ids,  # an answer that held a placeholder would ask for an image
                    streamer=streamer,
                    return_dict_in_generate=True,
                    **given,
                )
        except BaseException as error:
            self._forget()  # what the cache holds now is not known
            if isinstance(error, KeyboardInterrupt):
                self._keep(messages, images, streamer.text)
            raise
        self._cache = output.past_key_values
        self._held = output.sequences[0][: self._length()]
        arrived = len(self.waiting)
        self._keep(messages, images, streamer.text)
        end = time.perf_counter()
        return Turn(
            text=streamer.text,
            images=counts[len(images) - arrived :],
            prompt=len(ids),
            prefilled=len(ids) - known,
            encoded=len(images) - old,
            first=(streamer.first or end) - start,
            seconds=end - start,
            tokens=output.sequences.shape[1] - len(ids),
        )

    def _keep(self, messages: list[Message], images: list[Any], answer: str) -> None:
        self.messages = [*messages, Message("assistant", [answer.strip()])]
        self.images, self.waiting = images, []

    def _prompt(self, messages: list[Message], images: list[Any]) -> Tensor:
        """``(L,)`` ids of a conversation up to where the model is to answer."""
        placeholders = ["".join(self._processed(image).placeholders) for image in images]
        return torch.tensor(self._template.prompt(messages, placeholders), device=self.model.device)

    def _processed(self, image: Any) -> ImageInputs:
        """One image through the image processor, and its placeholders; done once a budget."""
        if id(image) not in self._inputs:
            own = self._own(image)
            self._inputs[id(image)] = process_images(self.processor, [image], None if own is None else [own])
        return self._inputs[id(image)]

    def _pixels(self, images: list[Any]) -> dict[str, Any]:
        """The model's inputs of some images alone."""
        merged = merge_image_inputs([self._processed(image).inputs for image in images])
        return to_model(unwrap(self.model), self.family.image_inputs(merged))

    def _visual(self, images: list[Any]) -> dict[str, Any]:
        """What ``generate`` takes for some images: pixels, or their tokens where these were needed before."""
        if not any(self._own(image) is not None for image in images):
            return self._pixels(images)
        tokens = [each for image in images for each in self._compressed(image)]
        return {"mm_encoder_outputs": required(self.model).encoder_outputs(tokens)}

    def _own(self, image: Any) -> Any:
        """The budget of an image that has one of its own, while anything is compressed."""
        return self._budgets.get(id(image)) if attached(self.model) is not None else None

    def _compressed(self, image: Any) -> list[Any]:
        """`Attachment.compress`'s result of an image, where budgets differ. Encoded once."""
        if id(image) not in self._encoded:
            own = self._own(image)
            config = self.config if own is None else required(self.model).at(own)
            self._encoded[id(image)] = self.family.compress(config, **self._pixels([image]))
        return self._encoded[id(image)]

    def _count(self, image: Any) -> tuple[int, int]:
        """(tokens now, tokens of the untouched model) of one image, all its tiles together."""
        if id(image) not in self._counted:
            own = self._own(image)
            config = self.config if own is None else required(self.model).at(own)
            counted = self.family.token_counts(config, **self._pixels([image]))
            stock, now = (sum(each) for each in zip(*counted, strict=True))
            self._counted[id(image)] = (now if attached(self.model) else stock, stock)
        return self._counted[id(image)]

    def _common(self, ids: Tensor, counts: list[int]) -> tuple[int, int]:
        """(how many ids the cache already holds, how many images stand among them). At least one id is left to compute."""
        if self._held is None:
            return 0, 0
        shorter = min(len(ids) - 1, len(self._held))
        differs = (ids[:shorter] != self._held[:shorter]).nonzero()
        known = int(differs[0]) if len(differs) else shorter
        places = (ids == self.family.image_token_id).nonzero().flatten().tolist()
        if len(places) != sum(counts):
            return 0, 0  # a family that writes more than its images' tokens: start again
        old, done = 0, 0
        while old < len(counts) and places[done + counts[old] - 1] < known:
            done, old = done + counts[old], old + 1
        if old < len(counts):
            known = min(known, places[done])  # never from the middle of an image
            if old and not self.family.images_on_cache:
                return 0, 0  # positions of a new image on an old cache: transformers' M-RoPE models can't
        return known, old

    def _crop(self, length: int) -> None:
        if length == 0 or any(
            getattr(self._cache, "is_sliding", [])
        ):  # a sliding window has thrown away what comes before
            self._forget()
        else:
            self._cache.crop(length - self._length())  # negative: how many to take off

    def _length(self) -> int:
        return int(self._cache.get_seq_length()) if self._cache is not None else 0

    def _forget(self) -> None:
        self._cache = self._held = None

    def _check_length(self, prompt: int) -> None:
        text = unwrap(self.model).config.get_text_config()
        most = getattr(text, "max_position_embeddings", None)
        if most and prompt + 1 > most:
            raise ValueError(f"the conversation has {prompt:,} tokens, and the model's limit is {most:,}: /reset")


class _Streamer(TextStreamer):
    """Hands on text, and notes when the first token came."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._write = write
        self.first: float | None = None
        self.text = ""

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt and self.first is None:
            self.first = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        self._write(text)
