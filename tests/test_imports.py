"""Imports go down only, and the terminal's front door stays light."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import preftune

ROOT = Path(preftune.__file__).parent

LAYERS = [  # a module imports from its own layer's package and from layers above this line, never from those below it
    {"errors", "registry", "files", "yamlfile", "settings_text", "section", "userfile"},
    {"data", "config", "loss_settings", "rollout_settings", "run"},
    {"losses"},
    {"model", "engine"},
    {"generate", "scoring", "chat", "asking", "sampling"},
    {"label", "training", "evaluate", "diagnose"},
    {"report", "web"},
    {"api", "show"},
    {"sweeping"},
    {"demo"},
    {
        "cli",
        "cli_asking",
        "cli_check",
        "cli_data",
        "cli_evaluate",
        "cli_judge",
        "cli_mtbench",
        "cli_sweep",
        "cli_winrate",
        "__main__",
    },
]
APART = {"label": {"training"}, "training": {"evaluate", "diagnose"}}  # within a layer; a run scores its replies by `label`
FILES_ONLY = {"report", "web", "diagnose"}  # they read what a run left behind: they never import what trains
NO_TORCH = {
    "data",
    "config",
    "loss_settings",
    "rollout_settings",
    "section",
    "settings_text",
    "registry",
    "errors",
    "files",
    "yamlfile",
    "userfile",
    "run",
    "report",
    "cli",
    "cli_data",
    "cli_asking",
    "cli_check",
    "cli_evaluate",
    "cli_mtbench",
    "cli_winrate",
    "cli_sweep",
    "cli_judge",
}
HEAVY = {"torch", "transformers", "peft", "tokenizers", "datasets", "pyarrow", "matplotlib", "wandb", "tensorboard", "openai"}
LAZY = {"datasets", "pyarrow", "wandb", "tensorboard", "trl", "openai", "optuna"}  # imported by nothing at module level
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}


def part_of(module: str) -> str:
    """`preftune.data.formats` -> `data`."""
    return module.split(".")[1]


def imports(path: Path, *, everywhere: bool) -> Iterator[tuple[int, str]]:
    """(line, module) of every import that runs; only those at module level unless `everywhere`."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide where things come from"
            yield node.lineno, str(node.module)
            if node.module == "preftune":
                yield from ((node.lineno, f"preftune.{alias.name}") for alias in node.names)
        elif everywhere or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            todo += ast.iter_child_nodes(node)


MODULES = {
    ".".join(("preftune", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}
INNER = {name: path for name, path in MODULES.items() if name != "preftune"}  # the front page imports by name, when asked


def test_every_part_has_a_layer() -> None:
    assert {part_of(name) for name in INNER} <= set(RANK)


@pytest.mark.parametrize("name", INNER)
def test_imports_go_down_only(name: str) -> None:
    part = part_of(name)
    for line, module in imports(INNER[name], everywhere=True):
        if not module.startswith("preftune."):
            continue
        other = part_of(module)
        where = f"{INNER[name]}:{line}: {part} imports {other}"
        assert other == part or RANK[other] <= RANK[part], f"{where}, which stands above it"
        assert other not in APART.get(part, ()), f"{where}, which stands beside it and may use it"
        assert not (part in FILES_ONLY and other == "training"), f"{where}: it should read the run's files"


@pytest.mark.parametrize("name", INNER)
def test_what_reads_files_does_not_import_torch(name: str) -> None:
    found = {(line, module.split(".")[0]) for line, module in imports(INNER[name], everywhere=False)}
    banned = HEAVY if part_of(name) in NO_TORCH else LAZY
    assert not [f"{INNER[name]}:{line}: {module}" for line, module in found if module in banned]
    if part_of(name) == "data":  # rows and tokens are nobody's tensors, not even inside a function
        assert "torch" not in {module.split(".")[0] for _, module in imports(INNER[name], everywhere=True)}


def test_there_is_no_circle_among_modules() -> None:
    graph = {n: {m for _, m in imports(p, everywhere=False) if m in INNER} - {n} for n, p in INNER.items()}
    while graph:
        leaves = {name for name, needs in graph.items() if not needs & set(graph)}
        assert leaves, f"these import each other in a circle: {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in leaves}


@pytest.mark.parametrize("command", ["import preftune", "import preftune.run, preftune.config, preftune.data.types"])
def test_importing_costs_no_torch(command: str) -> None:
    code = f"import sys; {command}; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.skipif(importlib.util.find_spec("preftune.cli") is None, reason="there is no command line yet")
@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["config"]])
def test_help_costs_no_torch(words: list[str]) -> None:
    code = f"""
import atexit, sys
from preftune.cli import main
heavy = {{"transformers", "datasets", "matplotlib", "peft", "tokenizers"}} | ({{"torch"}} if {words != ["config"]} else set())
atexit.register(lambda: print("imported:", sorted(heavy & set(sys.modules)), file=sys.stderr))
sys.argv = ["preftune", *{words!r}]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "imported: []"
    assert done.stdout
