"""How often `preftune check` finds a planted fault, by its strength, and how often it finds one where there is none.

    python benchmarks/check_rates.py            # the tables of docs/check.md, about five minutes on one core
    python benchmarks/check_rates.py --speed    # seconds of CPU by number of preferences
    python benchmarks/check_rates.py --noise --seeds 5    # wrong labels: what is said by their share and the number of rows

Rows are those of made_up_pairs.py. A fault counts as found where its check gives a warning or an error.
"""

from __future__ import annotations

import argparse
import random
import resource
import time

from made_up_pairs import FAULTS, clean

from preftune.diagnose.check import inspect

LOUD = ("warning", "error")


def found(rows: list[dict[str, object]], only: tuple[str, ...] = ()) -> set[str]:
    return {one.name for one in inspect(rows, only=only).findings if one.severity in LOUD and one.name != "size"}


def rates(n: int, seeds: int) -> None:
    print(f"| fault | check | found in {seeds} data sets of {n} rows, by strength |\n|---|---|---|")
    for name, fault in FAULTS.items():
        cells = []
        for rate in fault.rates:
            hits = sum(
                fault.name in found(fault.plant(clean(n, seed=seed), rate, random.Random(seed)), (fault.name,))
                for seed in range(seeds)
            )
            cells.append(f"{rate:g}: {hits}/{seeds}")
        print(f"| {name} | {fault.name} | {', '.join(cells)} |", flush=True)


def alarms(sizes: tuple[int, ...], seeds: int) -> None:
    for n in sizes:
        alarming = [names for seed in range(seeds) if (names := found(clean(n, seed=1000 + seed)))]
        print(f"clean data of {n} rows: {len(alarming)} of {seeds} data sets raise an alarm {alarming or ''}", flush=True)


def noise(sizes: tuple[int, ...], seeds: int) -> None:
    """What `label_noise` says of labels that were turned at random, by their share and the number of rows."""
    print("| rows | labels flipped | sets with a number | its mean, least, most | note or more | warning or more |")
    print("|---|---|---|---|---|---|")
    for n in sizes:
        for rate in (0.0, 0.05, 0.1, 0.2, 0.3):
            said = []
            for seed in range(seeds):
                rows = clean(n, seed=seed)
                rows = FAULTS["flipped"].plant(rows, rate, random.Random(seed)) if rate else rows
                said += [one for one in inspect(rows, only=("label_noise",)).findings if one.name == "label_noise"]
            known = [one.numbers["surest_against_label"] for one in said if "surest_against_label" in one.numbers]
            shown = f"{sum(known) / len(known):.3f}, {min(known):.3f}, {max(known):.3f}" if known else "none"
            counts = [sum(one.severity in which for one in said) for which in (("note", *LOUD), LOUD)]
            cells = [str(n), f"{rate:g}", f"{len(known)}/{seeds}", shown, *(f"{count}/{seeds}" for count in counts)]
            print(f"| {' | '.join(cells)} |", flush=True)


def speed(sizes: tuple[int, ...]) -> None:
    for n in sizes:
        rows = clean(n)
        mean = sum(len(row[side]) for row in rows for side in ("chosen", "rejected")) / (2 * n)
        begun = time.process_time()
        inspect(rows)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        took = time.process_time() - begun
        print(f"{n} preferences, {mean:.0f} characters a response: {took:.1f} s of CPU; peak {peak:.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--noise", action="store_true")
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--rows", type=int, default=1000)
    asked = parser.parse_args()
    if asked.speed:
        speed((1250, 2500, 5000, 10_000, 20_000))
        return
    if asked.noise:
        noise((1000, 4000), asked.seeds)
        return
    alarms((200, 1000, 4000), asked.seeds)
    rates(asked.rows, asked.seeds)


if __name__ == "__main__":
    main()
