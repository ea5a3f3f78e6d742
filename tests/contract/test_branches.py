"""Residual branches are found by what a model computes, or refused with the addition named."""

import pytest
import torch
from torch import nn

from normlab.lab.models import build_model
from normlab.method import Unsuitable
from normlab.surgery.branches import Branch, plan_branches
from normlab.surgery.tensor_graph import trace_graph
from residual_networks import NETWORKS, Attention, Convolutional, Joined, Skip, Vision, mlp, rows

X = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def plan_of(name):
    return plan_branches(NETWORKS[name](), X)


def test_preactivation():
    plan = plan_of("preactivation")
    expected = [(f"blocks.{i}", 2, [f"blocks.{i}.first", f"blocks.{i}.second"]) for i in range(3)]
    assert rows(plan) == expected
    assert list(plan.outside) == ["stem", "blocks.1.match"]
    assert list(plan.heads) == ["readout"]
    assert len(plan.norms) == 7
    assert not plan.beside


def test_postactivation_and_gates():
    inside = ("reduce", "middle", "expand")
    expected = [(f"blocks.{i}", 3, [f"blocks.{i}.{part}" for part in inside]) for i in range(3)]
    plain, gated = plan_of("postactivation"), plan_of("gated")
    assert rows(plain) == rows(gated) == expected
    assert list(plain.outside) == list(gated.outside) == ["stem", "blocks.1.short.1"]
    assert not plain.beside
    assert list(gated.beside) == [
        f"blocks.{i}.gate.{part}" for i in range(3) for part in ("shrink", "grow")
    ]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("stacked attention", ["attn.qkv", "attn.proj"]),
        ("three maps, products", ["attn.q", "attn.k", "attn.v", "attn.proj"]),
        ("multihead attention", ["attn"]),
    ],
)
def test_attention_counts_four(name, layers):
    plan = plan_of(name)
    for i, (one, two) in enumerate(zip(rows(plan)[::2], rows(plan)[1::2], strict=True)):
        own = f"blocks.{i}"
        assert one[1] == 4
        assert sorted(one[2]) == sorted(f"{own}.{layer}" for layer in layers)
        assert one[2][-1] == f"{own}.{layers[-1]}"
        assert two == (own, 2, [f"{own}.fc1", f"{own}.fc2"])
    assert list(plan.outside) == ["patches"]
    assert list(plan.heads) == ["head"]
    assert len(plan.norms) == 5
    assert any(node.attends for node in plan.graph.nodes)


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("shortcut", ["zero-pad", "projection"])
def test_the_workbenchs_own_networks(block, shortcut):
    depth, m = (8, 2) if block == "basic" else (11, 3)
    model = build_model(
        "resnet", (2, 8, 8), 4, depth=depth, width=8, block=block, shortcut=shortcut
    )
    plan = plan_branches(model, X)
    assert [branch.length for branch in plan.branches] == [m] * 3
    assert all(branch.num_last == 1 for branch in plan.branches)
    inside = sum(len(branch.layers) for branch in plan.branches)
    convolutions = sum(isinstance(one, nn.Conv2d) for one in model.modules())
    assert inside + len(plan.outside) == convolutions


def test_a_block_on_the_very_input():
    plan = plan_branches(nn.Sequential(Skip(nn.Linear(3, 3)), nn.Linear(3, 2)), torch.ones(2, 3))
    assert rows(plan) == [("0.branch", 1, ["0.branch"])]
    assert list(plan.heads) == ["1"]


def test_branches_side_by_side_and_nested():
    two = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 3))
    model = nn.Sequential(Skip(Joined(two, nn.Linear(3, 3))), nn.Linear(3, 2))
    plan = plan_branches(model, torch.ones(2, 3))
    assert rows(plan) == [
        ("0.branch.one", 2, ["0.branch.one.0", "0.branch.one.2"]),
        ("0.branch.two", 1, ["0.branch.two"]),
    ]
    nested = nn.Sequential(Skip(nn.Sequential(nn.Linear(3, 3), Skip(nn.Linear(3, 3)))))
    plan = plan_branches(nested, torch.ones(2, 3))
    assert rows(plan) == [
        ("0.branch.1.branch", 1, ["0.branch.1.branch"]),
        ("0.branch.0", 1, ["0.branch.0"]),
    ]
    assert not plan.heads


class Side(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.join = join
        self.ways = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x):
        one, two = self.ways[0](x), self.ways[2](self.ways[1](x).relu())
        return self.join(one, two)


def test_layers_side_by_side_inside_a_branch():
    """Of layers whose outputs are joined the longer way counts; all of the last ones end it."""
    model = Skip(Side(lambda one, two: torch.stack([one, two]).mean(0)))
    (branch,) = plan_branches(model, torch.ones(2, 3)).branches
    assert (branch.length, branch.num_last) == (2, 2)
    assert set(branch.last) == {model.branch.ways[0], model.branch.ways[2]}
    product = Skip(Side(lambda one, two: one * two))
    (branch,) = plan_branches(product, torch.ones(2, 3)).branches
    # The product has three factors, of which one that is zero is enough.
    assert (branch.length, branch.num_last) == (3, 1)


def test_readouts_that_are_averaged_are_no_branch():
    model = nn.Sequential(Skip(nn.Linear(3, 3)), Joined(nn.Linear(3, 2), nn.Linear(3, 2)))
    plan = plan_branches(model, torch.ones(2, 3))
    assert len(plan.branches) == 1
    assert set(plan.heads) == {"1.one", "1.two"}


def test_refusals():
    def refused(match, model):
        with pytest.raises(Unsuitable, match=match):
            plan_branches(model, torch.ones(2, 3))

    refused("nothing is added on the way", nn.Sequential(nn.Linear(3, 3), nn.ReLU()))
    refused("no weight layer was seen", nn.ReLU())
    pooled = nn.Sequential(nn.Linear(3, 3), Skip(nn.Tanh()), nn.Linear(3, 3))
    refused("none of its 1 additions", pooled)
    deep = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    two = nn.Sequential(Joined(deep, nn.Sequential(*deep)), nn.Linear(3, 2))
    refused(r"got one \(0\.one\.1 \+ 0\.one\.1\) of terms with 2 and 2 weight layers", two)
    ends = nn.Sequential(Skip(nn.Sequential(nn.Linear(3, 3), nn.Sigmoid())), nn.Linear(3, 2))
    refused(r"ends in 0\.branch\.1, which does not map zero to zero", ends)
    dead = nn.Sequential(Skip(nn.Sequential(nn.Linear(3, 3), nn.ReLU())), nn.Linear(3, 2))
    refused(r"ends in 0\.branch\.1, which lets no gradient pass", dead)

    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(3, 2), nn.Identity()

        def forward(self, x):
            return torch.cat([self.one(x), self.two(x)[:, :1]], 1)

    refused("a way without any weight layer", nn.Sequential(Skip(Dense()), nn.Linear(3, 2)))
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    refused("got 0.branch with a re-parametrisation", nn.Sequential(Skip(normed)))

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x):
            return nn.functional.layer_norm(self.inner(x), (3,))

    refused("got layer_norm in 0", nn.Sequential(Functional(), Skip(nn.Linear(3, 3))))


def test_a_plan_is_corrected():
    model = NETWORKS["preactivation"]()
    plan = plan_branches(model, X)
    less = plan.without("blocks.1")
    assert [branch.name for branch in less.branches] == ["blocks.0", "blocks.2"]
    assert {"blocks.1.first", "blocks.1.second"} < set(less.outside)
    block = model.blocks[1]
    more = less.with_branch(Branch("mine", (block.first, block.second)))
    assert [branch.name for branch in more.branches] == ["blocks.0", "blocks.2", "mine"]
    assert more.outside == plan.outside
    assert more.with_branch(Branch("mine", (block.second,))).branches[-1].length == 1
    with pytest.raises(ValueError, match=r"the branches are blocks\.0, blocks\.1, blocks\.2"):
        plan.without("block.1")
    with pytest.raises(ValueError, match=r"got blocks.0.first \(Conv2d\) of the branch blocks.0"):
        plan.with_branch(Branch("twice", (model.blocks[0].first,)))
    with pytest.raises(ValueError, match="got a module of another model"):
        plan.with_branch(Branch("strange", (nn.Linear(2, 2),)))


def test_branches_by_name():
    deep = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model = nn.Sequential(Joined(deep, other), nn.Linear(3, 2))
    named = [("mine", ("0.two.0", "0.two.1"))]
    plan = plan_branches(model, torch.ones(2, 3), branches=named)
    assert rows(plan) == [("mine", 2, ["0.two.0", "0.two.1"])]
    assert list(plan.outside) == ["0.one.0", "0.one.1"]
    assert list(plan.heads) == ["1"]
    with pytest.raises(ValueError, match=r"got '0\.three'; take them from model.named_modules"):
        plan_branches(model, torch.ones(2, 3), branches=[("mine", ("0.three",))])


def test_a_plan_prints():
    text = str(plan_of("gated"))
    assert text.startswith("3 residual branches\nbranch    m  weight layers, the zero ones in")
    assert "blocks.0  3  blocks.0.reduce, blocks.0.middle, [blocks.0.expand]" in text
    assert "\nreadout: readout\n" in text
    assert "\nnormalisers that go (10): " in text


def test_the_model_is_left_as_it_was():
    model = Convolutional().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan_branches(model, X)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_a_thousand_blocks_take_seconds():
    blocks = [Skip(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) for _ in range(1000)]
    plan = plan_branches(nn.Sequential(*blocks, nn.Linear(2, 2)), torch.ones(2, 2))
    assert len(plan.branches) == 1000


def test_tensors_off_the_path_are_not_in_the_graph():
    class Wasteful(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.wasted = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x):
            self.wasted(x)
            return {"logits": self.used(x)}

    graph = trace_graph(Wasteful(), torch.ones(1, 2))
    assert [node.name for node in graph.nodes if node.kind == "weight"] == ["used"]
    assert len(trace_graph(Vision(), X).norms) == 5


def test_weights_that_no_layer_of_the_plan_holds_are_listed():
    class Handed(Attention):
        """As some public vision Transformers: the layer is there, but its weight is handed on."""

        def forward(self, x):
            qkv = nn.functional.linear(x, self.qkv.weight, self.qkv.bias)
            q, k, v = qkv.unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0)
            out = nn.functional.scaled_dot_product_attention(q, k, v)
            return self.proj(out.transpose(1, 2).flatten(2))

    model = Vision(blocks=1)
    model.blocks[0].attn = Handed(8)
    plan = plan_branches(model, X)
    assert rows(plan)[0] == ("blocks.0.attn.proj", 4, ["blocks.0.attn.proj"])
    assert plan.unheld == ("blocks.0.attn.qkv.weight",)
    assert "left as they are: blocks.0.attn.qkv.weight\n" in str(plan)
    assert not plan_branches(Vision(), X).unheld

    class TwoOutputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.memory, self.second = mlp(), nn.LSTM(3, 3), nn.Linear(3, 2)

        def forward(self, x):
            x = self.memory(x)[0]
            return x + self.first(x), self.second(x)

    class Twice(Skip):
        def forward(self, x):
            return x + self.branch(nn.functional.linear(x, self.branch.weight))

    assert not plan_branches(Twice(nn.Linear(3, 3)), torch.ones(2, 3)).unheld

    memory = ("memory.weight_ih_l0", "memory.weight_hh_l0")
    assert plan_branches(TwoOutputs(), torch.ones(2, 3)).unheld == (*memory, "second.weight")


class Encoder(nn.Module):
    def __init__(self, norm_first, **masks):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
        self.stem, self.readout = nn.Linear(4, 8), nn.Linear(8, 3)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.masks = masks

    def forward(self, x):
        made = {name: make(x) for name, make in self.masks.items()}
        return self.readout(self.encoder(self.stem(x), **made))


MASKS = {
    "mask": {"mask": lambda x: torch.zeros(5, 5)},
    "causal": {
        "mask": lambda x: nn.Transformer.generate_square_subsequent_mask(5),
        "is_causal": lambda x: True,
    },
    "padding": {"src_key_padding_mask": lambda x: x[..., 0] > 9},
}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masks", MASKS)
def test_a_mask_is_no_factor_of_attention(masks, norm_first):
    plan = plan_branches(Encoder(norm_first, **MASKS[masks]), torch.randn(2, 5, 4))
    expected = []
    for i in range(2):
        own = f"encoder.layers.{i}"
        expected.append((f"{own}.self_attn", 4, [f"{own}.self_attn"]))
        expected.append((own, 2, [f"{own}.linear1", f"{own}.linear2"]))
    assert rows(plan) == expected
    assert list(plan.outside) == ["stem"]
    assert list(plan.heads) == ["readout"]
    assert not plan.beside


def test_torchs_sequence_first_transformer():
    class Translator(nn.Module):
        def __init__(self):
            super().__init__()
            self.both, self.readout = nn.Transformer(8, 2, 1, 2, 16), nn.Linear(8, 3)

        def forward(self, x):
            mask = nn.Transformer.generate_square_subsequent_mask(3)
            return self.readout(self.both(x, x[:3], tgt_mask=mask))

    plan = plan_branches(Translator(), torch.randn(5, 2, 8))
    assert [branch.length for branch in plan.branches] == [4, 2, *[4, 4, 2] * 2]
    assert list(plan.heads) == ["readout"]
    assert not plan.outside
    assert not plan.beside


def test_a_plan_keeps_what_it_was_made_with():
    x, y = torch.ones(2, 3), torch.zeros(2, 3)
    model = nn.Sequential(Skip(mlp()), nn.Linear(3, 2))
    model.forward = lambda x, y: nn.Sequential.forward(model, x + y)
    plan = plan_branches(model, x, y)
    assert plan.inputs == (x, y)
    assert plan.without("0.branch").inputs == (x, y)
