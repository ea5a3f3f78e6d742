"""The proof that a Fixup network starts silent, on inputs and outputs of every form."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.inits.fixup import prepare
from normlab.inits.fixup_any import fixup_any_
from normlab.inits.fixup_proof import inputs_of, prove
from normlab.method import Setting, Unsuitable
from normlab.surgery.branches import Branch, plan_branches
from residual_networks import Skip

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def two_layers():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


def network():
    return nn.Sequential(nn.Linear(8, 8), Skip(two_layers()), Skip(two_layers()), nn.Linear(8, 3))


def silent():
    return prepare(network(), Setting(batches=((X, X),)))


def branches_of(model):
    return [Branch(str(i), (model[i].branch[0], model[i].branch[2])) for i in (1, 2)]


def test_a_silent_network_is_left_as_it_was():
    model = silent()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert not prove(model, branches_of(model), {"3": model[3]}, (X,))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[3]._forward_hooks


def test_a_branch_that_is_open_is_named():
    model = silent()
    nn.init.normal_(model[2].branch[2].weight)
    with pytest.raises(Unsuitable, match=r"depend on the weights inside 2; correct the plan"):
        prove(model, branches_of(model), {"3": model[3]}, (X,))
    # Without a readout the output takes the place of the features.
    with pytest.raises(Unsuitable, match=r"depend on the weights inside 2;"):
        prove(model[:3], branches_of(model), {}, (X,))


def test_attention_ends_in_its_output_projection():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return x + self.attention(x, x, x)[0]

    model = nn.Sequential(Attending(), nn.Linear(8, 3))
    model = prepare(model, Setting(batches=((X[None], X),)))
    branches = [Branch("0", (model[0].attention,))]
    projection = model[0].attention.out_proj.weight
    assert not prove(model, branches, {"1": model[1]}, (X[None],))
    nn.init.ones_(projection)
    with pytest.raises(Unsuitable, match="depend on the weights inside 0;"):
        prove(model, branches, {"1": model[1]}, (X[None],))
    assert torch.equal(projection, torch.ones(8, 8))


def test_a_readout_that_is_not_silent():
    model = silent()
    nn.init.ones_(model[3].bias)
    with pytest.raises(Unsuitable, match=r"expected logits of zero.*3 adds something of its own"):
        prove(model, branches_of(model), {"3": model[3]}, (X,))


class Wrapped(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.inner, self.change = network(), [change]

    def forward(self, x):
        return self.change[0](self.inner(x), x)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits, x: logits.log_softmax(-1),
        lambda logits, x: logits.sigmoid(),
        lambda logits, x: {"logits": logits, "hidden": x},
    ],
)
def test_what_is_made_of_the_logits_is_no_matter(change):
    model = prepare(Wrapped(change), Setting(batches=((X, X),)))
    assert not model.inner(X).any()


def test_what_does_not_come_from_the_readout_is():
    model = Wrapped(lambda logits, x: torch.cat([logits.sigmoid(), x], 1))
    with pytest.raises(Unsuitable, match=r"the output does not come from inner\.3 alone"):
        prepare(model, Setting(batches=((X, X),)))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = nn.Linear(8, 8), Skip(two_layers()), nn.Linear(8, 3)

    def forward(self, x, y=None):
        x, y = (x["x"], x["y"]) if isinstance(x, dict) else (x, y)
        return self.head(self.block(self.stem(x) + y))


def test_models_of_several_inputs():
    y = torch.randn(3, 8)
    for inputs in ((X, y), ({"x": X, "y": y},)):
        model = TwoInputs()
        plan = plan_branches(model, *inputs)
        model = fixup_any_(model, plan, Setting(batches=((X, X),)))
        assert torch.equal(model.block(X), X)
        assert not model(*inputs).any()
    for inputs in ((X, y), [X, y], {"x": X, "y": y}):
        model = prepare(TwoInputs(), Setting(batches=((inputs, X),)))
        assert not model(X, y).any()
    assert [len(one) for one in inputs_of(Setting(batches=((X, X),)))] == [2]


class Language(nn.Module):
    """Reads words, and writes them with the embedding that it reads them by."""

    def __init__(self, width=64, tied=True, bias=False):
        super().__init__()
        self.words = nn.Embedding(50, width, padding_idx=0)
        inner = nn.Sequential(nn.Linear(width, 16), nn.ReLU(), nn.Linear(16, width))
        self.norm, self.block = nn.LayerNorm(width), Skip(inner)
        self.head = nn.Linear(width, 50, bias=bias)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, x):
        return self.head(self.norm(self.block(self.words(x))))


@pytest.mark.parametrize("bias", [False, True])
def test_a_readout_with_an_embeddings_weight_keeps_it(bias):
    words, said = torch.randint(1, 50, (4, 5)), []
    model = prepare(Language(bias=bias), Setting(batches=((words, words),), say=said.append))
    weight = model.words.weight
    assert model.head.weight is weight
    assert weight[1:].std().item() == pytest.approx(1 / math.sqrt(64), rel=0.05)
    assert not weight[0].any()
    assert model.head.bias is None or not model.head.bias.any()
    assert any("head has the weight of an embedding" in one for one in said)
    assert not any("unequal classes" in one for one in said)
    x = torch.randn(2, 5, 64)
    assert torch.equal(model.block(x), x)
    F.cross_entropy(model(words).flatten(0, 1), words.flatten()).backward()
    assert weight.grad.any()
    untied = prepare(Language(tied=False), Setting(batches=((words, words),)))
    assert not untied(words).any()
    assert untied.words.weight[1:].std() > 0.9


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.main, self.side = network(), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.main(self.norm(x)), self.side(x)


def test_normalisers_beside_the_first_output_stay():
    said = []
    model = prepare(TwoOutputs(), Setting(batches=((X, X),), say=said.append))
    assert type(model.norm) is nn.Identity
    assert type(model.side[0]) is nn.BatchNorm1d
    assert any("without 1 normalisers" in one for one in said)
    assert any("normalisers that stay" in one and "side.0" in one for one in said)
