# SPDX-License-Identifier: Apache-2.0
"""What the tests of bad input share: a row of their tables, and the checks of a message and of the memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from arrays import torch

MUST = ("must", "expected")


@dataclass
class Row:
    """Makes a good call (a dictionary of arguments) bad. `got` and `expected` are what the message must contain besides
    the argument's name; of alternatives one is enough."""

    name: str
    change: Callable[[Any, dict], dict]  # (arrays, good arguments) -> the bad ones
    error: type[Exception] | tuple[type[Exception], ...]
    argument: str | tuple[str, ...]
    got: str | tuple[str, ...] = ""
    expected: str | tuple[str, ...] = MUST
    only: str = ""  # "cpu" or "cuda"; empty for both


def other(arrays, shape, dtype=None):
    return arrays.random(shape, dtype or arrays.half, 2)


def integer(arrays, a, name):
    return a.to(getattr(torch, name)) if torch else a.astype(name)


def options_of(text) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def check_message(message: str, row: Row) -> None:
    for part, what in ((row.argument, "argument"), (row.got, "got"), (row.expected, "expected")):
        assert any(option in message for option in options_of(part)), f"no {what} {part} in: {message}"


def snapshot(arrays, call):
    """Copies of every array of a call, as (array, copy)."""
    return [(a, arrays.copy(a)) for a in call.values() if arrays.of_this_library(a) and a.shape != ()]


def assert_refused(function, arrays, call, row) -> None:
    """The good call made bad by the row raises as the row says, before anything is written."""
    out = call["out"]
    call = {**call, **row.change(arrays, call)}
    saved = snapshot(arrays, call)
    with pytest.raises(row.error) as caught:
        function(**call)
    arrays.synchronize()
    check_message(str(caught.value), row)
    assert arrays.is_poison(out)
    assert all(equal_bytes(a, b) for a, b in saved), "an array changed"


def equal_bytes(a, b) -> bool:
    if torch is not None and isinstance(a, torch.Tensor):
        return bool((a.contiguous().view(torch.uint8) == b.contiguous().view(torch.uint8)).all())
    return a.tobytes() == b.tobytes()
