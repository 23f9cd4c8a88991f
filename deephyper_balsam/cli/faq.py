"""Where docs/faq.md answers an error: its headings are literal texts of errors, with … for what differs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from deephyper_balsam.common.bundled_files import folder

_SHORTEST = 8  # characters of literal text that tell one error from another


def entries(page: str) -> Iterator[tuple[str, str]]:
    """Return each text that the headings of the page quote, with the heading's anchor (as GitHub makes it)."""
    for heading in re.findall(r"^### (.+)$", page, re.MULTILINE):
        if re.match(r"[A-Z]", heading):  # a heading in words
            continue
        anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for text in re.split(r"`+, `+", heading.strip()):
            yield text.strip("` "), anchor


def answer_to(message: str, page: str) -> str | None:
    """Return the anchor of the entry that quotes most of the message; None if none does."""
    best, most = None, _SHORTEST - 1
    for text, anchor in entries(page):
        parts = [part.strip(" .") for part in text.split("…") if len(part.strip(" .")) > 1]
        quoted = sum(map(len, parts))
        if quoted > most and re.search(".*".join(map(re.escape, parts)), message, re.DOTALL):
            best, most = anchor, quoted
    return best


def pointer(message: str) -> str | None:
    """Return the file and anchor that answer an error, or None."""
    try:
        page: Path = folder("docs") / "faq.md"
        anchor = answer_to(message, page.read_text(encoding="utf-8"))
    except OSError:  # an installation without it; the error itself is what matters
        return None
    return None if anchor is None else f"{page}#{anchor}"
