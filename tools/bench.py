"""Time each paper's hot paths beside a stated peer or the straightforward form, both in one run.

uv run tools/bench.py ggcn          # measure and write papers/ggcn/results/bench.json
uv run tools/bench.py --all
uv run tools/bench.py ggcn --only "squirrel" --dry   # only matching workloads, write nothing

A paper's workloads stand in tools/benches/<slug>.py: a function ``workloads()`` that yields ``Workload``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from shared import fingerprint
from shared.errors import UserError
from shared.files import write_json
from tools.common import arguments, machine_lock, paper_folder, papers, tool
from tools.reproduce import cpu

ROUNDS = 7
MINIMUM_SECONDS = 0.05


@dataclass(frozen=True)
class Workload:
    """One comparison.

    Attributes:
        name: what is timed, with its sizes. ours: makes the callable of one step of this project's code.
        other: makes the callable of the peer or straightforward form; ``None`` where none can be run.
        other_name: what it is compared with. other_seconds: its known seconds, where it cannot be run here.
        target: the least ratio that is expected. clock: what counts seconds; ``time.process_time`` for a peer whose
            processor time is known.
    """

    name: str
    ours: Callable[[], Callable[[], Any]]
    other: Callable[[], Callable[[], Any]] | None = None
    other_name: str = ""
    other_seconds: float | None = None
    target: float | None = None
    clock: Callable[[], float] = time.perf_counter


@dataclass(frozen=True)
class Row:
    """What was measured: medians over rounds of seconds a step."""

    name: str
    seconds: float
    fastest: float
    steps_per_second: float
    matmul_share: float | None
    peak_mib: int | None
    other: str
    other_seconds: float | None
    ratio: float | None
    target: float | None


def timed(step: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call; short calls are repeated."""
    begin = clock()
    step()
    once = clock() - begin
    repeats = max(1, int(MINIMUM_SECONDS / max(once, 1e-7)))
    if repeats == 1:
        return once
    begin = clock()
    for _ in range(repeats):
        step()
    return (clock() - begin) / repeats


def matmul_peak() -> float:
    """Floating-point operations a second of a large float32 matrix product on this machine."""
    import torch

    a = torch.randn(1024, 1024)
    best = min(timed(lambda: a @ a) for _ in range(5))
    return 2 * 1024**3 / best


def flops(step: Callable[[], Any]) -> int:
    """Operations of the matrix products and convolutions of one step (those that torch counts), 0 if it cannot."""
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    try:
        with counter:
            step()
    except AssertionError:  # its module tracker refuses a module that is given a view of a parameter without gradient
        return 0
    return int(counter.get_total_flops())


def compare(work: Workload, peak: float, memory: int | None, rounds: int = ROUNDS) -> Row:
    """Time both sides in turn, so that a change of the machine's speed meets both."""
    ours = work.ours()
    other = None if work.other is None else work.other()
    for step in (ours, other):
        if step is not None:
            step()
            step()
    mine, theirs = [], []
    for _ in range(rounds):
        mine.append(timed(ours, work.clock))
        if other is not None:
            theirs.append(timed(other, work.clock))
    seconds = statistics.median(mine)
    other_seconds = statistics.median(theirs) if theirs else work.other_seconds
    ratios = [b / a for a, b in zip(mine, theirs, strict=True)] if theirs else []
    ratio = statistics.median(ratios) if ratios else (None if other_seconds is None else other_seconds / seconds)
    operations = flops(ours)
    share = operations / seconds / peak if operations else None
    return Row(
        work.name,
        seconds,
        min(mine),
        1 / seconds,
        None if share is None else round(share, 4),
        memory,
        work.other_name,
        other_seconds,
        ratio,
        work.target,
    )


def load_workloads(slug: str) -> Iterator[Workload]:
    """The workloads of tools/benches/<slug>.py.

    Raises:
        UserError: the paper has none.
    """
    path = Path(__file__).resolve().parent / "benches" / f"{slug}.py"
    if not path.is_file():
        raise UserError(f"no {path.relative_to(path.parents[2])}, expected the paper's workloads there")
    module = importlib.import_module(f"tools.benches.{slug}")
    yield from module.workloads()


def peak_memory(slug: str, name: str) -> int | None:
    """Peak memory in MiB of one step in a process of its own, above what the imports take; ``None`` if it fails."""
    done = subprocess.run(
        [sys.executable, __file__, slug, "--memory-of", name],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        return int(json.loads(done.stdout.strip().splitlines()[-1])["peak_mib"])
    except (IndexError, ValueError, KeyError):
        return None


def _own_peak(slug: str, name: str) -> int:
    work = next(work for work in load_workloads(slug) if work.name == name)
    step = work.ours()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    step()
    return round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def run(slug: str, only: str, load: float, rounds: int, memory: bool) -> dict[str, Any]:
    """Measure the workloads of one paper."""
    import torch

    folder = paper_folder(slug)
    peak = matmul_peak()
    rows = []
    for work in load_workloads(slug):
        if only not in work.name:
            continue
        row = compare(work, peak, peak_memory(slug, work.name) if memory else None, rounds)
        rows.append(asdict(row))
        beside = (
            "" if row.ratio is None else f", {row.ratio:.2f} times faster than {row.other} ({row.other_seconds:.4g} s)"
        )
        short = " BELOW TARGET" if row.ratio is not None and row.target is not None and row.ratio < row.target else ""
        print(f"{slug} | {row.name}: {row.seconds:.4g} s{beside}{short}", flush=True)
    return {
        "paper": slug,
        "rounds": rounds,
        "rows": rows,
        "matmul_gflops": round(peak / 1e9, 1),
        "machine": {
            "cpu": cpu(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_at_start": round(load, 2),
        },
        "code": fingerprint.of_paper(folder),
    }


def main(argv: list[str] | None = None) -> int:
    """The command."""
    parser = arguments(__doc__)
    parser.add_argument("slugs", nargs="*", help="papers to time")
    parser.add_argument("--all", action="store_true", help="every paper that has workloads")
    parser.add_argument("--only", default="", help="only workloads whose name contains this")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of each workload")
    parser.add_argument("--dry", action="store_true", help="print, write nothing, leave memory out")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)

    def body(options: argparse.Namespace) -> int:
        if options.memory_of:
            print(json.dumps({"peak_mib": _own_peak(options.slugs[0], options.memory_of)}))
            return 0
        if bool(options.slugs) == options.all:
            raise UserError("name the papers to time, or give --all")
        if options.rounds < 1:
            raise UserError(f"--rounds is {options.rounds}, expected at least 1")
        benches = Path(__file__).resolve().parent / "benches"
        slugs = [s for s in papers() if (benches / f"{s}.py").exists()] if options.all else options.slugs
        with machine_lock("bench") as load:
            for slug in slugs:
                content = run(slug, options.only, load, options.rounds, memory=not options.dry)
                if not options.dry and not options.only:
                    write_json(paper_folder(slug) / "results" / "bench.json", content)
        return 0

    return tool(parser, body, argv)


if __name__ == "__main__":
    sys.exit(main())
