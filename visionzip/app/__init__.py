"""A page to look at a compressed model: move the budget, click patches, paint what to keep, ask. `looker` thinks, `ui` shows."""
