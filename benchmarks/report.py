"""python -m benchmarks.report: tables and plots from benchmarks/results/*.json.

Tables stand between two marks: all rows in docs/performance.md, those of length 8192 in README.md. A plot lies beside
each file of a GPU: of the rows that differ in head dim, mask and length alone, or of errors.
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
    """The rows in whose name the pattern `only` is found, as a Markdown table, the best library of each row in bold."""
    results = json.loads(path.read_text())
    environment = results["environment"]
    unit = unit_of(path)
    entries = [(entry["row"], rates(entry, unit)) for entry in results["rows"] if re.search(only, entry["row"])]
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


def accuracy_table(path: pathlib.Path) -> str:
    """Errors against float64, as a Markdown table."""
    results = json.loads(path.read_text())
    kinds = {"errors": "{}", "lse": "log-sum-exp of {}"}
    columns = list(dict.fromkeys((kind, name) for kind in kinds for entry in results["rows"] for name in entry[kind]))
    measured = _measured(results["environment"])
    lines = [
        f"Relative error on {measured} (`benchmarks/results/{path.name}`); of the log-sum-exp the greatest error:",
        "",
        f"| | {' | '.join(kinds[kind].format(name) for kind, name in columns)} |",
        f"|---{'|---' * len(columns)}|",
    ]
    for entry in results["rows"]:
        errors = [f"{entry[kind][name]:.2g}" if name in entry[kind] else "-" for kind, name in columns]
        lines.append(f"| {entry['row']} | {' | '.join(errors)} |")
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
        _draw(axis, lines, f"{dtype}, head dim {dim}, {'causal' if causal else 'full'}")
        axis.set_ylim(bottom=0)
    for axis in axes[-1]:
        axis.set_xlabel("length")
    for axis in axes[:, 0]:
        axis.set_ylabel("TFLOP/s")
    axes[0][0].legend(fontsize=8)
    return _saved(figure, path)


def accuracy_plot(path: pathlib.Path) -> pathlib.Path:
    """Relative error against length, a line for each column of the table, a panel for each kind of inputs."""
    from matplotlib import pyplot

    panels: dict = collections.defaultdict(lambda: collections.defaultdict(dict))
    for entry in json.loads(path.read_text())["rows"]:
        for column, error in entry["errors"].items():
            panels[entry["inputs"]][column][entry["length"]] = error
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 4), sharey=True, squeeze=False)
    for axis, (inputs, lines) in zip(axes[0], panels.items(), strict=True):
        _draw(axis, lines, inputs)
        axis.set_yscale("log")
        axis.set_xlabel("length")
        axis.legend(fontsize=8)
    axes[0][0].set_ylabel("relative error")
    return _saved(figure, path)


def _draw(axis, lines: dict[str, dict[int, float]], title: str) -> None:
    """A line for each name, over lengths."""
    for name, line in lines.items():
        own = name == "jax_flash"
        axis.plot(*zip(*sorted(line.items()), strict=True), label=name, marker="o", linewidth=2.5 if own else 1.2)
    axis.set_title(title, fontsize=10)
    axis.set_xscale("log", base=2)
    axis.grid(alpha=0.3)


def _saved(figure, path: pathlib.Path) -> pathlib.Path:
    """Writes a figure beside its file."""
    from matplotlib import pyplot

    figure.tight_layout()
    picture = path.with_suffix(".png")
    figure.savefig(picture, dpi=100)
    pyplot.close(figure)
    return picture


def main() -> None:
    """Rewrites README.md, docs/performance.md and the plots."""
    if importlib.util.find_spec("matplotlib") is None:
        raise SystemExit("plots need matplotlib; install it with: pip install matplotlib")
    accuracies, hosts = (sorted(RESULTS.glob(f"*-{name}.json")) for name in ("accuracy", "host"))
    suites = sorted({*RESULTS.glob("*.json")} - {*accuracies, *hosts})
    readme = [table(path, "[Sx]8192 ") for path in suites]
    performance = [*map(table, suites), *map(accuracy_table, accuracies), *map(host_table, hosts)]
    for page, tables in ((ROOT / "README.md", readme), (ROOT / "docs" / "performance.md", performance)):
        body = "\n" + "\n".join(filter(None, tables)) + "\n"
        page.write_text(MARKS.sub(lambda match, body=body: match[1] + body + match[2], page.read_text()))
    for path in suites:
        if not path.name.startswith("cpu-"):
            plot(path)
    for path in accuracies:
        accuracy_plot(path)


if __name__ == "__main__":
    main()
