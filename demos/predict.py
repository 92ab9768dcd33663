"""Predict a video with the model that ships: one real frame and a sentence in, a film out.

    make demo
    python demos/predict.py --prompt "close the drawer" --out outputs

Takes the first clip that ships with the project, shows its first frame(s) and a sentence to the
model, and writes the prediction as mp4 and GIF, and a strip with the truth above the prediction.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import stvision

#: Clips that ship with the project: mp4 files and one JSON line each (path, caption, fps).
SAMPLES = Path(stvision.__file__).parent / "samples"


def sample(clip: Path | None) -> tuple[Path, str | None]:
    """The clip to start from and its own sentence, if it is known."""
    index = SAMPLES / "index.jsonl"
    rows = [json.loads(line) for line in index.read_text().splitlines()] if index.is_file() else []
    if clip is not None:
        known = {(SAMPLES / row["path"]).resolve(): row["caption"] for row in rows}
        return clip, known.get(clip.resolve())
    if not rows:
        raise FileNotFoundError(f"no clips ship with this installation (looked for {index})")
    return SAMPLES / rows[0]["path"], rows[0]["caption"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--clip", type=Path, help="video to start from; its later frames are the truth"
    )
    parser.add_argument("--prompt", help="what shall happen; the clip's own sentence by default")
    parser.add_argument("--model", default="default", help="pipeline folder or name")
    parser.add_argument("--out", type=Path, default=Path("outputs"), help="folder for the results")
    parser.add_argument("--steps", type=int, help="denoising steps")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        path, caption = sample(arguments.clip)
        prompt = arguments.prompt or caption
        if prompt is None:
            raise ValueError(f"{path} has no sentence of its own; give one with --prompt")
        predict(arguments, path, prompt)
    except (FileNotFoundError, ImportError, ValueError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 2
    return 0


def predict(arguments: argparse.Namespace, path: Path, prompt: str) -> None:
    """Load, predict, write."""
    from stvision.io import save_clip, write_strip
    from stvision.pipelines.conditioning import fitted_clip, source_clip
    from stvision.pipelines.seer import SeerPipeline

    began = time.perf_counter()
    pipe = SeerPipeline.from_pretrained(arguments.model)
    loaded = time.perf_counter()
    height, width, num_frames = pipe.default_size()
    truth = source_clip(path, num_frames, fps=pipe.config.fps)
    print(f"{path.name}: {prompt!r}, {num_frames} frames of {height} x {width} pixels")
    output = pipe(
        prompt,
        truth,
        num_inference_steps=arguments.steps,
        fps=pipe.config.fps,
        generator=arguments.seed,
        output_type="pt",
    )
    done = time.perf_counter()
    clip = output.clips()[0]
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_clip(clip, arguments.out / "prediction.mp4")
    save_clip(clip, arguments.out / "prediction.gif")
    rows = [fitted_clip(truth, height, width), clip]
    write_strip(rows, arguments.out / "prediction.png", labels=["truth", "prediction"])
    for name in ("prediction.mp4", "prediction.gif", "prediction.png"):
        print(f"wrote {arguments.out / name}")
    print(f"loaded in {loaded - began:.1f} s, predicted in {done - loaded:.1f} s")


if __name__ == "__main__":
    raise SystemExit(main())
