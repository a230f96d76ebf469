"""The training program. It runs from a checkout and is never installed; `train.py` beside it is what launchers start."""
