"""Short names for values, and for what a processor does."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def digest(value: Any) -> str:
    """16 hex digits that equal values share. What JSON does not know goes in as its `str`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def describe_processor(processor: Any) -> dict[str, str]:
    """Part of the processor → digest of what makes pixels and token ids of a record. Not of how a tokenizer happens to pad or cut,
    which is a matter of the last call."""
    tokenizer = processor.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = json.loads(backend.to_str()) if backend is not None else tokenizer.get_vocab()
    found = {
        "tokenizer": digest({key: words[key] for key in words if key not in ("truncation", "padding")}),
        "chat_template": digest(getattr(processor, "chat_template", None)),
    }
    for name in ("image_processor", "video_processor"):
        if (part := getattr(processor, name, None)) is not None:
            settings = json.loads(part.to_json_string())
            found[name] = digest(
                {key: settings[key] for key in settings if key not in ("processor_class", "name_or_path")}
            )
    return found
