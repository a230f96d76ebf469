"""Redundancy measures and drawings: what was kept of an image, and what that is worth.

`trace` returns it as tensors for any family, `draw` draws it, `attention` and `redundancy` measure it, `plots` and `page` present it.
"""
