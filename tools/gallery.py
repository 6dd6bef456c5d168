"""Write the generated blocks of the READMEs from paper.toml and results/*.json.

uv run tools/gallery.py           # write
uv run tools/gallery.py --check   # exit 1 and name the files when a block is stale
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared import fingerprint, report
from shared.files import read_json, write_text
from shared.paper import Paper, read_paper
from tools.common import ROOT, arguments, block, papers, tool

LONG = 16


def results_of(folder: Path) -> dict[str, dict[str, Any]]:
    """Preset name -> content of ``results/<preset>.json``, the default first."""
    found = {path.stem: path for path in sorted((folder / "results").glob("*.json")) if path.stem != "bench"}
    names = sorted(found, key=lambda name: (name != "default", name))
    return {name: read_json(found[name], f"{folder.name}/results") for name in names}


def _folded(table: str, lines: int, title: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{table}\n\n</details>" if lines > LONG else table


def results_block(folder: Path) -> str:
    """The Results block of one paper's README."""
    out = []
    code = fingerprint.of_paper(folder)
    for name, result in results_of(folder).items():
        data = ", ".join(f"{row['name']} ({row['kind']})" for row in result["data"])
        cores = result.get("machine", {}).get("cores", "?")
        together = result.get("machine", {}).get("side_by_side", 1)
        beside = "" if together == 1 else f", {together} presets side by side"
        if len(data) > 120:
            kinds = sorted({row["kind"] for row in result["data"]})
            data = f"{len(result['data'])} data sets ({', '.join(kinds)})"
        out.append(f"### `{name}`")
        out.append(
            f"`{result['command']}` took {result['seconds']:.0f} s and {result['peak_memory_mib']} MiB "
            f"on {cores} cores{beside} ({result['device']}, torch {result['versions'].get('torch', '?')}). "
            f"Data: {data}."
        )
        if result["code"] != code:
            out.append(_age(result, code))
        table = report.markdown(result)
        claims = ""
        if result["claims"]:
            table, _, claims = table.partition("\n\n")
        lines = table.count("\n")
        out.append(_folded(table, lines, f"{lines - 1} numbers"))
        if claims:
            out.append(claims)
    bench = folder / "results" / "bench.json"
    if bench.exists():
        out += ["### Speed", bench_table(read_json(bench, "bench"), code)]
    return "\n\n".join(out)


def _age(result: dict[str, Any], code: str) -> str:
    """What to say of a result that another version of the code gave."""
    confirmed = result.get("confirmed", {})
    if confirmed.get("code") == code:
        return (
            f"Measured with an earlier version of the code; this one gives the same {confirmed['numbers']} numbers, "
            f"to the last digit, for the part of it that `{confirmed['words']}` runs."
        )
    return "> **Stale:** measured with an earlier version of the code in this folder."


def bench_table(content: dict[str, Any], code: str) -> str:
    """What ``tools/bench.py`` measured, as Markdown."""
    machine = content["machine"]
    lines = [
        f"`uv run tools/bench.py {content['paper']}`: both sides in one run, {machine['threads']} threads, "
        f"median of {content['rounds']} rounds.",
        "",
    ]
    if content["code"] != code:
        lines += ["> **Stale:** measured with an earlier version of the code in this folder.", ""]
    lines += ["| workload | seconds | peak MiB | compared with | its seconds | times faster |", "| --- " * 6 + "|"]
    for row in content["rows"]:
        other = "" if row["other_seconds"] is None else f"{row['other_seconds']:.4g}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        cells = (row["name"], f"{row['seconds']:.4g}", str(row["peak_mib"] or ""), row["other"] or "", other, ratio)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gallery_row(folder: Path, paper: Paper) -> str:
    """One line of the gallery."""
    results = results_of(folder)
    head = paper.headline
    stated = {row.metric: row for row in paper.reported}.get(head.reported)
    reported = "-" if stated is None else f"{report.number(stated.value, stated.std)} ({head.reported})"
    result = results.get(head.preset)
    measured, data, minutes = "-", "-", "-"
    if result is not None and head.measured in result["metrics"]:
        metric = result["metrics"][head.measured]
        many = len(metric["values"]) > 1
        measured = report.number(metric["mean"], metric["std"] if many else None)
        if head.measured != head.reported:
            measured += f" ({head.measured})"
        data = ", ".join(sorted({row["kind"] for row in result["data"]}))
    verdict = ""
    if "default" in results:
        claims = results["default"]["claims"]
        minutes = f"{results['default']['seconds'] / 60:.1f}"
        verdict = f" ({sum(c['holds'] for c in claims)} of {len(claims)} claims hold)"
    title = f"[{paper.slug}](papers/{folder.name}/README.md): {paper.title}, {paper.venue}"
    cells = (title, paper.summary + verdict, reported, measured, minutes, data, str(paper.rung))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def gallery_block(root: Path) -> str:
    """The gallery of the top README."""
    lines = ["| paper | claim | reported | measured | minutes | data | rung |", "| --- " * 7 + "|"]
    for slug in papers(root):
        folder = root / "papers" / slug
        lines.append(gallery_row(folder, read_paper(folder)))
    return "\n".join(lines)


def pages(root: Path = ROOT) -> dict[Path, str]:
    """Every README with generated blocks -> the text it should have."""
    top = root / "README.md"
    out = {top: block(top.read_text(encoding="utf-8"), "gallery", gallery_block(root), str(top))}
    for slug in papers(root):
        path = root / "papers" / slug / "README.md"
        out[path] = block(path.read_text(encoding="utf-8"), "results", results_block(path.parent), str(path))
    return out


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """The command."""
    parser = arguments(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a block is stale")

    def body(options: argparse.Namespace) -> int:
        stale = [path for path, text in pages(root).items() if path.read_text(encoding="utf-8") != text]
        for path in stale:
            if options.check:
                print(f"stale: {path.relative_to(root)}; write it with: uv run tools/gallery.py", file=sys.stderr)
            else:
                write_text(path, pages(root)[path])
                print(f"written: {path.relative_to(root)}")
        return 1 if stale and options.check else 0

    return tool(parser, body, argv)


if __name__ == "__main__":
    sys.exit(main())
