"""How often `preftune diagnose` finds a planted fault, and how often it finds one where there is none.

    python benchmarks/symptom_rates.py --out runs/symptoms --json docs/diagnose.json     # faults at the named strength
    python benchmarks/symptom_rates.py --out runs/symptoms --strengths --seeds 3         # at every strength
    python benchmarks/symptom_rates.py --out runs/symptoms --only-there                  # of what was trained so far

A fault counts as found where its finding is a warning or an error, and gives the cause where one is named; a healthy training
raises a false alarm where any finding is. What was trained is kept in OUT: the command goes on where it was stopped, and with
other thresholds it takes seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from symptom_faults import FAULTS, SOUND, Fault, Plant
from symptom_worlds import Bench, Scale, judged_badly

from preftune.demo.story import Size
from preftune.diagnose.case import Case
from preftune.diagnose.finding import Finding
from preftune.diagnose.symptoms import LOUD
from preftune.evaluate.estimate import wilson
from preftune.files import write_atomic
from preftune.registry import SYMPTOMS

N_SEEDS = 10
QUICK = Scale(
    Size(demonstrations=100, sft_epochs=1, prompts=12, replies=2, max_tokens=12), n_takes_up=20, eval_prompts=16, n_text=4
)
"""Sizes for seeing that it runs: the model has learnt nothing then."""


def case_of(bench: Bench, plant: Plant, *, train: bool) -> Case | None:
    """The run with this plant, judged as it says; None where it was not trained and must not be."""
    if not train and not bench.made(plant):
        return None
    case = Case.of(bench.run(plant))
    if plant.judge != "fair" and case.evaluation is not None:
        wins = judged_badly(case.evaluation.wins[0], plant.judge, bench.seed)
        case = replace(case, evaluation=replace(case.evaluation, wins=(wins,)))
    return case


def hit(fault: Fault, finding: Finding) -> bool:
    """Whether a finding is the one that a fault should give."""
    return finding.severity in LOUD and fault.cause in ("", finding.numbers.get("cause"))


def planted(benches: Sequence[Bench], names: Sequence[str], *, strengths: bool, train: bool) -> Iterator[dict[str, Any]]:
    """A row for each fault and strength."""
    for name in names:
        fault = FAULTS[name]
        for strength, plant in fault.strengths.items():
            if not strengths and strength != fault.named:
                continue
            cases = [case for bench in benches if (case := case_of(bench, plant, train=train)) is not None]
            found = [SYMPTOMS[fault.finding](case) for case in cases]
            n_hits = sum(hit(fault, one) for one in found)
            yield {
                "fault": name, "finding": fault.finding, "cause": fault.cause, "strength": strength,
                "named": strength == fault.named, "n_found": n_hits, "n": len(found),
                "missed": [one.said for one in found if not hit(fault, one)],
            }  # fmt: skip


def healthy(benches: Sequence[Bench], train: bool) -> Iterator[dict[str, Any]]:
    """A row for each healthy training: two of SOUND a seed."""
    for k, (name, plant) in enumerate(SOUND.items()):
        bench = benches[k % len(benches)]
        case = case_of(bench, plant, train=train)
        if case is not None:
            alarms = [one for finding in SYMPTOMS if (one := SYMPTOMS[finding](case)).severity in LOUD]
            yield {"training": name, "seed": bench.seed, "alarms": {one.name: one.said for one in alarms}}


def as_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: fault, strength, finding, rate."""
    lines = ["| fault | strength | finding (cause) | found |", "|---|---|---|---:|"]
    for row in rows:
        cause = f" ({row['cause']})" if row["cause"] else ""
        named = "**" if row["named"] else ""
        lines.append(
            f"| {row['fault']} | {row['strength']} | {row['finding']}{cause} | {named}{row['n_found']}/{row['n']}{named} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of what is trained")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--seeds", type=int, default=N_SEEDS)
    parser.add_argument("--strengths", action="store_true", help="every strength, not the named one alone")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: only to see that it runs")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="this fault alone, and no healthy training")
    parser.add_argument("--only-there", action="store_true", help="train nothing: of the runs that are there")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    started = time.process_time()
    benches = [Bench(asked.out, seed, QUICK if asked.quick else Scale()) for seed in range(asked.seeds)]
    sound = [] if asked.fault else list(healthy(benches, not asked.only_there))
    rows = list(planted(benches, asked.fault or list(FAULTS), strengths=asked.strengths, train=not asked.only_there))
    print(as_table(rows))
    for row in rows:
        for said in row["missed"]:
            print(f"missed {row['fault']} {row['strength']}: {said}")
    if sound:
        report(sound)
    took = time.process_time() - started
    print(f"{took:.0f} s of CPU")
    if asked.json:
        write_atomic(asked.json, json.dumps({"faults": rows, "healthy": sound}, indent=1) + "\n")


def report(sound: Sequence[Mapping[str, Any]]) -> None:
    """How many healthy trainings raise an alarm, and which."""
    n_alarms = sum(bool(row["alarms"]) for row in sound)
    rate = wilson(n_alarms, len(sound))
    print(f"healthy: {n_alarms} of {len(sound)} trainings raise an alarm, {rate.value:.1%} [{rate.low:.1%}, {rate.high:.1%}]")
    for row in sound:
        for name, said in row["alarms"].items():
            print(f"alarm: {row['training']} (seed {row['seed']}): {name}: {said}")


if __name__ == "__main__":
    main()
