"""Redundancy measures and drawings: what was kept of an image, and what that is worth.

`trace` says it in tensors for any family, `draw` paints it, `attention` and `redundancy` measure it, `plots` and `page` show it.
"""
