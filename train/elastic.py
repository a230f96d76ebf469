"""Training one projector for several budgets (`ZipConfig.budgets`): each image of each step at its own budget.

Which budget that is, `data.elastic` draws. From a token cache an item has the tokens of its budget. From pixels a batch has each
row's image inputs and budget, and the encoder runs here, before the model's forward, which then reads what a cache gives.
"""

from __future__ import annotations

from typing import Any

import torch

from data.cache.budgets import EncodeOnce
from data.cache.reader import VISUAL
from data.elastic import Budget
from data.images import AT_BUDGET
from visionzip import Attachment, attached
from visionzip.budgets import at_budget, ladder
from visionzip.families import Family
from visionzip.families.stand_ins import TokenCount
from visionzip.inputs import merge_image_inputs
from visionzip.selectors import SELECTORS


def check_supported(attachment: Attachment) -> None:
    """Raise ``ValueError`` for a model whose images can't have budgets of their own in one batch."""
    if not attachment.family.per_image_budgets:
        raise ValueError(
            f"zip.budgets: {type(attachment.model).__name__} can't be trained for several budgets; LLaVA-1.5 and LLaVA-NeXT can. "
            "Leave zip.budgets out"
        )
    if SELECTORS[attachment.config.selector].scales:
        raise ValueError(
            f"zip.budgets: {attachment.config.selector} scales the image to the budget, so one pass of the encoder gives one budget only; "
            "choose another selector, or leave zip.budgets out"
        )


def placeholder_counts(attachment: Attachment) -> dict[Budget, TokenCount]:
    """Budget → how many placeholders an image needs, from the smallest on."""
    config, family = attachment.config, attachment.family
    return {budget: family.placeholder_counts(at_budget(config, budget))["image"] for budget in ladder(config)}


def tokens_per_image(attachment: Attachment, usual: int = 0) -> dict[Budget, int]:
    """Budget → visual tokens of an image.

    Args:
        usual: those of a usual image at the current budget, where they are more than one budget (tiles); 0: not known.
    """
    config, family = attachment.config, attachment.family
    times = usual / sum(family.budget(config)) if usual else 1.0
    return {budget: round(times * sum(family.budget(at_budget(config, budget)))) for budget in ladder(config)}


def describe_budgets(attachment: Attachment) -> str:
    """``8, 16, 32``, or ``8 to 64`` where there are many."""
    totals = list(tokens_per_image(attachment).values())
    return ", ".join(map(str, totals)) if len(totals) <= 12 else f"{totals[0]} to {totals[-1]}"


def compress_at_budgets(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch's images through the encoder, each row's at its own budget: what comes back is what a cache gives (`train.cached`).
    A batch without such images is handed on.

    The encoder runs once, whatever the budgets: under ZeRO-3, where each of its modules is a collective, all ranks have to run it
    equally often.
    """
    if AT_BUDGET not in inputs:
        return inputs
    attachment = attached(model)
    assert attachment is not None
    rows: list[tuple[Budget, dict[str, Any]]] = inputs[AT_BUDGET]
    budgets = [budget for budget, images in rows for _ in range(attachment.family.count_images(images))]
    together = merge_image_inputs([images for _, images in rows])
    family = EncodeOnce.of(attachment.family)
    tokens: list[Any] = [None] * len(budgets)
    for budget in dict.fromkeys(budgets):
        family.encode.rewind()
        with torch.no_grad():
            found = family.compress(at_budget(attachment.config, budget), **together)
        for place, own in enumerate(budgets):
            if own == budget:
                tokens[place] = found[place]
    return {**{name: value for name, value in inputs.items() if name != AT_BUDGET}, VISUAL: tokens}


def count_images(family: Family, batch: dict[str, Any]) -> int:
    """Images in a batch of pixels with budgets."""
    return sum(family.count_images(inputs) for _, inputs in batch.get(AT_BUDGET) or ())
