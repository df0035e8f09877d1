"""The verbs that say whether it worked. `preftune.cli` takes them in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from preftune.cli_data import print_found


def diagnose(
    run: Annotated[Path, typer.Argument(help="Run folder, also of a run that goes on.")],
    only: Annotated[list[str] | None, typer.Option("--only", help="This finding alone; may be given again.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="Also what is in order, and what was not looked at.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit code 1 where there is an error.")] = False,
) -> None:
    """Say whether a run worked, why not, and what to do: findings from its own files, worst first."""
    from rich.console import Console

    from preftune.diagnose.symptoms import diagnose as look
    from preftune.run import Run

    found = look(Run.open(run), only=only or ())
    if as_json:
        print_found(found.as_dict(), "", as_json)
    else:
        found.show(Console(highlight=False), everything=everything)
    if strict and found.n_errors:
        raise typer.Exit(1)


VERBS: dict[str, Callable[..., None]] = {"diagnose": diagnose}
"""Verb -> function, in the order of the help."""
