"""Vision encoders: hidden states, keys and scores of one layer, in one pass. One file each."""

from visionzip.encoders.base import ENCODERS, Encoder, Layer, encoder_for

__all__ = ["ENCODERS", "Encoder", "Layer", "encoder_for"]
