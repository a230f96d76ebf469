"""Model families: where the encoder and projector are, and how compressed tokens become the LLM's visual sequence."""

from visionzip.families.base import FAMILIES, Family, Picture, family_for

__all__ = ["FAMILIES", "Family", "Picture", "family_for"]
