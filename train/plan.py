"""`python -m train.plan`: the command in train/commands/plan.py."""

from train.commands import start

if __name__ == "__main__":
    raise SystemExit(start("plan"))
