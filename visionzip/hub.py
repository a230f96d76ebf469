"""To and from a hub repository. Everything goes through huggingface_hub: its token, its cache, its ``HF_ENDPOINT``."""

from __future__ import annotations

import os
from pathlib import Path

from visionzip.export.base import FORMATS, recognise, run_result
from visionzip.export.card import HERE, KEPT, find_kept, render_card
from visionzip.export.files import NOTE
from visionzip.pretrained import looks_like_id

CARD = "README.md"
TIMEOUT = 15.0  # seconds for a question to the hub


def push(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Upload an export with its model card and return the address of the commit.

    The card is made here unless somebody has edited it. Of a run, the first image of its report (kept patches of a held-out image)
    goes with it.

    Raises:
        ValueError: when `directory` is not an export, or a damaged one, or the hub refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    place = run_result(directory)
    files = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else []
    names = [path.relative_to(place).as_posix() for path in files]
    if not set(names) & markers():
        raise ValueError(
            f"{directory} was not written by visionzip export (none of {', '.join(sorted(markers()))} in it)"
        )
    form = recognise(place)
    if form is None:
        raise ValueError(
            f"{directory} is not a complete export: it lacks the trained weights, and contains only {', '.join(names[:4])}"
        )
    header = form.read(place).header  # a damaged one is not for others
    kept = find_kept(place)
    text = (place / CARD).read_text(encoding="utf-8") if CARD in names else None
    if text is None or text == render_card(header, form, HERE):  # written before the run had a report
        text = render_card(header, form, repo_id, kept=kept is not None)
    operations = [CommitOperationAdd(CARD, text.replace(HERE, repo_id).encode())]
    if kept is not None and KEPT not in names:
        operations.append(CommitOperationAdd(KEPT, kept))
    operations += [
        CommitOperationAdd(name, path)
        for name, path in zip(names, files, strict=True)
        if name != CARD and not any(part.startswith(".") for part in Path(name).parts)
    ]
    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        done = api.create_commit(
            repo_id, operations, commit_message=message or f"Upload {place.name} with visionzip-ft", revision=revision
        )
    except _failures() as error:
        raise ValueError(
            f"{repo_id}: the hub refused: {str(error).rstrip('.')}. Is there a token with write access (hf auth login)?"
        ) from error
    return str(done.commit_url)


def pull(repo_id: str, out: str | os.PathLike[str] | None = None, *, revision: str | None = None) -> Path:
    """Download a repository, into `out` or the hub's cache, and return where it is.

    Raises:
        ValueError: when it does not exist, may not be read, or can't be reached.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, local_dir=None if out is None else Path(out)))
    except LocalEntryNotFoundError as error:
        raise ValueError(f"{repo_id}: the hub can't be reached and nothing of it is in the cache") from error
    except _failures() as error:
        raise ValueError(f"{repo_id} can't be downloaded: {error}") from error


def local_copy(path: str | os.PathLike[str], revision: str | None = None) -> Path | str:
    """`path` where it exists, or the result in it if it is the directory of a run; an export on a hub downloaded; the id of a
    plain model as it is, for transformers to load.

    Raises:
        ValueError: for what is neither a path nor the id of something, and for a run without a result.
    """
    if str(path) and Path(path).exists():
        return run_result(path)
    if not looks_like_id(path):
        raise ValueError(f"there is nothing at {str(path) or repr('')}, and it is not a hub id (owner/name)")
    names = _files(str(path), revision)
    return pull(str(path), revision=revision) if set(names) & markers() else str(path)


def markers() -> set[str]:
    """File names that tell an export from a plain model."""
    return {NOTE, *(marker for _, form in FORMATS for marker in form.markers)}


def _files(repo_id: str, revision: str | None) -> list[str]:
    """What a repository holds: as the hub says or, where it can't be asked, as the cache has it.

    Raises:
        ValueError: when neither knows it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        info = HfApi().model_info(repo_id, revision=revision, timeout=TIMEOUT)
        return [sibling.rfilename for sibling in info.siblings or []]
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(
            f"there is nothing at {repo_id}, and the hub has no model of that name that you may read"
        ) from error
    except _failures():
        try:
            cached = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
        except _failures() as error:
            raise ValueError(
                f"there is nothing at {repo_id}; the hub can't be asked, and its cache has no model of that name"
            ) from error
        return [path.name for path in cached.iterdir()]


def _failures() -> tuple[type[Exception], ...]:
    """Whatever huggingface_hub raises when a request fails; its HTTP client is one of two, by its version."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    client = [kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError"]
    return (*client, HFValidationError, OSError)  # LocalEntryNotFoundError and OfflineModeIsEnabled are OSErrors
