"""What to keep of an image: one validated object, stored with the model and with everything that is exported."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, field_validator, model_validator

Measure = Literal["attention", "coverage"]


class Adaptive(BaseModel):
    """Per-image budgets: an image keeps the fewest dominant tokens that reach `threshold` of the measure.

    `ZipConfig.dominant` is then the most an image keeps; contextual tokens are the same number for all. A threshold that
    gives a wanted mean is found by ``visionzip calibrate``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    threshold: float = Field(gt=0, lt=1, description="share that the kept patches have to reach")
    measure: Measure = Field(
        "attention", description="share of the attention on patches, or of what a greedy choice of patches covers"
    )
    least: StrictInt = Field(1, ge=1, description="dominant tokens that every image keeps, CLS included")

    @property
    def needs_scores(self) -> bool:
        return self.measure == "attention"


class ZipConfig(BaseModel):
    """How many visual tokens are kept, and how they are chosen.

    A budget is a number of tokens (an ``int``) or a share of the tokens the encoder makes (a ``float`` in (0, 1]). A share is
    truncated to whole tokens, of which there is at least one: 0.65 + 0.05 of 70 tokens are 45 + 3. That is the authors'
    arithmetic for Qwen2.5-VL, the one family for which they use shares; it is the same in all of ours.
    ``dominant`` counts the CLS token where the encoder has one, as the authors' call does: ``dominant=54`` on CLIP is
    CLS and 53 patches (authors' code; paper, section 3.2).

    Raises:
        pydantic.ValidationError: (a ``ValueError``) for a budget that no encoder could meet, or an unknown key.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    dominant: StrictInt | StrictFloat = Field(
        54, description="tokens kept as they are, CLS included; a share if below 1"
    )
    contextual: StrictInt | StrictFloat = Field(10, description="tokens that the rest is merged into; 0 drops the rest")
    selector: str = Field("visionzip", description="how the dominant tokens are chosen (visionzip/selectors/)")
    merge: str = Field("add", description="how the rest is merged into contextual tokens (visionzip/merges/)")
    layer: int | None = Field(
        None, description="hidden state that is read, as in `hidden_states[layer]`; None: the one the model reads"
    )
    adaptive: Adaptive | None = Field(
        None, description="per-image budgets: fewer tokens for images that need fewer; `dominant` is then the maximum"
    )
    pad_images: bool | Literal["auto"] = Field(
        "auto",
        description="pad images to squares with the mean colour, as LLaVA-1.5 does; auto: where the image processor would "
        "crop them to the middle square",
    )

    @field_validator("merge")
    @classmethod
    def _merge_is_known(cls, name: str) -> str:
        from visionzip.merges import MERGES  # brings torch, which this file does without

        return MERGES[name].name

    @model_validator(mode="after")
    def _budgets_are_possible(self) -> ZipConfig:
        for name, least in (("dominant", 1), ("contextual", 0)):
            value = getattr(self, name)
            if isinstance(value, float) and not (0.0 <= value <= 1.0 and (value > 0.0 or least == 0)):
                raise ValueError(
                    f"{name}={value} is not a share of the tokens; expected a float in ({'0' if least else '0 or more'}, 1],"
                    f" or an int for a number of tokens"
                )
            if isinstance(value, int) and value < least:
                raise ValueError(
                    f"{name}={value} can't be met; expected an int of at least {least}, or a share in (0, 1]"
                )
        if self.adaptive is not None and isinstance(self.dominant, int) and self.adaptive.least > self.dominant:
            raise ValueError(
                f"adaptive.least={self.adaptive.least} is more than dominant={self.dominant}, the most there can be"
            )
        return self

    def resolve(self, tokens: int, reserved: int = 0, *, cap: bool = False) -> tuple[int, int]:
        """The budget in tokens for an encoder that makes `tokens` of them.

        Args:
            tokens: ``N``, tokens an image has, CLS included.
            reserved: tokens that are always kept (CLS) and therefore need a place among the dominant.
            cap: an image with fewer tokens than asked for keeps all it has; for encoders whose images differ in size.

        Returns:
            ``(dominant, contextual)``, both in tokens.

        Raises:
            ValueError: when the encoder has fewer tokens than asked for.
        """
        dominant = self._tokens(self.dominant, tokens)
        contextual = self._tokens(self.contextual, tokens)
        dominant = max(dominant, reserved) if isinstance(self.dominant, float) else dominant
        if cap:
            dominant = min(dominant, tokens)
        if cap or isinstance(self.contextual, float):
            contextual = max(0, min(contextual, tokens - dominant))
        if dominant < reserved or dominant + contextual > tokens:
            raise ValueError(
                f"a budget of dominant={self.dominant} + contextual={self.contextual} can't be met: the encoder makes "
                f"{tokens} tokens per image{' (CLS included)' if reserved else ''}. Choose dominant + contextual <= {tokens}."
            )
        return dominant, contextual

    @staticmethod
    def _tokens(budget: int | float, tokens: int) -> int:
        if isinstance(budget, int):
            return budget
        return max(1, int(budget * tokens)) if budget else 0
