"""What of the data is bad can mostly be said at once: records are parsed and their files looked for before anything expensive."""

from __future__ import annotations

import os

from data.dataset import InstructionDataset
from data.rejects import SOONEST
from data.sample import Media, Reject, Rejection, Sample, rejecting
from visionzip.images import as_spelled, open_regular
from visionzip.inputs import ImageInputs


def check_records(dataset: InstructionDataset, limit: int = SOONEST) -> tuple[int, list[Rejection]]:
    """Look at the first `limit` records of an epoch; of a smaller set, at all.

    They are parsed, and the files of their images and videos opened, but not decoded. Where the data set has a token cache, the
    images' tokens are read.

    Returns:
        How many were looked at, and those of them that will be rejected, with the reason that reading them would give.
    """
    check = _find_tokens if dataset.config.cache is not None else _find_files
    checked = dataset.with_transform(lambda sample: check(dataset, sample))
    indices = dataset.sampler().order(0)[:limit].tolist()
    found = [checked[index] for index in dict.fromkeys(indices)]
    return len(found), [item for item in found if isinstance(item, Rejection)]


def _find_tokens(dataset: InstructionDataset, sample: Sample) -> ImageInputs:
    return dataset.images(sample)


def _find_files(dataset: InstructionDataset, sample: Sample) -> None:
    for media in sample.media:
        for path in _paths(media):
            with rejecting(), open_regular(path) as file:
                if not file.read(1):
                    raise Reject("empty file", path)


def _paths(media: Media) -> list[str]:
    """The files of an image or a video; none where it is bytes of the record, or a folder of frames."""
    if isinstance(media.source, bytes):
        return []
    if isinstance(media.source, list):
        return media.source
    return [] if media.kind == "video" and os.path.isdir(as_spelled(media.source)) else [media.source]
