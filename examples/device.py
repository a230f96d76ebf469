"""Greedy answers from an ONNX export with onnxruntime, numpy, Pillow and tokenizers alone: what a port to C++, Swift or Kotlin does.

python examples/device.py runs/demo-onnx photo.jpg "What is this?" [budget]
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer

folder, image, question = Path(sys.argv[1]), Image.open(sys.argv[2]).convert("RGB"), sys.argv[3]
facts = json.loads((folder / "device.json").read_text())
budget = facts["budgets"][sys.argv[4] if len(sys.argv) > 4 else facts["default"]]
prompt, sizes, pixels = facts["prompt"], facts["language"], facts["image"]

for step, value in pixels["steps"]:  # pad to a square, make a side that long, take the middle
    if step == "pad":
        square = Image.new("RGB", (max(image.size),) * 2, tuple(value))
        square.paste(image, tuple((square.width - side) // 2 for side in image.size))
        image = square
    elif step in ("shortest", "exact"):  # a padded image is a square, so either side is the shortest
        height, width = value if step == "exact" else (value, value)
        image = image.resize((width, height), pixels["resample"])
values = (np.asarray(image, np.float32) * pixels["scale"] - pixels["mean"]) / pixels["std"]
vision = onnxruntime.InferenceSession(folder / budget["file"])
visual = vision.run(["embeddings"], {"pixel_values": values.transpose(2, 0, 1)[None].astype(np.float32)})[0][
    0
]  # (K, hidden)

shown = (
    prompt["placeholder"]["before"] + budget["tokens"] * prompt["placeholder"]["token"] + prompt["placeholder"]["after"]
)
text = prompt["first"]["image"].replace(prompt["image"], shown) + question + prompt["ask"]
tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
pieces = [tokenizer.encode(piece, add_special_tokens=False).ids for piece in text.split(prompt["cut"]) if piece]
new, answer = prompt["begin"] + [token for piece in pieces for token in piece], []

language = onnxruntime.InferenceSession(folder / sizes["file"])
names = [value.name for value in language.get_inputs() if value.name.startswith("past.")]
past = {name: np.zeros((1, sizes["kv_heads"], 0, sizes["head_dim"]), np.float32) for name in names}
while len(answer) < 64 and not set(answer) & set(facts["end_ids"]):
    found = language.run(None, {"input_ids": np.array([new]), "image_embeds": visual, **past})
    outputs = dict(zip([value.name for value in language.get_outputs()], found, strict=True))
    past = {name: outputs[name.replace("past", "present")] for name in names}
    new = [int(outputs["logits"].argmax())]
    answer += new
print(tokenizer.decode(answer))
