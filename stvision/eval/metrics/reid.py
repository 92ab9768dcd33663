"""Re-identification as Market-1501 scores it: CMC and mean average precision over a gallery."""

import re
from typing import NamedTuple

import torch
from torch import Tensor

_NAME = re.compile(r"(-1|\d{4})_c(\d)s(\d)_(\d{6})_(\d{2})(?=\.|$)")


class CropName(NamedTuple):
    """What a file name of Market-1501 tells: ``0002_c1s1_000451_03.jpg``.

    ``person`` is -1 for junk and 0 for a distractor; ``camera`` counts from 1.
    """

    person: int
    camera: int
    sequence: int
    frame: int
    box: int


def read_crop_name(name: str) -> CropName:
    """Read a file name of Market-1501, with or without its ending.

    Raises:
        ValueError: another form.
    """
    found = _NAME.match(name)
    if found is None:
        raise ValueError(f"name must be PPPP_cCsS_FFFFFF_BB as in Market-1501, got {name!r}")
    return CropName(*map(int, found.groups()))


class ReidScores(NamedTuple):
    """Scores of re-identification.

    ``mean_average_precision`` and the entries of ``cmc`` lie in 0 to 1; ``cmc[k - 1]`` is the part
    of the queries with a true match among the first k; ``average_precision`` is (queries,), NaN for
    the queries that are left out; ``queries`` counts the others.
    """

    mean_average_precision: float
    cmc: Tensor
    average_precision: Tensor
    queries: int


def reid_scores(
    distance: Tensor,
    query_person: Tensor,
    query_camera: Tensor,
    gallery_person: Tensor,
    gallery_camera: Tensor,
    *,
    ranks: int = 10,
) -> ReidScores:
    """CMC and mean average precision.

    From each query's ranking go junk (person -1) and the images of the same person by the same
    camera. Average precision is the mean, over true matches, of the precision at their rank; the
    first toolkit of Market-1501 took trapezoids instead, which gives less. Queries without a true
    match are left out. Of equal distances the first in the gallery comes first.

    Args:
        distance: (queries, gallery), lower is more alike; for similarities give their negative.
        query_person: (queries,) integers.
        query_camera: (queries,) integers.
        gallery_person: (gallery,) integers; -1 for junk, 0 for distractors.
        gallery_camera: (gallery,) integers.
        ranks: length of ``cmc``.

    Raises:
        ValueError: shapes that do not fit, a distance that is NaN, ``ranks`` below 1, or no query
            that has a true match.
    """
    if ranks < 1:
        raise ValueError(f"ranks must be at least 1, got {ranks}")
    if distance.ndim != 2:
        raise ValueError(f"distance must be (queries, gallery), got {tuple(distance.shape)}")
    for name, labels, count in (
        ("query_person", query_person, distance.shape[0]),
        ("query_camera", query_camera, distance.shape[0]),
        ("gallery_person", gallery_person, distance.shape[1]),
        ("gallery_camera", gallery_camera, distance.shape[1]),
    ):
        if labels.shape != (count,):
            raise ValueError(f"{name} must be ({count},), got {tuple(labels.shape)}")
    if distance.isnan().any():
        raise ValueError("distance must hold no NaN")
    order = distance.argsort(dim=1, stable=True)
    person, camera = gallery_person[order], gallery_camera[order]
    same = person == query_person[:, None]
    kept = (person != -1) & ~(same & (camera == query_camera[:, None]))
    hits = same & kept
    matches = hits.sum(1)
    valid = matches > 0
    if not valid.any():
        raise ValueError("no query has a true match by another camera in the gallery")
    place = kept.cumsum(1).clamp_min(1)  # rank among what is kept, from 1
    precision = hits.cumsum(1).double() / place
    average = (precision * hits).sum(1) / matches
    best = torch.where(hits, place, distance.shape[1] + 1).amin(1)[valid]
    asked = torch.arange(1, ranks + 1, device=distance.device)
    cmc = (best[:, None] <= asked).double().mean(0)
    average = average.masked_fill(~valid, torch.nan)
    return ReidScores(float(average[valid].mean()), cmc, average, int(valid.sum()))
