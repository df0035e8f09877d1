"""A user's own objective: a function in a file, named in the settings as `loss.name=path/to/my.py:my_loss`.

It is written like every objective of the package (see `preftune.losses.records`):

    from preftune.losses.records import PairLoss, RefPairs

    def my_loss(pairs: RefPairs, *, beta: float = 0.1) -> PairLoss: ...
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, get_type_hints

from torch import Tensor

from preftune.errors import ConfigError, TrainingError
from preftune.losses import records
from preftune.userfile import user_function

_UNITS = (
    records.Tokens,
    records.Pairs,
    records.RefPairs,
    records.Labels,
    records.Ranked,
    records.Scores,
    records.Rollout,
    records.Replies,
)
_BESIDE = (
    records.Confidence,
    records.Margin,
    records.Prefixes,
    records.SequentialKL,
    records.OnPolicy,
    records.Mismatched,
)


@cache
def load(name: str) -> Callable[..., Any]:
    """The function that "FILE.py:FUNCTION" names. Raises ConfigError that says what was expected of the file or of it."""
    objective = user_function(name, what="an objective")
    file, _, function = name.rpartition(":")
    if problem := _problem(objective):
        raise ConfigError(f"{file}:{objective.__code__.co_firstlineno}: {function}: {problem}")

    @wraps(objective)
    def watched(*taken: Any, **parameters: Any) -> Any:
        try:
            outcome = objective(*taken, **parameters)
        except Exception as error:
            line = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == file][-1:]
            raise TrainingError(f"{file}:{line[0] if line else 1}: {function}: {type(error).__name__}: {error}") from None
        if problem := _wrong_outcome(outcome, taken[0]):
            raise TrainingError(f"{file}:{objective.__code__.co_firstlineno}: {function}: {problem}")
        return outcome

    return watched


def _wrong_outcome(outcome: Any, units: Any) -> str:
    """What is wrong with what an objective returned for these units; "" for nothing."""
    losses = outcome if isinstance(outcome, Tensor) else getattr(outcome, "loss", outcome)
    sized = {records.Ranked: "list_size", records.Replies: "advantage"}  # of the others the first field says it
    n_units = len(getattr(units, sized.get(type(units), units._fields[0])))
    if isinstance(losses, Tensor) and losses.shape == (n_units,):
        return ""
    got = f"a tensor of shape {list(losses.shape)}" if isinstance(losses, Tensor) else f"{type(losses).__name__}"
    return (
        f"expected one loss for each of the {n_units} units, a tensor of shape [{n_units}]; got {got} (the mean is taken later)"
    )


def _problem(function: Callable[..., Any]) -> str:
    """What keeps a function from being an objective; "" for nothing."""
    try:
        hints = get_type_hints(function, include_extras=True)
    except Exception as error:
        return f"its annotations cannot be read: {error}"
    return _wrong_records(function, hints) or _wrong_parameters(function, hints) or _wrong_return(hints.get("return"))


def _wrong_records(function: Callable[..., Any], hints: dict[str, Any]) -> str:
    arguments = inspect.signature(function).parameters.values()
    taken = [a.name for a in arguments if a.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    plain = get_type_hints(function)
    if not taken or plain.get(taken[0]) not in _UNITS:
        names = ", ".join(r.__name__ for r in _UNITS)
        return f"expected a first argument annotated with the record that it takes, one of {names} of preftune.losses.records"
    for name in taken[1:]:
        if plain.get(name) not in (*_UNITS, *_BESIDE):
            parameter = f"{function.__name__}({taken[0]}, *, {name}=…)"
            return f"expected a record for {name}; parameters come after a *, as in {parameter}"
    if hints[taken[0]] == records.WholeStep[records.Ranked]:
        return "expected Ranked by itself: lists are not compared over the whole step"
    if any(hints[name] is records.Mismatched for name in taken):
        return "expected WholeStep[Mismatched]: these responses stand in no relation to the units of a micro-batch"
    return ""


def _wrong_parameters(function: Callable[..., Any], hints: dict[str, Any]) -> str:
    for argument in inspect.signature(function).parameters.values():
        if argument.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL):
            return f"expected parameters by name, found {argument}"
        bare = argument.default is inspect.Parameter.empty or argument.name not in hints
        if argument.kind is inspect.Parameter.KEYWORD_ONLY and bare:
            return f"expected a type and a default for the parameter {argument.name}, as in {argument.name}: float = 0.1"
    return ""


def _wrong_return(returned: Any) -> str:
    tensors = returned is Tensor or getattr(returned, "array_type", None) is Tensor
    if tensors or returned in (records.PairLoss, records.ResponseLoss, records.ClippedLoss):
        return ""
    kinds = "PairLoss or ResponseLoss (of rollouts ClippedLoss) of preftune.losses.records"
    return f"expected a return annotation: {kinds}, or Tensor (one loss per unit)"
