"""python -m benchmarks.report: tables and plots from benchmarks/results/*.json.

Tables stand between two marks: all rows in docs/performance.md, those of length 8192 in README.md. A plot of the rows
that differ in head dim, mask and length alone lies beside each file of a GPU.
"""

from __future__ import annotations

import collections
import importlib.util
import json
import pathlib
import re

from benchmarks.suites import SUITES, Row

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MARKS = re.compile(r"(<!-- results -->\n).*(<!-- end of results -->)", re.DOTALL)


def row_of(problem: dict) -> Row:
    """A row as a file keeps it."""
    return Row(**{name: tuple(value) if isinstance(value, list) else value for name, value in problem.items()})


def rates(entry: dict, unit: str) -> dict[str, float]:
    """Each library's rate, or time, in a unit."""
    row = row_of(entry["problem"])
    of = {
        "TFLOP/s": lambda seconds: row.flops / seconds / 1e12,
        "TB/s": lambda seconds: row.bytes / seconds / 1e12,
        "µs": lambda seconds: seconds * 1e6,
    }[unit]
    return {name: of(seconds) for name, seconds in entry["seconds"].items()}


def unit_of(path: pathlib.Path) -> str:
    """The unit of a file's suite, which its name ends with."""
    return SUITES[path.stem.rpartition("-")[2]].unit


def table(path: pathlib.Path, only: str = "") -> str:
    """The rows that have `only` in their name, as a Markdown table, the best library of each row in bold."""
    results = json.loads(path.read_text())
    environment = results["environment"]
    unit = unit_of(path)
    entries = [(entry["row"], rates(entry, unit)) for entry in results["rows"] if only in entry["row"]]
    if not entries:
        return ""
    libraries = list(dict.fromkeys(name for _, values in entries for name in values))
    ceilings = [
        f"{name.split(',')[0]} {rate / 1e12:.3g} T{name.split(', ')[1]}" for name, rate in results["ceilings"].items()
    ]
    lines = [
        f"{unit} on {_measured(environment)} (`benchmarks/results/{path.name}`{''.join(f'; {c}' for c in ceilings)}):",
        "",
        f"| | {' | '.join(libraries)} |",
        f"|---{'|---' * len(libraries)}|",
    ]
    for name, values in entries:
        best = (min if unit == "µs" else max)(values.values())
        lines.append(f"| {name} | {' | '.join(_cell(values.get(library), best) for library in libraries)} |")
    return "\n".join(lines) + "\n"


def host_table(path: pathlib.Path) -> str:
    """What calls cost beside their kernel, as a Markdown table."""
    results = json.loads(path.read_text())
    lines = [f"On {_measured(results['environment'])} (`benchmarks/results/{path.name}`):", "", "| | |", "|---|---|"]
    for name, seconds in results["seconds"].items():
        lines.append(f"| {name} | {f'{seconds:.2g} s' if seconds > 1e-2 else f'{seconds * 1e6:.2g} µs'} |")
    return "\n".join(lines) + "\n"


def _measured(environment: dict[str, str]) -> str:
    """On what, when and of which sources."""
    return (
        f"one {environment['device']}, jax {environment['jax']}, {environment['date']}, commit {environment['commit']}"
    )


def _cell(value: float | None, best: float) -> str:
    if value is None:
        return "-"
    number = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return f"**{number}**" if value == best else number


def plot(path: pathlib.Path) -> pathlib.Path | None:
    """TFLOP/s against length, a line for each library, a panel for each dtype, mask and head dim, if lengths differ."""
    from matplotlib import pyplot

    panels: dict = collections.defaultdict(lambda: collections.defaultdict(dict))
    for entry in json.loads(path.read_text())["rows"]:
        row = row_of(entry["problem"])
        if row.plain:
            for library, rate in rates(entry, "TFLOP/s").items():
                panels[row.causal, row.dtype, row.head_dim][library][row.q_lengths[0]] = rate
    panels = {key: lines for key, lines in panels.items() if any(len(line) > 2 for line in lines.values())}
    if not panels:
        return None
    columns = sorted({(dtype, dim) for _, dtype, dim in panels})
    figure, axes = pyplot.subplots(2, len(columns), figsize=(4 * len(columns), 7), sharex=True, squeeze=False)
    for (causal, dtype, dim), lines in panels.items():
        axis = axes[int(causal)][columns.index((dtype, dim))]
        for library, line in lines.items():
            own = library == "jax_flash"
            axis.plot(
                *zip(*sorted(line.items()), strict=True), label=library, marker="o", linewidth=2.5 if own else 1.2
            )
        axis.set_title(f"{dtype}, head dim {dim}, {'causal' if causal else 'full'}", fontsize=10)
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("length")
    for axis in axes[:, 0]:
        axis.set_ylabel("TFLOP/s")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)
    return picture


def main() -> None:
    """Rewrites README.md, docs/performance.md and the plots."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("plots need matplotlib; install it with: pip install matplotlib")
    hosts = sorted(RESULTS.glob("*-host.json"))
    suites = sorted({*RESULTS.glob("*.json")} - {*hosts})
    readme = [table(path, " S8192 ") for path in suites]
    performance = [*(table(path) for path in suites), *map(host_table, hosts)]
    for page, tables in ((ROOT / "README.md", readme), (ROOT / "docs" / "performance.md", performance)):
        body = "\n" + "\n".join(filter(None, tables)) + "\n"
        page.write_text(MARKS.sub(lambda match, body=body: match[1] + body + match[2], page.read_text()))
    for path in suites:
        if not path.name.startswith("cpu-"):
            plot(path)


if __name__ == "__main__":
    main()
