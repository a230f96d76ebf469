"""One model, every budget: change how many visual tokens it keeps while it is loaded."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from visionzip.attach import Attachment, attach, attached, pause, paused
from visionzip.budgets import as_config, format_budget, is_trained, ladder
from visionzip.config import ZipConfig

log = logging.getLogger(__name__)
_warned: set[tuple[str, str]] = set()  # (budget, trained budgets) that this process has warned of


def set_budget(model: nn.Module, budget: Any) -> Any:
    """Keep another number of visual tokens from now on: ``set_budget(model, 32)``. Model and processor change together; nothing is
    loaded, copied or attached again.

    Args:
        model: attached (or loaded with `visionzip.load`).
        budget: 32, 0.1 (a share), ``"27+5"``, ``(27, 5)``, or ``"all"``: the untouched model, until the next call.

    Returns:
        `model`. A budget that its projector was not trained for is logged, once.

    Raises:
        ValueError: when nothing is attached, the encoder can't meet the budget, or the model's prompts have a fixed budget;
            nothing has changed then.
    """
    attachment, before = attached(model), paused(model)
    known = attachment or before
    if known is None:
        raise ValueError("nothing is attached to this model; call attach(model, processor, ZipConfig(...)) first")
    if known.fixed:
        raise ValueError(known.fixed)
    config = as_config(budget, known.config)
    if config is None:
        if attachment is not None:
            pause(attachment)
        return model
    if attachment is None:
        attach(model, known.processor, config)
    else:
        attachment.change(config)
    warn_untrained(attached(model) or known)
    return model


def warn_untrained(attachment: Attachment) -> None:
    """Log, once in this process, that the projector was not trained for the current budget."""
    config, trained = attachment.config, attachment.trained
    if trained is None:
        return
    try:
        budget: Any = attachment.family.budget(config)
    except ValueError:  # images of any size: only what is written can be compared
        budget = (config.dominant, config.contextual)
    if is_trained(trained, budget) or is_trained(trained, (config.dominant, config.contextual)):
        return
    text, known = format_budget(config), describe_trained(trained)
    if (text, known) not in _warned:
        _warned.add((text, known))
        log.warning(
            "this projector was not trained for a budget of %s (trained for: %s); answers may be worse", text, known
        )


def describe_trained(config: ZipConfig) -> str:
    """``13 + 3``, or ``8 + 0 to 64 + 0``: the smallest and the largest budget."""
    rungs = ladder(config)
    ends = [f"{dominant} + {contextual}" for dominant, contextual in (rungs[0], rungs[-1])]
    return ends[0] if len(rungs) == 1 else " to ".join(ends)
