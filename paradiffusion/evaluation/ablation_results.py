"""Results of an ablation's runs as lines of JSON, small enough to be published: the table is made from them alone, and a study goes on
from them on another machine."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from paradiffusion.errors import UserError
from paradiffusion.evaluation.ablation_plan import Plan
from paradiffusion.evaluation.ablation_table import Column, Observed, Result
from paradiffusion.evaluation.estimates import Estimate


def read_results(path: Path, plan: Plan) -> dict[tuple[str, int], Result]:
    """By setting and seed, the results in a file (none where it is missing) of what the study says now. UserError for a line that is
    none."""
    said = {(cell.setting, cell.seed): cell.said for cell in plan.cells}
    found = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"results={path} cannot be read ({getattr(error, 'strerror', 'no text')}); name a file.") from None
    for number, line in enumerate(lines, 1):
        try:
            result = _result_of(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"line {number} of {path} is no result of scripts/ablate.py; delete it, and the run is made again.") from None
        place = result.setting, result.seed
        if said.get(place) == result.said:
            found[place] = result
    return found


def add_results(path: Path, results: Iterable[Result], columns: Collection[Column]) -> None:
    """Add lines to the file, each at once, for several processes may add theirs; of the measures those in ``columns`` alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    keys = {column.key for column in columns}
    with path.open("a", encoding="utf-8") as file:
        for result in results:
            file.write(json.dumps(_record_of(result, keys), ensure_ascii=False) + "\n")
            file.flush()


def _record_of(result: Result, keys: Collection[str]) -> dict[str, Any]:
    observed = {key: one for key, one in result.observed.items() if key in keys}
    prompts: dict[str, list[str]] = {}
    for key, one in observed.items():
        names = prompts.setdefault(result.columns[key].suite, [])
        names += [name for name in one.below if name not in names]
    measures = [
        asdict(column := result.columns[key])
        | {"n": one.n, "whole": _plain(one.whole) if one.whole else None}
        | {part: [_short(getattr(one, part).get(name)) for name in prompts[column.suite]] for part in ("above", "below") if one.below}
        for key, one in observed.items()
    ]
    return {
        "setting": result.setting, "seed": result.seed, "said": result.said, "machine": result.machine, "agreed": result.agreed,
        "warnings": result.warnings, "prompts": prompts, "measures": measures,
    }  # fmt: skip


def _plain(estimate: Estimate) -> dict[str, Any]:
    return {key: None if math.isnan(value) else value for key, value in asdict(estimate).items()}


def _short(value: float | None) -> float | None:
    return None if value is None else int(value) if value == int(value) else round(value, 6)


def _result_of(record: dict[str, Any]) -> Result:
    said, agreed, warnings = tuple(record["said"]), record["agreed"], record["warnings"]
    result = Result(record["setting"], record["seed"], said, record["machine"], agreed=agreed, warnings=warnings)
    for measure in record["measures"]:
        whole, n = measure.pop("whole"), measure.pop("n")
        names = record["prompts"][measure["suite"]]
        above, below = (
            {name: float(value) for name, value in zip(names, measure.pop(part, None) or (), strict=False) if value is not None}
            for part in ("above", "below")
        )
        known: dict[str, Any] = {key: math.nan if value is None else value for key, value in (whole or {}).items()}
        column = Column(**measure)
        result.columns[column.key] = column
        result.observed[column.key] = Observed(above, below, Estimate(**known) if whole else None, n)
    return result
