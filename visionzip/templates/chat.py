"""The processor's own chat template.

The template is rendered with a mark in place of every text. Around the marks stands what the template itself wrote, so what is
the user's, what is the assistant's and where images stand need no searching. Putting the texts back must give what the
template renders for the real conversation, character for character; otherwise the conversation is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from visionzip.inputs import takes_videos
from visionzip.prompts import BaseTemplate, Message, PromptError, Slot, Span

# Private-use characters: a template has no reason to touch them.
_OPEN, _CLOSE = "\ue0a0", "\ue0a1"
_MARK = re.compile(f"{_OPEN}(\\d+){_CLOSE}")


class Template(BaseTemplate):
    def __init__(self, processor: Any) -> None:
        super().__init__(processor)
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                f"{type(processor).__name__} has no chat template; set data.template to llava_v1 or plain, "
                "or load a processor with one (chat_template.jinja)"
            )
        self._video_type = "video" if takes_videos(processor) else "image"
        tokens = {kind: getattr(processor, f"{kind}_token", None) for kind in ("image", "video")}
        self._media_tokens = {token: kind for kind, token in tokens.items() if token}
        self._media_pattern = re.compile("|".join(map(re.escape, self._media_tokens)) or r"(?!)")
        try:
            self._lead, self._end = self._probe()
        except Exception as error:  # Jinja's syntax errors, names it does not know, whatever a template raises itself
            number = getattr(error, "lineno", None)
            line = f", line {number}" if number else ""
            raise ValueError(
                f"the chat template of this {type(processor).__name__} can't write one question and its answer "
                f"({type(error).__name__}{line}: {error}); fix its chat_template.jinja, or use the template llava_v1 or plain"
            ) from error

    def _probe(self) -> tuple[str, str]:
        """What stands between the generation prompt and an answer, and what the template ends an answer with.

        The first is whitespace a model has to write before its answer (`ASSISTANT:` → `ASSISTANT: Red`), the second goes up
        to the last control token behind it, or is the end-of-sequence token where the template writes none.
        """
        question = {"role": "user", "content": [{"type": "text", "text": f"{_OPEN}0{_CLOSE}"}]}
        answer = {"role": "assistant", "content": [{"type": "text", "text": f"{_OPEN}1{_CLOSE}"}]}
        prompt = self._render([question], generation=True).partition(f"{_OPEN}0{_CLOSE}")[2]
        between, _, tail = (
            self._render([question, answer]).partition(f"{_OPEN}0{_CLOSE}")[2].partition(f"{_OPEN}1{_CLOSE}")
        )
        lead = between[len(prompt) :] if between.startswith(prompt) else ""
        controls = list(self._control.finditer(tail))
        return (lead if not lead.strip() else ""), (tail[: controls[-1].end()] if controls else "")

    def _render(self, conversation: list[dict[str, Any]], generation: bool = False) -> str:
        return self.processor.apply_chat_template(conversation, add_generation_prompt=generation, tokenize=False)

    def spans(self, messages: Sequence[Message], generation: bool = False) -> list[list[Span]]:
        texts: list[tuple[str, str]] = []  # (role, text) in order of the marks
        slots: dict[str, list[int]] = {"image": [], "video": []}  # as the template is told: by kind, in order
        marked, real = [], []
        for message in messages:
            marked_parts: list[dict[str, str]] = []
            real_parts: list[dict[str, str]] = []
            for part in _tidy(message.parts):
                if isinstance(part, Slot):
                    kind = self._video_type if part.kind == "video" else "image"
                    slots[kind].append(part.index)
                    marked_parts.append({"type": kind})
                    real_parts.append({"type": kind})
                else:
                    marked_parts.append({"type": "text", "text": f"{_OPEN}{len(texts)}{_CLOSE}"})
                    real_parts.append({"type": "text", "text": part})
                    texts.append((message.role, part))
            marked.append({"role": message.role, "content": marked_parts})
            real.append({"role": message.role, "content": real_parts})
        try:
            skeleton, expected = self._render(marked, generation), self._render(real, generation)
        except Exception as error:  # templates raise for conversations they do not take, each in its own way
            raise PromptError("template", f"the chat template rejects it: {type(error).__name__}: {error}") from error
        texts = self._as_rendered(skeleton, expected, texts)
        return [self._cut(skeleton, texts, slots)]

    def _as_rendered(self, skeleton: str, expected: str, texts: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """The texts as the template writes them: unchanged, or with the space at their ends trimmed.

        Raises `PromptError` where the template changes them in another way: labels made from them would be wrong.
        """
        for candidate in (texts, [(role, text.strip()) for role, text in texts]):
            if _MARK.sub(lambda mark: candidate[int(mark[1])][1], skeleton) == expected:  # noqa: B023
                return candidate
        raise PromptError(
            "template", "the chat template changes the text of a message, so its answers can't be told apart"
        )

    def _cut(self, skeleton: str, texts: list[tuple[str, str]], slots: dict[str, list[int]]) -> list[Span]:
        spans: list[Span] = []
        images = {kind: iter(indices) for kind, indices in slots.items()}
        position = 0
        after_answer = False
        marks = [*_MARK.finditer(skeleton), None]
        for mark in marks:
            written = skeleton[position : mark.start() if mark else len(skeleton)]
            if after_answer:
                end = self._end if self._end and written.startswith(self._end) else ""
                if end or not self._end:
                    spans.append(Span(end or self.tokenizer.eos_token, supervised=True, trusted=True))
                written = written[len(end) :]
            answer = mark is not None and texts[int(mark[1])][0] == "assistant"
            lead = self._lead if answer and self._lead and written.endswith(self._lead) else ""
            spans += self._with_images(written[: len(written) - len(lead)], images)
            if mark is not None:
                spans.append(Span(lead, supervised=True, trusted=True))
                spans.append(Span(texts[int(mark[1])][1], supervised=answer))
                position, after_answer = mark.end(), answer
        if any(next(rest, None) is not None for rest in images.values()):
            raise PromptError("template", "the chat template leaves out an image of this conversation")
        return [span for span in spans if span.text or span.slot is not None]

    def _with_images(self, written: str, images: dict[str, Iterator[int]]) -> list[Span]:
        """Replace the template's media tokens by slots, in order."""
        spans: list[Span] = []
        position = 0
        for token in self._media_pattern.finditer(written):
            slot = next(images[self._media_tokens[token[0]]], None)
            if slot is None:
                raise PromptError("template", "the chat template writes more images than the conversation has")
            spans += [Span(written[position : token.start()], trusted=True), Span(slot=slot)]
            position = token.end()
        return [*spans, Span(written[position:], trusted=True)]


def _tidy(parts: list[str | Slot]) -> list[str | Slot]:
    """Drop the newline that LLaVA-style records put between an image and the text: the template puts its own there."""
    tidy: list[str | Slot] = []
    for number, part in enumerate(parts):
        if isinstance(part, str):
            if number and isinstance(parts[number - 1], Slot):
                part = part.removeprefix("\n")
            if number + 1 < len(parts) and isinstance(parts[number + 1], Slot):
                part = part.removesuffix("\n")
            if not part:
                continue
        tidy.append(part)
    return tidy
