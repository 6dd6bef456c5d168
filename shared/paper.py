"""Reading ``paper.toml``: who wrote the paper, the numbers it reports and the claims that are checked."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shared.errors import UserError


@dataclass(frozen=True)
class Reported:
    """A number of the paper. ``analogue`` names the metric of generated data that plays its part in the default run."""

    metric: str
    value: float
    source: str
    std: float | None = None
    note: str = ""
    analogue: str = ""


@dataclass(frozen=True)
class ClaimText:
    """A claim as paper.toml states it, with the thresholds that were fixed before the first full run."""

    name: str
    statement: str
    thresholds: dict[str, float] = field(default_factory=dict)
    why: str = ""
    expected: str = "holds"
    explanation: str = ""


@dataclass(frozen=True)
class MayDiverge:
    """Units of work, by a pattern of their names, that may end in a loss that is not finite: a finding, not a mishap.

    Such a unit is recorded as ``metric`` = 1 and the run goes on; any other unit stops the run.
    """

    unit: str
    metric: str
    why: str


@dataclass(frozen=True)
class Headline:
    """What the gallery shows: a reported metric beside a metric of ``results/<preset>.json``."""

    reported: str = ""
    measured: str = ""
    preset: str = "default"


@dataclass(frozen=True)
class Paper:
    """The content of ``paper.toml``."""

    slug: str
    title: str
    authors: tuple[str, ...]
    venue: str
    year: int
    paper: str
    summary: str
    rung: int
    domain: str = ""
    doi: str = ""
    code: str = ""
    code_licence: str = ""
    code_commit: str = ""
    bibtex: str = ""
    reported_none: str = ""
    extras: tuple[str, ...] = ()
    data_wheels: tuple[str, ...] = ()
    headline: Headline = Headline()
    reported: tuple[Reported, ...] = ()
    claims: tuple[ClaimText, ...] = ()
    may_diverge: tuple[MayDiverge, ...] = ()

    def claim(self, name: str) -> ClaimText:
        """The claim called ``name``.

        Raises:
            KeyError: paper.toml has none of that name.
        """
        for claim in self.claims:
            if claim.name == name:
                return claim
        raise KeyError(f"paper.toml of {self.slug} states no claim {name!r}")


def _build(cls: type, table: dict[str, Any], where: str) -> Any:
    known = cls.__dataclass_fields__  # type: ignore[attr-defined]
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise UserError(f"{where}: unknown key {unknown[0]!r}, expected among {', '.join(known)}")
    try:
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in table.items()})
    except TypeError as error:
        raise UserError(f"{where}: {error}") from error


def read_paper(folder: Path) -> Paper:
    """Read ``folder/paper.toml``.

    Raises:
        UserError: missing, malformed, or with an unknown or missing key.
    """
    path = folder / "paper.toml"
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"no readable paper.toml in {folder}") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: {error}") from error
    reported = tuple(_build(Reported, row, f"{path} [[reported]]") for row in table.pop("reported", []))
    claims = tuple(_build(ClaimText, row, f"{path} [[claim]]") for row in table.pop("claim", []))
    diverging = tuple(_build(MayDiverge, row, f"{path} [[may_diverge]]") for row in table.pop("may_diverge", []))
    headline = _build(Headline, table.pop("headline", {}), f"{path} [headline]")
    made = {"reported": reported, "claims": claims, "headline": headline, "may_diverge": diverging}
    paper: Paper = _build(Paper, {**table, **made}, str(path))
    for claim in claims:
        if claim.expected not in ("holds", "fails"):
            raise UserError(f"{path}: claim {claim.name}: expected is {claim.expected!r}, not 'holds' or 'fails'")
        if claim.expected == "fails" and not claim.explanation:
            raise UserError(f"{path}: claim {claim.name} is expected to fail and has no explanation")
    return paper
