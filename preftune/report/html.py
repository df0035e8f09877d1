"""One HTML file that needs nothing but itself: templates, style, the script of the plots and the policy that lets only it run.

Whatever a template shows is escaped. Scripts and styles run by their SHA-256 alone (Content-Security-Policy), and nothing may
be fetched, so that a text that slipped through could still neither run nor call out.

The script is uPlot (MIT, beside this file with its licence): of the libraries that draw long curves it is the one that is
small, 50 kB against the megabytes that a package of PyPI would bring into every page, and it sets no style attributes.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment

_HERE = Path(__file__).parent


def render(template: str, content: Mapping[str, Any]) -> str:
    """The HTML of one of this folder's templates that extends base.html.jinja; every name that it uses has to be given."""
    from markupsafe import Markup

    style, script = (Markup(part) for part in _assets())  # noqa: S704  # our own files
    frame = {"style": style, "script": script, "style_hash": _digest(style), "script_hash": _digest(script)}
    return _templates().get_template(template).render({**frame, **content})


@cache
def _assets() -> tuple[str, str]:
    style = (_HERE / "style.css").read_text()
    script = (_HERE / "plots.js").read_text() + (_HERE / "vendor" / "uplot.min.js").read_text()
    return style, script


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@cache
def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(_HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
