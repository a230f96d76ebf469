"""Losses of the labels: one file each; a new one is a new file with one registration."""

from train.losses.base import DEFAULT, LOSSES, Loss, with_autograd

__all__ = ["DEFAULT", "LOSSES", "Loss", "with_autograd"]
