"""Where everything passes that a command prints: nothing that a terminal would obey gets through."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import click

from deephyper_balsam.common.wording import printable


class PrintableStream:
    """Writes to a stream, with `printable` on the way.

    Attributes
    ----------
    rich_proxied_file
        The stream itself: rich draws with escape sequences of its own, and asks for it by this name.
    """

    def __init__(self, stream: TextIO) -> None:
        self.rich_proxied_file = stream

    def write(self, text: str) -> int:
        """Write text; how much of it was taken."""
        if not isinstance(text, str):
            raise TypeError(f"Text is written here, but got {type(text).__name__}.")
        self.rich_proxied_file.write(printable(text))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        if name == "buffer":  # a way around
            raise AttributeError(name)
        return getattr(self.rich_proxied_file, name)


@contextmanager
def printable_streams() -> Iterator[None]:
    """Let what is printed meanwhile pass through `PrintableStream`."""
    before = sys.stdout, sys.stderr
    if not any(isinstance(stream, PrintableStream) or stream is None for stream in before):
        sys.stdout, sys.stderr = PrintableStream(before[0]), PrintableStream(before[1])
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def unwrapped(stream: TextIO) -> TextIO:
    """Return the stream itself, for what draws with escape sequences of its own and cleans its text beforehand."""
    return stream.rich_proxied_file if isinstance(stream, PrintableStream) else stream


def is_terminal(stream: Any) -> bool:
    """Return whether a stream ends at a terminal."""
    return bool(stream.isatty())


def echo_data(text: str) -> None:
    """Print a table for a program: to a file or a pipe as it is, to a terminal printable."""
    stream = sys.stdout
    if isinstance(stream, PrintableStream) and not is_terminal(stream):
        click.echo(text, nl=False, file=stream.rich_proxied_file, color=True)  # color: nothing is taken out
    else:
        click.echo(text, nl=False)
