"""The documentation holds: links, code, commands, quoted texts."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest

from deephyper_balsam.cli import main

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
READMES = [ROOT / "README.md", *sorted(ROOT.glob("apps/**/README.md")), *sorted(ROOT.glob("site-configs/*/README.md"))]
READMES.append(ROOT / "jobscripts" / "README.md")
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
_SPAN = re.compile(r"(`+)(.+?)\1(?!`)")


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and text of each fenced block."""
    for indent, language, text in _FENCE.findall(page.read_text(encoding="utf-8")):
        yield language, re.sub(f"^{indent}", "", text, flags=re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of the headings, as GitHub makes them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each deephyper-balsam command in a shell block, inside $( ) too."""
    for language, text in blocks(page):
        if language not in ("sh", "bash", "shell", ""):
            continue
        for line in text.replace("\\\n", " ").splitlines():
            for found in re.finditer(r"\bdeephyper-balsam ([^)|;&#>\n]*)", line):
                with_closed_quotes = found.group(1) + ("'" if found.group(1).count("'") % 2 else "")
                yield shlex.split(with_closed_quotes.replace('"', "") if "$(" in line else with_closed_quotes)


def complaint(words: list[str]) -> str | None:
    """What is wrong with a command, by click's own parameters; it is not run."""
    command: click.Command = main
    context = click.Context(main, info_name="deephyper-balsam")
    rest = list(words)
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        below = command.get_command(context, rest[0])
        if below is None:
            return f"there is no command {rest[0]!r}"
        command, rest = below, rest[1:]
        context = click.Context(command, info_name=command.name, parent=context)
    options = {name: p for p in command.params if isinstance(p, click.Option) for name in p.opts}
    given, positional = set(), 0
    while rest:
        word, _, value = rest.pop(0).partition("=")
        if word in ("...", "--help", "-h", "--version"):
            continue
        if not word.startswith("-"):
            positional += 1
            if command.context_settings.get("allow_interspersed_args") is False:  # what follows is for another command
                return complaint(["search", "run", word, *rest])
            continue
        if word not in options:
            return f"there is no option {word}"
        option = options[word]
        given.add(option.name)
        if not option.is_flag:
            if not value and not rest:
                return f"{word} lacks its value"
            value = value or rest.pop(0)
            if value.isupper():  # a placeholder, such as SITE
                continue
            try:
                option.type.convert(value, option, None)
            except click.BadParameter as error:
                return f"{word}: {error.message}"
    if "..." in words or isinstance(command, click.Group) or {"--help", "-h", "--version"} & set(words):
        return None
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    most = positional if any(p.nargs == -1 for p in arguments) else len(arguments)
    if not sum(p.required for p in arguments) <= positional <= most:
        return f"takes {len(arguments)} arguments, but has {positional}"
    missing = [p.name for p in command.params if isinstance(p, click.Option) and p.required and p.name not in given]
    return f"lacks {missing}" if missing else None


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=name_of)
def test_relative_links_and_images_lead_somewhere(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in _LINK.findall(text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        aim = (page.parent / path).resolve() if path else page
        assert aim.exists(), f"{target} leads nowhere"
        if anchor:
            assert anchor in anchors(aim), f"{target}: the page has no such heading"


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=name_of)
def test_python_blocks_compile(page: Path) -> None:
    for language, text in blocks(page):
        if language == "python":
            compile(text, name_of(page), "exec")


@pytest.mark.parametrize("page", [*PAGES, *READMES], ids=name_of)
def test_commands_and_their_options_exist(page: Path) -> None:
    for words in commands(page):
        problem = complaint(words)
        assert problem is None, f"deephyper-balsam {' '.join(words)}: {problem}"


def test_a_command_that_does_not_exist_would_be_noticed() -> None:
    assert complaint(["search", "jump", "x"]) == "there is no command 'jump'"
    assert complaint(["search", "run", "x", "--sites", "local"]) == "there is no option --sites"
    assert complaint(["search", "run", "x", "--method", "magic"]) is not None
    assert complaint(["app", "register", "digits"]) == "lacks ['site']"
    assert complaint(["search", "best"]) == "takes 1 arguments, but has 0"
    assert complaint(["search", "best", "x", "-n", "3"]) is None


def test_every_command_is_reached_by_the_reader() -> None:
    assert sum(1 for page in PAGES for _ in commands(page)) > 40


def _make_cli() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_cli", DOCS / "make_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_cli_md_is_up_to_date() -> None:
    assert (DOCS / "cli.md").read_text(encoding="utf-8") == _make_cli().render(), "run `python docs/make_cli.py`"


@functools.cache
def _texts_of_sources() -> list[str]:
    """Every text of the package; what an f-string fills in is a NUL."""
    texts = []
    for path in sorted((ROOT / "deephyper_balsam").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values]
                texts.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return texts


def quoted_errors() -> list[str]:
    """The texts in the headings of the FAQ's entries; … stands for what differs."""
    headings = re.findall(r"^### (.+)$", (DOCS / "faq.md").read_text(encoding="utf-8"), re.MULTILINE)
    found = []
    for heading in headings:
        if re.match(r"[A-Z]", heading):  # a heading in words
            continue
        # Texts are separated by "`, `"; a text may hold single back quotes itself
        for text in re.split(r"`+, `+", heading.strip()):
            found.append(text.strip("` "))
    return found


@pytest.mark.parametrize("text", quoted_errors())
def test_the_faq_quotes_texts_of_the_sources(text: str) -> None:
    literal = [part for part in text.split("…") if len(part.strip()) > 1]
    sources = _texts_of_sources()
    assert literal
    assert any(all(part.strip(" .") in source for part in literal) for source in sources), f"no source says {text!r}"


def test_pages_name_no_file_of_the_package_that_is_gone() -> None:
    package = ROOT / "deephyper_balsam"
    text = (DOCS / "design.md").read_text(encoding="utf-8")
    table = text[text.index("## The house") :]
    names = {span for _, span in _SPAN.findall(table) if span.endswith((".py", "/"))}
    below = {path.name for place in (package, ROOT / "tests") for path in place.rglob("*.py")}
    assert not sorted(name for name in names if name.endswith(".py") and Path(name).name not in below)
    folders = {f"{path.name}/" for path in package.rglob("*") if path.is_dir()}
    assert not sorted(name for name in names if name.endswith("/") and name.split("/")[-2] + "/" not in folders)
