"""talk with a compressed model about images; each image is encoded once, every turn reuses the cache

  visionzip chat runs/demo/projector --image photo.jpg
  visionzip chat llava-hf/llava-1.5-7b-hf --dominant 54 --contextual 10
  visionzip chat runs/demo --image photo.jpg --ask "What is this?"    (one answer, and the end)
  visionzip chat --device runs/demo-onnx --image photo.jpg    (an ONNX export, without PyTorch)

In the chat:
  /image photo.jpg [more.png]   show images before the next question
  /image scan.png --budget 128  with their own budget, whatever that of the others
  /budget 64                    keep 64 tokens per image from now on; also 54+10, 0.1 (a share), or all
  /reset                        forget the conversation and its images
  /help, /exit
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from visionzip.argument_types import at_least
from visionzip.commands import _model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _model.add_arguments(parser, model="?")
    parser.add_argument(
        "--image", action="append", default=[], help="an image to begin with; can be given several times"
    )
    parser.add_argument(
        "--ask", metavar="QUESTION", action="append", default=[],
        help="ask this, print the answer and end; can be given several times, one question after the other",
    )  # fmt: skip
    parser.add_argument("--max-new-tokens", type=at_least(1), default=512, help="longest answer (default: 512)")
    parser.add_argument("--temperature", type=temperature, default=0.0, help="0 (default): always the likeliest token")


def temperature(text: str) -> float:
    """0 or more."""
    if not (text.replace(".", "", 1).isdecimal()):
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return float(text)


def run(arguments: argparse.Namespace) -> None:
    directory = onnx_export(arguments)
    if directory is not None:
        return talk_on_device(directory, arguments)
    if arguments.model is None:
        print("usage: visionzip chat MODEL, or visionzip chat --device DIRECTORY (of an ONNX export)", file=sys.stderr)
        raise SystemExit(2)
    from visionzip.chat import Chat

    begun = [open_image(path) for path in arguments.image]  # before the model: a wrong path costs nothing
    every = (arguments.budget or "").lower() in ("all", "full")
    if every:
        arguments.budget = None  # attached first, so that /budget can go back to fewer
    model, processor = _model.load(arguments)
    chat = Chat(model, processor, arguments.max_new_tokens, arguments.temperature)
    if every:
        chat.budget(None)
    for image in begun:
        chat.show(image)
    Terminal(chat, arguments.model, arguments.ask).run()


def without_torch(arguments: argparse.Namespace) -> bool:
    """For `visionzip.cli`, which sets up torch and transformers for all other commands."""
    return onnx_export(arguments) is not None


def onnx_export(arguments: argparse.Namespace) -> str | None:
    """The directory of an ONNX export, as the model or as the device to run on; None where neither is one."""
    from visionzip.device.package import MANIFEST

    if arguments.model is None and arguments.device and os.path.isdir(arguments.device):
        return arguments.device
    return arguments.model if arguments.model and os.path.isfile(os.path.join(arguments.model, MANIFEST)) else None


class Terminal:
    """Reads lines, prints answers. Commands begin with a slash.

    Args:
        questions: asked in place of what is typed.
    """

    def __init__(self, chat: Any, name: str, questions: Sequence[str] = ()) -> None:
        self.chat, self.name, self.questions = chat, name, questions
        self.live = sys.stdin.isatty()
        self.dim, self.plain = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")

    def run(self) -> None:
        for question in self.questions:
            self.answer(question)
        if self.questions:
            return
        if self.live:
            import contextlib

            with contextlib.suppress(ImportError):
                import readline  # noqa: F401 (line editing and history for input())
        self.note(f"{self.name}: {self.budget_words()}. /help says what can be done, /exit ends.")
        if self.chat.waiting:
            self.note(f"{len(self.chat.waiting)} image{'s' * (len(self.chat.waiting) > 1)} before the first question.")
        while True:
            try:
                line = input("> ").strip()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print("\n(/exit ends)")
                continue
            if not self.live:
                print(line)  # so that a transcript of piped input can be read
            if line in ("/exit", "/quit"):
                return
            try:
                if line.startswith("/"):
                    self.command(line)
                elif line:
                    self.answer(line)
            except (ValueError, OSError) as error:
                print(f"! {error}")

    def answer(self, question: str) -> None:
        import torch

        def write(text: str) -> None:
            print(text, end="", flush=True)

        try:
            turn = self.chat.ask(question, write)
        except KeyboardInterrupt:
            print(" … (stopped)")
            return
        except torch.OutOfMemoryError:
            raise ValueError(
                "there is not enough memory for this conversation; try /reset, or a smaller /budget"
            ) from None
        print()
        self.note(summary(turn))

    def command(self, line: str) -> None:
        """Raises ValueError for what it does not know."""
        try:
            word, *rest = shlex.split(line)
        except ValueError as error:
            raise ValueError(f"{line}: {error}") from None
        if word == "/image":
            own = None
            if "--budget" in rest:
                place = rest.index("--budget")
                own, rest = " ".join(rest[place + 1 : place + 2]), rest[:place] + rest[place + 2 :]
            if not rest:
                raise ValueError("/image takes one or more files: /image photo.jpg")
            for image in [open_image(path) for path in rest]:
                self.chat.show(image, own)
                self.note(f"{image.width} × {image.height} image, shown with the next question.")
        elif word == "/budget":
            if len(rest) != 1:
                raise ValueError(f"/budget takes one value such as 64, 54+10, 0.1 or all; now: {self.budget_words()}")
            self.chat.budget(rest[0])
            self.note(f"{self.budget_words()}; the images so far are encoded again.")
        elif word == "/reset":
            self.chat.reset()
            self.note("Conversation and images forgotten.")
        elif word == "/help":
            print((__doc__ or "").split("In the chat:\n")[1].rstrip())
        else:
            raise ValueError(f"{word} is not a command; there are /image, /budget, /reset, /help and /exit")

    def budget_words(self) -> str:
        from visionzip.attach import attached
        from visionzip.export.card import budget_words

        attachment = attached(self.chat.model)
        return budget_words(attachment.config) + " per image" if attachment else "all visual tokens"

    def note(self, text: str) -> None:
        print(f"{self.dim}{text}{self.plain}", flush=True)


def summary(turn: Any) -> str:
    """One line of what a turn took."""
    parts = [f"image: {now} of {stock} tokens" for now, stock in turn.images]
    cached = turn.prompt - turn.prefilled
    parts.append(f"prompt {turn.prompt} tokens" + (f" ({cached} from the cache)" if cached else ""))
    if turn.encoded > len(turn.images):
        parts.append(f"images encoded again: {turn.encoded}")
    rate = (turn.tokens - 1) / (turn.seconds - turn.first) if turn.tokens > 1 and turn.seconds > turn.first else None
    parts.append(f"first token after {1000 * turn.first:.0f} ms")
    parts.append(f"{turn.tokens} tokens" + (f", {rate:.0f}/s" if rate else ""))
    return " · ".join(parts)


def open_image(path: str) -> Any:
    """A file as an upright RGB image.

    Raises:
        ImageError: when it can't be read.
    """
    from visionzip.decode import decode_image

    return decode_image(os.path.expanduser(path))


#: arguments of `visionzip chat` that mean nothing to a graph
MEANINGLESS = ("base", "dominant", "contextual", "selector", "merge", "layer", "positions", "temperature", "force")


def talk_on_device(directory: str, arguments: argparse.Namespace) -> None:
    """Raises ``ValueError`` for a directory that can't be used, or an argument that a graph does not have."""
    from visionzip.device import load
    from visionzip.device.package import MANIFEST

    given = [name for name in MEANINGLESS if getattr(arguments, name)]
    if given:
        raise ValueError(
            f"--{given[0]} can't be changed in an ONNX export ({directory}/{MANIFEST}); export the model again"
        )
    if len(arguments.image) > 1:
        raise ValueError("an ONNX export shows one image a question; give one --image, and others later with /image")
    chat = load(directory).chat(arguments.budget, arguments.max_new_tokens)
    for path in arguments.image:
        chat.show(path)
    DeviceTerminal(chat, directory, arguments.ask).run()


class DeviceTerminal(Terminal):
    """On an ONNX export: neither torch nor transformers is imported."""

    @property
    def model(self) -> Any:
        return self.chat.model

    def answer(self, question: str) -> None:
        def write(text: str) -> None:
            print(text, end="", flush=True)

        try:
            found = self.chat.ask(question, write)
        except KeyboardInterrupt:
            print(" … (stopped)")
            return
        print()
        self.note(device_summary(found))

    def command(self, line: str) -> None:
        word, *rest = shlex.split(line) if line.count('"') % 2 == 0 and line.count("'") % 2 == 0 else line.split()
        if word == "/image":
            if len(rest) != 1:
                raise ValueError("/image takes one file here: /image photo.jpg")
            image = self.chat.show(rest[0])
            self.note(f"{image.width} × {image.height} image, shown with the next question.")
        elif word == "/budget":
            if len(rest) != 1:
                raise ValueError(f"/budget takes one of {', '.join(self.model.budgets)}; now: {self.budget_words()}")
            waiting: list[Any] = self.chat.waiting
            self.chat = self.model.chat(rest[0], self.chat.limit)
            self.chat.waiting = waiting
            self.note(f"{self.budget_words()}; the conversation begins anew.")
        else:
            super().command(line)

    def budget_words(self) -> str:
        return f"{self.model.budgets[str(self.chat.budget)]} visual tokens per image"


def device_summary(answer: Any) -> str:
    """One line of what an answer took."""
    cached = answer.prompt - answer.prefilled
    parts = [f"prompt {answer.prompt} tokens" + (f" ({cached} from the cache)" if cached else "")]
    rate = (answer.tokens - 1) / (answer.seconds - answer.first) if answer.tokens > 1 else None
    parts.append(f"first token after {1000 * answer.first:.0f} ms")
    parts.append(f"{answer.tokens} tokens" + (f", {rate:.0f}/s" if rate else ""))
    return " · ".join(parts)
