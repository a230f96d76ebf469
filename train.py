"""What launchers start: `deepspeed train.py --config configs/….yaml key=value …`; see train/commands/train.py."""

from train.commands import start

if __name__ == "__main__":
    raise SystemExit(start("train", program="train.py"))
