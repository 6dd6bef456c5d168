"""The table of reported and measured numbers, the verdicts on the claims, and the style of the figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")


def number(value: float, std: float | None = None) -> str:
    """A number for a reader: four significant digits, with its standard deviation where there is one."""
    text = f"{value:.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    return text if std is None else f"{text} ± {std:.2g}"


def rows(result: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """(metric, reported, measured, note) of every reported number and every metric, reported ones first."""
    metrics, out, shown = result["metrics"], [], set()
    for row in result["reported"]:
        measured = metrics.get(row.get("measured", ""))
        name = row["metric"]
        if row.get("measured") and row["measured"] != name:
            name = f"{name} | {row['measured']}"
        if row["comparable"] and measured:
            shown.add(row["measured"])
        text = number(measured["mean"], measured["std"] if len(measured["values"]) > 1 else None) if measured else "-"
        note = row["source"] if row["comparable"] else f"not comparable: {row['reason']}"
        out.append((name, number(row["value"], row.get("std")), text, note))
    for name, metric in metrics.items():
        if name not in shown:
            many = len(metric["values"]) > 1
            text = number(metric["mean"], metric["std"] if many else None)
            out.append((name, "", text, f"n = {len(metric['values'])}" if many else ""))
    return out


def _plain(header: tuple[str, ...], body: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in [header, *body]) for i in range(len(header))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in [header, *body]]
    return [line.rstrip() for line in [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]]


def measured_text(claim: dict[str, Any]) -> str:
    """The numbers a claim rests on, on one line."""
    return ", ".join(f"{name} {number(value)}" for name, value in claim["measured"].items())


def verdict(claim: dict[str, Any]) -> str:
    """``holds`` or ``DOES NOT HOLD``, and whether that is what paper.toml expects."""
    text = "holds" if claim["holds"] else "DOES NOT HOLD"
    as_expected = claim["holds"] == (claim.get("expected", "holds") == "holds")
    return text if as_expected and claim["holds"] else f"{text} ({'as expected' if as_expected else 'unexpected'})"


def terminal(result: dict[str, Any]) -> str:
    """The end of a run as plain text: table, claims, cost."""
    lines = [f"{result['paper']} · preset {result['preset']} · {len(result['seeds'])} seed(s)", ""]
    lines += _plain(("metric", "reported", "measured", ""), rows(result))
    lines.append("")
    for claim in result["claims"]:
        lines.append(f"claim {claim['name']}: {verdict(claim)}")
        lines.append(f"    {claim['statement']}")
        lines.append(f"    measured: {measured_text(claim)}")
    if not result["claims"]:
        lines.append("claims: none are checked by this preset")
    cost = f"{result['seconds']:.1f} s, {result['peak_memory_mib']} MiB"
    lines += ["", f"{cost}, {result['steps_per_second']:.1f} steps/s on {result['device']}"]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def markdown(result: dict[str, Any]) -> str:
    """The same for a README: a table of numbers and a table of claims."""
    lines = ["| metric | reported | measured | |", "| --- | --- | --- | --- |"]
    lines += ["| " + " | ".join(_cell(cell) for cell in row) + " |" for row in rows(result)]
    if result["claims"]:
        lines += ["", "| claim | verdict | measured |", "| --- | --- | --- |"]
        for claim in result["claims"]:
            cells = (claim["statement"], f"**{verdict(claim)}**", measured_text(claim))
            lines.append("| " + " | ".join(_cell(cell) for cell in cells) + " |")
    return "\n".join(lines)


def figure(rows: int = 1, columns: int = 1, width: float = 4.2, height: float = 3.2, **kwargs: Any) -> tuple[Any, Any]:
    """A matplotlib figure and its axes in the house style, drawn without a display.

    Returns:
        (figure, axes) as ``matplotlib.pyplot.subplots`` gives them; ``kwargs`` go to ``Figure.subplots``.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.rcsetup import cycler

    style: Any = {
        "axes.prop_cycle": cycler(color=COLOURS),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.3,
        "font.size": 9,
        "legend.frameon": False,
        "lines.linewidth": 1.6,
    }
    matplotlib.rcParams.update(style)
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    FigureCanvasAgg(made)
    return made, made.subplots(rows, columns, **kwargs)
