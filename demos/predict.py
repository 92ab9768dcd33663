"""Predict a video with the model that ships: one real frame and a sentence in, a film out.

    make demo
    python demos/predict.py --clip 3 --prompt "close the drawer"
    python demos/predict.py --all

Shows the first frame of a clip that ships with the project, and its sentence, to the model, and
writes the prediction as mp4 and GIF, and a strip with the truth above the prediction. With
``--all``, every clip goes into one gallery of such strips and into one animated wall.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import stvision

if TYPE_CHECKING:
    from stvision.io import Clip

#: Clips that ship with the project: mp4 files and one JSON line each (path, caption, fps).
SAMPLES = Path(stvision.__file__).parent / "samples"


@dataclass
class Sample:
    """A clip to start from and, when it is known, the sentence that tells what happens in it."""

    path: Path
    caption: str | None


def shipped() -> list[Sample]:
    """The clips of ``SAMPLES``, in the order of their index."""
    index = SAMPLES / "index.jsonl"
    if not index.is_file():
        raise FileNotFoundError(f"no clips ship with this installation (looked for {index})")
    lines = [line for line in index.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [json.loads(line) for line in lines]
    if not rows:
        raise FileNotFoundError(f"no clips ship with this installation ({index} is empty)")
    return [Sample(SAMPLES / row["path"], row["caption"]) for row in rows]


def chosen(which: str | None) -> Sample:
    """The first shipped clip, or the one of a number counted from 1, or a file of the user's."""
    if which is not None and not which.isdigit():
        path = Path(which)
        if not path.exists():
            raise FileNotFoundError(f"no clip at {which!r}; give a file, or a number for --clip")
        same = [item for item in shipped() if item.path.resolve() == path.resolve()]
        return same[0] if same else Sample(path, None)
    samples = shipped()
    number = 1 if which is None else int(which)
    if not 1 <= number <= len(samples):
        names = ", ".join(f"{n} {item.path.name}" for n, item in enumerate(samples, start=1))
        raise ValueError(f"--clip must be a file or one of {names}; got {number}")
    return samples[number - 1]


def predict(pipe: Any, sample: Sample, prompt: str | None, options: argparse.Namespace) -> Any:
    """The truth as the model sees it, and the prediction from its first frames."""
    from stvision.io import as_clip, read_clip
    from stvision.pipelines.conditioning import fitted_clip

    prompt = prompt or sample.caption
    if prompt is None:
        raise ValueError(f"{sample.path} has no sentence of its own; give one with --prompt")
    height, width, num_frames = pipe.default_size()
    truth: Clip = as_clip(sample.path) if sample.path.is_dir() else read_clip(sample.path)
    if len(truth) > num_frames:
        truth = truth.sample_uniform(num_frames)
    print(f"{sample.path.name}: {prompt!r}, {num_frames} frames of {height} x {width} pixels")
    began = time.perf_counter()
    output = pipe(
        prompt,
        replace(truth[: pipe.config.num_reference_frames], fps=truth.fps),
        num_inference_steps=options.steps,
        generator=options.seed,
        output_type="pt",
    )
    print(f"predicted in {time.perf_counter() - began:.1f} s on {pipe.device}")
    return fitted_clip(truth, height, width), output.clips()[0]


def wall(pairs: list[tuple["Clip", "Clip"]], columns: int = 4, zoom: int = 2) -> "Clip":
    """One clip of all pairs, each truth above its prediction, ``columns`` pairs in a row."""
    import torch

    from stvision.io import Clip

    length = max(len(clip) for pair in pairs for clip in pair)
    cells = []
    for pair in pairs:
        shown = [clip.to_uint8().frames for clip in pair]
        # a shorter film waits at its last frame
        held = [torch.cat([x, x[-1:].expand(length - len(x), -1, -1, -1)]) for x in shown]
        cells.append(torch.cat(held, dim=1))
    gap = torch.full_like(cells[0], 255)
    cells += [gap] * (-len(cells) % columns)
    rows = [torch.cat(cells[i : i + columns], dim=2) for i in range(0, len(cells), columns)]
    frames = torch.cat(rows, dim=1)
    frames = frames.repeat_interleave(zoom, dim=1).repeat_interleave(zoom, dim=2)
    return Clip.from_frames(frames, fps=8.0)


def main() -> int:
    """Read the words, predict, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--clip", metavar="N|FILE", help="shipped clip by number (1 by default), or a video file"
    )
    parser.add_argument("--all", action="store_true", help="predict every shipped clip")
    parser.add_argument("--prompt", help="what shall happen; the clip's own sentence by default")
    parser.add_argument("--model", default="default", help="pipeline folder or name")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the results")
    parser.add_argument("--steps", type=int, help="denoising steps; the model's own by default")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--device", help="cpu, cuda, ...; a GPU when there is one")
    options = parser.parse_args()
    try:
        written = run(options)
    except (OSError, ImportError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    for path in written:
        print(f"wrote {path}")
    return 0


def run(options: argparse.Namespace) -> list[Path]:
    """Load the model, predict what was asked for, and return the files that were written."""
    if options.all and options.clip is not None:
        raise ValueError("--all takes every shipped clip; leave out --clip")
    samples = shipped() if options.all else [chosen(options.clip)]

    import torch

    from stvision.io import save_clip, write_strip
    from stvision.pipelines.seer import SeerPipeline

    began = time.perf_counter()
    pipe = SeerPipeline.from_pretrained(options.model)
    pipe.to(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    print(f"loaded {options.model} in {time.perf_counter() - began:.1f} s")
    rows, labels = [], []
    for sample in samples:
        truth, prediction = predict(pipe, sample, options.prompt, options)
        rows += [truth, prediction]
        labels += [(sample.caption or "truth") if options.all else "truth", "prediction"]
    options.out.mkdir(parents=True, exist_ok=True)
    if options.all:
        pairs = list(zip(rows[::2], rows[1::2], strict=True))
        return [
            write_strip(rows, options.out / "predict_gallery.png", labels=labels),
            save_clip(wall(pairs), options.out / "predict_gallery.gif"),
        ]
    return [
        save_clip(rows[1], options.out / "predict.mp4"),
        save_clip(rows[1], options.out / "predict.gif"),
        write_strip(rows, options.out / "predict_strip.png", labels=labels),
    ]


if __name__ == "__main__":
    raise SystemExit(main())
