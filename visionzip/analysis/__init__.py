"""Redundancy measures and pictures: what was kept of a picture, and what that is worth.

`trace` says it in tensors for any family, `draw` paints it, `attention` and `redundancy` measure it, `plots` and `page` show it.
"""
