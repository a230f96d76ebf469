"""Sessions of ONNX Runtime, and conversations that keep their KV cache.

The decoding loop is greedy and of our own: onnxruntime-genai, which has one, could not run these graphs (docs/device.md says what was
tried). The language graph takes ids, the visual tokens that stand for the placeholders among them, and the keys and values so far.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionzip.device.package import TOKENIZER, Package, read_package
from visionzip.device.pixels import open_image, to_pixels
from visionzip.device.prompt import Turn, check_question, encode_conversation

Source = str | os.PathLike[str] | bytes | Image.Image
Write = Callable[[str], None]


@dataclass(frozen=True)
class Answer:
    """What was said, and what it took.

    Attributes:
        text: the answer.
        prompt: tokens of the conversation before the answer.
        prefilled: how many of them were computed for this question; the others were in the cache.
        tokens: generated, the one that ends an answer included.
        first: seconds from the question to the first token of the answer, the image included.
        seconds: … to the last.
        cache_bytes: size of the keys and values after the answer.
    """

    text: str
    prompt: int
    prefilled: int
    tokens: int
    first: float
    seconds: float
    cache_bytes: int


def load(path: str | os.PathLike[str], threads: int | None = None) -> DeviceModel:
    """The model in a directory that ``visionzip export --format onnx`` wrote.

    Args:
        threads: of ONNX Runtime; default: its own choice, all cores.

    Raises:
        FileNotFoundError, ValueError: as `read_package`.
    """
    return DeviceModel(read_package(path), threads)


class DeviceModel:
    """A vision graph for each budget, opened when it is first used, and the language graph."""

    def __init__(self, package: Package, threads: int | None = None) -> None:
        from tokenizers import Tokenizer

        self.package = package
        self.threads = threads
        self._vision: dict[str, Any] = {}
        try:
            self.tokenizer = Tokenizer.from_file(str(package.path / TOKENIZER))
        except Exception as error:  # the library raises bare Exceptions
            raise ValueError(f"{package.path / TOKENIZER} can't be read as a tokenizer: {error}") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self._language = open_session(package.path / package.language["file"], threads)
        layers = range(package.language["layers"])
        self._past = [f"past.{layer}.{kind}" for layer in layers for kind in ("key", "value")]
        self._present = [name.replace("past", "present", 1) for name in self._past]
        expected = {"input_ids", "image_embeds", *self._past}
        found = {value.name for value in self._language.get_inputs()}
        if found != expected:
            raise ValueError(
                f"{package.language['file']} does not take what {len(layers)} layers need: {sorted(found ^ expected)[0]}. Export it again"
            )

    @property
    def budgets(self) -> dict[str, int]:
        """Name → visual tokens per image."""
        return {name: entry["tokens"] for name, entry in self.package.budgets.items()}

    def budget(self, wanted: int | str | None = None) -> str:
        """The name of a budget: ``16``, ``"16"`` or ``"all"``; the default where None is given.

        Raises:
            ValueError: for one that was not exported.
        """
        if wanted is None:
            return self.package.default
        if str(wanted) not in self.package.budgets:
            known = ", ".join(self.package.budgets)
            raise ValueError(f"budget {wanted} is not in this export, which has {known}; export it with --budgets")
        return str(wanted)

    def encode(self, images: list[Source], budget: int | str | None = None) -> np.ndarray:
        """Images of any shape → ``(B, K, hidden)`` float32, what the language model reads."""
        return self.see(images, budget)[0]

    def see(self, images: list[Source], budget: int | str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """`encode`, and the places ``(B, dominant)`` of the tokens that were kept among the encoder's."""
        name = self.budget(budget)
        if name not in self._vision:
            self._vision[name] = open_session(self.package.path / self.package.budgets[name]["file"], self.threads)
        pixels = np.stack([to_pixels(open_image(image), self.package.image) for image in images])
        embeddings, kept = self._vision[name].run(["embeddings", "kept"], {"pixel_values": pixels})
        return embeddings, kept

    def ask(
        self,
        image: Source | None,
        question: str,
        budget: int | str | None = None,
        write: Write = lambda text: None,
        limit: int = 512,
    ) -> Answer:
        """One question about one image (or none), in a conversation of its own.

        Args:
            budget: visual tokens of the image, one of `budgets`.
            write: is handed the answer's text as it comes.
            limit: tokens of the longest answer.

        Raises:
            ValueError: for an image that can't be read, a question that can't be asked, or a budget that was not exported.
        """
        chat = Chat(self, budget, limit)
        if image is not None:
            chat.show(image)
        return chat.ask(question, write)

    def chat(self, budget: int | str | None = None, limit: int = 512) -> Chat:
        """A conversation, in which an image is encoded and prefilled once."""
        return Chat(self, budget, limit)

    def empty_cache(self) -> list[Any]:
        sizes = self.package.language
        return [ort_value(np.zeros((1, sizes["kv_heads"], 0, sizes["head_dim"]), np.float32)) for _ in self._past]

    def step(self, ids: list[int], visual: np.ndarray, cache: list[Any]) -> tuple[int, list[Any]]:
        """Ids that follow what the cache contains → the likeliest next token, and the cache with them in it.

        Args:
            visual: ``(V, hidden)`` for the `V` placeholders among `ids`.
        """
        if not len(visual):
            visual = np.zeros(
                (1, self.package.language["hidden"]), np.float32
            )  # a graph can't index nothing; never read
        given = {"input_ids": ort_value(np.array([ids], np.int64)), "image_embeds": ort_value(visual)}
        found = self._language.run_with_ort_values(
            ["logits", *self._present], given | dict(zip(self._past, cache, strict=True))
        )
        return int(found[0].numpy().reshape(-1).argmax()), found[1:]


@dataclass
class Chat:
    """A conversation. Every turn is written out whole and compared with what the cache holds; what both share is not computed again."""

    model: DeviceModel
    budget: int | str | None = None
    limit: int = 512
    turns: list[Turn] = field(default_factory=list)
    waiting: list[Image.Image] = field(default_factory=list)
    _visual: list[np.ndarray] = field(default_factory=list)
    _held: list[int] = field(default_factory=list)
    _cache: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.budget = self.model.budget(self.budget)

    def show(self, image: Source) -> Image.Image:
        """Put an image before the next question.

        Raises:
            ValueError: when it can't be read, or another one waits for the question already.
        """
        if self.waiting:
            raise ValueError("the next question already has an image, and a question can have only one; ask it first")
        self.waiting.append(open_image(image))
        return self.waiting[0]

    def reset(self) -> None:
        """Forget the conversation and its images."""
        self.turns, self._visual, self.waiting, self._held, self._cache = [], [], [], [], []

    def ask(self, question: str, write: Write = lambda text: None) -> Answer:
        """Answer, passing text to `write` as it is generated.

        Raises:
            ValueError: for a question that can't be asked, or a conversation that does not fit any more; nothing has changed then.
            KeyboardInterrupt: passed on; the question is not part of the conversation then.
        """
        from tokenizers.decoders import DecodeStream

        start = time.perf_counter()
        model, package = self.model, self.model.package
        turns = [*self.turns, Turn(check_question(question, package.prompt), bool(self.waiting))]
        count = package.budgets[str(self.budget)]["tokens"]
        ids = encode_conversation(turns, package.prompt, [count] * sum(turn.image for turn in turns), model.tokenizer)
        if len(ids) + 1 > package.language["limit"]:
            raise ValueError(
                f"the conversation has {len(ids):,} tokens, and the model's limit is {package.language['limit']:,}: /reset"
            )
        known = self._common(ids)
        visual = [*self._visual, *(model.encode([image], self.budget)[0] for image in self.waiting)]
        cache = [crop(value, known) for value in self._cache] if known else model.empty_cache()
        said, text, stream, first = [], "", DecodeStream(skip_special_tokens=True), None
        new, embeds = ids[known:], self._needed(ids, known, visual)
        while True:
            token, cache = model.step(new, embeds, cache)
            first = first or time.perf_counter() - start
            said.append(token)
            if token in package.end_ids:
                break
            if (piece := stream.step(model.tokenizer, token)) is not None:
                write(piece)
            if len(said) == self.limit or len(ids) + len(said) >= package.language["limit"]:
                break
            new, embeds = [token], visual[0][:0] if visual else np.zeros((0, package.language["hidden"]), np.float32)
        text = model.tokenizer.decode(said, skip_special_tokens=True)
        self._held, self._cache = [*ids, *said[:-1]], cache  # the last token was never given to the model
        self.turns, self._visual, self.waiting = [*turns[:-1], turns[-1]._replace(answer=text.strip())], visual, []
        size = sum(value.numpy().nbytes for value in cache)
        return Answer(text, len(ids), len(ids) - known, len(said), first, time.perf_counter() - start, size)

    def _common(self, ids: list[int]) -> int:
        """How many of the ids the cache holds; at least one is left to compute, and no image is cut."""
        shorter = min(len(ids) - 1, len(self._held))
        known = next((place for place in range(shorter) if ids[place] != self._held[place]), shorter)
        image = self.model.package.prompt["image_id"]
        while 0 < known < len(ids) and ids[known] == image and ids[known - 1] == image:
            known -= 1
        return known

    def _needed(self, ids: list[int], known: int, visual: list[np.ndarray]) -> np.ndarray:
        """``(V, hidden)`` of the placeholders from place `known` on."""
        image = self.model.package.prompt["image_id"]
        done, wanted = ids[:known].count(image), ids.count(image)
        every = np.concatenate(visual) if visual else np.zeros((0, self.model.package.language["hidden"]), np.float32)
        if len(every) != wanted:
            raise ValueError(
                f"the prompt has {wanted} placeholders for {len(every)} visual tokens; export the model again"
            )
        return every[done:]


def open_session(file: Path, threads: int | None) -> Any:
    """An ONNX Runtime session on the CPU, without any library of custom operators.

    Raises:
        ValueError: for a file that is no graph, is damaged, or needs operators that this ONNX Runtime does not have.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what is wrong is raised
    if threads:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes, none of which it exports
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file} can't be run by onnxruntime {onnxruntime.__version__}: {reason}") from error


def ort_value(array: np.ndarray) -> Any:
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def crop(value: Any, length: int) -> Any:
    """The first `length` positions of keys or values ``(1, heads, L, d)``."""
    array = value.numpy()
    return value if array.shape[2] == length else ort_value(array[:, :, :length])
