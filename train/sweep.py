"""`python -m train.sweep`: the command in train/commands/sweep.py."""

from train.commands import start

if __name__ == "__main__":
    raise SystemExit(start("sweep"))
