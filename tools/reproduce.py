"""Measure papers and write their results/: the only way a number gets there.

uv run tools/reproduce.py ggcn                                  # the default preset
uv run tools/reproduce.py ggcn --preset texas wisconsin --data DIR
uv run tools/reproduce.py --all

uv run tools/reproduce.py ggcn --preset texas --data DIR --confirm="--splits 1"

An interrupted measurement is gone on with; a finished one of the same code is taken as it is, unless --fresh.
--jobs 2 runs two presets side by side with one thread each; default presets are always measured alone.
--confirm is for long measurements of code that has changed since in ways that should not matter to them: it runs the
preset with the flags given, which shorten it, and asks that each number equals the recorded one to the last digit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared import fingerprint
from shared.errors import UserError
from shared.files import read_json, replacing, write_json
from tools.common import ROOT, arguments, machine_lock, paper_folder, papers, tool

FIGURES = (".png", ".gif")


def cpu() -> str:
    """The processor's name, as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def measure(folder: Path, preset: str, extra: list[str], load: float, fresh: bool, jobs: int = 1) -> dict[str, Any]:
    """Run one preset to its end and write ``results/<preset>.json`` and its figures; ``jobs`` run side by side.

    Raises:
        UserError: the run failed; what it printed last is named.
    """
    run = folder / "runs" / f"reproduce-{preset}"
    code = fingerprint.of_paper(folder)
    if run.exists() and (fresh or not _same_code(run, code)):
        shutil.rmtree(run)
    if not (run / "result.json").exists():
        resume = (run / "config.json").exists()
        if not resume and run.exists():
            shutil.rmtree(run)
        words = ["--resume", str(run)] if resume else ["--preset", preset, *extra, "--out", str(run)]
        print(f"{folder.name} {preset}: {'going on' if resume else 'running'} (load {load:.2f})", flush=True)
        _train(folder, words, jobs, f"{folder.name} --preset {preset}")
    result: dict[str, Any] = read_json(run / "result.json", f"{folder.name} {preset}")
    result["machine"] = {"cpu": cpu(), "cores": os.cpu_count(), "load_at_start": round(load, 2), "side_by_side": jobs}
    results = folder / "results"
    write_json(results / f"{preset}.json", result)
    for path in sorted(run.iterdir()):
        if path.suffix in FIGURES:
            name = path.name if preset == "default" else f"{preset}-{path.name}"
            with replacing(results / name) as temporary:
                shutil.copyfile(path, temporary)
    return result


def confirm(folder: Path, preset: str, extra: list[str], words: list[str]) -> int:
    """Repeat a part of a recorded run with the code as it is, and note in its result that the numbers are the same.

    The part's values of each metric must be the first of the recorded ones. The recorded fingerprint stays.

    Args:
        words: flags that shorten the preset, e.g. one split of ten.

    Returns:
        how many values were equal.

    Raises:
        UserError: nothing recorded, the run failed, or a number differs.
    """
    path = folder / "results" / f"{preset}.json"
    recorded = read_json(path, f"{folder.name} --preset {preset}")
    what = f"{folder.name} --preset {preset} {shlex.join(words)}"
    jobs = recorded.get("machine", {}).get("side_by_side", 1)  # sums depend on the number of threads
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        _train(folder, ["--preset", preset, *extra, *words, "--out", str(out)], jobs, what)
        part = read_json(out / "result.json", f"{folder.name} {preset}")
    count = 0
    for name, metric in part["metrics"].items():
        values = recorded["metrics"].get(name, {"values": []})["values"][: len(metric["values"])]
        if values != metric["values"]:
            raise UserError(f"{what}: {name} is {metric['values']}, recorded are {values}")
        count += len(values)
    if not count:
        raise UserError(f"{what} measures nothing")
    recorded["confirmed"] = {"code": part["code"], "words": shlex.join(words), "numbers": count}
    write_json(path, recorded)
    return count


def _train(folder: Path, words: list[str], jobs: int, what: str) -> None:
    """Run a paper's ``train.py``, with one thread where several run side by side."""
    env = dict(os.environ) if jobs == 1 else os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "train.py", *words], cwd=folder, stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        raise UserError(f"{what} ended with exit code {done.returncode}")


def _same_code(run: Path, code: str) -> bool:
    try:
        return bool(json.loads((run / "config.json").read_text(encoding="utf-8")).get("code") == code)
    except (OSError, ValueError):
        return False


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = arguments(__doc__)
    parser.add_argument("slugs", nargs="*", help="papers to measure")
    parser.add_argument("--all", action="store_true", help="every paper")
    parser.add_argument("--preset", nargs="+", default=["default"], help="presets to measure (default: default)")
    parser.add_argument("--data", type=Path, help="folder with the real data")
    parser.add_argument("--seeds", type=int, help="number of seeds instead of the preset's")
    parser.add_argument("--jobs", type=int, default=1, help="presets measured side by side, with one thread each")
    parser.add_argument("--fresh", action="store_true", help="measure again although there is a finished run")
    parser.add_argument("--confirm", metavar="FLAGS", help="repeat a part of what is recorded, with these flags")

    def body(options: argparse.Namespace) -> int:
        if bool(options.slugs) == options.all:
            raise UserError("name the papers to measure, or give --all")
        slugs = papers() if options.all else options.slugs
        folders = [paper_folder(slug) for slug in slugs]
        extra = [] if options.data is None else ["--data", str(options.data.resolve())]
        extra += [] if options.seeds is None else ["--seeds", str(options.seeds)]
        if options.jobs < 1:
            raise UserError(f"--jobs is {options.jobs}, expected at least 1")
        failed: list[str] = []
        work = [(folder, preset) for folder in folders for preset in options.preset]
        alone = [item for item in work if item[1] == "default" or options.jobs == 1]
        together = [item for item in work if item not in alone]
        with machine_lock("reproduce") as load:

            def one(item: tuple[Path, str], jobs: int) -> None:
                folder, preset = item
                try:
                    if options.confirm is not None:
                        count = confirm(folder, preset, extra, shlex.split(options.confirm))
                        print(f"{folder.name} {preset}: {count} numbers are the same", flush=True)
                        return
                    result = measure(folder, preset, extra, load, options.fresh, jobs)
                except UserError as error:
                    print(f"failed: {error}", file=sys.stderr)
                    failed.append(f"{folder.name}/{preset}")
                    return
                verdicts = ", ".join(f"{c['name']} {'holds' if c['holds'] else 'fails'}" for c in result["claims"])
                took = f"{result['seconds']:.0f} s; {verdicts or 'no claim decided'}"
                print(f"{folder.name} {preset}: {took}", flush=True)

            for item in alone:
                one(item, 1)
            with ThreadPoolExecutor(options.jobs) as pool:
                list(pool.map(lambda item: one(item, options.jobs), together))
        print(f"next: uv run tools/gallery.py ({ROOT.name}/README.md and the papers' READMEs show the new numbers)")
        if failed:
            print(f"error: not measured: {', '.join(failed)}", file=sys.stderr)
        return 1 if failed else 0

    return tool(parser, body, argv)


if __name__ == "__main__":
    sys.exit(main())
