"""A web page for exploring a compressed model: change the budget, click patches, ask questions. `looker` runs the model, `ui` is the
page."""
