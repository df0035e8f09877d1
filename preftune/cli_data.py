"""The verbs that make preference data: import, agree, pairs. `preftune.cli` takes them in."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from preftune.cli_asking import Fields, Format, Quarantine, fields_of
from preftune.errors import ConfigError, DataError, printable

if TYPE_CHECKING:
    from preftune.data.types import Judgment

Judgments = Annotated[Path, typer.Argument(help="Judgments, as judge and annotate write them.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")]
Choice = Annotated[
    Literal["all", "best_worst", "best_random"],
    typer.Option("--choice", help="Pairs of a prompt: all, its best against its worst, or its best against one at random."),
]
Seed = Annotated[int, typer.Option(help="Same seed, same choice.")]


def say(text: str) -> None:
    """One line for the person, apart from what a script reads."""
    print(printable(text), file=sys.stderr)


def print_counts(counts: Mapping[str, Any], as_json: bool) -> None:
    """The account of what was written."""
    print(json.dumps(counts) if as_json else printable("\n".join(f"{n:>9,}  {name}" for name, n in counts.items())))


def print_found(found: Mapping[str, Any], text: str, as_json: bool) -> None:
    """What was found: an object for scripts, or `text`; nothing of it drives a terminal."""
    print(json.dumps(found, indent=1) if as_json else printable(text))


def import_data(
    data: Annotated[str, typer.Argument(help="Preference file, folder, saved dataset or hub id, in any known format.")],
    out: Annotated[Path, typer.Option(help="JSONL file to write.")],
    choice: Choice = "all",
    aspects: Annotated[
        str | None, typer.Option(help="Ratings that count, separated by commas; default: what the format says.")
    ] = None,
    format: Format = "auto",
    field: Fields = None,
    quarantine: Quarantine = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Bring a preference set of any known format into one file of ours, margins kept."""
    from preftune.data.importing import import_file

    counts = import_file(
        data,
        out,
        format=format,
        fields=fields_of(field),
        quarantine=quarantine,
        aspects=tuple(name.strip() for name in (aspects or "").split(",") if name.strip()),
        choice=choice,
        seed=seed,
        on_note=say,
    )
    print_counts(counts, as_json)


def agree(judgments: Judgments, as_json: AsJson = False) -> None:
    """How far the annotators of a file agree, beyond chance: kappas and alpha, and what each annotator did."""
    from preftune.label.agree import agreement

    found = agreement(_judgments(judgments))
    print_found(found.as_dict(), found.as_text(), as_json)


def pairs(
    judgments: Judgments,
    out: Annotated[Path, typer.Option(help="JSONL file to write.")],
    data: Annotated[
        str | None, typer.Option("--data", help="What was judged; default: what judge or annotate left beside the judgments.")
    ] = None,
    weigh: Annotated[
        Literal["majority", "confidence"], typer.Option(help="Verdicts, or the probabilities that judges stated.")
    ] = "majority",
    ties: Annotated[Literal["drop", "soft"], typer.Option(help="Equal votes: no pair, or one of confidence 0.5.")] = "drop",
    min_agreement: Annotated[float, typer.Option(help="Smallest share of the votes for the winner, 0.5 to 1.")] = 0.5,
    min_annotators: Annotated[int, typer.Option(help="Fewest annotators with a verdict.")] = 1,
    choice: Choice = "all",
    labels: Annotated[bool, typer.Option("--labels", help="Good and bad responses apart, for unpaired objectives.")] = False,
    balance: Annotated[bool, typer.Option("--balance", help="With --labels: as many good as bad.")] = False,
    held_out: Annotated[Path | None, typer.Option(help="Also split by prompt, and write the other side here.")] = None,
    fraction: Annotated[float, typer.Option(help="Share of the prompts that is held out.")] = 0.1,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Turn judgments into training data: who wins and how sure that is, with an account of what was left out."""
    from preftune.data.pairs import labels as labelled
    from preftune.data.pairs import preferences
    from preftune.data.read import read_examples
    from preftune.data.split import split_by_prompt
    from preftune.data.write import judged_file, write_examples

    if balance and not labels:
        raise ConfigError("--balance: is for --labels; pairs have as many winners as losers")
    if labels and (weigh, ties, min_agreement, choice) != ("majority", "drop", 0.5, "all"):
        raise ConfigError("--labels: --weigh, --ties, --min-agreement and --choice are for pairs")
    verdicts = _judgments(judgments)
    if data is None and not judged_file(judgments).is_file():
        raise ConfigError(f"--data: name the file that was judged; there is no {judged_file(judgments)} beside the judgments")
    source = read_examples(data or judged_file(judgments))
    for line in source.notes:
        say(line)
    if labels:
        found = labelled(source.examples, verdicts, min_annotators=min_annotators, balance=balance, seed=seed)
    else:
        found = preferences(
            source.examples, verdicts, weigh=weigh, ties=ties, min_agreement=min_agreement, min_annotators=min_annotators,
            choice=choice, seed=seed,
        )  # fmt: skip
    train, held = split_by_prompt(found.examples, fraction if held_out else 0.0, seed)
    write_examples(out, train)
    counts = found.counts | {f"examples in {out}": len(train)}
    if held_out:
        write_examples(held_out, held)
        counts[f"examples in {held_out}"] = len(held)
    print_counts(counts, as_json)


def _judgments(file: Path) -> list[Judgment]:
    """What the file holds. Raises DataError where that is nothing: a wrong file must not look like one without agreement."""
    from preftune.data.judgments import read_judgments

    found = read_judgments(file)
    if not found:
        cut = " (one line without its end, as a crash leaves it)" if file.stat().st_size else ""
        raise DataError(f"{file}: no judgments in it{cut}; expected lines as preftune judge and preftune annotate write them")
    return found


VERBS: dict[str, Callable[..., None]] = {"import": import_data, "agree": agree, "pairs": pairs}
"""Verb -> function, in the order of the help."""
