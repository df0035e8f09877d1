"""The demo: a base model is made, preferences are collected, DPO aligns it, and the true reward says whether that worked.

Every stage is the product's own: the same training, sampling, labelling, checking and reporting that a user's data go through.
Only the world is special: it is small, and its reward is known exactly.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from preftune.api import train
from preftune.data.judgments import append_judgments
from preftune.data.pairs import preferences
from preftune.data.types import Example, Judgment
from preftune.data.write import plain, write_examples
from preftune.demo.rubric import Grade, grade, plain_text, reward
from preftune.demo.world import World, build_tokenizer
from preftune.diagnose.check import inspect
from preftune.engine.policy import Policy
from preftune.errors import StorageError
from preftune.evaluate import samples
from preftune.evaluate.estimate import Estimate, mean, shares
from preftune.evaluate.kl import KL, divergence, trees_of
from preftune.evaluate.record import Evaluation, Figure
from preftune.evaluate.samples import Drawn, draw
from preftune.evaluate.wins import counted
from preftune.files import append_lines, json_line, make_folder, storage, write_atomic
from preftune.generate import Sampling
from preftune.label.rule import label_by_rule
from preftune.model.load import load_model, open_renderer, quiet_transformers
from preftune.report.page import write_report
from preftune.run import Run


@dataclass(frozen=True)
class Size:
    """How much of everything the demo makes."""

    demonstrations: int = 10_000
    sft_epochs: int = 3
    prompts: int = 1600
    replies: int = 4
    dpo_epochs: int = 2
    eval_prompts: int = 256
    max_tokens: int = 72


FULL = Size()
QUICK = Size(demonstrations=6000, prompts=600, eval_prompts=128)
BETA, LEARNING_RATE = 0.1, 1e-3
_SHARES = ("right_fix", "apology", "rude", "malformed")
LABEL_NOISE = 1.0  # temperature of the Bradley-Terry draw, in units of the reward: about one label in ten is wrong


class Measured(NamedTuple):
    """A model on the held-out prompts."""

    answers: Drawn
    grades: list[list[Grade]]

    def rewards(self) -> list[list[float]]:
        """[prompt][reply] true rewards."""
        return [[g.reward for g in grades] for grades in self.grades]

    def share(self, name: str) -> Estimate:
        """How many replies have this property of a Grade."""
        return mean([[float(getattr(g, name)) for g in grades] for grades in self.grades])


def tell(out: Path, *, size: Size = FULL, seed: int = 0) -> int:
    """Runs the demo into `out` and prints the story. Returns 0 if alignment worked, 1 if it did not."""
    started = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True)
    torch.set_num_threads(1)  # for matrices this small a second thread gains little, and on a busy machine it costs a lot
    _make_room(out)
    quiet_transformers()
    world = World(seed)
    say = _Narrator(console)

    say("1  A world is written", f"{size.demonstrations:,} support-desk dialogues of mixed quality, a vocabulary of its own")
    base = make_base(world, out / "base", seed=seed)
    write_dialogues(out / "demonstrations.jsonl", world.demonstrations(size.demonstrations))

    say("2  A tiny language model imitates them (SFT)", "this will be the reference")
    sft = train(sft_settings(base, out, size, seed), quiet=True)

    say("3  It answers", f"{size.replies} replies to each of {size.prompts} complaints")
    collected = collect(sft, world, size, seed)

    say("4  The replies are compared", "by the rubric, with the errors that people make (Bradley-Terry)")
    judgments = label_by_rule(collected, reward, temperature=LABEL_NOISE, seed=seed, annotator="rule:rubric+noise")
    console.print(f"   {len(judgments):,} judgments, {_share_right(collected, judgments):.1%} agree with the true reward")
    data = out / "preferences.jsonl"
    write_examples(data, preferences(collected, judgments).examples)
    append_judgments(out / "judgments.jsonl", judgments)
    console.print("   check: " + inspect(str(data)).summary)

    say("5  DPO", f"beta {BETA}, {size.dpo_epochs} passes over the preferences")
    dpo = train(dpo_settings(sft, data, out, size, seed), quiet=True)

    say("6  Did it work?", f"{size.eval_prompts} complaints about items that no preference mentioned")
    unseen = world.prompts(size.eval_prompts, split="eval")
    before, after = (measure(run, unseen, size, seed + 1) for run in (sft, dpo))
    told = _Told(out, size, seed + 1, sft, dpo, unseen, before, after)
    worked = _verdict(console, told)
    console.print(f"\nThe demo took {time.perf_counter() - started:.0f} s. Report: {dpo.report_file}")
    _print_next(console, told)
    return 0 if worked else 1


def make_base(world: World, folder: Path, *, seed: int) -> Path:
    """An untrained Llama-style model of about 100,000 weights, with the world's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer(world.vocabulary, folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.1,  # the usual 0.02 is for wide models: 64 wide, attention then learns to copy much later
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def sft_settings(base: Path, out: Path, size: Size, seed: int) -> dict[str, Any]:
    """Settings of the SFT stage."""
    return {
        "model": str(base),
        "data": str(out / "demonstrations.jsonl"),
        "out": str(out / "sft"),
        "seed": seed,
        "epochs": float(size.sft_epochs),
        "loss.name": "sft",
        "optim.lr": 1e-2,
        "optim.beta2": 0.98,
        "optim.schedule": "cosine",
        "batch.pairs_per_step": 32,
        "eval.fraction": 0.02,
        "checkpoint.every": 0,
    }


def dpo_settings(sft: Run, data: Path, out: Path, size: Size, seed: int) -> dict[str, Any]:
    """Settings of the DPO stage."""
    return {
        "model": str(sft.model),
        "data": str(data),
        "out": str(out / "dpo"),
        "seed": seed,
        "epochs": float(size.dpo_epochs),
        "loss.name": "dpo",
        "loss.beta": BETA,
        "optim.lr": LEARNING_RATE,
        "optim.beta2": 0.95,
        "optim.schedule": "cosine",
        "batch.pairs_per_step": 16,
        "checkpoint.every": 0,
        "cache": str(out / "cache"),
    }


def collect(run: Run, world: World, size: Size, seed: int) -> list[Example]:
    """Each train prompt with the model's own replies; empty ones and those about a held-out item are left out, and counted."""
    prompts = world.prompts(size.prompts, split="train")
    examples, n_kept = [], 0
    for prompt, decoded in zip(prompts, _answers(run, prompts, size, seed).texts, strict=True):
        texts = tuple(text for text in decoded if text.strip() and not world.speaks_of_held_out(text))
        n_kept += len(texts)
        if len(texts) > 1:
            examples.append(replace(prompt, responses=texts))
    n_left_out = size.prompts * size.replies - n_kept
    print(f"   {n_left_out} of {size.prompts * size.replies} replies are left out: empty, or about an item kept for later")
    return examples


def measure(run: Run, prompts: Sequence[Example], size: Size, seed: int) -> Measured:
    """Replies of a run's model to `prompts`, graded by the true reward."""
    answers = _answers(run, prompts, size, seed)
    grades = [[grade(e.prompt, text) for text in row] for e, row in zip(prompts, answers.texts, strict=True)]
    return Measured(answers, grades)


def kl_from(reference: Run, run: Run, measured: Measured) -> KL:
    """KL of the run's model from the reference's, on the run's own replies."""
    trees = trees_of(measured.answers.prompts, measured.answers.replies)
    policy, frozen = (Policy.choose(load_model(r.model), trees) for r in (run, reference))
    return divergence(policy, frozen, trees)


def _answers(run: Run, prompts: Sequence[Example], size: Size, seed: int) -> Drawn:
    """Replies of the run's model, drawn at temperature 1."""
    renderer = open_renderer(run.model)
    ids = [renderer.prompt_ids(e.prompt) for e in prompts]
    return draw(load_model(run.model), renderer, ids, _sampling(size, seed))


def _sampling(size: Size, seed: int) -> Sampling:
    return Sampling(n=size.replies, max_tokens=size.max_tokens, seed=seed)


class _Told(NamedTuple):
    """What the demo made, for its last page."""

    out: Path
    size: Size
    seed: int
    sft: Run
    dpo: Run
    prompts: list[Example]
    before: Measured
    after: Measured


def _verdict(console: Console, told: _Told) -> bool:
    """Compares the two models, writes evaluation and report, prints both, and says whether alignment worked."""
    found = evaluation(told)
    told.dpo.write_json(told.dpo.evaluation_file, found.as_dict())
    write_report([told.dpo])
    _print_table(console, found)
    _print_samples(console, told)
    console.print(f"\n[bold {'green' if found.worked else 'red'}]{found.verdict}[/]")
    return bool(found.worked)


def evaluation(told: _Told) -> Evaluation:
    """What the true reward, the reference and the replies say; answers.jsonl is written on the way."""
    before, after, sampling = told.before, told.after, _sampling(told.size, told.seed)
    kl = kl_from(told.sft, told.dpo, after)
    renderer = open_renderer(told.dpo.model)
    answers = samples.rows(told.prompts, renderer, after.answers, before.answers, kl)
    preferred = shares(after.rewards(), before.rewards())
    write_atomic(
        told.dpo.answers_file,
        "".join(json_line(row | {"preference": p}) for row, p in zip(answers, preferred, strict=True)),
    )
    measured = samples.record(after.answers, before.answers, kl, sampling, beta=BETA)
    gain = mean([[sum(a) / len(a) - sum(b) / len(b)] for a, b in zip(after.rewards(), before.rewards(), strict=True)])
    wins = counted(
        preferred,
        judge="the true reward",
        against=str(told.sft.path),
        tokens=measured.policy.tokens.value,
        tokens_base=measured.reference.tokens.value if measured.reference else None,
    )
    worked = gain.low > 0 and wins.win_rate.low > 50
    return Evaluation(
        policy=str(told.dpo.path),
        against=str(told.sft.path),
        beta=BETA,
        objective="dpo",
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        verdict=_sentence(told, worked, gain, wins.win_rate),
        worked=worked,
        samples=measured,
        wins=(wins,),
        figures=(
            Figure("true reward", mean(after.rewards()), mean(before.rewards())),
            *(Figure(name.replace("_", " "), after.share(name), before.share(name)) for name in _SHARES),
        ),
    )


def _sentence(told: _Told, worked: bool, gain: Estimate, wins: Estimate) -> str:
    before, after = (mean(m.rewards()).value for m in (told.before, told.after))
    verdict = (
        f"{'Alignment worked' if worked else 'Alignment did NOT work'}: on unseen items the true reward went from "
        f"{before:.2f} to {after:.2f}, a gain of {gain} (95 % CI), "
        f"and replies beat the SFT model's in {wins.value:.1f} % [{wins.low:.1f}, {wins.high:.1f}] of comparisons."
    )
    cost, was = told.after.share("malformed"), told.before.share("malformed")
    if cost.low > was.high:
        verdict += (
            f" It had a price: malformed replies went from {was.value:.0%} to {cost.value:.0%}, since offline preferences push "
            "the model to where it has no samples; a larger loss.beta or fresh samples from the new model lower that."
        )
    return verdict


def _print_next(console: Console, told: _Told) -> None:
    data, out = told.out / "preferences.jsonl", told.out
    console.print("\nWhat to try next")
    activate = Path(sys.executable).with_name("activate")
    if shutil.which("preftune") is None and activate.exists():
        console.print(f"  . {shlex.quote(os.path.relpath(activate))}")
    console.print(f'  preftune chat {out}/dpo --prompt "{escape(plain_text(told.prompts[0].prompt))}"')
    console.print(f"  preftune score --model {out}/dpo --data {data}")
    console.print(f"  preftune train model={out}/sft/model data={data} loss.beta=0.5 optim.lr=1e-3 out={out}/beta-0.5")
    console.print("  preftune train model=YOUR_MODEL data=YOUR_PAIRS.jsonl out=runs/mine")


def _print_table(console: Console, found: Evaluation) -> None:
    assert found.samples is not None and found.samples.kl_per_response is not None and found.samples.kl_per_token is not None
    assert found.samples.reference is not None
    rows: list[tuple[str, Estimate | None, Estimate]] = [
        *((figure.name, figure.before, figure.value) for figure in found.figures),
        ("tokens a reply", found.samples.reference.tokens, found.samples.policy.tokens),
        ("win rate over SFT, %", None, found.wins[0].win_rate),
        ("KL from SFT, nats a reply", None, found.samples.kl_per_response),
        ("KL from SFT, nats a token", None, found.samples.kl_per_token),
    ]
    table = Table(title="On complaints about items that no preference mentioned (95 % intervals, clustered by prompt)")
    for name in ("", "SFT", "after DPO"):
        table.add_column(name, justify="left" if not name else "right")
    for name, old, new in rows:
        table.add_row(name, str(old) if old else "", str(new))
    console.print(table)


def _print_samples(console: Console, told: _Told) -> None:
    for e, b, a in list(zip(told.prompts, told.before.answers.texts, told.after.answers.texts, strict=True))[:3]:
        console.print(f"\n[bold]customer[/]  {escape(plain_text(e.prompt))}")
        console.print(f"[dim]before[/]    {escape(b[0])}")
        console.print(f"[green]after[/]     {escape(a[0])}")


_MARK = ".preftune-demo"  # says that a folder is a demo's
_MADE = ("base", "sft", "dpo", "cache", "demonstrations.jsonl", "preferences.jsonl", "judgments.jsonl")


def _make_room(out: Path) -> None:
    """An empty place for a new demo. Of a former one only what it made itself is deleted, of any other folder nothing."""
    if out.is_dir() and any(out.iterdir()) and not (out / _MARK).exists():
        raise StorageError(f"{out}: holds something that is no demo; choose another folder with --out")
    make_folder(out)
    write_atomic(out / _MARK, "")
    with storage(out, "clear away the former demo"):
        for made in (out / name for name in _MADE):
            if made.is_dir():
                shutil.rmtree(made)
            else:
                made.unlink(missing_ok=True)


def write_dialogues(path: Path, examples: Sequence[Example]) -> None:
    """Prompts with their first reply as rows of `messages`, as demonstrations usually come."""
    rows = []
    for e in examples:
        assert not isinstance(e.prompt, str) and isinstance(e.responses[0], str)
        rows.append({"messages": [*plain(e.prompt), {"role": "assistant", "content": e.responses[0]}]})
    append_lines(path, rows)


def _share_right(examples: Sequence[Example], judgments: Sequence[Judgment]) -> float:
    """Of the judgments whose two replies differ in true reward, the share that prefers the better one."""
    by_id = {e.id: e for e in examples}
    right = []
    for j in judgments:
        e = by_id[j.example]
        difference = reward(e.prompt, e.responses[j.i]) - reward(e.prompt, e.responses[j.j])
        if difference and j.verdict in ("i", "j"):
            right.append((difference > 0) == (j.verdict == "i"))
    return float(np.mean(right)) if right else 1.0


class _Narrator:
    """Headings with the time that the stage before took."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._since = time.perf_counter()

    def __call__(self, title: str, detail: str) -> None:
        now = time.perf_counter()
        if now - self._since > 0.5:
            self.console.print(f"   [dim]{now - self._since:.0f} s[/]")
        self._since = now
        self.console.print(f"\n[bold]{title}[/]  [dim]{detail}[/]")
