"""One file a conversation template; the file's name is the template's. See `visionzip/prompts.py` for what a file must hold."""
