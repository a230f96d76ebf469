"""The Vicuna conversation LLaVA-1.5 is trained with: `system USER: question ASSISTANT: answer</s>USER: …`.

Every text between two images is tokenized as the start of a text (a SentencePiece prefix space after each image), as LLaVA's
own preprocessing does in training and in evaluation; the ids equal its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from visionzip.prompts import BaseTemplate, Message, Slot, Span

#: LLaVA's `conv_vicuna_v1`, which its training (`--version v1`) and its evaluation (`--conv-mode vicuna_v1`) use; "curious human" is
#: the sentence of its older `conv_llava_v1`
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


class Template(BaseTemplate):
    def spans(self, messages: Sequence[Message], generation: bool = False) -> list[list[Span]]:
        spans: list[Span] = []
        if messages and messages[0].role == "system":
            spans.append(Span(messages[0].text))
            messages = messages[1:]
        else:
            spans.append(Span(SYSTEM, trusted=True))
        spans.append(Span(" ", trusted=True))
        for message in messages:
            if message.role == "user":
                spans.append(Span("USER: ", trusted=True))
                spans += image_first(message)
                spans.append(Span(" ASSISTANT:", trusted=True))
            else:
                spans.append(Span(" ", supervised=True, trusted=True))
                spans += [Span(part, supervised=True) for part in message.parts if isinstance(part, str)]
                spans.append(Span(self.tokenizer.eos_token, supervised=True, trusted=True))
        return split_at_images(spans)


def image_first(message: Message) -> list[Span]:
    """A turn with one image begins with it, on a line of its own; with several, each stays where it was put."""
    slots = message.slots
    if len(slots) == 1:
        text = message.text.strip()
        return [Span(slot=slots[0].index), Span("\n" + text if text else "")]
    return [Span(slot=part.index) if isinstance(part, Slot) else Span(part) for part in message.parts]


def split_at_images(spans: list[Span]) -> list[list[Span]]:
    chunks: list[list[Span]] = [[]]
    for span in spans:
        if span.slot is None:
            chunks[-1].append(span)
        else:
            chunks += [[span], []]
    return [chunk for chunk in chunks if any(span.text or span.slot is not None for span in chunk)]
