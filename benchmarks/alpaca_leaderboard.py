"""Our figures beside the leaderboard's, for every model whose annotations are in a checkout of AlpacaEval.

    git clone https://github.com/tatsu-lab/alpaca_eval
    python benchmarks/alpaca_leaderboard.py --checkout alpaca_eval --tables FOLDER

FOLDER holds df_gamed*.csv and instruction_difficulty*.csv. With --official (and alpaca_eval installed, in an environment of its
own: `pip install alpaca-eval==0.6.6`, with this repository on PYTHONPATH) its own code runs on the same files and tables too.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preftune.errors import PreftuneError
from preftune.evaluate import length_control
from preftune.evaluate.annotations import read_annotations
from preftune.evaluate.benchmark import figures
from preftune.evaluate.length_tables import read_tables

ANNOTATOR = "weighted_alpaca_eval_gpt4_turbo"
PLAIN = ("win_rate", "standard_error", "n_total", "n_wins", "n_wins_base", "n_draws", "discrete_win_rate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--tables", type=Path, required=True)
    parser.add_argument("--official", action="store_true")
    given = parser.parse_args()
    length_control.RESAMPLES = 2  # the interval is not what is compared
    tables = read_tables(given.tables)
    official = official_code(given.tables) if given.official else None
    published = leaderboard(given.checkout)
    differences: dict[str, list[tuple[float, str]]] = {}
    for file in sorted(given.checkout.glob(f"results/*/{ANNOTATOR}/annotations.json")):
        name = file.parts[-3]
        try:
            found = figures(read_annotations(file), tables=tables).as_dict()
        except PreftuneError as error:
            print(f"{name}: {error}")
            continue
        compared = {"published": published.get(name, {})} | ({"official code": official(file)} if official else {})
        for kind, theirs in compared.items():
            for column in (*PLAIN, "length_controlled_winrate", "lc_standard_error"):
                if theirs.get(column) is not None:
                    what = f"{kind}: {'counts, win rate and its error' if column in PLAIN else column}"
                    differences.setdefault(what, []).append((abs(found[column] - theirs[column]), name))
    for what, values in differences.items():
        largest = ", ".join(f"{difference:.2g} {name}" for difference, name in sorted(values, reverse=True)[:3])
        models = len({name for _, name in values})
        print(f"{what}: {models} models, largest differences: {largest}")


def leaderboard(checkout: Path) -> dict[str, dict[str, float | None]]:
    file = checkout / f"src/alpaca_eval/leaderboards/data_AlpacaEval_2/{ANNOTATOR}_leaderboard.csv"
    with file.open(encoding="utf-8", newline="") as opened:
        return {row[""]: {name: number(cell) for name, cell in row.items()} for row in csv.DictReader(opened)}


def number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def official_code(tables: Path) -> Callable[[Path], dict[str, float]]:
    """AlpacaEval's own function, with the two tables from a folder in the place of its download."""
    import warnings

    import alpaca_eval.metrics.glm_winrate as theirs
    import pandas

    def table(filename: str, **_: Any) -> str:
        return str(next(tables.glob(f"{Path(filename).stem}*.csv")))

    theirs.hf_hub_download = table

    def run(file: Path) -> dict[str, float]:
        rows = pandas.DataFrame(json.loads(file.read_text(encoding="utf-8")))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = theirs.get_length_controlled_winrate(rows, save_weights_dir=None, is_warn_extreme_changes=False)
        return {name: float(value) for name, value in found.items()}

    return run


if __name__ == "__main__":
    main()
