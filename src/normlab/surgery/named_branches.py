"""Check a branch that a user names against what the model computes."""

from __future__ import annotations

import heapq
from collections.abc import Iterable

from torch import nn

from normlab.surgery.branch_finder import Branch
from normlab.surgery.branch_ways import Ways, meet
from normlab.surgery.tensor_graph import Node, TensorGraph, is_weight_layer


def closing_of(
    graph: TensorGraph, branch: Branch, others: Iterable[Branch], operation: str
) -> tuple[Node, tuple[Node, ...]] | None:
    """Return the sum that ends a named branch, and its other terms; None where none is seen whole.

    Args:
        graph: The pass.
        branch: The branch.
        others: The other branches of the plan.
        operation: What the user called, for messages.

    Raises:
        ValueError: The layers are not the model's, lie in another branch or not on the way to the
            sum, or would not make the branch zero, or a dead one.
    """
    _check_layers(graph, branch, others, operation)
    names = graph.names
    missing = [names[layer] for layer in branch.last if layer not in graph.weights]
    if missing:
        raise _refusal(
            operation,
            branch,
            "weight layers that the output depends on",
            f"{missing[0]}, which no call was seen of",
            "name those that are called",
        )
    closing, behind = _first_closing([node for one in branch.last for node in graph.weights[one]])
    if closing is None and not any(node.kind == "sum" for node in behind):
        raise _refusal(
            operation,
            branch,
            "an addition behind its last layer",
            f"{_listed(graph, branch.last)} without any, such as a readout has none",
            "name the layers between the fork and the addition",
        )
    if closing is None:
        return None
    mine = [term for term in dict.fromkeys(closing.sources) if term in behind]
    rest = tuple(term for term in dict.fromkeys(closing.sources) if term not in behind)
    fork, between = meet([*mine, *rest])
    if fork is None:
        return closing, rest
    _check_way(graph, branch, mine, fork, operation)
    ways = Ways(fork, between)
    for term in mine:
        why = ways.ends(term, branch.last)[1] if term in ways.weights else ""
        if why:
            raise _refusal(
                operation,
                branch,
                "last layers that make the branch zero and still learn",
                f"{_listed(graph, branch.last)} {why}",
                "name the layers in the order of the forward pass, and let the branch end in its "
                "last ones",
            )
    return closing, rest


def _check_layers(
    graph: TensorGraph, branch: Branch, others: Iterable[Branch], operation: str
) -> None:
    taken = {layer: other.name for other in others for layer in other.layers}
    if not branch.layers:
        raise _refusal(operation, branch, "at least one weight layer", "none", "name them")
    for layer in branch.layers:
        if layer not in graph.names or not is_weight_layer(layer) or layer in taken:
            place = f" of the branch {taken[layer]}" if layer in taken else ""
            name = graph.names.get(layer, "a module of another model")
            raise _refusal(
                operation,
                branch,
                "weight layers of the model that lie in no other branch",
                f"{name} ({type(layer).__name__}){place}",
                "name the others only",
            )


def _check_way(
    graph: TensorGraph, branch: Branch, terms: list[Node], fork: Node, operation: str
) -> None:
    """Refuse layers that do not lie between the fork and the sum."""
    inside, stack = set(terms), list(terms)
    while stack:
        for source in stack.pop().sources:
            if source.index > fork.index and source not in inside:
                inside.add(source)
                stack.append(source)
    modules = {node.module for node in inside if node.kind == "weight"}
    strange = [layer for layer in branch.layers if layer not in modules]
    if strange:
        raise _refusal(
            operation,
            branch,
            "layers on the way to the addition that ends the branch",
            f"{_listed(graph, strange)}, which lies elsewhere",
            "name the layers between the fork and the addition",
        )


def _first_closing(starts: Iterable[Node]) -> tuple[Node | None, set[Node]]:
    """Return the first sum that joins ``starts`` with something else, and what they made so far.

    No further weight layer may stand in between.
    """
    behind: set[Node] = set()
    waiting = {node.index: node for node in starts}
    heap = sorted(waiting)
    while heap:
        node = waiting[heapq.heappop(heap)]
        behind.add(node)
        if node.kind == "sum" and any(source not in behind for source in node.sources):
            return node, behind
        for taker in node.takers:
            if taker.kind != "weight" and taker.index not in waiting:
                waiting[taker.index] = taker
                heapq.heappush(heap, taker.index)
    return None, behind


def _listed(graph: TensorGraph, layers: Iterable[nn.Module]) -> str:
    return " and ".join(graph.names[layer] for layer in layers)


def _refusal(operation: str, branch: Branch, expected: str, got: str, advice: str) -> ValueError:
    return ValueError(f"{operation}({branch.name!r}): expected {expected}, got {got}; {advice}")
