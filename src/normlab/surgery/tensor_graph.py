"""The tensors of one forward pass as a graph: what each was made of, and by which kind of layer.

`trace_flow` tells where each input of a layer was made. Here that becomes a graph from the model's
input to its output, in which every node has a kind (a weight layer, a normaliser, an activation, a
sum, a product) and knows who takes it. Side products, by which a path is multiplied with something
that was computed from that very path (squeeze and excitation, a hand-written swish), are told apart
from the path itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from normlab.surgery.flow import Call, Flow, Sum, trace_flow
from normlab.surgery.normalisers import find_normalisers

Kind = Literal["weight", "norm", "activation", "sum", "product", "silent", "other"]

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_WEIGHING = ("linear", "conv1d", "conv2d", "conv3d", "multi_head_attention_forward")
_NORMALISING = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
_MULTIPLYING = ("mul", "imul", "rmul", "multiply", "matmul", "imatmul", "rmatmul", "bmm", "einsum")
_ATTENDING = ("scaled_dot_product_attention", "multi_head_attention_forward", "softmax")
_ACTIVATIONS = ("relu", "elu", "silu", "swish", "mish", "sigmoid", "tanh", "softplus")
_SILENT = ("identity", "drop", "stochasticdepth", "contiguous", "clone")
# The halves of one tensor multiply each other: neither is a side product of the other.
_SPLITTING = ("chunk", "split", "unbind", "getitem", "tensor_split")


@dataclass(eq=False)
class Node:
    """One tensor, or the tensors that one call made.

    Attributes:
        index: The place in an order in which every node stands behind what it was made of.
        kind: What made it; ``"silent"`` is what passes values on, such as dropout, and is never
            the source of another node unless it is the model's input.
        name: The qualified name of the module that made it, or called the function that did.
        operation: The function's name; empty for a module.
        module: The module that made it, or whose function did.
        sources: What it was made of, the model's own parameters and silent nodes left out.
        main: The sources on the main path: without side products and, once a residual branch is
            known to end here, without the branch.
        takers: The nodes that were made of it.
        beside: Whether it belongs to a side product.
    """

    index: int
    kind: Kind
    name: str
    operation: str
    module: nn.Module | None
    sources: tuple[Node, ...]
    main: tuple[Node, ...]
    takers: list[Node] = field(default_factory=list)
    beside: bool = False

    def __str__(self) -> str:
        """Where to look for it."""
        return f"{self.operation} in {self.name or 'the model'}" if self.operation else self.name

    @property
    def attends(self) -> bool:
        """Whether it is a part of attention."""
        soft = isinstance(self.module, nn.Softmax) and not self.operation
        return not self.beside and (soft or self.operation in _ATTENDING)


@dataclass(frozen=True)
class TensorGraph:
    """What one pass made on the way from the input to the output.

    Attributes:
        nodes: In order; tensors that the output does not depend on are not among them.
        output: The output.
        names: The qualified name of each module.
        norms: The normalisers, by name.
    """

    nodes: tuple[Node, ...]
    output: Node | None
    names: dict[nn.Module, str]
    norms: dict[str, nn.Module]

    def calls(self, module: nn.Module) -> int:
        """Return how often the output depends on a call of ``module``."""
        return sum(node.module is module and not node.operation for node in self.nodes)


def trace_graph(model: nn.Module, *inputs: Any) -> TensorGraph:
    """Run ``model`` once in evaluation mode and return what was made of what.

    Args:
        model: Any module; it is left as it was.
        inputs: What its forward takes; two samples are enough.

    Returns:
        The graph. Where the model returns several tensors, the first is taken for the output.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU())
        >>> import torch
        >>> [node.kind for node in trace_graph(model, torch.zeros(2, 4)).nodes]
        ['silent', 'weight', 'norm', 'activation']
    """
    ends = _Ends(model)
    flow = trace_flow(ends, *inputs)
    names = {module: name for name, module in reversed(list(model.named_modules()))}
    norms = _norms(model)
    return TensorGraph(*_nodes(ends, flow, names, set(norms.values())), names, norms)


def is_weight_layer(module: nn.Module | None) -> bool:
    """Whether a module multiplies by a weight: linear, convolution, attention, or one's own."""
    if isinstance(module, (*_LAYERS, nn.MultiheadAttention)):
        return True
    if module is None or isinstance(module, (nn.Embedding, nn.EmbeddingBag, nn.RNNBase)):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() > 1 and not any(True for _ in module.children())


class _Ends(nn.Module):
    """Marks the model's input and output, so that both can be told from its parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.entry, self.model, self.exit = nn.Identity(), model, nn.Identity()

    def forward(self, *inputs: Any) -> Any:
        outputs = self.model(*(self.entry(x) if isinstance(x, Tensor) else x for x in inputs))
        return self.exit(next(_tensors(outputs), None))


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, (dict, list, tuple)):
        for value in outputs.values() if isinstance(outputs, dict) else outputs:
            yield from _tensors(value)


def _norms(model: nn.Module) -> dict[str, nn.Module]:
    """Return torch's normalisers, their subclasses, and weightless modules with such a name."""
    found = {norm.name: norm.module for norm in find_normalisers(model)}
    known = {inner for norm in found.values() for inner in norm.modules()}
    for name, module in model.named_modules():
        weightless = all(weight.dim() < 2 for weight in module.parameters())
        if module not in known and weightless and "norm" in type(module).__name__.lower():
            found[name] = module
            known |= set(module.modules())
    return found


def _nodes(
    ends: _Ends, flow: Flow, names: dict[nn.Module, str], norms: set[nn.Module]
) -> tuple[tuple[Node, ...], Node | None]:
    modules = {name: module for module, name in names.items()}
    made: dict[Any, Node] = {}
    last = flow.of(ends.exit)[0].source
    stack = [] if last is None else [last]
    while stack:
        source = stack[-1]
        before = [one for one in _sources(source) if one is not None]
        waiting = [one for one in before if one not in made]
        if waiting:
            stack += waiting
            continue
        stack.pop()
        if source not in made:
            sources = tuple(_behind_silence(made[one]) for one in before)
            node = _node(len(made), source, sources, modules, norms)
            made[source] = node
            for one in dict.fromkeys(node.sources):
                one.takers.append(node)
            _part_from_side_products(node)
    output = None if last is None else _behind_silence(made[last])
    return tuple(made.values()), output


def _behind_silence(node: Node) -> Node:
    """Return what a node that only passes values on was made of.

    Such a module often returns the very tensor that it was given, of which one cannot say then
    whether a later user took it before or behind the module.
    """
    return node.sources[0] if node.kind == "silent" and len(node.sources) == 1 else node


def _sources(source: Any) -> Iterable[Any]:
    if isinstance(source, Call):
        return (source.source,)
    return source.terms if isinstance(source, Sum) else source.sources


def _node(
    index: int,
    source: Any,
    sources: tuple[Node, ...],
    modules: dict[str, nn.Module],
    norms: set[nn.Module],
) -> Node:
    if isinstance(source, Sum):
        return Node(index, "sum", "", "sum", None, sources, sources)
    if isinstance(source, Call):
        name, operation, module = _own_name(source.name), "", source.module
        word = type(module).__name__.lower()
    else:
        name, operation = _own_name(source.owner), source.name.strip("_")
        module, word = modules.get(name), operation.lower()
    kind: Kind = "other"
    if (module in norms and (not operation or operation in _NORMALISING)) or (
        operation in _NORMALISING
    ):
        kind = "norm"
    elif is_weight_layer(module) and (not operation or operation in _WEIGHING):
        kind = "weight"
    elif operation in _MULTIPLYING or operation == "scaled_dot_product_attention":
        kind = "product"
    elif any(part in word for part in _ACTIVATIONS):
        kind = "activation"
    elif any(part in word for part in _SILENT):
        kind = "silent"
    return Node(index, kind, name, operation, module, sources, sources)


def _own_name(name: str) -> str:
    return name.removeprefix("model").removeprefix(".")


def _part_from_side_products(node: Node) -> None:
    """Leave a factor that was computed from the other one out of the main path."""
    factors = sorted(set(node.sources), key=lambda one: one.index)
    elementwise = "mul" in node.operation and "matmul" not in node.operation
    if not elementwise or len(factors) != 2 or factors[0].operation in _SPLITTING:
        return
    base, side = factors
    between = _between(base, side)
    if between:
        node.main = (base,)
        for one in between:
            one.beside = True


def _between(start: Node, end: Node) -> list[Node]:
    """Return the nodes on the ways from ``start``, which is left out, to ``end``."""
    seen, stack = {end}, [end]
    while stack:
        for one in stack.pop().sources:
            if one.index > start.index and one not in seen:
                seen.add(one)
                stack.append(one)
    reached = {start}
    for one in sorted(seen, key=lambda one: one.index):
        if any(source in reached for source in one.sources):
            reached.add(one)
    return [one for one in seen if one in reached] if end in reached else []
