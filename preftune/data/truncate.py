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

    def with_last(n_kept: int) -> tuple[Message, ...]:
        return (*system, Message(last.role, content[len(content) - n_kept :]), *after)

    few, many = min(1, len(content)), len(content)  # characters kept: `few` fit where anything does, `many` never did
    while few < many and fits(with_last(min(2 * few, many))):  # from the short side, so that a huge text costs no more
        few = min(2 * few, many)
    many = min(2 * few, many)
    while many - few > 1:
        middle = (few + many) // 2
        if fits(with_last(middle)):
            few = middle
        else:
            many = middle
    return with_last(few)
