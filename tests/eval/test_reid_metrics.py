"""Re-identification scores against rankings walked through one by one."""

import pytest
import torch
from torch import Tensor

from stvision.eval.metrics import CropName, read_crop_name, reid_scores


def walked(
    distance: Tensor, qp: Tensor, qc: Tensor, gp: Tensor, gc: Tensor
) -> tuple[list[float], list[int]]:
    """Average precision and first true rank of each query that has a match."""
    precisions, firsts = [], []
    for q in range(len(distance)):
        ranking = []
        for _, g in sorted((float(d), i) for i, d in enumerate(distance[q])):
            if gp[g] == -1 or (gp[g] == qp[q] and gc[g] == qc[q]):
                continue
            ranking.append(bool(gp[g] == qp[q]))
        places = [rank for rank, hit in enumerate(ranking, 1) if hit]
        if places:
            precisions.append(sum((i + 1) / rank for i, rank in enumerate(places)) / len(places))
            firsts.append(places[0])
    return precisions, firsts


def test_a_hundred_random_rankings() -> None:
    g = torch.Generator().manual_seed(0)

    def integers(low: int, high: int, count: int) -> Tensor:
        return torch.randint(low, high, (count,), generator=g)

    left_out = 0
    for _ in range(100):
        queries, gallery = int(integers(2, 6, 1)), int(integers(8, 30, 1))
        distance = torch.randint(0, 12, (queries, gallery), generator=g).float()  # with ties
        labels = (
            integers(1, 6, queries),
            integers(1, 4, queries),
            integers(-1, 6, gallery),
            integers(1, 4, gallery),
        )
        precisions, firsts = walked(distance, *labels)
        if not precisions:
            continue
        scores = reid_scores(distance, *labels, ranks=5)
        left_out += queries - scores.queries
        assert scores.queries == len(precisions)
        assert abs(scores.mean_average_precision - sum(precisions) / len(precisions)) < 1e-12
        for k in range(1, 6):
            assert abs(float(scores.cmc[k - 1]) - sum(f <= k for f in firsts) / len(firsts)) < 1e-12
        got = scores.average_precision[~scores.average_precision.isnan()]
        assert (got - torch.tensor(precisions, dtype=torch.float64)).abs().max() < 1e-12
    assert left_out > 10  # queries without a valid match were met


def test_miss_hit_hit_miss() -> None:
    person = torch.tensor([2, 1, 1, 0])
    scores = reid_scores(
        torch.arange(4.0)[None], torch.tensor([1]), torch.tensor([1]), person, torch.full((4,), 2)
    )
    assert abs(scores.mean_average_precision - 0.5833) < 1e-4  # trapezoids would give 0.4167
    assert scores.cmc[0] == 0 and scores.cmc[4] == 1


def test_the_same_camera_and_junk_do_not_count() -> None:
    distance = torch.tensor([[0.0, 0.1, 0.2, 0.3]])
    one = torch.tensor([1])
    person, camera = torch.tensor([1, -1, 2, 1]), torch.tensor([1, 2, 2, 2])
    scores = reid_scores(distance, one, one, person, camera)
    assert scores.mean_average_precision == 0.5 and scores.cmc[:2].tolist() == [0, 1]


def test_file_names_are_read() -> None:
    assert read_crop_name("0002_c1s1_000451_03.jpg") == CropName(2, 1, 1, 451, 3)
    assert read_crop_name("-1_c6s4_012345_10.jpg.jpg").person == -1
    assert read_crop_name("0000_c3s2_000001_00") == CropName(0, 3, 2, 1, 0)
    for name in ("0002_c1_000451_03.jpg", "person.jpg", "002_c1s1_000451_03.jpg"):
        with pytest.raises(ValueError, match="name must be PPPP_cCsS_FFFFFF_BB as in Market-1501"):
            read_crop_name(name)


def test_bad_input_gets_one_sentence() -> None:
    two, three = torch.tensor([1, 2]), torch.tensor([1, 2, 3])
    distance = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        reid_scores(distance, two, two, three, three, ranks=0)
    with pytest.raises(ValueError, match=r"distance must be \(queries, gallery\), got \(3,\)"):
        reid_scores(distance[0], two, two, three, three)
    with pytest.raises(ValueError, match=r"gallery_camera must be \(3,\), got \(2,\)"):
        reid_scores(distance, two, two, three, two)
    with pytest.raises(ValueError, match="distance must hold no NaN"):
        reid_scores(distance / 0, two, two, three, three)
    with pytest.raises(ValueError, match="no query has a true match by another camera"):
        reid_scores(distance, two, two, three, three)
