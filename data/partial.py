"""A model without some of its halves: the vision tower is not needed where visual tokens come from a cache, nor the LLM where they
are made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from data.config import ConfigError, ModelSection
from visionzip import pretrained


@contextmanager
def as_config_error(place: str) -> Iterator[None]:
    """Errors of `visionzip.pretrained` and `attach`, each one sentence, as a `ConfigError` at this place of the config."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ImportError, ValueError) as error:
        raise ConfigError(f"{place}: {error}") from error


def load_processor(section: ModelSection) -> Any:
    """The processor of `model.path`. Raises `ConfigError`."""
    with as_config_error("model.path"):
        return pretrained.load_processor(section.path, **section.source_options)


def load_shapes(section: ModelSection) -> Any:
    """The model on the meta device: its modules and their shapes, no weights."""
    import torch
    from transformers import AutoModelForImageTextToText

    config = pretrained.read_config(section.path, **section.source_options)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, trust_remote_code=section.trust_remote_code)


def load_without(
    path: str,
    without: Sequence[str],
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **kwargs: Any,
) -> Any:
    """`visionzip.pretrained.load_model`, but the weights of the modules named in `without` are never read.

    The modules stay, with their sizes and without parameters; running one raises. Keys of the checkpoint are converted as ever:
    transformers does that for classes of its own package only, hence the name and module of the class that is used to load.

    Args:
        without: ``"encoder"`` and/or ``"llm"``; what maps visual tokens into the LLM is always loaded.

    Raises:
        ValueError: as `load_model`, and for a model that is not supported.
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    from visionzip.families import FAMILIES

    source: Any = {"revision": revision, "trust_remote_code": trust_remote_code}
    config = pretrained.read_config(path, **source)
    family = FAMILIES.get(str(config.model_type))
    kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(type(config), None)
    if family is None or kind is None:
        raise ValueError(f"{path} is a {config.model_type} model; supported: {', '.join(FAMILIES.names())}")
    if "llm" in without:
        config.tie_word_embeddings = False  # nothing is left to tie

    def __init__(self: Any, *args: Any, **options: Any) -> None:
        kind.__init__(self, *args, **options)
        if "encoder" in without:
            strip_parameters(self, family.tower, family.projectors)
        if "llm" in without:
            strip_parameters(self, family.llm, family.projectors)
            strip_parameters(self, "lm_head", ())

    names = {"__init__": __init__, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    loader: Any = type(kind.__name__, (kind,), {**names, "_keys_to_ignore_on_load_unexpected": [".*"]})
    model = pretrained.load_model(path, loader=loader, config=config, **source, **kwargs)
    model.__class__ = kind
    return model


def strip_parameters(model: nn.Module, name: str, keep: Sequence[str]) -> None:
    """Take the parameters off the module called `name` and all inside it, except for the modules named in `keep`."""
    for inner, module in model.get_submodule(name).named_modules():
        full = f"{name}.{inner}" if inner else name
        if any(full == kept or full.startswith(f"{kept}.") for kept in keep):
            continue
        if module._parameters:
            module._parameters = dict.fromkeys(module._parameters)
            module.register_forward_pre_hook(_Missing(full))
        module._is_hf_initialized = True  # else transformers draws weights for it


class _Missing:
    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any) -> None:
        raise RuntimeError(f"{self.name} was loaded without its weights (data.cache is set), so it can't be run")
