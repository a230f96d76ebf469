"""Model families: where the encoder and projector are, and how compressed tokens become the LLM's visual sequence."""

from visionzip.families.base import FAMILIES, Family, VisualTokens, family_for

__all__ = ["FAMILIES", "Family", "VisualTokens", "family_for"]
