"""PaliGemma's one round: the images, `<bos>`, the question and a newline, then the answer and `<eos>`, which alone are supervised."""

from __future__ import annotations

from collections.abc import Sequence

from visionzip.prompts import BaseTemplate, Message, PromptError, Span


class Template(BaseTemplate):
    def spans(self, messages: Sequence[Message], generation: bool = False) -> list[list[Span]]:
        turns = [message for message in messages if message.role != "system"]
        if len(turns) > 2:
            raise PromptError("template", f"paligemma has one question and one answer, found {len(turns)} turns")
        spans = [Span(slot=slot.index) for slot in turns[0].slots]
        spans += [Span(self.tokenizer.bos_token, trusted=True), Span(turns[0].text.strip()), Span("\n", trusted=True)]
        if not generation:
            spans += [Span(turns[1].text, supervised=True)]
            spans += [Span(self.tokenizer.eos_token, supervised=True, trusted=True)]
        return [spans]
