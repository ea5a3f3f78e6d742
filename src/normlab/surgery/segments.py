"""Cut runs of layers into segments so that recomputing one at a time needs little memory.

Kept during the whole pass is what goes into each segment; a segment's own activations live while it
is recomputed. With L equal layers in segments of k the sum is L / k + k, least at the root of L.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from math import inf
from typing import NamedTuple

EXACT_SUMS = 2000
"""Up to so many different sums each is tried as the largest segment; else a grid of them."""

GRID = 200


class Layer(NamedTuple):
    """What one layer costs, in any unit.

    Attributes:
        saved: What it keeps for backward, its input left out.
        boundary: Its input, which is kept where a segment begins with it.
        not_first: Whether no segment may begin with it, as with a layer that works in place.
    """

    saved: int
    boundary: int
    not_first: bool = False


def choose_segments(
    runs: Sequence[Sequence[Layer]], segments: int | None = None
) -> list[list[int]]:
    """Return the numbers of layers in the segments of each run.

    Args:
        runs: Runs of layers; a segment lies within one of them.
        segments: At most so many in all, of which the largest is then as small as can be; None for
            the least sum of all boundaries and the largest segment.

    Returns:
        For each run the lengths of its segments, in order.

    Example:
        >>> choose_segments([[Layer(1, 1)] * 16])
        [[4, 4, 4, 4]]
        >>> choose_segments([[Layer(1, 1)] * 6, [Layer(1, 1)] * 3], segments=3)
        [[3, 3], [3]]
    """
    atoms = [_atoms(run) for run in runs]
    if segments is not None:
        return _fewest(atoms, segments)
    best, chosen = inf, []
    for cap in _caps(atoms):
        cuts = [_cut(run, cap) for run in atoms]
        total = sum(boundary for boundary, _ in cuts)
        largest = max(_largest(run, cut) for run, (_, cut) in zip(atoms, cuts, strict=True))
        if total + largest < best:
            best, chosen = total + largest, [cut for _, cut in cuts]
    return [_lengths(run, cut) for run, cut in zip(atoms, chosen, strict=True)]


class _Atom(NamedTuple):
    saved: int
    boundary: int
    length: int


def _atoms(run: Sequence[Layer]) -> list[_Atom]:
    """Join each layer that may not begin a segment to the one in front of it."""
    atoms: list[_Atom] = []
    for layer in run:
        if layer.not_first and atoms:
            saved, boundary, length = atoms[-1]
            atoms[-1] = _Atom(saved + layer.saved, boundary, length + 1)
        else:
            atoms.append(_Atom(layer.saved, layer.boundary, 1))
    return atoms


def _caps(runs: list[list[_Atom]]) -> list[float]:
    """Return sizes of the largest segment that are worth a try."""
    least = max(atom.saved for run in runs for atom in run)
    most = max(sum(atom.saved for atom in run) for run in runs)
    if sum(len(run) ** 2 for run in runs) <= 2 * EXACT_SUMS:
        sums = {
            total
            for run in runs
            for start in range(len(run))
            for total in accumulate(atom.saved for atom in run[start:])
        }
        return sorted(total for total in sums if total >= least)
    low, high = max(least, 1), max(most, 1)
    return [least, *(low * (high / low) ** (i / GRID) for i in range(1, GRID)), most]


def _cut(run: list[_Atom], cap: float) -> tuple[int, list[int]]:
    """Return the least sum of boundaries with segments up to ``cap``, and where they begin."""
    before = [0, *accumulate(atom.saved for atom in run)]
    sums = [0] * (len(run) + 1)
    begins = [0] * (len(run) + 1)
    # The beginnings that may still be best for a later end, the best one first.
    window: deque[int] = deque()
    for end in range(1, len(run) + 1):
        new = end - 1
        cost = sums[new] + run[new].boundary
        while window and sums[window[-1]] + run[window[-1]].boundary >= cost:
            window.pop()
        window.append(new)
        # An atom larger than the cap stands alone.
        while before[end] - before[window[0]] > cap and len(window) > 1:
            window.popleft()
        begins[end] = window[0]
        sums[end] = sums[window[0]] + run[window[0]].boundary
    cut, end = [], len(run)
    while end:
        end = begins[end]
        cut.append(end)
    return sums[-1], cut[::-1]


def _largest(run: list[_Atom], cut: list[int]) -> int:
    ends = [*cut[1:], len(run)]
    return max(sum(atom.saved for atom in run[i:j]) for i, j in zip(cut, ends, strict=True))


def _lengths(run: list[_Atom], cut: list[int]) -> list[int]:
    ends = [*cut[1:], len(run)]
    return [sum(atom.length for atom in run[i:j]) for i, j in zip(cut, ends, strict=True)]


def _fewest(runs: list[list[_Atom]], segments: int) -> list[list[int]]:
    """Return the cut whose largest segment is smallest among those of at most ``segments``."""
    counted = [[atom._replace(boundary=1) for atom in run] for run in runs]
    low = max(atom.saved for run in runs for atom in run)
    high = max(sum(atom.saved for atom in run) for run in runs)
    while low < high:
        middle = (low + high) // 2
        if sum(_cut(run, middle)[0] for run in counted) <= segments:
            high = middle
        else:
            low = middle + 1
    return [_lengths(run, _cut(run, high)[1]) for run in counted]
