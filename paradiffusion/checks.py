"""Checks of single values, which raise one sentence that names the key and what it accepts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import yaml

from paradiffusion.errors import UserError

Check = Callable[[str, Any], None]  # of a key and its value


def choice(key: str, value: Any, accepted: tuple[Any, ...]) -> None:
    """Raise UserError unless ``value`` is one of ``accepted``."""
    if value not in accepted:
        raise UserError(f"{key}={value} is unknown; choose one of {', '.join(map(str, accepted))}.")


def positive(key: str, value: float | None, *, zero: bool = False) -> None:
    """Raise UserError unless ``value`` is above 0 (or 0, where ``zero``)."""
    # Not "value <= 0": nan compares false with everything.
    if value is None or not math.isfinite(value) or not (value > 0 or (zero and value == 0)):
        raise UserError(f"{key}={value} is out of range; expected a number {'of at least' if zero else 'above'} 0.")


def fraction(key: str, value: float) -> None:
    """Raise UserError unless ``value`` lies in 0 .. 1."""
    if not 0 <= value <= 1:
        raise UserError(f"{key}={value} is out of range; expected 0 to 1.")


def below_one(key: str, value: float) -> None:
    """Raise UserError unless ``value`` lies in 0 .. 1, 1 left out."""
    if not 0 <= value < 1:
        raise UserError(f"{key}={value} is out of range; expected at least 0 and below 1.")


def not_negative(key: str, value: float | None) -> None:
    """Raise UserError unless ``value`` is 0 or more."""
    positive(key, value, zero=True)


def one_of(*accepted: Any) -> Check:
    """The check that a value is one of these."""
    return lambda key, value: choice(key, value, accepted)


def on_disk(key: str, value: str) -> None:
    """Raise UserError for the address of a store: what is written needs renames and locks, and a path would make of it a folder "s3:"."""
    if "://" in value:
        raise UserError(f"{key}={value} is an address, and results are written to a folder; name one, and copy it there when it is whole.")


def finite(values: Any, whose: str, key: str) -> None:
    """Raise UserError, which names the model's part and the ``key`` of its dtype, unless all numbers of a tensor are finite:
    float16 ends at 65504."""
    if not bool(values.isfinite().all()):
        raise overflow(whose, key)


def overflow(whose: str, key: str) -> UserError:
    """The refusal of a model's numbers that are not finite."""
    return UserError(f"{whose} are not finite numbers: they overflowed in its dtype; set {key}=bfloat16 or {key}=float32.")


def parsed(key: str, text: str | None, example: str) -> Any:
    """The list or mapping that ``text`` is as YAML; None for None. Raises UserError, as ``not_understood`` says it."""
    try:
        return None if text is None else yaml.safe_load(text)
    except yaml.YAMLError:
        raise not_understood(key, text, example) from None


def not_understood(key: str, text: str | None, example: str) -> UserError:
    """The refusal of a value of another form than ``example``."""
    return UserError(f"{key}={text} is not understood; expected {key}='{example}'.")


def split_list(text: str | None) -> list[str]:
    """``[a,b]``, ``a,b`` or ``a`` as a list; spaces and quotes around an item are dropped."""
    inner = (text or "").strip()
    inner = inner[1:-1] if inner.startswith("[") and inner.endswith("]") else inner
    return [item for part in inner.split(",") if (item := part.strip().strip("'\""))]


def step_of(action: str | None, given: Iterable[str], steps: Mapping[str, Sequence[str]]) -> str:
    """The one of ``steps`` that ``action=`` names; UserError for none, and for a key among ``given`` that belongs to another step alone."""
    if action is None:
        raise UserError(f"action= is missing; expected action={'|'.join(steps)}, see --help.")
    choice("action", action, tuple(steps))
    for key in given:
        owners = [step for step, keys in steps.items() if key in keys]
        if owners and action not in owners:
            raise UserError(f"{key}= belongs to action={owners[0]}, and does nothing in action={action}; leave it out.")
    return action
