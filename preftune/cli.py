"""The terminal: one verb for each thing that preftune does. Each is a few lines over the Python interface.

Nothing heavy is imported until a verb needs it, so `preftune --help` answers at once.
"""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated, Any

import typer

from preftune import cli_check, cli_data, cli_evaluate, cli_judge, cli_mtbench, cli_sweep, cli_winrate
from preftune.errors import ConfigError, PreftuneError, printable

app = typer.Typer(
    help="Align a language model with preferences, end to end.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Words = Annotated[list[str] | None, typer.Argument(help="A recipe (YAML file) and settings as key=value.", show_default=False)]


def main() -> None:
    """Runs the command line. A user's mistake prints its message and leaves with its exit code; no traceback."""
    gc.set_threshold(100_000, 50, 100)  # imports make a million objects that stay; looking for garbage among them took 0.5 s
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal or a pipe that knows ASCII alone gets \u… and no traceback
            stream.reconfigure(errors="backslashreplace")
    try:
        app(standalone_mode=True)
    except SystemExit as leave:
        if leave.code == 130:  # Ctrl-C outside the loop of training, which has a message of its own
            print("preftune: interrupted", file=sys.stderr)
        raise
    except PreftuneError as error:
        print(f"preftune: {printable(str(error))}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def _print_version(asked: bool) -> bool:
    if asked:
        import preftune

        print(f"preftune {preftune.__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """What stands before the verb."""


def _settings(words: list[str] | None) -> tuple[str | None, list[str]]:
    """The recipe (the words without "=", at most one) and the key=value words."""
    if flags := [w for w in words or [] if w.startswith("-")]:
        raise ConfigError(f"{flags[0]}: no such option; settings are given as key=value, without dashes, such as optim.lr=1e-4")
    recipes = [w for w in words or [] if "=" not in w]
    if len(recipes) > 1:
        raise ConfigError(f"expected at most one recipe, got {', '.join(recipes)}; settings are given as key=value")
    return (recipes[0] if recipes else None), [w for w in words or [] if "=" in w]


@app.command(context_settings={"ignore_unknown_options": True})  # `--lr 1e-4` then comes as words, to say how it is given
def train(
    words: Words = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in out=, bit for bit.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Plain lines for logs, no progress line.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what the run will do and take, as `plan` does.")] = False,
) -> None:
    """Fine-tune a model on preferences: preftune train recipes/dpo.yaml model=PATH data=FILE out=runs/first."""
    from preftune.config import Config
    from preftune.run import Run

    recipe, settings = _settings(words)
    config = Config.load(recipe, settings)
    if resume and config.out is None:
        raise ConfigError("--resume: give the folder of the run to go on with, as out=PATH")
    if resume and config.out and recipe is None and config.model is None:  # the run's own settings, and these words over them
        config = Config.load(Run.open(config.out).config_file, settings)
    if dry_run:
        from preftune.training.forecast import plan as forecast
        from preftune.training.prepare import require

        require(config)
        print(forecast(config).as_text())
        return
    gc.disable()  # run_job turns it on again when training begins
    try:
        from preftune.api import train as run_training

        run = run_training(config, resume=resume, quiet=quiet)
    finally:
        gc.enable()
    if os.environ.get("RANK", "0") == "0":
        print(run.path)


@app.command(context_settings={"ignore_unknown_options": True})
def plan(
    words: Words = None,
    memory: Annotated[str | None, typer.Option(help="What the run may take, as 8GiB; default: what is free.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Plan for this many GPUs, which need not be here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of text.")] = False,
) -> None:
    """What a run will do and take: peak memory, the largest batch that fits, disk, work. Reads no weights, only config.json."""
    from preftune.config import Config

    models = [w for w in words or [] if "=" not in w and Path(w).is_dir()]  # a model may stand by itself
    recipe, settings = _settings([*(w for w in words or [] if w not in models), *(f"model={m}" for m in models)])
    config = Config.load(recipe, settings)
    import json

    from preftune.training.forecast import parse_size
    from preftune.training.forecast import plan as forecast

    found = forecast(config, memory=None if memory is None else parse_size(memory), gpus=gpus)
    print(json.dumps(found.as_dict(), indent=1) if as_json else found.as_text())


@app.command()
def score(
    model: Annotated[str, typer.Option("--model", help="Model folder, run folder or hub id.")],
    data: Annotated[str | None, typer.Option("--data", help="Preference file, folder, saved dataset or hub id.")] = None,
    reference: Annotated[
        str | None, typer.Option("--reference", help="Also score this model, and give implicit rewards.")
    ] = None,
    beta: Annotated[float | None, typer.Option(help="β of the reward; default: the run's own, else 0.1.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="JSONL file to write; default: standard output. With --reward a folder.")
    ] = None,
    reward: Annotated[
        bool, typer.Option("--reward", help="Score nothing: write the implicit reward itself, for judge --by reward.")
    ] = False,
    format: Annotated[str, typer.Option(help="Data format, or auto.")] = "auto",
    template: Annotated[
        str | None, typer.Option("--chat-template", "--template", help="Chat template: chatml, plain or a Jinja file.")
    ] = None,
    quarantine: Annotated[Path | None, typer.Option(help="Move bad rows to this file and go on.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest prompt + response, in tokens.")] = None,
    precision: Annotated[str, typer.Option(help="auto, fp32, bf16 or pure_bf16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
) -> None:
    """Log-probs of every response, and implicit rewards against a reference; JSONL, one row a response."""
    from preftune.files import json_line, write_atomic
    from preftune.scoring import score as score_rows

    if reward:
        print(_export_reward(model, reference, beta, out))
        return
    if data is None:
        raise ConfigError("--data: name the file with the responses to score")
    rows = score_rows(
        model,
        data,
        reference=reference,
        beta=beta,
        format=format,
        template=template,
        quarantine=quarantine,
        max_length=max_length,
        precision=precision,
        device=device,
        on_note=lambda text: print(text, file=sys.stderr),
    )
    if out is None:
        for row in rows:
            sys.stdout.write(json_line(row))
    else:
        write_atomic(out, "".join(json_line(row) for row in rows))


def _export_reward(model: str, reference: str | None, beta: float | None, out: Path | None) -> Path:
    """Writes the implicit reward of a model, or of a run with what it was trained with. Raises ConfigError."""
    from preftune.label.implicit import ImplicitReward, export
    from preftune.run import Run
    from preftune.scoring import of_run

    if out is None:
        raise ConfigError("--out: name the folder that the reward is written to")
    if Run(model).config_file.exists():
        named, beta, _ = of_run(Run(model).config(), reference, beta, None)
        reference = None if named is None else str(named)
    if reference is None:
        raise ConfigError("--reference: an implicit reward is against a reference; name its model")
    if beta is not None and beta <= 0:
        raise ConfigError(f"--beta: {beta} given, expected a number above 0")
    return export(ImplicitReward(model, reference, 0.1 if beta is None else beta), out)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Run folder, model folder or hub id.")],
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="Answer this and leave.")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float, typer.Option(help="0: the likeliest token every time.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that hold this share.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 512,
    seed: Annotated[int, typer.Option(help="Same seed, same answer.")] = 0,
    template: Annotated[
        str | None, typer.Option("--chat-template", "--template", help="Chat template: chatml, plain or a Jinja file.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
) -> None:
    """Talk to a model; tokens appear as they come. /new starts over, /quit leaves."""
    from preftune.chat import Conversation
    from preftune.generate import Sampling

    settings = Sampling(temperature=temperature, top_p=top_p, max_tokens=max_tokens, seed=seed)
    conversation = Conversation.open(model, settings, system=system, template=template, device=device)
    if prompt is not None:
        _answer(conversation, prompt)
        return
    _talk(conversation)


def _answer(conversation: Any, text: str) -> None:
    for piece in conversation.answer(text):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


def _talk(conversation: Any) -> None:
    """A line in, an answer out, until /quit or the end of input."""
    if not sys.stdin.isatty():
        _each_line(conversation, "", _answer)
        return
    print("/new starts over, /quit leaves, Ctrl-C breaks off an answer", file=sys.stderr)
    if _each_line(conversation, "you> ", _answer_in_talk):
        print()


def _each_line(conversation: Any, mark: str, answer: Callable[[Any, str], None]) -> bool:
    """Answers line by line; whether it was the input that ended."""
    while True:
        try:
            text = input(mark).strip()
        except EOFError:
            return True
        if text in ("/quit", "/exit"):
            return False
        if text == "/new":
            conversation.restart()
        elif text:
            answer(conversation, text)


def _answer_in_talk(conversation: Any, text: str) -> None:
    """At a terminal Ctrl-C breaks off an answer, and what cannot be answered does not end the conversation."""
    if re.fullmatch(r"/[a-z]+", text):
        print(f"{text}: no such command; there are /new and /quit", file=sys.stderr)
        return
    try:
        _answer(conversation, text)
    except KeyboardInterrupt:
        print()
    except PreftuneError as error:
        print(f"{error}\n/new starts over", file=sys.stderr)


@app.command()
def config(loss: Annotated[str | None, typer.Option(help="Show the parameters of this objective alone.")] = None) -> None:
    """Every setting with its default, unit and one line of help, as YAML."""
    from preftune.config import describe

    sys.stdout.write(describe(loss))


for _verbs in (
    cli_check.VERBS,
    cli_data.VERBS,
    cli_judge.VERBS,
    cli_evaluate.VERBS,
    cli_sweep.VERBS,
    cli_winrate.VERBS,
    cli_mtbench.VERBS,
):
    for _name, _verb in _verbs.items():
        app.command(_name)(_verb)


@app.command()
def annotate(
    data: Annotated[str, typer.Argument(help="Examples with two responses or more, in any data format.")],
    db: Annotated[Path, typer.Option(help="SQLite file of the judgments; made if need be.")],
    host: Annotated[str, typer.Option(help="Address to listen on; the default is this machine alone.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free one.")] = 8500,
    token: Annotated[str | None, typer.Option(help="The secret that lets people in; default: a new one.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="Read the token from this file.")] = None,
    annotator: Annotated[list[str] | None, typer.Option(help="A name with a link of its own; may be given again.")] = None,
    overlap: Annotated[int, typer.Option(min=1, help="How many people judge each pair.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the order of pairs and of what stands on the left.")] = 0,
    terminal: Annotated[bool, typer.Option("--terminal", help="Judge here, by keys, without a server.")] = False,
    name: Annotated[str, typer.Option(envvar="USER", help="Who judges in the terminal.")] = "me",
    export: Annotated[Path | None, typer.Option(help="Write the judgments to this JSONL file and leave.")] = None,
    format: Annotated[str, typer.Option(help="Data format, or auto.")] = "auto",
    quarantine: Annotated[Path | None, typer.Option(help="Move bad rows to this file and go on.")] = None,
) -> None:
    """People judge pairs on a page in the browser (or in the terminal); nothing said is lost."""
    from preftune.data.read import read_examples
    from preftune.data.write import judged_file, write_examples
    from preftune.files import write_atomic
    from preftune.web.results import jsonl
    from preftune.web.serve import serve, token_of
    from preftune.web.store import Store

    secret = token_of(token, token_file)
    examples = read_examples(data, format=format, quarantine=quarantine).examples
    store = Store.open(db, examples, overlap=overlap, seed=seed)
    if export is not None:
        judgments = store.judgments()
        write_atomic(export, jsonl(judgments))
        write_examples(judged_file(export), examples)
        print(f"{len(judgments):,} judgments in {export}")
    elif terminal:
        from preftune.web.terminal import judge_in_terminal

        judge_in_terminal(store, name)
    else:
        serve(store, host=host, port=port, token=secret, names=annotator or [], say=lambda text: print(text, flush=True))


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; a sweep's folder stands for all of its runs.")],
    out: Annotated[
        Path | None, typer.Option(help="HTML file to write; default: report.html in the run's folder.", show_default=False)
    ] = None,
) -> None:
    """One HTML page of a run, or of several beside each other, from their files; the model's card is written anew as well."""
    from preftune.report.page import write_report
    from preftune.run import Run

    print(write_report([run for path in runs for run in Run.all_in(path)], out))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo-run"),
    quick: Annotated[bool, typer.Option("--quick", help="Smaller, under a minute.")] = False,
    seed: Annotated[int, typer.Option(help="Same seed, same numbers on the same machine.")] = 0,
) -> None:
    """The whole story on a small world whose true reward is known: base model, preferences, DPO, and whether it worked."""
    from preftune.demo.story import FULL, QUICK, tell

    raise SystemExit(tell(out, size=QUICK if quick else FULL, seed=seed))
