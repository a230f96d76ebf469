"""`python -m train.teacher`: the command in train/commands/teacher.py."""

from train.commands import start

if __name__ == "__main__":
    raise SystemExit(start("teacher"))
