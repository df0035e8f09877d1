"""The verbs that give the figures of benchmarks: winrate, mtbench. `preftune.cli` takes them in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from preftune.cli_data import AsJson, Seed, print_found
from preftune.errors import ConfigError


def winrate(
    annotations: Annotated[
        Path | None, typer.Option(help="AlpacaEval's annotations (.json, .json.gz, .jsonl) or our judgments.jsonl.")
    ] = None,
    length_control: Annotated[
        Path | None, typer.Option(help="Folder of AlpacaEval's df_gamed*.csv and instruction_difficulty*.csv.")
    ] = None,
    own_prompts: Annotated[
        bool, typer.Option("--own-prompts", help="Control lengths by these rows alone, for prompts of your own.")
    ] = False,
    instructions: Annotated[
        Path | None,
        typer.Option(help="All instructions of the benchmark in order: difficulties go by text, not by row number."),
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="What was judged, where it is not beside judgments.jsonl.")] = None,
    annotator: Annotated[str | None, typer.Option(help="Of judgments.jsonl: whose are counted.")] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Win rate, its error and the length-controlled win rate of a file of preferences, as AlpacaEval counts them."""
    from preftune.evaluate.annotations import read_annotations
    from preftune.evaluate.benchmark import figures
    from preftune.evaluate.length_tables import read_tables

    if annotations is None:
        raise ConfigError("--annotations: name the file of preferences")
    if own_prompts and length_control:
        raise ConfigError("--own-prompts: controls lengths without AlpacaEval's tables; leave --length-control out")
    if instructions and not length_control:
        raise ConfigError("--instructions: says which difficulty belongs to a row; give --length-control FOLDER too")
    tables = None if length_control is None else read_tables(length_control, instructions=instructions)
    found = figures(read_annotations(annotations, data=data, annotator=annotator), tables=tables, own=own_prompts, seed=seed)
    print_found(found.as_dict(), found.as_text(), as_json)


VERBS: dict[str, Callable[..., None]] = {"winrate": winrate}
"""Verb -> function, in the order of the help."""
