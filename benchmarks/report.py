"""Writes tables from benchmarks/results/*.json between two marks: all of them into docs, length 8192 into README.md."""

from __future__ import annotations

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parent.parent
MARKS = re.compile(r"(<!-- results -->\n).*(<!-- end of results -->)", re.DOTALL)


def table(path: pathlib.Path, only: str) -> str:
    """The rows that have `only` in their name, as a Markdown table in TFLOP/s, the best library of each row in bold."""
    results = json.loads(path.read_text())
    environment = results["environment"]
    rows = [row for row in results["rows"] if only in row["row"]]
    if not rows:
        return ""
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
    """Rewrites README.md and docs/performance.md."""
    for page, only in ((ROOT / "README.md", " S8192 "), (ROOT / "docs" / "performance.md", "")):
        tables = [table(path, only) for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))]
        body = "\n" + "\n".join(filter(None, tables)) + "\n"
        page.write_text(MARKS.sub(lambda match, body=body: match[1] + body + match[2], page.read_text()))


if __name__ == "__main__":
    main()
