"""The U-Net of configs/unet/tiny.yaml, for tests that build models without a command line."""

from __future__ import annotations

from typing import Any

import yaml
from conftest import ROOT

TINY_UNET: dict[str, Any] = yaml.safe_load((ROOT / "configs" / "unet" / "tiny.yaml").read_text())["arguments"]
