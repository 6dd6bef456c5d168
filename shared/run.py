"""A run: its folder, its units of work, exact resume, logs, claims and ``result.json``.

A run is a sequence of units (a seed and an arm, a split and a model ...). A unit's record is durable as soon as the
unit is finished; inside a unit, a checkpoint holds the modules, optimisers, random states and ``unit.state``. What a
unit computes depends on its key and the configuration only, never on the units before it, so a run that was killed
and resumed gives the numbers of one that was not.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import resource
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import FrameType
from typing import IO, Any, cast
from urllib.parse import quote

import numpy as np
import torch
from safetensors.torch import load_file

from shared import fingerprint
from shared.checkpoint import Checkpoint, Checkpoints, assert_plain, save_tensors
from shared.errors import UserError
from shared.files import disk_error, read_json, replacing, sha256_json, sha256_path, write_json
from shared.paper import Paper
from shared.seeds import derive_seed, rng_state, seed_everything, set_rng_state

CHECKPOINT_SECONDS = 30.0
LOGS_PER_UNIT = 100


class Stopped(Exception):
    """The run was asked to stop (``--stop-after``, SIGINT, SIGTERM) and has written its checkpoint."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


@dataclass(frozen=True)
class Summary:
    """A metric over seeds or splits: mean, population standard deviation, and the values in unit order."""

    mean: float
    std: float
    values: tuple[float, ...]

    @staticmethod
    def of(values: Sequence[float]) -> Summary:
        """Summarise at least one finite value."""
        array = np.asarray(values, dtype=np.float64)
        return Summary(float(array.mean()), float(array.std()), tuple(float(v) for v in array))


@dataclass
class UnitRecord:
    """What a finished unit leaves behind."""

    metrics: dict[str, float]
    timings: dict[str, float]
    seconds: float
    steps: int
    log_offset: int


class Diverged(UserError):
    """A logged value was NaN or infinite; ``unit`` is the unit of work that it ends."""

    def __init__(self, message: str, unit: Unit) -> None:
        super().__init__(message)
        self.unit = unit


def unwrap(module: Any) -> Any:
    """The user's module inside what Fabric, DDP and ``torch.compile`` wrap around it."""
    while True:
        inner = getattr(module, "_orig_mod", None)
        if inner is None and type(module).__name__ in ("_FabricModule", "DistributedDataParallel"):
            inner = getattr(module, "_forward_module", None) or module.module
        if inner is None:
            return module
        module = inner


class Unit:
    """One unit of work of a run; made by ``Run.units``."""

    def __init__(self, run: Run, key: tuple[Any, ...], restored: Checkpoint | None) -> None:
        self.run, self.key = run, key
        self.name = "/".join(str(part) for part in key)
        self.state: dict[str, Any] = {}
        self._objects: dict[str, Any] = {}
        self._restored = restored
        self._step = 0
        self._total = 0
        self._log_every = 1
        self._last_finite: float | None = None
        self._before = 0.0
        self._started = time.monotonic()
        self._bar: Any = None
        self.record: UnitRecord | None = None
        if restored is not None:
            self.state = restored.state["state"]
            self._step = restored.state["step"]
            self._before = restored.state["unit_seconds"]

    @property
    def seconds(self) -> float:
        """Seconds spent on this unit, those before an interruption included."""
        return self._before + time.monotonic() - self._started

    def attach(self, **objects: Any) -> None:
        """Name what a checkpoint holds: modules, optimisers, schedulers, anything with a state dict.

        Call it once, after everything has been made. When this unit was interrupted they are restored here.

        Raises:
            UserError: the checkpoint does not fit (names, shapes): both are listed.
        """
        self._objects = objects
        if self._restored is None:
            return
        states = self._restored.state["objects"]
        if sorted(states) != sorted(objects):
            raise UserError(f"{self._restored.folder} holds {sorted(states)}, this unit has {sorted(objects)}")
        for name, value in objects.items():
            inner = unwrap(value)
            if isinstance(inner, torch.nn.Module):
                prefix = f"{name}."
                tensors = {k[len(prefix) :]: v for k, v in self._restored.tensors.items() if k.startswith(prefix)}
                try:
                    inner.load_state_dict(tensors)
                except RuntimeError as error:
                    raise UserError(f"{self._restored.folder} does not fit {name}: {error}") from error
            else:
                value.load_state_dict(states[name])

    def steps(self, total: int, log_every: int | None = None) -> Iterator[int]:
        """The optimiser steps still to do, ``0 .. total-1`` in a run that was not interrupted. ``break`` ends early.

        Between steps: checkpoints, ``--stop-after``, signals, the progress bar.

        Args:
            total: number of steps.
            log_every: steps between two entries of ``metrics.jsonl``; by default a hundredth of ``total``.
        """
        run = self.run
        self._total = total
        self._log_every = log_every or max(1, total // LOGS_PER_UNIT)
        if self._restored is not None:
            states = self._restored.state["rng"]
            set_rng_state(states[run.rank % len(states)], run.device)
            self._restored = None
        self._bar = run.progress(total, self._step, self.name)
        try:
            while self._step < total:
                yield self._step
                self._step += 1
                if self._bar is not None:
                    self._bar.update(1)
                run._boundary(self)
        finally:
            if self._bar is not None:
                self._bar.close()
                self._bar = None

    def log(self, **scalars: Any) -> None:
        """Log scalars of the current step (numbers or one-element tensors; a process's share is averaged under DDP).

        Raises:
            Diverged: a value is NaN or infinite. Says the step, the last finite value and what to try.
        """
        run = self.run
        due = self._step % self._log_every == 0 or self._step == self._total - 1
        if run.world_size > 1:
            if not due:
                return
        elif not due and run.device.type != "cpu":
            return  # reading a value of an accelerator waits for it
        values = {}
        for name, value in scalars.items():
            if run.world_size > 1:
                value = run.mean_over_processes(value)
            number = float(value.detach()) if isinstance(value, torch.Tensor) else float(value)
            if not math.isfinite(number):
                last = "none" if self._last_finite is None else f"{self._last_finite:.6g}"
                raise Diverged(
                    f"{name} is {number} at step {self._step} of {self.name} (last finite value {last}): "
                    "try a lower learning rate, --precision 32, or check the data for extreme values",
                    self,
                )
            values[name] = number
        self._last_finite = next(iter(values.values()), self._last_finite)
        if due:
            if self._bar is not None:
                self._bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
            run._write_log(self.name, self._step, values)

    def finish(
        self,
        metrics: Mapping[str, float] | None = None,
        timings: Mapping[str, float] | None = None,
        keep: Mapping[str, torch.Tensor | np.ndarray] | None = None,
    ) -> None:
        """Record this unit: durable when this returns.

        Args:
            metrics: name -> value; values of one name are collected over units, in unit order. Deterministic only.
            timings: the same for what depends on the clock.
            keep: tensors that later units, claims or the figure need (``run.kept(key)``).

        Raises:
            UserError: a metric is not finite, or the disk is full.
        """
        clean = {name: float(value) for name, value in (metrics or {}).items()}
        for name, value in clean.items():
            if not math.isfinite(value):
                raise UserError(f"metric {name} of unit {self.name} is {value}: the run diverged or the data is empty")
        times = {name: float(value) for name, value in (timings or {}).items()}
        self.record = UnitRecord(clean, times, self.seconds, self._step, self.run._log_offset())
        tensors = {k: torch.as_tensor(v).detach().cpu().contiguous() for k, v in (keep or {}).items()}
        self.run._finish(self, tensors)


class Run:
    """The run that ``cli.main`` hands to a paper's ``train`` function.

    Attributes:
        config: the paper's Config. preset: its ``cli.Preset``; preset_name: its name.
        seeds: the seeds to run. data: the folder given with ``--data`` or ``None``.
        folder: where everything is written. device: ``torch.device`` of this process.
        rank, world_size, is_main: this process under torchrun.
    """

    def __init__(
        self,
        *,
        paper: Paper,
        paper_folder: Path,
        config: Any,
        preset: Any,
        preset_name: str,
        seeds: list[int],
        folder: Path | Callable[[], Path],
        data: Path | None,
        device: str = "auto",
        precision: str = "32",
        compile: bool = False,
        stop_after: int | None = None,
        argv: Sequence[str] = (),
    ) -> None:
        self.paper, self.paper_folder = paper, paper_folder
        self.config, self.preset, self.preset_name = config, preset, preset_name
        self.seeds, self.data = seeds, data
        self.precision, self._compile, self._stop_after = precision, compile, stop_after
        self._argv = list(argv)
        self.device = pick_device(device)
        self._fabric = self._make_fabric()
        if self._fabric is not None:
            self.device = self._fabric.device
        self.rank = 0 if self._fabric is None else self._fabric.global_rank
        self.world_size = 1 if self._fabric is None else self._fabric.world_size
        self.is_main = self.rank == 0
        self.folder = self._agree_on(folder)
        self.checkpoints = Checkpoints(self.folder / "checkpoint", paper.slug)
        self._records: dict[str, UnitRecord] = {}
        self._keys: list[str] = []
        self._data: list[dict[str, Any]] = []
        self._claims: list[dict[str, Any]] = []
        self._log: IO[str] | None = None
        self._events: Any = None
        self._work = 0
        self._started = time.monotonic()
        self._saved = time.monotonic()
        self._before = 0.0
        self._signal: int | None = None
        self._lock: IO[str] | None = None
        self._resumed: Checkpoint | None = None
        self._announced: set[int] = set()

    # ---- beginning and end -------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Lock the folder, find what is already done, and listen to SIGINT and SIGTERM."""
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / ".lock", "w")
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise UserError(f"another process is working in {self.folder}") from error
        self._barrier()
        self._resumed = self.checkpoints.load("last")
        offsets = [0 if self._resumed is None else self._resumed.state["log_offset"]]
        for path in sorted((self.folder / "checkpoint" / "units").glob("*.json")):
            row = read_json(path, "unit record")
            name = row.pop("unit")
            self._records[name] = UnitRecord(**row)
            offsets.append(self._records[name].log_offset)
        self._before = sum(record.seconds for record in self._records.values())
        if self.is_main:
            path = self.folder / "metrics.jsonl"
            path.touch()
            with open(path, "r+b") as file:  # lines after the last checkpoint are going to be written again
                file.truncate(min(max(offsets), path.stat().st_size))
            self._log = open(path, "a", encoding="utf-8")
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                signal.signal(number, self._on_signal)
            except ValueError:
                break  # not the main thread: the caller handles signals

    def end(self) -> None:
        """Release files and signal handlers."""
        for number in (signal.SIGINT, signal.SIGTERM):
            try:
                signal.signal(number, signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)
            except ValueError:
                break
        if self._log is not None:
            self._log.close()
        if self._events is not None:
            self._events.close()
        if self._lock is not None:
            self._lock.close()
        self._log = self._events = self._lock = None

    def _agree_on(self, folder: Path | Callable[[], Path]) -> Path:
        """The run's folder: the first process decides (and makes it), the others are told."""
        if self.world_size == 1:
            return folder() if callable(folder) else folder
        made = str(folder() if callable(folder) else folder) if self.is_main else None
        return Path(cast(Any, self._fabric).broadcast(made))

    # ---- units -------------------------------------------------------------------------------------------------

    def units(self, keys: Iterable[Any]) -> Iterator[Unit]:
        """Yield a ``Unit`` for each key that has no record yet, with the global generators seeded from the key.

        Raises:
            ValueError: a key twice. RuntimeError: the body did not call ``unit.finish``.
        """
        for raw in keys:
            key = tuple(raw) if isinstance(raw, (tuple, list)) else (raw,)
            name = "/".join(str(part) for part in key)
            if name in self._keys:
                raise ValueError(f"unit {name} twice in one run")
            self._keys.append(name)
            if name in self._records:
                continue
            restored = None
            if self._resumed is not None and self._resumed.state["unit"] == name:
                restored, self._resumed = self._resumed, None
            seed_everything(derive_seed("unit", *key, self.rank) if self.rank else derive_seed("unit", *key))
            unit = Unit(self, key, restored)
            self._saved = time.monotonic()
            yield unit
            if unit.record is None:
                raise RuntimeError(f"unit {name} ended without unit.finish(...)")
            if unit._step == 0:
                self._work += 1  # a unit without steps counts as one unit of work
            self._stop_if_asked(None)

    def train(self, train: Callable[[Any, Run], None]) -> None:
        """Call ``train(config, run)``, again after each unit that diverged as paper.toml says that it may.

        What is finished is skipped then, as when a run is resumed.

        Raises:
            Diverged: a unit that paper.toml does not name.
        """
        threads = torch.get_num_threads()
        while True:
            try:
                return train(self.config, self)
            except Diverged as error:
                metrics = [row.metric for row in self.paper.may_diverge if fnmatchcase(error.unit.name, row.unit)]
                if not metrics:
                    raise
                self.print(f"recorded and left: {error}")
                error.unit.finish(dict.fromkeys(metrics, 1.0))
            self._keys.clear()
            torch.set_num_threads(threads)

    def kept(self, *key: Any) -> dict[str, torch.Tensor]:
        """The tensors that the finished unit of this key kept (on the CPU)."""
        parts = key[0] if len(key) == 1 and isinstance(key[0], tuple) else key
        return load_file(str(self._unit_path("/".join(str(part) for part in parts), ".safetensors")))

    def derive_seed(self, *purpose: object) -> int:
        """A seed for one purpose, e.g. ``run.derive_seed("data", seed)``."""
        return derive_seed(*purpose)

    def generator(self, *purpose: object) -> torch.Generator:
        """A CPU generator for one purpose, e.g. ``run.generator("augment", seed)``."""
        return torch.Generator().manual_seed(derive_seed(*purpose))

    def _unit_path(self, name: str, suffix: str) -> Path:
        return self.folder / "checkpoint" / "units" / (quote(name, safe="=+,") + suffix)

    def _finish(self, unit: Unit, tensors: dict[str, torch.Tensor]) -> None:
        assert unit.record is not None
        if self.is_main:
            if tensors:
                path = self._unit_path(unit.name, ".safetensors")
                with replacing(path) as temporary:
                    save_tensors(temporary, tensors)
            write_json(self._unit_path(unit.name, ".json"), {"unit": unit.name, **asdict(unit.record)})
        self._records[unit.name] = unit.record
        self._barrier()

    def _boundary(self, unit: Unit) -> None:
        """Between two steps: save when it is time, stop when asked to."""
        self._work += 1
        if self.world_size > 1:
            at_log = unit._step % unit._log_every == 0
            if at_log:  # every process must take the same decision
                wish = [self._signal or 0, int(time.monotonic() - self._saved > CHECKPOINT_SECONDS)]
                wish = cast(Any, self._fabric).broadcast(wish)
                self._signal = wish[0] or None
                if wish[1]:
                    self.save(unit)
            if at_log or (self._stop_after is not None and self._work >= self._stop_after):
                self._stop_if_asked(unit)
            return
        if time.monotonic() - self._saved > CHECKPOINT_SECONDS:
            self.save(unit)
        self._stop_if_asked(unit)

    def _stop_if_asked(self, unit: Unit | None) -> None:
        if self._signal is not None:
            code, reason = 128 + self._signal, signal.Signals(self._signal).name
        elif self._stop_after is not None and self._work >= self._stop_after:
            code, reason = 0, f"--stop-after {self._stop_after}"
        else:
            return
        if unit is not None:
            self.save(unit)
        raise Stopped(code, reason)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt  # asked twice: leave at once, the last checkpoint stands
        self._signal = number
        print(f"{signal.Signals(number).name}: stopping after this step (again to leave at once)", file=sys.stderr)

    def save(self, unit: Unit) -> None:
        """Write the checkpoint of a unit in progress."""
        tensors: dict[str, torch.Tensor] = {}
        states: dict[str, Any] = {}
        for name, value in unit._objects.items():
            inner = unwrap(value)
            if isinstance(inner, torch.nn.Module):
                states[name] = None
                tensors.update({f"{name}.{k}": v for k, v in inner.state_dict().items()})
            else:
                states[name] = value.state_dict()
        rng = [rng_state(self.device)]
        if self.world_size > 1:
            gathered: list[Any] = [None] * self.world_size
            torch.distributed.all_gather_object(gathered, rng[0])
            rng = gathered
        state = {
            "unit": unit.name,
            "step": unit._step,
            "unit_seconds": unit.seconds,
            "log_offset": self._log_offset(),
            "state": unit.state,
            "objects": states,
            "rng": rng,
        }
        assert_plain(unit.state, f"unit.state of {unit.name}")
        if self.is_main:
            self.checkpoints.save("last", tensors, state)
        self._barrier()
        self._saved = time.monotonic()

    # ---- devices and processes ---------------------------------------------------------------------------------

    def _make_fabric(self) -> Any:
        world = int(os.environ.get("WORLD_SIZE", "1"))
        if world == 1 and self.device.type == "cpu" and self.precision == "32":
            return None
        from lightning_fabric import Fabric  # costs seconds to import: only where it does something

        nodes = max(1, world // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", str(world)))))
        fabric = Fabric(
            accelerator={"cuda": "cuda", "mps": "mps"}.get(self.device.type, "cpu"),
            devices=world // nodes if world > 1 else 1,
            num_nodes=nodes,
            strategy="ddp" if world > 1 else "auto",
            precision=cast(Any, "32-true" if self.precision == "32" else self.precision),
        )
        fabric.launch()
        return fabric

    def setup(self, model: torch.nn.Module, *optimizers: torch.optim.Optimizer) -> Any:
        """Put a model (and its optimisers) on the device, with ``--compile``, precision and DDP as asked.

        Returns:
            the model alone, or ``(model, *optimizers)``. Call the returned model, not the one given.
        """
        if self._compile:
            model = cast(torch.nn.Module, torch.compile(model))
        if self._fabric is None:
            model = model.to(self.device)
            return (model, *optimizers) if optimizers else model
        if not optimizers:
            trainable = any(p.requires_grad for p in model.parameters())
            return self._fabric.setup_module(model) if trainable else self._fabric.to_device(model)
        return self._fabric.setup(model, *optimizers)

    def backward(self, loss: torch.Tensor) -> None:
        """``loss.backward()``, with loss scaling where the precision needs it."""
        if self._fabric is None:
            loss.backward()
        else:
            self._fabric.backward(loss)

    def shard(self, index: torch.Tensor, micro_batch: int | None = None) -> list[tuple[torch.Tensor, float]]:
        """This process's share of a global batch, in parts of at most ``micro_batch`` samples.

        Args:
            index: (B,) indices of the global batch. micro_batch: samples in one forward pass on one device.

        Returns:
            (indices, weight) pairs. Weights are such that the gradients of ``weight * mean loss of the part``, summed
            over parts and averaged over processes (as DDP does), are those of the mean loss of the global batch.
        """
        n, world = len(index), self.world_size
        share = -(-n // world)
        parts = -(-share // (micro_batch or share))
        if n not in self._announced and not self._announced and (world > 1 or parts > 1):
            self.print(f"global batch {n} = {world} processes x {parts} parts of at most {-(-share // parts)} samples")
        self._announced.add(n)
        mine = torch.tensor_split(index, world)[self.rank]
        out = []
        for part in torch.tensor_split(mine, parts):
            out.append((part, len(part) / n * world) if len(part) else (index[:1], 0.0))  # DDP needs every process
        return out

    def mean_over_processes(self, value: Any) -> torch.Tensor:
        """Mean of a scalar over the processes of a torchrun."""
        tensor = torch.as_tensor(value, dtype=torch.float64).detach().clone()
        if self.world_size > 1:
            tensor = tensor.to(self.device) if self.device.type == "cuda" else tensor.cpu()
            torch.distributed.all_reduce(tensor)
            tensor /= self.world_size
        return tensor

    def _barrier(self) -> None:
        if self.world_size > 1:
            cast(Any, self._fabric).barrier()

    # ---- what the reader sees ----------------------------------------------------------------------------------

    def print(self, *parts: object) -> None:
        """Print on the first process, without breaking the progress bar."""
        if self.is_main:
            if sys.stderr.isatty():
                from tqdm import tqdm

                tqdm.write(" ".join(str(part) for part in parts))
            else:
                print(*parts, flush=True)

    def progress(self, total: int, initial: int, name: str) -> Any:
        """A progress bar with rate and remaining time; ``None`` when stderr is not a terminal."""
        if not self.is_main or not sys.stderr.isatty():
            return None
        from tqdm import tqdm

        return tqdm(total=total, initial=initial, desc=name, leave=False, dynamic_ncols=True, mininterval=0.2)

    def _log_offset(self) -> int:
        if self._log is None:
            return 0
        self._log.flush()
        return self._log.tell()

    def _write_log(self, unit: str, step: int, values: dict[str, float]) -> None:
        if self._log is None:
            return
        row = {"unit": unit, "step": step, **values, "seconds": round(self.seconds, 3)}
        try:
            self._log.write(json.dumps(row) + "\n")
        except OSError as error:
            raise disk_error(error, self.folder / "metrics.jsonl") from error
        if self._events is None:
            self._events = _Events(self.folder)
        self._events.add(unit, step, values)

    @property
    def seconds(self) -> float:
        """Seconds of this run so far, those before an interruption included."""
        return self._before + time.monotonic() - self._started

    # ---- results -----------------------------------------------------------------------------------------------

    def data_used(self, name: str, kind: str, path: Path | None = None, spec: Any = None) -> None:
        """Record a data set: ``kind`` "real" (hash of ``path``, a file or folder) or "generated" (hash of ``spec``)."""
        if kind not in ("real", "generated"):
            raise ValueError(f"kind is {kind!r}, expected 'real' or 'generated'")
        digest = sha256_path(path) if path is not None else sha256_json(spec)
        row = {"name": name, "kind": kind, "sha256": digest}
        if row not in self._data:
            self._data.append(row)

    @property
    def metrics(self) -> dict[str, Summary]:
        """Metrics of the finished units, each name's values in unit order."""
        return self._collect("metrics")

    def _collect(self, what: str) -> dict[str, Summary]:
        values: dict[str, list[float]] = {}
        for name in self._keys:
            for metric, value in getattr(self._records[name], what).items():
                values.setdefault(metric, []).append(value)
        return {metric: Summary.of(v) for metric, v in values.items()}

    @property
    def timings(self) -> dict[str, Summary]:
        """What depends on the clock, collected like ``metrics``."""
        return self._collect("timings")

    def threshold(self, claim: str, key: str = "margin") -> float:
        """A threshold that paper.toml states for a claim."""
        return float(self.paper.claim(claim).thresholds[key])

    def claim(self, name: str, holds: Any, **measured: float) -> None:
        """Record the verdict on a claim of paper.toml, with the numbers it rests on.

        Raises:
            KeyError: paper.toml states no such claim.
        """
        text = self.paper.claim(name)
        numbers = {k: float(v) for k, v in measured.items()}
        row = {
            "name": name,
            "statement": text.statement,
            "thresholds": dict(text.thresholds),
            "measured": numbers,
            "expected": text.expected,
            "holds": bool(holds),
        }
        self._claims.append(row)

    def figure(self, figure: Any, name: str = "figure.png") -> None:
        """Save a matplotlib figure into the run folder; PNGs in 256 colours, a third of the size."""
        if self.is_main:
            with replacing(self.folder / name) as temporary:
                figure.savefig(temporary, format=Path(name).suffix.lstrip("."), dpi=110, bbox_inches="tight")
                if name.endswith(".png"):
                    from PIL import Image  # matplotlib writes its PNGs with it

                    with Image.open(temporary) as image:
                        few = image.convert("RGB").quantize(256, dither=Image.Dither.NONE)
                    few.save(temporary, format="PNG", optimize=True)

    def reported(self) -> list[dict[str, Any]]:
        """Rows of the paper's numbers that this run has something to say to."""
        metrics = self.metrics
        why = getattr(self.preset, "why_not_comparable", None)
        rows: list[dict[str, Any]] = []
        for row in self.paper.reported:
            out: dict[str, Any] = {"metric": row.metric, "value": row.value, "source": row.source}
            if row.std is not None:
                out["std"] = row.std
            if row.metric in metrics:
                out |= {"measured": row.metric, "comparable": why is None}
                if why is not None:
                    out["reason"] = why
            elif row.analogue and row.analogue in metrics:
                out |= {"measured": row.analogue, "comparable": False, "reason": why or "another data set"}
            elif row.metric == self.paper.headline.reported:
                out |= {"comparable": False, "reason": why or "not measured by this preset"}
            else:
                continue
            rows.append(out)
        return rows

    def result(self) -> dict[str, Any]:
        """The content of ``result.json``."""
        seconds = self.seconds
        steps = sum(self._records[name].steps for name in self._keys)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)
        out: dict[str, Any] = {
            "paper": self.paper.slug,
            "preset": self.preset_name,
            "seeds": self.seeds,
            "device": self.device.type,
            "precision": self.precision,
            "processes": self.world_size,
            "config": asdict(self.config),
            "data": self._data,
            "metrics": {name: asdict(summary) for name, summary in self.metrics.items()},
            "reported": self.reported(),
            "claims": self._claims,
            "timings": {name: asdict(summary) for name, summary in self.timings.items()},
            "seconds": round(seconds, 2),
            "peak_memory_mib": round(peak),
            "steps_per_second": round(steps / max(seconds, 1e-9), 3),
            "threads": torch.get_num_threads(),
            "versions": versions(),
            "command": self.command(),
            "code": fingerprint.of_paper(self.paper_folder),
            "shared": fingerprint.of_shared(self.paper_folder, Path(__file__).parent),
        }
        if self.device.type == "cuda":
            out["peak_device_memory_mib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**20)
        return out

    def command(self) -> str:
        """The command that gives this run again; folders of this machine are left out."""
        words, out = iter(self._argv), ["uv", "run", "train.py"]
        for word in words:
            flag, _, value = word.partition("=")
            if flag in ("--out", "--resume", "--stop-after"):
                if not value:
                    next(words, None)
            elif flag == "--data":
                if not value:
                    next(words, None)
                out += ["--data", "DIR"]
            else:
                out.append(word)
        return shlex.join(out)

    def write_result(self) -> dict[str, Any]:
        """Write ``result.json``, the last file of a run."""
        result = self.result()
        if self.is_main:
            write_json(self.folder / "result.json", result)
        self._barrier()
        return result


class _Events:
    """TensorBoard's event file, where TensorBoard is installed; written without its heavier summary module."""

    def __init__(self, folder: Path) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.compat.proto.summary_pb2 import Summary as Proto
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            self._writer = None
            return
        self._event, self._proto = Event, Proto
        self._writer = EventFileWriter(str(folder))

    def add(self, unit: str, step: int, values: dict[str, float]) -> None:
        if self._writer is not None:
            rows = [self._proto.Value(tag=f"{name}/{unit}", simple_value=value) for name, value in values.items()]
            event = self._event(step=step, wall_time=time.time(), summary=self._proto(value=rows))
            self._writer.add_event(event)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def pick_device(name: str) -> torch.device:
    """The device that ``--device`` names; ``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        UserError: asked for one that is not there.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if available[kind]))
    if not available.get(name, False):
        usable = ", ".join(kind for kind, there in available.items() if there)
        raise UserError(f"--device {name}: torch finds none on this machine, usable here: {usable}")
    return torch.device(name)


def versions() -> dict[str, str]:
    """Versions of what decides a number."""
    from importlib.metadata import PackageNotFoundError, version

    out = {"python": platform.python_version()}
    for name in ("torch", "numpy", "scipy", "scikit-learn", "torch-geometric", "timm", "transformers"):
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out
