"""Frequent itemsets, exactly: all of them, the closed ones, or the maximal ones."""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int, Int64, UInt64

from lit_distill.core.errors import UsageError

Kind = Literal["all", "closed", "maximal"]


class Itemset(NamedTuple):
    """A set of items and the number of transactions that have them all.

    Attributes:
        items: In ascending order.
        support: Number of transactions.
    """

    items: tuple[int, ...]
    support: int


def frequent_itemsets(
    transactions: Int[np.ndarray, " m"],
    items: Int[np.ndarray, " m"],
    min_support: int,
    *,
    kind: Kind = "all",
    max_size: int | None = None,
    max_itemsets: int = 100_000,
) -> list[Itemset]:
    """Mines the itemsets that at least `min_support` transactions have.

    Depth first over item after item, a set's transactions being a row of bits: the supports of all extensions of a set
    are one `and` and one count over a matrix. Closed sets are enumerated without the others, each from its one
    prefix-preserving parent (Uno, Kiyomi, Arimura, LCM ver. 2, 2004), and maximal ones are those of them that nothing
    extends.

    Args:
        transactions: Number of the transaction that has an item, (M,), for each occurrence.
        items: Which item, (M,). An item that occurs twice in a transaction counts once.
        min_support: Least number of transactions, 1 or more.
        kind: "all"; "closed" for sets that lose transactions with whatever is added; "maximal" for sets that are
            frequent with nothing added.
        max_size: Most items in a set. For "all" only: what is closed or maximal is so among sets of any size.
        max_itemsets: Where to give up.

    Returns:
        Itemsets by falling support; among equals the smaller sets first, then by items.

    Raises:
        UsageError: A number makes no sense, or there are more than `max_itemsets`.
    """
    if min_support < 1:
        raise UsageError(f"support is {min_support}; give 1 transaction or more")
    if max_size is not None and (max_size < 1 or kind != "all"):
        raise UsageError(
            f"max_size is {max_size} for {kind} itemsets; give 1 or more, with kind 'all', or leave it out"
        )
    names, bits = _rows(transactions, items, min_support)
    found: list[Itemset] = []
    for members, support in _search(bits, min_support, kind, len(names) if max_size is None else max_size):
        if len(found) == max_itemsets:
            raise UsageError(
                f"more than {max_itemsets} itemsets have a support of {min_support} or more; raise the threshold, "
                "mine 'closed' or 'maximal' ones, limit max_size, or raise max_itemsets"
            )
        found.append(Itemset(tuple(sorted(names[list(members)].tolist())), support))
    return sorted(found, key=lambda itemset: (-itemset.support, len(itemset.items), itemset.items))


def _rows(
    transactions: np.ndarray, items: np.ndarray, min_support: int
) -> tuple[Int64[np.ndarray, " k"], UInt64[np.ndarray, "k w"]]:
    """Returns the frequent items, rarest first, and for each a row of bits, one a transaction."""
    pairs = np.unique(np.stack([items, transactions]), axis=1) if len(items) else np.zeros((2, 0), dtype=np.int64)
    names, supports = np.unique(pairs[0], return_counts=True)
    names = names[supports >= min_support][np.argsort(supports[supports >= min_support], kind="stable")]
    _, columns = np.unique(pairs[1], return_inverse=True)
    width = int(columns.max()) + 1 if len(columns) else 0
    bits = np.zeros((len(names), -(-width // 64)), dtype=np.uint64)
    if len(names):
        order = np.argsort(names)
        place = np.searchsorted(names, pairs[0], sorter=order)
        row = order[np.minimum(place, len(names) - 1)]
        known = names[row] == pairs[0]
        row, column = row[known], columns[known]
        np.bitwise_or.at(bits, (row, column // 64), np.uint64(1) << (column % 64).astype(np.uint64))
    return names, bits


def _search(bits: np.ndarray, least: int, kind: Kind, max_size: int) -> Iterator[tuple[tuple[int, ...], int]]:
    if not len(bits):
        return
    everything = np.bitwise_or.reduce(bits, axis=0)
    if kind == "all":
        yield from _all(bits, np.arange(len(bits)), (), least, max_size)
    else:
        yield from _closed(bits, everything, -1, least, maximal=kind == "maximal")


def _all(
    bits: np.ndarray, candidates: np.ndarray, prefix: tuple[int, ...], least: int, max_size: int
) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yields the prefix with each candidate, and everything that extends it by later candidates.

    Args:
        bits: For each candidate, the transactions that have it and the prefix; all frequent.
        candidates: Items by row.
        prefix: The set so far.
        least: Least support.
        max_size: Most items.
    """
    for row, item in enumerate(candidates.tolist()):
        members = (*prefix, item)
        yield members, _count(bits[row])
        if len(members) < max_size and row + 1 < len(bits):
            extended = bits[row + 1 :] & bits[row]
            frequent = np.bitwise_count(extended).sum(1) >= least
            if frequent.any():
                yield from _all(extended[frequent], candidates[row + 1 :][frequent], members, least, max_size)


def _closed(
    bits: np.ndarray, transactions: np.ndarray, core: int, least: int, *, maximal: bool
) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yields the closure of a set of transactions, and the closed sets that are made of it by items behind its core.

    Args:
        bits: Transactions of every frequent item.
        transactions: Those of the set.
        core: The item whose addition has made the set; -1 for the first.
        least: Least support.
        maximal: Yield only sets without a frequent extension.
    """
    support = _count(transactions)
    supports = np.bitwise_count(bits & transactions).sum(1)
    inside = supports == support
    if inside.any() and not (maximal and (supports[~inside] >= least).any()):
        yield tuple(np.flatnonzero(inside).tolist()), support
    for item in np.flatnonzero((supports >= least) & ~inside).tolist():
        if item <= core:
            continue
        narrowed = transactions & bits[item]
        # Of all ways to the same closed set, only the one that adds nothing before the item.
        if not ((narrowed & ~bits[:item][~inside[:item]]) == 0).all(1).any():
            yield from _closed(bits, narrowed, item, least, maximal=maximal)


def _count(row: np.ndarray) -> int:
    return int(np.bitwise_count(row).sum())
