"""Numbers and the words they count."""

from __future__ import annotations


def count_of(number: int, noun: str) -> str:
    """`1 record`, `2 records`, `3 processes`."""
    ending = "es" if noun.endswith("s") else "s"
    return f"{number:,} {noun}{'' if number == 1 else ending}"
