"""The Dockerfiles say what exists: files that they copy, versions that the constraints pin, extras of pyproject.toml.

No image is built here, since that needs a container engine and downloads gigabytes.
"""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = ("Dockerfile", "docker/Dockerfile.cuda")
INSTRUCTIONS = {"ADD", "ARG", "CMD", "COPY", "ENTRYPOINT", "ENV", "EXPOSE", "FROM", "HEALTHCHECK", "LABEL", "ONBUILD", "RUN", "SHELL", "STOPSIGNAL", "USER", "VOLUME", "WORKDIR"}  # fmt: skip


def parse_dockerfile(text: str) -> list[tuple[str, str]]:
    """(instruction, its arguments) in order, with continued lines joined and comments dropped.

    Raises:
        ValueError: for an unknown instruction, one without arguments, anything but ARG before FROM, and a line that is never ended.
    """
    lines = [line.strip() for line in text.splitlines()]
    joined, open_line = [], ""
    for line in lines:
        if not line or line.startswith("#"):
            continue
        open_line += line.removesuffix("\\")
        if not line.endswith("\\"):
            joined.append(open_line)
            open_line = ""
    if open_line:
        raise ValueError(f"the last line is continued: {open_line}")
    parsed = []
    for line in joined:
        name, _, rest = line.partition(" ")
        if name not in INSTRUCTIONS or not rest.strip():
            raise ValueError(f"not an instruction with arguments: {line}")
        if name not in ("ARG", "FROM") and not any(earlier == "FROM" for earlier, _ in parsed):
            raise ValueError(f"before FROM: {line}")
        parsed.append((name, rest.strip()))
    return parsed


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a file or folder out of the build."""
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert not any(set("!?[") & set(pattern) for pattern in patterns), "this test knows names and **/name only"
    names = [pattern for pattern in patterns if not pattern.startswith("**/")]
    anywhere = [pattern.removeprefix("**/") for pattern in patterns if pattern.startswith("**/")]
    parts = Path(path).parts
    return parts[0] in names or any(Path(part).match(pattern) for part in parts for pattern in anywhere)


@pytest.fixture(params=FILES)
def instructions(request):
    return parse_dockerfile((ROOT / request.param).read_text())


def test_what_is_copied_exists_and_is_sent_to_the_build(instructions):
    copied = [source for name, rest in instructions if name == "COPY" for source in shlex.split(rest)[:-1]]
    assert {"constraints.txt", "visionzip", "train", "data", "configs"} <= set(copied)
    tracked = subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines()
    for source in copied:
        files = [file for file in tracked if file == source or file.startswith(f"{source}/")]
        assert files, f"COPY {source}: the repository has no such file"
        assert not [file for file in files if ignored(file)], f"COPY {source}: .dockerignore leaves some of it out"


def test_versions_are_those_of_the_constraints(instructions):
    pinned = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "constraints.txt").read_text(), re.M))
    extras = set(re.findall(r"^([a-z]+) = \[", (ROOT / "pyproject.toml").read_text().split("optional-dependencies]")[1], re.M))  # fmt: skip
    installs = [part for name, rest in instructions if name == "RUN" for part in rest.split("&&") if "pip install" in part]  # fmt: skip
    assert len(installs) == 2
    for command in installs:
        words = shlex.split(command)
        assert words[words.index("-c") + 1] == "constraints.txt", command
        for name, version in re.findall(r"([\w.-]+)==([\w.]+)", command):  # a local version (+cpu) is not part of it
            assert pinned[name] == version, command
    named = {extra for group in re.findall(r"\.\[([^]]+)\]", " ".join(installs)) for extra in group.split(",")}
    assert {"train", "viz"} <= named <= extras


def test_shell_lines_are_shell_and_lists_are_json(instructions):
    for name, rest in instructions:
        if name == "RUN":
            subprocess.run(["sh", "-n", "-c", rest], check=True)
        if name in ("CMD", "ENTRYPOINT"):
            assert all(isinstance(word, str) for word in json.loads(rest))
    assert [rest for name, rest in instructions if name == "USER"][-1:] == ["user"]


def test_nothing_that_git_ignores_is_sent_to_the_build():
    for line in (ROOT / ".gitignore").read_text().splitlines():
        name = line.rstrip("/").replace("*", "x")
        assert ignored(name), line
    assert ignored(".git")
    assert ignored("data/cache/__pycache__/x.pyc")
    assert not ignored("data/cache/build.py")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("FORM x", "not an instruction"),
        ("FROM", "not an instruction"),
        ("RUN ls\nFROM x", "before FROM"),
        ("FROM x\nRUN ls \\", "continued"),
    ],
)
def test_a_broken_file_is_seen(text, error):
    with pytest.raises(ValueError, match=error):
        parse_dockerfile(text)
    assert parse_dockerfile("ARG A=1\nFROM x\nRUN a \\\n # why\n  && b\n")[-1] == ("RUN", "a && b")
