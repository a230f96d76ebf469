"""Samples printed as the model sees them, what is supervised in colour."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from rich.console import Console
from rich.text import Text

from data.dataset import InstructionDataset
from data.sample import Reject, Sample
from data.stream import StreamedDataset
from data.template import IGNORE, Encoded

SUPERVISED = "bold green"
IMAGE = "bold magenta"
_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | dict.fromkeys(
    range(127, 160), 0xFFFD
)


def show_samples(console: Console, data: InstructionDataset | StreamedDataset, samples: list[Sample]) -> None:
    legend = (
        Text("\nsamples: ", style="bold")
        .append("supervised", style=SUPERVISED)
        .append(", ")
        .append("image", style=IMAGE)
    )
    console.print(legend)
    for sample in samples:
        console.print(Text(show_whitespace(f"\n{sample.source} {sample.id}"), style="dim"))
        try:
            encoded, _, before = data.encoder.encode(sample)
        except Reject as error:
            console.print(Text(show_whitespace(f"rejected: {error}"), style="red"))
            continue
        console.print(colour_tokens(data.encoder.template.tokenizer, encoded))
        if before > len(encoded.input_ids):
            console.print(Text(f"[truncated from {before} tokens]", style="red"))


def colour_tokens(tokenizer: Any, encoded: Encoded) -> Text:
    """The text of all tokens; each image's placeholders as one note of how many there are."""
    text = Text()
    images = {position: index for index, (start, end) in encoded.images.items() for position in range(start, end)}

    def mark(position: int) -> tuple[str, int]:
        if position in images:
            return ("image", images[position])
        return ("supervised" if encoded.labels[position] != IGNORE else "text", 0)

    for (kind, index), run in groupby(range(len(encoded.input_ids)), key=mark):
        ids = [encoded.input_ids[position] for position in run]
        if kind == "image":
            text.append(f"[image {index + 1}: {len(ids)} tokens]", style=IMAGE)
        else:
            text.append(
                show_whitespace(decode_readable(tokenizer, ids)), style=SUPERVISED if kind == "supervised" else ""
            )
    return text


def show_whitespace(text: str) -> str:
    """Control characters as `␛` and its like: what a record holds must not steer the terminal."""
    return text.translate(_CONTROL)


def decode_readable(tokenizer: Any, ids: list[int]) -> str:
    """The decoded text; SentencePiece decoders drop the space a run begins with, which is put back."""
    text = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return " " + text.lstrip(" ") if tokenizer.convert_ids_to_tokens(ids[0]).startswith("▁") else text
