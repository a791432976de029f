"""The programs of scripts/ as modules, so that a test calls their ``main`` within its own process."""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

from commands import ROOT


def script(name: str) -> Any:
    """scripts/NAME.py, under a name that hides no module; a UserError of its ``main`` comes through."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
