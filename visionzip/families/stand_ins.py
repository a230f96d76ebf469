"""What attaching puts on the instances of a model and its processor in place of their own methods.

Picklable objects rather than bound methods, which pickle would lose in silence. Those on a model know its `Family`: deepcopy
follows the reference, so a copied model calls its own copy. Those on a processor hold numbers alone, since a processor travels
to worker processes without the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from inspect import Parameter, Signature
from typing import Any, Protocol

from transformers.processing_utils import MultiModalData

from visionzip.config import ZipConfig

#: what transformers hands on to every ``get_image_features``, by name
OPTIONS = ("vision_feature_layer", "vision_feature_select_strategy", "return_dict")


@dataclass
class MediaFeatures:
    """For ``get_image_features`` and ``get_video_features`` of an inner model: compress, project, and give what they give.

    ``generate`` inspects the signature to know which inputs to pass: it names the family's (`Family.inputs`).
    """

    family: Any  # Family
    config: ZipConfig
    kind: str = "image"

    @property
    def __signature__(self) -> Signature:
        inputs = [
            Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, default=None) for name in self.family.inputs[self.kind]
        ]
        options = [Parameter(name, Parameter.KEYWORD_ONLY, default=None) for name in OPTIONS]
        return Signature([*inputs, *options, Parameter("kwargs", Parameter.VAR_KEYWORD)])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The selection strategy is moot: CLS is kept and counted.

        Raises:
            ValueError: when another layer is asked for than the one the ZipConfig reads.
        """
        names = self.family.inputs[self.kind]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        self._check_layer(given.get("vision_feature_layer"))
        inputs = {name: given[name] for name in names if given.get(name) is not None}
        return self.family.outputs(self.family.compress(self.config, **inputs), self.kind)

    def _check_layer(self, asked: Any) -> None:
        reads = self.family.layer(self.config)
        if asked is not None and asked not in (reads, self.family.stock_layer):
            raise ValueError(
                f"vision_feature_layer={asked} was requested, but this model is attached to layer {reads}; "
                f"attach it with ZipConfig(layer={asked})"
            )


class TokenCount(Protocol):
    """How many placeholders an image or video needs."""

    def of_input(self, inputs: Any, index: int) -> int:
        """Of the `index`-th, from what the image or video processor made of them all."""

    def of_size(self, size: Any) -> int:
        """Of an image of ``(height, width)`` pixels, or of a video of ``(frames, height, width)``."""


@dataclass
class FixedCount:
    """The same number for every image."""

    tokens: int

    def of_input(self, inputs: Any, index: int) -> int:
        return self.tokens

    def of_size(self, size: Any) -> int:
        return self.tokens


@dataclass
class Placeholders:
    """For a processor's ``replace_image_token`` or ``replace_video_token``: as many placeholders as `count` says."""

    token: str
    count: TokenCount

    def __call__(self, inputs: Any, index: int | None = None, **kwargs: Any) -> str:
        number = index if index is not None else next(value for name, value in kwargs.items() if name.endswith("_idx"))
        return self.token * self.count.of_input(inputs, number)


@dataclass
class TokenCounts:
    """For a processor's ``_get_num_multimodal_tokens``, which serving engines ask for lengths."""

    image: TokenCount
    video: TokenCount | None = None

    def __call__(
        self, image_sizes: list | None = None, video_sizes: list | None = None, **kwargs: Any
    ) -> MultiModalData:
        found: dict[str, list[int]] = {}
        if image_sizes is not None:
            found["num_image_tokens"] = [self.image.of_size(size) for size in image_sizes]
            found["num_image_patches"] = [1] * len(image_sizes)
        if video_sizes is not None and self.video is not None:
            found["num_video_tokens"] = [self.video.of_size(size) for size in video_sizes]
        return MultiModalData(**found)


class Cut(Protocol):
    """How runs of placeholders that a processor writes are cut, where there is more in its text than placeholders."""

    def run(self, processor: Any, kind: str, inputs: Any, index: int) -> tuple[int, int]:
        """(placeholders in each run of the `index`-th image or video, how many of them stay)."""

    def apply(self, processor: Any, data: Any, image_sizes: list | None, video_sizes: list | None) -> None:
        """Cut the numbers in `data`, the processor's own, in place."""


@dataclass
class FewerPlaceholders:
    """For ``replace_image_token`` or ``replace_video_token``: the processor's own text with fewer placeholders in a run."""

    processor: Any
    kind: str
    token: str
    cut: Cut

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> str:
        text = getattr(type(self.processor), f"replace_{self.kind}_token")(self.processor, inputs, *args, **kwargs)
        index = args[0] if args else kwargs[f"{self.kind}_idx"]
        before, after = self.cut.run(self.processor, self.kind, inputs, index)
        return text.replace(self.token * before, self.token * after)


@dataclass
class FewerTokenCounts:
    """For ``_get_num_multimodal_tokens``: the processor's own numbers, cut."""

    processor: Any
    cut: Cut

    def __call__(
        self, image_sizes: list | None = None, video_sizes: list | None = None, **kwargs: Any
    ) -> MultiModalData:
        sizes = {"image_sizes": image_sizes} | ({} if video_sizes is None else {"video_sizes": video_sizes})
        data = type(self.processor)._get_num_multimodal_tokens(self.processor, **sizes, **kwargs)
        self.cut.apply(self.processor, data, image_sizes, video_sizes)
        return data


@dataclass
class TokenTypes:
    """A pre-hook of ``forward``: `Family.token_types` for a prompt that comes without, where nothing is cached yet."""

    family: Any  # Family

    def __call__(self, model: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        ids, cache = kwargs.get("input_ids"), kwargs.get("past_key_values")
        begins = cache is None or cache.get_seq_length() == 0
        if args or ids is None or kwargs.get("token_type_ids") is not None or not begins:
            return None
        types = self.family.token_types(ids, kwargs.get("labels"))
        return None if types is None else (args, {**kwargs, "token_type_ids": types})
