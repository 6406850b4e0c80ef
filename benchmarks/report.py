"""Writes the tables of README.md from benchmarks/results/*.json, between its two `results` marks."""

from __future__ import annotations

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
MARKS = re.compile(r"(<!-- results -->\n).*(<!-- end of results -->)", re.DOTALL)


def table(path: pathlib.Path) -> str:
    """One file of results as a Markdown table in TFLOP/s, the best library of each row in bold."""
    results = json.loads(path.read_text())
    environment, rows = results["environment"], results["rows"]
    libraries = list(dict.fromkeys(name for row in rows for name in row["tflops"]))
    lines = [
        f"TFLOP/s on one {environment['device']}, jax {environment['jax']}, {environment['date']}, commit "
        f"{environment['commit']} (`benchmarks/results/{path.name}`):",
        "",
        f"| | {' | '.join(libraries)} |",
        f"|---{'|---' * len(libraries)}|",
    ]
    for row in rows:
        best = max(row["tflops"].values())
        cells = [_cell(row["tflops"].get(name), best) for name in libraries]
        lines.append(f"| {row['row']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(tflops: float | None, best: float) -> str:
    if tflops is None:
        return "-"
    number = f"{tflops:.0f}" if tflops >= 10 else f"{tflops:.3f}"
    return f"**{number}**" if tflops == best else number


def main() -> None:
    """Rewrites README.md."""
    tables = [table(path) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
    readme = ROOT / "README.md"
    body = "\n" + "\n".join(tables) + "\n"
    readme.write_text(MARKS.sub(lambda match: match[1] + body + match[2], readme.read_text()))


if __name__ == "__main__":
    main()
