"""Where the stamps and background photographs of `data.stamps` come from: two Debian packages of Tux Paint, or folders given by hand.

The files are under the GPL-2: they are fetched, never part of this repository.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from data.stamp_scenes import CATALOGUE

STAMPS_PACKAGE, BACKGROUNDS_PACKAGE = "tuxpaint-stamps-default", "tuxpaint-data"
_STAMPS = "usr/share/tuxpaint/stamps"
_BACKGROUNDS = "usr/share/tuxpaint/templates"
#: Photographs in which nothing stands that a question could be about.
BACKGROUNDS = (
    "burnt_bark", "cliff", "corn_maze", "ocean_splash", "ocean_waves", "redwoods_above", "sun_behind_clouds",
    "sun_behind_leaves", "trees_at_dusk",
)  # fmt: skip


def fetch(cache: Path) -> tuple[Path, list[Path]]:
    """The folder of stamps and the background photographs, unpacked into `cache` on first use.

    Raises:
        FileNotFoundError: no apt-get or dpkg-deb on this machine, or no such package; says what to do instead.
    """
    stamps = _unpacked(cache, STAMPS_PACKAGE) / _STAMPS
    photographs = _unpacked(cache, BACKGROUNDS_PACKAGE) / _BACKGROUNDS
    return stamps, [photographs / f"{name}.jpg" for name in BACKGROUNDS]


def check_stamps(stamps: Path) -> None:
    """Raise FileNotFoundError unless every stamp of the catalogue lies in `stamps`."""
    missing = [path for thing in CATALOGUE for path in thing.stamps if not (stamps / path).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{stamps} lacks {len(missing)} of the stamps that scenes are made of ({missing[0]}, …): expected the folder "
            f"`stamps` of Tux Paint, with animals/, food/, … in it (Debian's package {STAMPS_PACKAGE})"
        )


def find_photographs(folder: Path) -> list[Path]:
    """The JPEG and PNG files of a folder of background photographs, sorted.

    Raises:
        FileNotFoundError: when there are none.
    """
    found = sorted(path for path in folder.glob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not found:
        raise FileNotFoundError(f"{folder} contains no .jpg or .png file to use as a background")
    return found


def _unpacked(cache: Path, package: str) -> Path:
    folder = cache / package
    if folder.is_dir():
        return folder
    by_hand = f"give the folders by hand with --stamps and --backgrounds (files of Debian's package {package})"
    for program in ("apt-get", "dpkg-deb"):
        if shutil.which(program) is None:
            raise FileNotFoundError(f"{program} is not on this machine, so {package} can't be fetched: {by_hand}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".{package}-") as aside:
        _run(
            ["apt-get", "download", package],
            aside,
            f"{package} could not be downloaded; run `apt-get update`, or {by_hand}",
        )
        archive = next(Path(aside).glob("*.deb"))
        _run(["dpkg-deb", "-x", archive.name, "unpacked"], aside, f"{archive.name} could not be unpacked; {by_hand}")
        try:
            (Path(aside) / "unpacked").rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was faster
                raise
    return folder


def _run(command: Sequence[str], folder: str, otherwise: str) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise FileNotFoundError(f"{otherwise} ({said[-1] if said else f'exit code {done.returncode}'})")
