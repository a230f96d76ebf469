"""`visionzip chat` on an ONNX export: neither torch nor transformers is imported."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from visionzip.commands.chat import Terminal
from visionzip.device import Answer, DeviceModel, load
from visionzip.device.package import MANIFEST

#: arguments of `visionzip chat` that mean nothing to a graph
MEANINGLESS = ("base", "dominant", "contextual", "selector", "merge", "layer", "temperature", "force")


def talk(directory: str, arguments: argparse.Namespace) -> None:
    """Raises ``ValueError`` for a directory that can't be used, or an argument that a graph does not have."""
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
    DeviceTerminal(chat, directory).run()


class DeviceTerminal(Terminal):
    @property
    def model(self) -> DeviceModel:
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
        self.note(summary(found))

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


def summary(answer: Answer) -> str:
    """One line of what an answer took."""
    cached = answer.prompt - answer.prefilled
    parts = [f"prompt {answer.prompt} tokens" + (f" ({cached} from the cache)" if cached else "")]
    rate = (answer.tokens - 1) / (answer.seconds - answer.first) if answer.tokens > 1 else None
    parts.append(f"first token after {1000 * answer.first:.0f} ms")
    parts.append(f"{answer.tokens} tokens" + (f", {rate:.0f}/s" if rate else ""))
    return " · ".join(parts)
