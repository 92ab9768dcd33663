"""``python -m benchmarks.neighborhood_report``: table and plot of the benchmark's JSON.

Rewrites what stands between ``<!-- table -->`` and ``<!-- end table -->``, and ``<!-- sweep -->``
and ``<!-- end sweep -->``, of a page, and draws speed-up over dense attention against the share of the
grid that a window covers (needs matplotlib: ``pip install 'stvision[plot]'``).
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def by_case(rows: Rows) -> dict[str, dict[str, dict[str, Any]]]:
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["case"], {})[row["name"]] = row
    return found


def best(rows: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Our row that an automatic choice takes."""
    return next((row for row in rows.values() if row["taken"]), None)


def number(row: dict[str, Any] | None, name: str, digits: int = 3) -> str:
    return f"{row[name]:.{digits}g}" if row and name in row else "-"


def table(found: dict[str, Any]) -> str:
    """Markdown: forward and backward milliseconds of all peers, roof, memory and error."""
    lines = [
        (
            f"{found['device']}, torch {found['torch']}, bfloat16, medians in milliseconds, forward / "
            "backward. A last column over 1 says how many times our forward, and forward with backward,"
        ),
        "is as fast as the best peer that computes the same windows.",
        "",
        (
            "| case | ours | deterministic | one pass | FlexAttention | NATTEN | dense cuDNN | of roof | "
            "peak / least | error | over best peer |"
        ),
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, rows in by_case(found["rows"]).items():
        our = best(rows)
        if our is None or "forward" not in our:
            continue
        cells = [name]
        others = ("deterministic", "one pass", "FlexAttention", "NATTEN")
        for row in (our, *(rows.get(n) for n in others)):
            cells.append(f"{number(row, 'forward')} / {number(row, 'backward')}")
        dense = rows.get("dense")
        cells.append(f"{number(dense, 'forward')} / {number(dense, 'backward')}")
        roof = 1e3 * our["operations"] / our["roof"]
        share = f"{roof / our['forward']:.2f}"
        if "backward" in our:
            share += f" / {2.5 * roof / our['backward']:.2f}"
        cells += [share, number(our, "peak_over_least"), f"{our['error']:.0e}"]
        peers = [rows[n] for n in ("FlexAttention", "NATTEN") if "forward" in rows.get(n, {})]
        ratio = "-"
        if peers:
            ratio = f"{min(p['forward'] for p in peers) / our['forward']:.2f}"
            both = [p["forward"] + p["backward"] for p in peers if "backward" in p]
            if both and "backward" in our:
                ratio += f" / {min(both) / (our['forward'] + our['backward']):.2f}"
        lines.append(f"| {' | '.join([*cells, ratio])} |")
    return "\n".join(lines)


def speedups(found: dict[str, Any]) -> list[tuple[float, float, float]]:
    """Share of the grid, and forward and forward-with-backward speed-up over dense attention."""
    points = []
    for rows in by_case(found["rows"]).values():
        our, dense = best(rows), rows.get("dense")
        if our and dense and "forward" in our and "forward" in dense:
            both = math.nan
            if "backward" in our and "backward" in dense:
                both = (dense["forward"] + dense["backward"]) / (our["forward"] + our["backward"])
            points.append((our["fraction"], dense["forward"] / our["forward"], both))
    return sorted(points)


def sweep_table(points: list[tuple[float, float, float]]) -> str:
    lines = [
        "| share of the grid in a window | speed-up forward | forward and backward |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {share:.3f} | {a:.2f} | {b:.2f} |" for share, a, b in points]
    return "\n".join(lines)


def plot(points: list[tuple[float, float, float]], path: Path, device: str) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit("the plot needs matplotlib: pip install 'stvision[plot]'") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    share = [p[0] for p in points]
    axes.loglog(share, [p[1] for p in points], "o-", label="forward")
    axes.loglog(share, [p[2] for p in points], "s-", label="forward and backward")
    axes.loglog(share, [1 / s for s in share], ":", color="gray", label="operations saved")
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xlabel("share of the grid that a window covers")
    axes.set_ylabel("times as fast as dense attention (cuDNN)")
    axes.set_title(device)
    axes.legend()
    figure.savefig(path)


def between(page: Path, name: str, text: str) -> None:
    """Replace what stands between the marks ``<!-- name -->`` and ``<!-- end name -->``."""
    old = page.read_text()
    begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
    if begin not in old or end not in old:
        raise SystemExit(f"{page} has no marks {begin} and {end}")
    head, rest = old.split(begin, 1)
    page.write_text(f"{head}{begin}\n\n{text}\n\n{end}{rest.split(end, 1)[1]}")


def main() -> int:
    parser = argparse.ArgumentParser(description="Table and plot of the benchmark's JSON.")
    parser.add_argument("--cases", type=Path, help="JSON of python -m benchmarks.neighborhood")
    parser.add_argument("--sweep", type=Path, help="JSON of the same with --sweep")
    parser.add_argument("--page", type=Path, action="append", default=[], help="pages to rewrite")
    parser.add_argument("--plot", type=Path, help="file of the plot, .svg or .png; needs --sweep")
    arguments = parser.parse_args()
    if arguments.cases is None and arguments.sweep is None:
        parser.error("give --cases or --sweep")
    parts = {}
    if arguments.cases is not None:
        parts["table"] = table(json.loads(arguments.cases.read_text()))
    if arguments.sweep is not None:
        found = json.loads(arguments.sweep.read_text())
        points = speedups(found)
        parts["sweep"] = sweep_table(points)
        if arguments.plot is not None:
            plot(points, arguments.plot, found["device"])
    for name, text in parts.items():
        print(text + "\n")
        for page in arguments.page:
            if f"<!-- {name} -->" in page.read_text():
                between(page, name, text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
