"""The fenced blocks of the documentation, and what is told of them in a comment above.

A block runs in a test as it stands. A comment in the line above it, which no reader of the page sees, says otherwise:

``<!-- test: live -->``
    it needs a Balsam, and is run on one by the live tests;
``<!-- test: elsewhere, REASON -->``
    it cannot be run by a test, for example since it submits to a machine that is not here: it is read only.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), ROOT / "jobscripts" / "README.md"]
PAGES += [*sorted(ROOT.glob("apps/**/README.md")), *sorted(ROOT.glob("site-configs/*/README.md"))]
_BLOCK = re.compile(r"^( *)(?:<!-- test: ([^\n]+?) -->\n\1)?```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w/]+\.py)$")


@dataclass(frozen=True)
class Block:
    """A block: its language, text, line in its page, and the word of its comment (empty: none)."""

    language: str
    text: str
    line: int
    mark: str

    @property
    def file(self) -> str | None:
        """The file that the block is, by its first line."""
        found = _FILE.match(self.text.splitlines()[0]) if self.text.strip() else None
        return found[1] if found else None

    def write(self, folder: Path) -> Path:
        """Write the file that the block is."""
        assert self.file is not None
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(self.text, encoding="utf-8")
        return path


def blocks(page: Path, *languages: str) -> Iterator[Block]:
    """Yield the blocks of a page in these languages; without any, all."""
    text = page.read_text(encoding="utf-8")
    for found in _BLOCK.finditer(text):
        indent, mark, language, body = found.groups()
        if not languages or language in languages:
            line = text.count("\n", 0, found.start()) + 1
            yield Block(language, re.sub(f"^{indent}", "", body, flags=re.MULTILINE), line, mark or "")
