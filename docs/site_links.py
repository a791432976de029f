"""Hook of mkdocs.yml: pages that lie outside docs/, and the links between them and docs/.

The documents link to each other as files of the repository, which is what an editor and a code host follow. On the site a file
outside docs/ is the page repository/<its path>, if mkdocs.yml's nav has it, and each link is turned to where its target is there.
"""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = "repository/"
LINK = re.compile(r"(\]\()([^)#\s:]+)(?=[#)])")


def on_files(files: Files, config: Any) -> None:
    """Add the pages outside docs/ that the nav has."""
    for name in re.findall(rf"{OUTSIDE}[^\s'\"]+\.md", str(config.nav)):
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name.removeprefix(OUTSIDE))))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn the page's relative links, which mkdocs then checks."""
    here: str = page.file.src_uri
    source = here.removeprefix(OUTSIDE) if here.startswith(OUTSIDE) else join("docs", here)

    def turned(match: re.Match[str]) -> str:
        target = normpath(join(dirname(source), match[2]))
        if not (ROOT / target).is_file():
            return match[0]  # for mkdocs to report
        there = target.removeprefix("docs/") if target.startswith("docs/") else OUTSIDE + target
        return match[1] + relpath(there, dirname(here) or ".")

    return LINK.sub(turned, markdown)
