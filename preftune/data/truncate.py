"""Shortens the messages of a prompt: the oldest turns go first, the newest text stays longest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from preftune.data.types import Message


def shorten(messages: Sequence[Message], fits: Callable[[tuple[Message, ...]], bool]) -> tuple[Message, ...]:
    """The longest shortened form of `messages` for which `fits` holds, or the shortest form where it never does.

    System messages at the start stay. Whole turns are dropped from the oldest on, up to a user's turn, so that the turns still
    alternate; the last user's turn and what follows it stay. If that is not enough, the oldest text of the last user's turn is
    cut, down to its last character.
    """
    n_system = next((i for i, m in enumerate(messages) if m.role != "system"), len(messages))
    system, turns = tuple(messages[:n_system]), tuple(messages[n_system:])
    if not turns:
        return system
    starts = [i for i, m in enumerate(turns) if m.role == "user"] or [len(turns) - 1]
    for start in starts:
        if start > 0 and fits(system + turns[start:]):
            return system + turns[start:]
    last, after = turns[starts[-1]], turns[starts[-1] + 1 :]
    content = last.content.rstrip()  # a template may trim: the last character must be one that it keeps

    def without(n_cut: int) -> tuple[Message, ...]:
        return (*system, Message(last.role, content[n_cut:]), *after)

    short, long = max(len(content) - 1, 0), 0  # characters cut: `short` is known to fit, `long` is known not to
    if not fits(without(short)):
        return without(short)
    while short - long > 1:
        middle = (short + long) // 2
        if fits(without(middle)):
            short = middle
        else:
            long = middle
    return without(short)
