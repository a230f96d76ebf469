"""Ask a compressed model about images with ONNX Runtime alone: neither torch nor transformers is imported.

``pip install --no-deps visionzip-ft`` and ``pip install onnxruntime numpy pillow tokenizers`` is all it needs.

```python
from visionzip.device import load

model = load("runs/demo-onnx")  # what `visionzip export … --format onnx` wrote
print(model.ask("photo.jpg", "What is this?", budget=16).text)
```
"""

from visionzip.device.package import Package, read_package
from visionzip.device.runtime import Answer, Chat, DeviceModel, load

__all__ = ["Answer", "Chat", "DeviceModel", "Package", "load", "read_package"]
