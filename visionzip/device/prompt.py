"""From a conversation to token ids, without a template engine.

``prompt`` of ``device.json`` is what the model's chat template writes around the texts of a conversation, found and checked when it was
exported. Written out, a conversation is

    first + question + between + answer + next + question + between + answer + … + next + question + ask

- ``first`` and ``next`` have two forms, for a question with and without an image; the character ``image`` in them stands for it;
- ``placeholder``: ``before``, ``token`` and ``after``: an image of `K` visual tokens is ``before + K · token + after``;
- the character ``cut`` separates pieces that are tokenized on their own; ``begin``: ids in front of all;
- ``controls``: texts that a question must not contain, since the tokenizer would take them for control tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple


class Turn(NamedTuple):
    """A question, whether it shows an image, and its answer (empty for the question that is to be answered)."""

    question: str
    image: bool
    answer: str = ""


def write_conversation(turns: Sequence[Turn], prompt: dict[str, Any], tokens: Sequence[int]) -> str:
    """The conversation as text with ``cut`` characters in it, up to where the model is to answer the last question.

    Args:
        tokens: visual tokens of each image that is shown, in order.
    """
    image, placeholder, counts = prompt["image"], prompt["placeholder"], iter(tokens)
    written = []
    for number, turn in enumerate(turns):
        opening = prompt["first" if number == 0 else "next"]["image" if turn.image else "plain"]
        if turn.image:
            shown = placeholder["before"] + next(counts) * placeholder["token"] + placeholder["after"]
            opening = opening.replace(image, shown)
        last = number == len(turns) - 1
        written.append(opening + turn.question + (prompt["ask"] if last else prompt["between"] + turn.answer))
    return "".join(written)


def encode_conversation(
    turns: Sequence[Turn], prompt: dict[str, Any], tokens: Sequence[int], tokenizer: Any
) -> list[int]:
    """`write_conversation` as ids, with the `tokenizers` library's tokenizer."""
    text = write_conversation(turns, prompt, tokens)
    pieces = [piece for piece in text.split(prompt["cut"]) if piece]
    return [*prompt["begin"], *(id for piece in pieces for id in tokenizer.encode(piece, add_special_tokens=False).ids)]


def check_question(question: str, prompt: dict[str, Any]) -> str:
    """The question without space at its ends.

    Raises:
        ValueError: when it is empty, or contains what is no text to the tokenizer.
    """
    question = question.strip()
    if not question:
        raise ValueError("the question is empty")
    found = [control for control in (*prompt["controls"], prompt["image"], prompt["cut"]) if control in question]
    if found:
        raise ValueError(f"the question contains {found[0]!r}, which is a control token of this model; leave it out")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the question contains {question[error.start]!r}, which is half a surrogate pair") from error
    return question
