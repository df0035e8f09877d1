"""What the verbs that ask models have in common: their options, who answers for a name, and how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from preftune.errors import ConfigError, ModelError, ServerError, printable

if TYPE_CHECKING:
    from preftune.asking.askers import Askers
    from preftune.asking.records import Asker, Ledger
    from preftune.asking.replies import Replies

BaseUrl = Annotated[
    str | None,
    typer.Option("--base-url", help="OpenAI-compatible server, such as http://127.0.0.1:8000/v1; none: a local model."),
]
Concurrency = Annotated[int, typer.Option(help="Requests under way at once.")]
Retries = Annotated[int, typer.Option(help="How often a request is tried again.")]
Timeout = Annotated[float, typer.Option(help="Seconds without a sign of the server.")]
Cache = Annotated[Path | None, typer.Option(help="File of remembered replies; default: ~/.cache/preftune/replies.sqlite.")]
Format = Annotated[str, typer.Option(help="Data format, or auto.")]
Fields = Annotated[list[str] | None, typer.Option("--field", help="Column of another name: prompt=question. May be repeated.")]
Quarantine = Annotated[Path | None, typer.Option(help="Move bad rows to this file and go on.")]
ChatTemplate = Annotated[str | None, typer.Option(help="Chat template of a local model: chatml, plain or a Jinja file.")]
Device = Annotated[str, typer.Option(help="Of a local model: auto, cpu, cuda, cuda:1, …")]
PriceIn = Annotated[float, typer.Option(help="Price of a million tokens read.", min=0)]
PriceOut = Annotated[float, typer.Option(help="Price of a million tokens written.", min=0)]
MaxCost = Annotated[float | None, typer.Option(help="Ask nothing that could bring this run's cost above it.", min=0)]


ModelUrl = Annotated[
    str | None, typer.Option("--model-url", help="Server of the model that answers; none: a model on this machine.")
]
AnswerTemperature = Annotated[float | None, typer.Option(help="Of the answers; default: what the benchmark takes.", min=0)]
MaxUnscored = Annotated[float, typer.Option(help="Fail where more than this share has no verdict.", min=0, max=1)]


def fields_of(given: list[str] | None) -> dict[str, str]:
    """What --field says. Raises ConfigError."""
    if wrong := [word for word in given or [] if "=" not in word]:
        raise ConfigError(f"--field {wrong[0]}: expected OURS=THEIRS, such as prompt=question")
    return dict(word.split("=", 1) for word in given or [])


def cache_file(given: Path | None) -> Path:
    """The file of --cache, or the one that all runs share."""
    from preftune.files import default_cache

    return given or default_cache() / "replies.sqlite"


def check_prices(max_cost: float | None, price_in: float, price_out: float) -> None:
    """Raises ConfigError for a bound on costs that nobody could keep."""
    if max_cost is not None and not (price_in or price_out):
        raise ConfigError("--max-cost: needs --price-in and --price-out; no prices are built in")


class Benchmark(NamedTuple):
    """What a benchmark's run asks with: the model that answers, the judge, what they cost and what is remembered."""

    answering: Askers
    judging: Askers
    replies: Replies
    answered: Ledger
    judged: Ledger
    progress: Progress

    def answers_for(self, model: str) -> Asker:
        """Who answers as this model. Raises ModelError."""
        try:
            return self.answering.of(model)
        except ModelError as error:
            raise ModelError(
                f"{error}\na model behind a server is named with --model-url (--base-url is the judge's)"
            ) from None


@contextmanager
def benchmark(
    model_url: str | None, base_url: str | None, *, concurrency: int, retries: int, timeout: float, cache: Path | None,
    price_in: float, price_out: float, max_cost: float | None, chat_template: str | None, device: str,
) -> Iterator[Benchmark]:  # fmt: skip
    """Servers and files of a benchmark's run; prices are the judge's. Raises ConfigError."""
    from preftune.asking.askers import Askers
    from preftune.asking.records import Ledger
    from preftune.asking.replies import Replies

    check_prices(max_cost, price_in, price_out)

    def askers(url: str | None) -> Askers:
        return Askers(url, concurrency=concurrency, retries=retries, timeout=timeout, template=chat_template, device=device)

    with Replies(cache_file(cache)) as replies, Progress() as progress, askers(model_url) as one, askers(base_url) as other:
        yield Benchmark(one, other, replies, Ledger(), Ledger(price_in=price_in, price_out=price_out), progress)


_OF_A_RUN = ("model", "name", "judge_model", "template", "template_name", "out", "base_url", "model_url", "temperature",
             "cache", "max_cost", "chat_template")  # fmt: skip


def check_benchmark(given: Mapping[str, Any], *, counts: str, stored: str, needs: Sequence[str], more: Sequence[str]) -> None:
    """Options of a benchmark's verb that contradict each other. Raises ConfigError.

    counts:  the option that names a file to count; with it nothing is asked.
    stored:  the option that names stored answers, in the place of --model.
    needs:   what a run cannot do without; `more`: what else is for a run alone.
    """

    def flag(name: str) -> str:
        return f"--{name.replace('_', '-')}"

    if given[counts] is not None:
        if wrong := [name for name in (*_OF_A_RUN, stored, *more) if given[name] is not None]:
            raise ConfigError(f"{flag(wrong[0])}: is for a run; {flag(counts)} only counts what a file holds")
        return
    if (given["model"] is None) == (given[stored] is None):
        raise ConfigError(
            f"{flag(counts)} FILE counts; for a run name the model with --model, or its answers with {flag(stored)}"
        )
    if missing := [name for name in needs if given[name] is None]:
        raise ConfigError(f"{flag(missing[0])}: a run needs it")
    if given["model"] is None and (wrong := [name for name in ("model_url", "temperature") if given[name] is not None]):
        raise ConfigError(f"{flag(wrong[0])}: is for a model that answers now; {flag(stored)} has its answers already")
    if given["template"] is None and (wrong := [name for name in ("template_name", "labels") if given.get(name)]):
        raise ConfigError(f"{flag(wrong[0])}: says how a --template is read; give that too")


def check_unscored(n_unscored: int, n: int, most: float, where: Path) -> None:
    """Raises ServerError where more than the share `most` of the judgments has no verdict."""
    if n and n_unscored / n > most:
        raise ServerError(
            f"{n_unscored} of {n} judgments ({n_unscored / n:.1%}) have no verdict, more than --max-unscored {most:g}; {where} "
            "says why of each, and the same command asks those again"
        )


class Progress:
    """How far asking is: one live line on a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self) -> None:
        """Nothing is shown yet."""
        self._began: dict[str, float] = {}
        self._shown = time.monotonic()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if sys.stderr.isatty() and self._began:
            print(file=sys.stderr)

    def __call__(self, name: str, done: int, total: int) -> None:
        """Shows `done` of `total`, and how long the rest may take."""
        now = time.monotonic()
        if name not in self._began:  # what came before, such as loading a model, is no part of the pace
            self._began[name] = self._shown = now
        began = self._began[name]
        live = sys.stderr.isatty()
        if done < total and now - self._shown < (0.2 if live else 10):
            return
        self._shown = now
        left = (now - began) / done * (total - done)
        text = printable(name) + f": {done:,}/{total:,}" + (f", about {left:.0f} s to go" if done < total else "")
        print(f"\r\x1b[K{text}" if live else text, end="" if live else "\n", file=sys.stderr, flush=True)
