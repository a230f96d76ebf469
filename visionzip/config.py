"""What to keep of an image: one validated object, stored with the model and with everything that is exported."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, field_validator, model_validator


class TrainedBudgets(BaseModel):
    """The budgets that one projector is (to be) trained for: a list, or every number of tokens of a range.

    In a config a list stands for itself: ``budgets: [8, 16, 32, "54+10"]``. With a density: ``{totals: [8, 16], density: [0.7,
    0.3]}``, or ``{least: 8, most: 128, density: [2, -2]}``.

    Raises:
        pydantic.ValidationError: (a ``ValueError``) for an empty or unordered list, a range that holds nothing, a density whose sum
            (of a range: integral) is not 1 or that is negative somewhere.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    totals: list[StrictInt | StrictFloat | str] | None = Field(
        None, description="budgets in ascending order: numbers of tokens, dominant+contextual (54+10), or shares"
    )
    least: StrictInt | None = Field(None, description="smallest number of tokens of a range")
    most: StrictInt | None = Field(None, description="largest number of tokens of a range")
    contextual: bool | None = Field(
        None, description="whether they have contextual tokens; default: whether `zip.contextual` is more than 0"
    )
    density: list[float] | None = Field(
        None,
        description="how often each is drawn. Of a list: one probability for each (default: equal). Of a range: the "
        "coefficients of a polynomial in x, which goes from 0 at the smallest to 1 at the largest (default: 2 - 2x)",
    )

    @model_validator(mode="after")
    def _budgets_are_possible(self) -> TrainedBudgets:
        if self.totals is None:
            if self.least is None or self.most is None:
                raise ValueError("expected a list of budgets ([8, 16, 64]), or a range with `least` and `most`")
            if not 1 <= self.least <= self.most:
                raise ValueError(f"least={self.least}, most={self.most} is not a range; expected 1 <= least <= most")
        elif self.least is not None or self.most is not None:
            raise ValueError("expected either a list of budgets or `least` and `most`, got both")
        elif not self.totals:
            raise ValueError(
                "the list of budgets is empty; name at least one, or leave `budgets` out for a fixed budget"
            )
        sizes = [sum(size) if isinstance(size, tuple) else size for size in self.sizes()]
        if len({type(size) for size in sizes}) > 1 or sizes != sorted(set(sizes)):
            raise ValueError(
                f"{self.totals} are not in ascending order; expected numbers of tokens, or shares, from small to large"
            )
        if self.density is not None and self.totals is not None and len(self.density) != len(self.totals):
            raise ValueError(
                f"density has {len(self.density)} numbers for {len(self.totals)} budgets; expected one for each"
            )
        merged = [size for size in self.sizes() if isinstance(size, tuple) and size[1]]
        if merged and self.contextual is False:
            raise ValueError(
                f"{merged[0][0]}+{merged[0][1]} has contextual tokens, but contextual=0 leaves them out of all budgets; write "
                f"{sum(merged[0])}, or set contextual"
            )
        weights = self.weights()
        if min(weights) < -1e-9 or not math.isclose(sum(weights), 1.0, abs_tol=1e-6):
            raise ValueError(
                f"density={self.density} is not a density: "
                + (f"it sums to {sum(weights):g}" if min(weights) >= -1e-9 else "it is negative for some budgets")
                + "; expected numbers of at least 0 that sum to 1 (of a range: a polynomial whose integral over 0..1 is 1)"
            )
        return self

    def sizes(self) -> list[int | float | tuple[int, int]]:
        """Each budget, ascending: a number of tokens, a share of them, or ``(dominant, contextual)``.

        Raises:
            ValueError: for a text that is not ``dominant+contextual``, or a number that keeps nothing.
        """
        if self.totals is None:
            return list(range(self.least or 1, (self.most or 0) + 1))
        return [_size(total) for total in self.totals]

    def weights(self) -> list[float]:
        """The probability with which each of `sizes` is drawn. Of a range with ``n`` sizes the ``i``-th has the integral of the
        density from ``i / n`` to ``(i + 1) / n``: 2 - 2x gives the smallest about twice the mean."""
        count = len(self.sizes())
        if self.totals is not None:
            return list(self.density) if self.density is not None else [1 / count] * count
        density = self.density if self.density is not None else [2.0, -2.0]

        def below(x: float) -> float:
            return sum(factor * x ** (power + 1) / (power + 1) for power, factor in enumerate(density))

        edges = [below(place / count) for place in range(count + 1)]
        return [after - before for before, after in itertools.pairwise(edges)]


_NUMBER = r"(?:[0-9]+|[0-9]*\.[0-9]+%?|[0-9]+%)"
_SIZE = re.compile(rf"({_NUMBER})(?:\+({_NUMBER}))?")


def _size(total: int | float | str) -> int | float | tuple[int, int]:
    size: Any = parse_size(total) if isinstance(total, str) else total
    if size is None or (isinstance(size, tuple) and not all(isinstance(part, int) for part in size)):
        raise ValueError(f"{total!r} is not a budget; expected a number of tokens (64), 54+10, or a share (0.1)")
    first = size[0] if isinstance(size, tuple) else size
    if first <= 0 or (isinstance(first, float) and first > 1):
        raise ValueError(f"{total!r} is not a budget; expected at least one token, or a share of at most 1")
    return size


def parse_size(text: str) -> int | float | tuple[int | float, int | float] | None:
    """``"64"`` → 64 tokens, ``"54+10"`` → ``(54, 10)``, ``"0.1"`` or ``"10%"`` → a share of 0.1; None for any other text.

    The one place that reads how a budget is written; `visionzip.budgets` builds on it.
    """
    found = _SIZE.fullmatch(re.sub(r"\s*\+\s*", "+", text.strip()))
    if found is None:
        return None
    first = _number(found[1])
    return (first, _number(found[2])) if found[2] else first


def _number(text: str) -> int | float:
    if text.endswith("%"):
        return float(text[:-1]) / 100
    return float(text) if "." in text else int(text)


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
    budgets: TrainedBudgets | None = Field(
        None,
        description="budgets that one projector is trained for, as a list ([8, 16, 54+10]) or a range with a density; None: for "
        "`dominant` + `contextual` only, which is otherwise the default budget",
        exclude_if=lambda budgets: budgets is None,  # what was stored before there were any stays what it is
    )
    positions: Literal["compact", "original"] = Field(
        "compact",
        description="positions of kept tokens in the LLM: consecutive, or those of the uncompressed prompt (LLaVA-1.5)",
        exclude_if=lambda positions: positions == "compact",  # as for budgets
    )
    pad_images: bool | Literal["auto"] = Field(
        "auto",
        description="pad images to squares with the mean colour, as LLaVA-1.5 does; auto: where the image processor would "
        "crop them to the middle square",
    )

    @model_validator(mode="before")
    @classmethod
    def _stored_by_earlier_versions(cls, fields: Any) -> Any:
        """Earlier versions stored ``adaptive``, nearly always None: budgets that a threshold chose for each image."""
        if not isinstance(fields, dict) or "adaptive" not in fields:
            return fields
        if fields["adaptive"] is not None:
            raise ValueError("adaptive: budgets that a threshold chooses for each image were removed (docs/results.md); "
                             "leave it out for a fixed budget")  # fmt: skip
        return {key: value for key, value in fields.items() if key != "adaptive"}

    @model_validator(mode="before")
    @classmethod
    def _budgets_say_whether_they_merge(cls, fields: Any) -> Any:
        """A list of budgets → its section; the budgets a projector is trained for must not depend on the one chosen later."""
        budgets = fields.get("budgets") if isinstance(fields, dict) else None
        if isinstance(budgets, TrainedBudgets):
            budgets = budgets.model_dump()
        elif isinstance(budgets, list | tuple):
            budgets = {"totals": list(budgets)}
        if not isinstance(budgets, dict):
            return fields
        if budgets.get("contextual") is None:
            budgets = {**budgets, "contextual": bool(fields.get("contextual", 1))}
        return {**fields, "budgets": budgets}

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
