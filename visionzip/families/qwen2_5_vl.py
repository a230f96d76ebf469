"""Qwen2.5-VL: Qwen2-VL with windows in most of the encoder's blocks.

The last block is one of the few that attend over the whole image; its scores are the ones that are read. Windows order the
groups while encoding; what is read is put back into raster order first (`visionzip.encoders.qwen.Windows`). Positions of a
video's frames follow its frame rate (``second_per_grid_ts``), which the model's own ``get_rope_index`` sees to.
"""

from __future__ import annotations

from visionzip.families.base import FAMILIES
from visionzip.families.qwen2_vl import Qwen2VL


class Qwen25VL(Qwen2VL):
    """Nothing but the encoder differs."""


FAMILIES.register("qwen2_5_vl")(Qwen25VL)
