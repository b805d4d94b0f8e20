"""Products of many factors, of which the default run takes a few that have every pair, or every value, and the slow one all."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def pairwise(sizes: list[int]) -> set[tuple[int, ...]]:
    """Combinations of indices that have each pair of values of any two factors.

    Greedily: the first of the product that has the most pairs that none before it has.
    """
    combinations = list(itertools.product(*map(range, sizes)))
    pairs = {c: set(itertools.combinations(enumerate(c), 2)) for c in combinations}
    left, chosen = set().union(*pairs.values()), set()
    while left:
        best = max(combinations, key=lambda c: len(pairs[c] & left))
        left -= pairs[best]
        chosen.add(best)
    return chosen


def alternating(sizes: list[int]) -> set[tuple[int, ...]]:
    """Combinations of indices that have each value of the longest factor once, and all combinations of the others."""
    longest = sizes.index(max(sizes))
    others = list(itertools.product(*(range(size) for i, size in enumerate(sizes) if i != longest)))
    assert len(others) <= sizes[longest], "the others have more combinations than the longest has values: `covered`"
    chosen = set()
    for value in range(sizes[longest]):
        place = others[value % len(others)]
        chosen.add((*place[:longest], value, *place[longest:]))
    return chosen


def covered(**factors: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test by the product of factors: a covering of all pairs in the default run, the rest under `slow`.

    Args:
        **factors: the values of each argument of the test; of a dictionary, its keys.
    """
    return _parametrized(factors, pairwise)


def alternated(**factors: Iterable[Any]) -> pytest.MarkDecorator:
    """As `covered`, but with each value of the longest factor once, where the others act independently of it."""
    return _parametrized(factors, alternating)


def thinned(**factor: Iterable[Any]) -> pytest.MarkDecorator:
    """Parametrize a test by one factor, every other value of which runs under `slow`: for runs of which others are alike."""
    ((name, values),) = factor.items()
    marks: list[Any] = [(), pytest.mark.slow]
    return pytest.mark.parametrize(
        name, [pytest.param(value, id=str(value), marks=marks[i % 2]) for i, value in enumerate(values)]
    )


def _parametrized(
    factors: dict[str, Iterable[Any]], choose: Callable[[list[int]], set[tuple[int, ...]]]
) -> pytest.MarkDecorator:
    values = [list(given) for given in factors.values()]
    chosen = choose([len(given) for given in values])
    cases = [
        pytest.param(
            *(given[i] for given, i in zip(values, place, strict=True)),
            id="-".join(str(given[i]) for given, i in zip(values, place, strict=True)),
            marks=() if place in chosen else pytest.mark.slow,
        )
        for place in itertools.product(*(range(len(given)) for given in values))
    ]
    return pytest.mark.parametrize(tuple(factors), cases)
