"""Stage-one captions: the image, then the caption and a newline, which alone are supervised. No roles, no question."""

from __future__ import annotations

from collections.abc import Sequence

from visionzip.prompts import BaseTemplate, Message, PromptError, Span
from visionzip.templates.llava_v1 import split_at_images


class Template(BaseTemplate):
    def spans(self, messages: Sequence[Message], generation: bool = False) -> list[list[Span]]:
        turns = [message for message in messages if message.role != "system"]
        if not turns or not turns[0].slots:
            raise PromptError("template", "plain is for captions: the first turn has no image")
        if len(turns) > 2:
            raise PromptError("template", f"plain is for captions: one image and one caption, found {len(turns)} turns")
        spans = [Span(slot=slot.index) for slot in turns[0].slots]
        if not generation:
            spans += [Span(turns[1].text, supervised=True), Span("\n", supervised=True, trusted=True)]
        return split_at_images(spans)
