"""Fixtures of several files of integration tests."""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

import pytest
from commands import ROOT


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("caption_script", ROOT / "scripts" / "caption.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["caption_script"] = module
    spec.loader.exec_module(module)
    return module
