"""From Vega-Lite specifications to files, and to what a page embeds; the only importer of vl-convert."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from deephyper_balsam.errors import InputError

SUFFIXES = (".pdf", ".png", ".svg")
_VEGA_LITE = "6.4"
_PNG_SCALE = 3.0


def _library() -> Any:
    try:
        import vl_convert
    except ImportError as error:
        raise InputError(
            "Figures and reports need the package vl-convert-python, which is not installed here. "
            "Install it with `pip install 'deephyper-balsam[report]'`."
        ) from error
    return vl_convert


def check_drawing(output: Path | None = None) -> None:
    """Refuse before anything is read: the library is not installed, or `output` is no picture that it draws.

    Raises
    ------
    InputError
        It says what to install, or names the suffixes.
    """
    if output is not None and output.suffix.lower() not in SUFFIXES:
        raise InputError(f"A figure's file must end in one of {', '.join(SUFFIXES)}, but got {output.name!r}.")
    _library()


def to_vega(spec: dict[str, Any]) -> dict[str, Any]:
    """Return the Vega specification of a Vega-Lite one, which a page draws without Vega-Lite."""
    return dict(_library().vegalite_to_vega(spec, vl_version=_VEGA_LITE))


@cache
def vega_library() -> str:
    """Return Vega as a script that leaves ``vegaEmbed`` in the window; safe inside a script element."""
    script: str = _library().javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_VEGA_LITE)
    return script.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def draw(spec: dict[str, Any], suffix: str) -> bytes:
    """Return a figure as a file of one of the `SUFFIXES`."""
    library = _library()
    if suffix == ".svg":
        return str(library.vegalite_to_svg(spec, vl_version=_VEGA_LITE)).encode()
    if suffix == ".png":
        return bytes(library.vegalite_to_png(spec, vl_version=_VEGA_LITE, scale=_PNG_SCALE))
    return bytes(library.vegalite_to_pdf(spec, vl_version=_VEGA_LITE))
