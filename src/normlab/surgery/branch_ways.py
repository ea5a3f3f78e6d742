"""The ways on which a residual branch leads from its fork to its end, and the layers on them."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence

from torch import nn

from normlab.surgery.tensor_graph import Node

# A branch that starts at zero must end at zero, and still learn.
_NOT_KEEPING_ZERO = ("sigmoid", "softmax", "softplus", "exp", "cos", "rsub")
_FLAT_AT_ZERO = ("relu", "relu6", "threshold")


def meet(terms: Sequence[Node]) -> tuple[Node | None, list[Node]]:
    """Return the last node that all terms come from, and what lies behind it, latest first."""
    everyone = (1 << len(terms)) - 1
    masks = dict.fromkeys(terms, 0)
    for bit, term in enumerate(terms):
        masks[term] |= 1 << bit
    heap = [(-node.index, node) for node in masks]
    heapq.heapify(heap)
    between = []
    while heap:
        node = heapq.heappop(heap)[1]
        if masks[node] == everyone:
            return node, between
        between.append(node)
        for source in node.main:
            if source not in masks:
                masks[source] = 0
                heapq.heappush(heap, (-source.index, source))
            masks[source] |= masks[node]
    return None, []


class Ways:
    """The ways from a fork to the terms of a sum."""

    def __init__(self, fork: Node, between: list[Node]) -> None:
        self.fork = fork
        # How often each layer's weight is multiplied in; ways beside the fork do not count.
        self.weights: dict[Node, Counter[nn.Module]] = {fork: Counter()}
        for node in reversed(between):
            ways = [self.weights[source] for source in node.main if source in self.weights]
            if not ways:
                continue
            if node.kind == "product":
                weights = sum(ways, Counter())
            else:
                weights = max(ways, key=lambda way: sum(way.values()))
            if node.kind == "weight" and node.module is not None:
                own = 4 if isinstance(node.module, nn.MultiheadAttention) else 1
                weights = weights.copy()
                weights[node.module] += own
            self.weights[node] = weights

    def _back(self, term: Node, stop: Callable[[Node], bool]) -> list[Node]:
        """Return the nodes from which ``term`` was made, itself included, back to the fork."""
        seen, stack = {term}, [term]
        while stack:
            node = stack.pop()
            sources = [] if node is self.fork or stop(node) else self._sources(node)
            stack += [one for one in sources if one not in seen]
            seen.update(sources)
        return sorted(seen, key=lambda node: node.index)

    def _sources(self, node: Node) -> list[Node]:
        return [source for source in node.main if source in self.weights]

    def layers(self, term: Node) -> list[nn.Module]:
        """Return the weight layers on the ways to ``term``, in order, each once."""
        if term not in self.weights:
            return []
        back = self._back(term, lambda node: False)
        found = [n.module for n in back if n.kind == "weight" and n is not self.fork and n.module]
        return list(dict.fromkeys(found))

    def ends(self, term: Node) -> tuple[list[nn.Module], str]:
        """Return the layers which, when zero, make ``term`` zero, or the reason why none do."""
        found, stack, seen = [], [term], {term}
        while stack:
            node = stack.pop()
            if node is self.fork:
                return [], "of a branch in which a way without any weight layer leads to its end"
            word = node.operation or type(node.module).__name__.lower()
            if node.kind == "weight":
                found.append(node.module)
                continue
            if any(part in word for part in _NOT_KEEPING_ZERO):
                return [], f"of a branch that ends in {node}, which does not map zero to zero"
            if word.rstrip("_") in _FLAT_AT_ZERO:
                return [], f"of a branch that ends in {node}, which lets no gradient pass at zero"
            sources = self._sources(node)
            if node.kind == "product":
                # One factor is enough; the last one made is the value that attention weighs.
                weighed = [s for s in sources if sum(self.weights[s].values())]
                sources = (weighed or sources)[-1:]
            stack += [one for one in sources if one not in seen]
            seen.update(sources)
        return list(dict.fromkeys(reversed(found))), ""
