"""`python -m train.evaluate`: the command in train/commands/evaluate.py."""

from train.commands import start

if __name__ == "__main__":
    raise SystemExit(start("evaluate"))
