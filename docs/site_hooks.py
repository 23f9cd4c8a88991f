"""What `make docs` needs beside mkdocs.yml: links to files of the checkout, which are no pages, are shown as paths."""

from __future__ import annotations

import re
from posixpath import dirname, join, normpath
from typing import Any

_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace each link that leads out of docs/ by its text and the path."""

    def shown(link: re.Match[str]) -> str:
        path = normpath(join("docs", dirname(page.file.src_uri), link[2]))
        return link[0] if path.startswith("docs/") else f"{link[1]} (`{path}`)"

    return _LINK.sub(shown, markdown)
