# SPDX-License-Identifier: Apache-2.0
"""All-pairs cases: a short list in which every two values of every two parameters meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Case = dict[str, Any]


def pairwise(
    parameters: Mapping[str, Sequence], allowed: Callable[[Case], bool] = lambda case: True, seed: int = 0
) -> list[Case]:
    """Greedy: each case starts from a pair not yet met and takes, parameter by parameter, the value that meets most new
    pairs.

    `allowed` judges whole cases. Pairs for which no allowed case turns up are left out (`uncovered` finds them). The
    same arguments give the same list.
    """
    rng = random.Random(seed)
    names = list(parameters)
    todo: dict[tuple, None] = {}  # ordered, so that the list does not depend on string hashing
    for a, b in itertools.combinations(range(len(names)), 2):
        for x, y in itertools.product(range(len(parameters[names[a]])), range(len(parameters[names[b]]))):
            todo[(a, x, b, y)] = None

    def build(a: int, x: int, b: int, y: int) -> list[int]:
        chosen = {a: x, b: y}
        rest = [i for i in range(len(names)) if i not in chosen]
        rng.shuffle(rest)
        for i in rest:
            values = list(range(len(parameters[names[i]])))
            rng.shuffle(values)
            chosen[i] = max(values, key=lambda v: sum(_pair(i, v, j, w) in todo for j, w in chosen.items()))
        return [chosen[i] for i in range(len(names))]

    cases = []
    while todo:
        start = next(iter(todo))
        # Trying a few builds and keeping the one that meets most makes the list about a tenth shorter.
        tries = [build(*start) for _ in range(8)]
        tries = [t for t in tries if allowed(_case(names, parameters, t))]
        for _ in range(200):
            if tries:
                break
            t = [rng.randrange(len(parameters[name])) for name in names]
            t[start[0]], t[start[2]] = start[1], start[3]
            if allowed(_case(names, parameters, t)):
                tries.append(t)
        if not tries:
            del todo[start]
            continue
        best = max(tries, key=lambda t: sum(pair in todo for pair in _pairs(t)))
        for pair in _pairs(best):
            todo.pop(pair, None)
        cases.append(_case(names, parameters, best))
    return cases


def uncovered(
    parameters: Mapping[str, Sequence], cases: Sequence[Case]
) -> Iterator[tuple[tuple[str, Any], tuple[str, Any]]]:
    """The pairs that no case contains."""
    for a, b in itertools.combinations(parameters, 2):
        met = {(case[a], case[b]) for case in cases}
        for x, y in itertools.product(parameters[a], parameters[b]):
            if (x, y) not in met:
                yield (a, x), (b, y)


def product_case(parameters: Mapping[str, Sequence], index: int) -> Case:
    """Case number `index` of the whole product."""
    case = {}
    for name, values in parameters.items():
        index, digit = divmod(index, len(values))
        case[name] = values[digit]
    return case


def product_size(parameters: Mapping[str, Sequence]) -> int:
    size = 1
    for values in parameters.values():
        size *= len(values)
    return size


def _pair(i: int, v: int, j: int, w: int) -> tuple:
    return (i, v, j, w) if i < j else (j, w, i, v)


def _pairs(case: Sequence[int]) -> list[tuple]:
    return [(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)]


def _case(names, parameters, indices) -> Case:
    return {name: parameters[name][i] for name, i in zip(names, indices, strict=True)}
