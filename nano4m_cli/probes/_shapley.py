"""What each member of a set adds to a value that every subset has: gains, Shapley values, interactions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from math import factorial

import numpy as np

from nano4m_cli.rng import permutation

Subset = frozenset[str]
MOST = 5  # members whose subsets are all asked; of more, orders are drawn
ORDERS = 8  # orders drawn, each with its reverse


def subsets(members: Sequence[str]) -> Iterator[Subset]:
    """Yield every subset, the smallest first."""
    for size in range(len(members) + 1):
        yield from map(frozenset, combinations(members, size))


def orders(members: Sequence[str], seed: int) -> list[list[str]] | None:
    """Return the orders that Shapley values are the mean over; None: all of them, through all subsets."""
    if len(members) <= MOST:
        return None
    out = []
    for k in range(ORDERS):
        order = [members[i] for i in permutation(len(members), seed, "shapley", k)]
        out += [order, order[::-1]]
    return out


def shapley(
    members: Sequence[str], value: Callable[[Subset], np.ndarray], drawn: Sequence[Sequence[str]] | None = None
) -> dict[str, np.ndarray]:
    """Return {member: value (N,)}: what a member adds on average over all orders in which the set may grow (Shapley 1953).

    The values of all members add up to value(all) - value(none), exactly, drawn orders or not.

    Args:
        value: the value (N,) of a subset. drawn: these orders alone instead of all.
    """
    if drawn is not None:
        total = {m: 0.0 for m in members}
        for order in drawn:
            for k, m in enumerate(order):
                total[m] = total[m] + value(frozenset(order[: k + 1])) - value(frozenset(order[:k]))
        return {m: t / len(drawn) for m, t in total.items()}
    n, out = len(members), {}
    for m in members:
        parts = []
        for without in subsets([x for x in members if x != m]):
            weight = factorial(len(without)) * factorial(n - 1 - len(without)) / factorial(n)
            parts.append(weight * (value(without | {m}) - value(without)))
        out[m] = np.sum(parts, axis=0)
    return out
