"""Give a file that was changed a checksum that is right again, as a writer would that makes the mistake itself: what is tested
behind the checksum is then reached."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from visionzip.export.header import digest_of
from visionzip.export.llava import NAMES
from visionzip.export.peft import PREFIX
from visionzip.export.safetensors import unpack
from visionzip.manifest import list_files


def rewrite(file, change, reseal=True):
    """Change the dict of tensors in a file of any format."""
    file = Path(file)
    note = file.parent / "visionzip.json"
    if file.suffix == ".bin":
        state = torch.load(file, weights_only=True)
        change(state)
        torch.save(state, file)
        state = {NAMES.get(name, name): value for name, value in state.items()}
        metadata = {}
    else:
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata()
        state = load_file(file)
        change(state)
        if reseal and "digest" in metadata:
            metadata["digest"] = digest_of(unpack(metadata, file), state)
        save_file(state, file, metadata=metadata)
    if reseal and "digest" not in metadata and note.is_file():
        facts = json.loads(note.read_text())
        if "files" in facts:  # merged: the note's digest is over the projector alone
            facts["files"] |= list_files(file.parent, [file.name])
            names = [(name, name.removeprefix("model.")) for name in facts["projector"]]
            state = {
                name: state.get(name, state.get(short)) for name, short in names if name in state or short in state
            }
        state = {name.removeprefix(PREFIX): value for name, value in state.items()}
        facts["digest"] = digest_of(facts, state)
        note.write_text(json.dumps(facts))
