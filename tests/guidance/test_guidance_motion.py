"""The motion report on clips whose motion is known."""

import json
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from stvision.cli.main import main
from stvision.eval.motion import (
    choose_flow,
    flow_consistency,
    measure_clip,
    measure_motion,
    optical_flow,
    raft_weights,
    side_by_side,
    warp,
)
from stvision.io import read_clip, write_video

pytest.importorskip("cv2")


def moving(shift: tuple[int, int] = (0, 2), frames: int = 5, size: int = 64) -> torch.Tensor:
    """A smooth random picture seen through a window; the content moves by (rows, columns)."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 24, 24, generator=generator)
    picture = F.interpolate(coarse, (128, 128), mode="bicubic").clamp(0, 1)[0]
    views = []
    for t in range(frames):
        y, x = 32 - shift[0] * t, 32 - shift[1] * t
        views.append(picture[:, y : y + size, x : x + size])
    return torch.stack(views).permute(0, 2, 3, 1)


@pytest.mark.parametrize("shift", [(0, 2), (1, -2), (0, 0)])
def test_flow_is_the_shift_that_was_made(shift):
    flow = optical_flow(moving(shift), "farneback")
    middle = flow[:, 16:-16, 16:-16].mean((0, 1, 2))
    expected = torch.tensor([shift[1], shift[0]], dtype=torch.float32)
    torch.testing.assert_close(middle, expected, rtol=0, atol=0.15)


def test_warping_by_the_true_flow_gives_the_earlier_frame():
    clip = moving((1, 2)).permute(0, 3, 1, 2)
    flow = torch.tensor([2.0, 1.0]).expand(4, 64, 64, 2)
    back, inside = warp(clip[1:], flow)
    expected = torch.zeros(64, 64, dtype=torch.bool)
    expected[:63, :62] = True
    assert torch.equal(inside, expected.expand(4, -1, -1))
    torch.testing.assert_close(back[..., :63, :62], clip[:-1, :, :63, :62], rtol=0, atol=1e-4)
    frames = clip.permute(0, 2, 3, 1)
    assert flow_consistency(frames, flow) == pytest.approx(1, abs=1e-4)
    assert flow_consistency(frames, -flow) < 0.9


def test_measures_tell_motion_from_wobble():
    still, steady = measure_clip(moving((0, 0))), measure_clip(moving())
    noise = 0.2 * torch.rand(5, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    wobbling = measure_clip((moving() + noise).clamp(0, 1))
    assert still.flicker == 0
    # Farneback's polynomial fit at the border leaves some thousandths of a pixel
    assert still.flow < 0.01
    assert still.consistency > 0.999
    assert steady.flow == pytest.approx(2, abs=0.4)
    assert steady.consistency > 0.95 > wobbling.consistency
    assert wobbling.flicker > steady.flicker > 0
    change = moving().diff(dim=0).abs().mean()
    assert steady.flicker == pytest.approx(float(change), rel=1e-5)


def test_report_pairs_clips(tmp_path):
    slow, fast = moving((0, 1)), moving((0, 2))
    report = measure_motion(
        {"before": [("a", slow), ("b", slow)], "after": [("b", fast), ("a", slow)]},
        method="farneback",
        energies={"before": [0.1, 0.2], "after": [0.4, 0.1]},
    )
    flow = {(r.column, r.key): r.flow for r in report.rows}
    gain = report.difference("before", "after", "flow")
    assert gain.value == pytest.approx((flow["after", "b"] - flow["before", "b"]) / 2)
    assert report.difference("before", "after", "energy").value == pytest.approx(0.1)
    report.write_json(tmp_path / "r.json")
    held = json.loads((tmp_path / "r.json").read_text())
    assert held["summary"]["after"]["flow"]["count"] == 2 and len(held["rows"]) == 4
    assert "difference" in report.to_markdown()
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "r.png")
    assert read_clip(tmp_path / "r.png").frames.float().std() > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.json", "r.png"]


def test_side_by_side_keeps_both_and_rests_on_the_last_frame():
    first, second = moving(frames=3), moving((1, 0), frames=5)[:, :, :61]
    pair = side_by_side(first, second)
    assert pair.shape == (5, 64, 64 + 5 + 61, 3)
    eight = (first * 255).round().byte()
    assert torch.equal(pair[:3, :, :64], eight) and torch.equal(pair[4, :, :64], eight[-1])
    assert torch.equal(pair[:, :, 69:], (second * 255).round().byte())
    with pytest.raises(ValueError, match="one height"):
        side_by_side(first, second[:, :60])


def test_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for folder, shift in (("a", (0, 1)), ("b", (0, 2))):
        (tmp_path / folder).mkdir()
        write_video(moving(shift), tmp_path / folder / "clip.mp4", fps=8)

    def motion(*words):
        status = main(["eval", "motion", *map(str, words), "--flow", "farneback"])
        return status, capsys.readouterr()

    out = tmp_path / "o"
    status, shown = motion(tmp_path / "a", "--against", tmp_path / "b", "--out", out)
    assert status == 0 and "optical flow" in shown.out and str(out) in shown.out
    held = json.loads((out / "motion.json").read_text())
    assert held["rows"][1]["flow"] > 1.5 * held["rows"][0]["flow"]
    assert "difference, clip by clip" in (out / "motion.md").read_text()
    assert read_clip(out / "motion.png").frames.float().std() > 0
    pair = read_clip(out / "pairs" / "clip.mp4").frames
    assert pair.shape == (5, 64, 132, 3)
    # before on the left, after on the right, up to what the codec loses
    for side, folder in ((pair[:, :, :64], "a"), (pair[:, :, 68:], "b")):
        alone = read_clip(tmp_path / folder / "clip.mp4").frames
        assert (side.float() - alone.float()).abs().mean() < 4

    status, shown = motion(tmp_path / "a" / "clip.mp4", "--json", "--num-frames", 3)
    row = json.loads(shown.out)["rows"][0]
    assert status == 0 and (row["key"], row["frames"]) == ("clip", 3)
    status, shown = motion(tmp_path / "nowhere")
    assert status == 2 and "no clip or folder of clips" in shown.err and "nowhere" in shown.err
    (tmp_path / "b" / "clip.mp4").rename(tmp_path / "b" / "other.mp4")
    write_video(moving((0, 1)), tmp_path / "b" / "third.mp4", fps=8)
    status, shown = motion(tmp_path / "a", "--against", tmp_path / "b")
    assert status == 2 and "no names are in both" in shown.err


def test_raft_is_found_and_runs_beside_any_torchvision(tmp_path):
    """In a process of its own, where nothing has mended a torchvision of another build before."""
    models = pytest.importorskip("torchvision.models.optical_flow", reason="torchvision is missing")
    weights = tmp_path / "hub" / "checkpoints" / "raft_small_random.pth"
    weights.parent.mkdir(parents=True)
    torch.save(models.raft_small(weights=None).state_dict(), weights)
    code = (
        "import torch; from stvision.eval.motion import choose_flow, optical_flow;"
        "assert choose_flow() == 'raft', choose_flow();"
        "print(tuple(optical_flow(torch.rand(2, 20, 30, 3), 'raft').shape))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TORCH_HOME": str(tmp_path)},
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "(1, 20, 30, 2)", done.stderr[-2000:]


def test_bad_input():
    with pytest.raises(ValueError, match="two frames"):
        optical_flow(torch.rand(1, 16, 16, 3))
    with pytest.raises(ValueError, match="flow must be"):
        choose_flow("lucas")
    if raft_weights() is None:
        assert choose_flow() == "farneback"
        with pytest.raises(FileNotFoundError, match="raft_small"):
            choose_flow("raft")
