"""The tensors of one forward pass as a graph: what each was made of, and by which kind of layer.

`trace_flow` tells where each input of a layer was made. Here that becomes a graph from the model's
input to its output, in which every node has a kind (a weight layer, a normaliser, an activation, a
sum, a product) and knows who takes it. Layers called by keyword and layers that return several
tensors are seen like others. Side products, by which a path is multiplied with something
that was computed from that very path (squeeze and excitation, a hand-written swish), are told apart
from the path itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from normlab.surgery.flow import Call, Flow, Sum, tensors_in, trace_flow
from normlab.surgery.named_norms import NamedNorms
from normlab.surgery.normalisers import find_normalisers
from normlab.surgery.weight_uses import RECURRENT, Marks, WeightUses, in_order, sources_of

Kind = Literal["weight", "norm", "activation", "sum", "product", "silent", "other"]

_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_WEIGHING = ("linear", "conv1d", "conv2d", "conv3d", "multi_head_attention_forward")
_NORMALISING = ("batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm")
_ADDING = ("sub", "isub", "subtract", "addcmul", "lerp")
_REDUCING = ("sum", "mean")
_ELEMENTWISE = ("mul", "imul", "rmul", "multiply")
_MULTIPLYING = (*_ELEMENTWISE, "matmul", "imatmul", "rmatmul", "bmm", "einsum")
_ATTENDING = ("scaled_dot_product_attention", "multi_head_attention_forward", "softmax")
_ACTIVATIONS = ("relu", "elu", "silu", "swish", "mish", "sigmoid", "tanh", "softplus")
_SILENT = ("identity", "drop", "stochasticdepth", "contiguous", "clone")
# Layers of torch that hide what they compute and may return more than one tensor.
_RETURNING_SEVERAL = (
    *RECURRENT, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveMaxPoolNd,
)  # fmt: skip
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
        loose: The names of the weights that it multiplied by though they belong to no weight layer
            that was called.
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
    loose: tuple[str, ...] = ()

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
        loose: Names of the weights that the pass used otherwise than by a weight layer on the way
            to the output.
    """

    nodes: tuple[Node, ...]
    output: Node | None
    names: dict[nn.Module, str]
    norms: dict[str, nn.Module]
    loose: tuple[str, ...]

    @cached_property
    def weights(self) -> dict[nn.Module, list[Node]]:
        """The nodes that each weight layer made."""
        found: dict[nn.Module, list[Node]] = {}
        for node in self.nodes:
            if node.kind == "weight" and node.module is not None:
                found.setdefault(node.module, []).append(node)
        return found

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
    known = {norm.name: norm.module for norm in find_normalisers(model)}
    named = NamedNorms(model, set(known.values()))
    ends = _Ends(model)
    with _by_position(model), ends.seen_whole(), named.watched():
        flow = trace_flow(ends, *inputs)
    names = {module: name for name, module in reversed(list(model.named_modules()))}
    norms = known | named.found()
    nodes, output = _Maker(model, names, set(norms.values())).make(ends, flow)
    return TensorGraph(nodes, output, names, norms, _loose(model, flow, nodes))


def is_weight_layer(module: nn.Module | None) -> bool:
    """Whether a module multiplies by a weight: linear, convolution, attention, or one's own."""
    if isinstance(module, (*_LAYERS, nn.MultiheadAttention)):
        return True
    if module is None or isinstance(module, (nn.Embedding, nn.EmbeddingBag, nn.RNNBase)):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() > 1 and not any(True for _ in module.children())


class _Ends(nn.Module):
    """Marks the model's input, output and weights, so that they can be told apart."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.entry, self.model, self.exit = nn.Identity(), model, nn.Identity()
        self.marks = Marks(model)
        hiding = [one for one in model.modules() if isinstance(one, _RETURNING_SEVERAL)]
        self.returned = nn.ModuleList(_Returned(one) for one in hiding)

    def forward(self, *inputs: Any) -> Any:
        self.marks()
        outputs = self.model(*(self.entry(x) if isinstance(x, Tensor) else x for x in inputs))
        return self.exit(next(tensors_in(outputs), None))

    @contextmanager
    def seen_whole(self) -> Iterator[None]:
        """Let the tensors that a layer returns in a tuple be seen as made by it."""
        hooks = [one.by[0].register_forward_hook(one.see) for one in _returned(self)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class _Returned(nn.Module):
    """Stands for a call of a layer that returns a tuple: called with its input and one output."""

    by: tuple[nn.Module]

    def __init__(self, by: nn.Module) -> None:
        super().__init__()
        self.by = (by,)

    def see(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        given = next(tensors_in(inputs), None)
        for made in () if isinstance(output, Tensor) else tensors_in(output):
            self(given, made)

    def forward(self, given: Tensor | None, made: Tensor) -> Tensor:
        return made


def _returned(ends: _Ends) -> Iterator[_Returned]:
    return (one for one in ends.returned if isinstance(one, _Returned))


@contextmanager
def _by_position(model: nn.Module) -> Iterator[None]:
    """Hand over by position what calls without any positional input hand over by keyword."""

    def reorder(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if inputs or not named:
            return None
        bound = inspect.signature(module.forward).bind(**named)
        return bound.args, bound.kwargs

    hooks = [
        module.register_forward_pre_hook(reorder, with_kwargs=True) for module in model.modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Maker:
    """Makes the nodes of a pass."""

    def __init__(
        self, model: nn.Module, names: dict[nn.Module, str], norms: set[nn.Module]
    ) -> None:
        self.names, self.norms = names, norms
        self.modules = {name: module for module, name in names.items()}
        self.parameters = {id(value): name for name, value in model.named_parameters()}

    def make(self, ends: _Ends, flow: Flow) -> tuple[tuple[Node, ...], Node | None]:
        uses = WeightUses(flow)
        made: dict[Any, Node] = {}
        last = flow.of(ends.exit)[0].source
        for source in in_order([last]):
            if uses.is_parameter(source):
                continue
            before = [one for one in sources_of(source) if one is not None]
            sources = tuple(_behind_silence(made[one]) for one in before if one in made)
            node = self._node(len(made), source, sources)
            node.loose = self._loose(node, uses.of(source))
            made[source] = node
            for one in dict.fromkeys(node.sources):
                one.takers.append(node)
            _part_from_side_products(node)
        output = None if last is None or last not in made else _behind_silence(made[last])
        return tuple(made.values()), output

    def _node(self, index: int, source: Any, sources: tuple[Node, ...]) -> Node:
        if isinstance(source, Sum):
            return Node(index, "sum", "", "sum", None, sources, sources)
        if isinstance(source, Call):
            name, module = _own_name(source.name), source.module
            if isinstance(module, _Returned):
                module = module.by[0]
                name = self.names[module]
            operation, word = "", type(module).__name__.lower()
        else:
            name, operation = _own_name(source.owner), source.name.strip("_")
            module, word = self.modules.get(name), operation.lower()
        if operation in _REDUCING and len(sources) == 1 and sources[0].operation == "stack":
            # The sum or mean of tensors that were stacked is one of these tensors.
            sources = sources[0].sources
            return Node(index, "sum", name, operation, module, sources, sources)
        kind: Kind = "other"
        if (module in self.norms and (not operation or operation in _NORMALISING)) or (
            operation in _NORMALISING
        ):
            kind = "norm"
        elif is_weight_layer(module) and (not operation or operation in _WEIGHING):
            kind = "weight"
        elif operation in _ADDING:
            kind = "sum"
        elif operation in _MULTIPLYING or operation == "scaled_dot_product_attention":
            kind = "product"
        elif any(part in word for part in _ACTIVATIONS):
            kind = "activation"
        elif any(part in word for part in _SILENT):
            kind = "silent"
        return Node(index, kind, name, operation, module, sources, sources)

    def _loose(self, node: Node, used: list[str]) -> tuple[str, ...]:
        module = node.module
        if isinstance(module, RECURRENT) and not node.operation:
            return tuple(self.parameters[id(p)] for p in module.parameters() if p.dim() > 1)
        if node.kind != "weight" or module is None:
            return tuple(used)
        whole = isinstance(module, nn.MultiheadAttention)
        held = module.parameters() if whole else [module._parameters.get("weight")]
        own = {self.parameters.get(id(one)) for one in held}
        return tuple(name for name in used if name not in own)


def _loose(model: nn.Module, flow: Flow, nodes: tuple[Node, ...]) -> tuple[str, ...]:
    """Return the names of the weights used on the way to the output or by layers off it."""
    found = {name: None for node in nodes for name in node.loose}
    seen = {node.module for node in nodes}
    called = {call.module for call in flow.calls}
    for name, module in model.named_modules():
        weighs = isinstance(module, RECURRENT) or is_weight_layer(module)
        if weighs and module in called and module not in seen:
            own = module.named_parameters(name, remove_duplicate=False)
            found.update((one, None) for one, value in own if value.dim() > 1)
    return tuple(found)


def _behind_silence(node: Node) -> Node:
    """Return what a node that only passes values on was made of.

    Such a module often returns the very tensor that it was given, of which one cannot say then
    whether a later user took it before or behind the module.
    """
    return node.sources[0] if node.kind == "silent" and len(node.sources) == 1 else node


def _own_name(name: str) -> str:
    return name.removeprefix("model").removeprefix(".")


def _part_from_side_products(node: Node) -> None:
    """Leave a factor that was computed from the other one out of the main path."""
    factors = sorted(set(node.sources), key=lambda one: one.index)
    elementwise = node.operation in _ELEMENTWISE
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
