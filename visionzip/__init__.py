"""VisionZip for Hugging Face models: run and fine-tune vision-language models on a tenth of their visual tokens."""

from visionzip.attach import Attachment, attach, attached, detach, visionzip
from visionzip.config import ZipConfig
from visionzip.loading import load, save

__version__ = "0.1.0"
__all__ = ["Attachment", "ZipConfig", "attach", "attached", "detach", "load", "save", "visionzip"]
