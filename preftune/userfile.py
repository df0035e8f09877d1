"""A user's own function in a file, named as FILE.py:FUNCTION. It is the user's code and runs with the user's rights."""

from __future__ import annotations

import importlib.util
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preftune.errors import ConfigError, nearest


def user_function(name: str, *, what: str) -> Callable[..., Any]:
    """The function that "FILE.py:FUNCTION" names; `what` says in errors what it is ("an objective"). Raises ConfigError."""
    file, _, function = name.rpartition(":")
    if not Path(file).is_file():
        raise ConfigError(f"{file or name}: no such file; {what} of your own is named as FILE.py:FUNCTION")
    module = _module(Path(file))
    found = {n: f for n, f in vars(module).items() if inspect.isfunction(f) and not n.startswith("_")}  # imported ones too
    if function not in found:
        mine = [n for n, f in found.items() if f.__module__ == module.__name__]
        has = nearest(function, mine) if mine else "it has no function"
        raise ConfigError(f"{file}: no function {function!r}; {has}")
    return found[function]


def _module(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"preftune_own_{file.stem}", file)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{file}: not a Python file by its name; expected FILE.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        inside = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(file)]
        line = inside[-1] if inside else getattr(error, "lineno", None)
        raise ConfigError(f"{file}:{line or 1}: cannot be imported: {type(error).__name__}: {error}") from None
    return module
