"""Fixup on networks of any form: silent at the start, scalars where they belong, all alive."""

import copy
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normlab.inits.fixup import METHOD, Branch, prepare, scalars_of
from normlab.inits.fixup_any import fixup_any_
from normlab.inits.fixup_blocks import ScalarBias, ScalarScale
from normlab.inits.fixup_insert import bias_before_
from normlab.inits.fixup_rules import fixup_, he_normal_
from normlab.lab.models import build_model
from normlab.method import Setting, Unsuitable
from normlab.surgery.branches import plan_branches
from normlab.testing import METHOD_CHECKS, MethodCase
from residual_networks import NETWORKS, Joined, PreactivationBlock, Skip, Vision, conv

X = torch.randn(12, 2, 8, 8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(12) % 4


def setting(**options):
    return Setting(batches=((X, TARGETS),), generator=torch.Generator().manual_seed(1), **options)


def prepared(name, **options):
    torch.manual_seed(0)
    return prepare(NETWORKS[name](), setting(), **options).eval()


def perturb(model):
    """Give every scalar and every layer that starts at zero a value of its own."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for number, scalar in enumerate(scalars_of(model)):
            scalar.add_(0.03 * (number % 7) + 0.02)
        for module in model.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.out_proj.weight.normal_(std=0.3, generator=generator)
            elif isinstance(module, (nn.Linear, nn.Conv2d)) and not module.weight.any():
                module.weight.normal_(std=0.3, generator=generator)
    return model


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__)
def test_method_contract(check, name):
    check(MethodCase(METHOD, NETWORKS[name], X, TARGETS, num_classes=4))


@pytest.mark.parametrize("name", NETWORKS)
def test_a_fresh_network_is_silent(name):
    model = prepared(name)
    logits = model(X)
    assert torch.equal(logits, torch.zeros(12, 4))
    assert F.cross_entropy(logits, TARGETS).item() == pytest.approx(math.log(4), abs=1e-6)
    for i, block in enumerate(model.blocks):
        if "attention" in name or "maps" in name:
            x = torch.randn(3, 5, 8)
            assert torch.equal(block(x), x)
            assert torch.equal(block.train()(x), x)
            continue
        x = torch.randn(3, (4, 4, 6)[i], 6, 6)
        if name == "preactivation":
            expected = x if block.match is None else block.match(x.relu())
        else:
            expected = block.short(x).relu()
        assert torch.equal(block(x), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_no_normaliser_and_no_own_bias_is_left(name):
    model = prepared(name)
    plan = plan_branches(NETWORKS[name](), X)
    modules = dict(model.named_modules())
    for module in model.modules():
        assert "Norm" not in type(module).__name__
    for branch in plan.branches:
        for layer in branch.layers:
            now = modules[plan.graph.names[layer]]
            assert type(now) is type(layer)
            own = [n for n, _ in now.named_parameters() if "bias" in n]
            assert not own
    assert next(iter(plan.heads)) in {n.rpartition(".")[0] for n, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "biases", "scales"),
    [
        # As in the sheet: 4 in a block of two convolutions, 6 in one of three, and the readout's.
        ("preactivation", 4 * 3 + 1 + 1, 3),
        ("postactivation", 6 * 3 + 1, 3),
        ("gated", 6 * 3 + 1, 3),
        # Attention: in front of each layer. The other branch: two layers and the activation.
        ("stacked attention", (2 + 3) * 2 + 1, 4),
        ("three maps, products", (4 + 3) * 2 + 1, 4),
        ("multihead attention", (1 + 3) * 2 + 1, 4),
    ],
)
def test_scalar_counts(name, biases, scales):
    model = prepared(name)
    assert sum(isinstance(m, ScalarBias) for m in model.modules()) == biases
    assert sum(isinstance(m, ScalarScale) for m in model.modules()) == scales
    # And the readout's own bias, but no gate's.
    assert len(scalars_of(model)) == biases + scales + 1
    head = model.readout if hasattr(model, "readout") else model.head
    assert any(scalar is head.bias for scalar in scalars_of(model))
    own = [{"params": list(model.parameters())}]
    others, small = METHOD.parameter_groups(own, model, setting(lr=0.3))
    assert len(small["params"]) == biases + scales + 1
    assert (others["lr"], small["lr"]) == (0.3, pytest.approx(0.03))


@pytest.mark.parametrize("block", ["basic", "bottleneck"])
def test_the_general_form_counts_as_the_papers_blocks(block):
    depth = 14 if block == "basic" else 20
    make = lambda: build_model("resnet", (2, 8, 8), 4, depth=depth, width=4, block=block)  # noqa: E731
    said = []
    known = prepare(make(), setting(say=said.append))
    assert "in the paper's block form" in said[0]
    model = make()
    general = fixup_any_(model, plan_branches(model, X), setting(say=said.append))
    assert "in the general form, without 1" in said[1]
    for kind in (ScalarBias, ScalarScale):
        counts = [sum(isinstance(m, kind) for m in one.modules()) for one in (known, general)]
        assert counts[0] == counts[1]
    assert torch.equal(general(X), torch.zeros(12, 4))
    # On identity paths both forms are one function: put the same values into both.
    one, two = known.layer1[0], general.layer1[0]
    values = [p for n, p in one.named_parameters() if n.startswith(("bias", "scale"))]
    weights = [m for m in one.modules() if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        for value in values:
            value.fill_(0.1)
        for m in two.modules():
            if isinstance(m, (ScalarBias, ScalarScale)):
                m.value.fill_(0.1)
        inside = [m for m in two.modules() if isinstance(m, nn.Conv2d)]
        for mine, its in zip(inside, weights, strict=True):
            its.weight.normal_()
            mine.weight.copy_(its.weight)
    if one.shortcut is None:
        x = torch.randn(2, inside[0].in_channels, 5, 5)
        torch.testing.assert_close(two(x), one(x))


def test_standard_deviations():
    torch.manual_seed(0)
    blocks = [PreactivationBlock(32, 32) for _ in range(9)]
    model = nn.Sequential(conv(2, 32), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = prepare(model.append(nn.Linear(32, 4)), setting())
    wanted = math.sqrt(2 / (32 * 9))
    assert model[0].weight.std().item() == pytest.approx(wanted, rel=0.1)
    for block in blocks:
        assert block.first.weight.std().item() == pytest.approx(wanted / 3, rel=0.04)
        assert not block.second.weight.any()
    grouped = nn.Conv2d(64, 64, 3, groups=64)
    he_normal_(grouped)
    assert grouped.weight.std().item() == pytest.approx(math.sqrt(2 / 9), rel=0.12)
    transposed = nn.ConvTranspose2d(64, 32, 3)
    he_normal_(transposed)
    assert transposed.weight.std().item() == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("name", ["stacked attention", "multihead attention"])
def test_transformers_start_by_xaviers_rule(name):
    model = prepared(name)
    for block in model.blocks:
        stacked = block.attn.qkv.weight if "stacked" in name else block.attn.in_proj_weight
        for weight, m in ((stacked, 4), (block.fc1.weight, 2)):
            bound = 4 ** (-1 / (2 * m - 2)) * math.sqrt(6 / sum(weight.shape))
            assert 0.9 * bound < weight.abs().max().item() <= bound
        last = block.attn.proj if "stacked" in name else block.attn.out_proj
        assert not last.weight.any()
        assert not block.fc2.weight.any()
        # At their own 1e-5 a branch at zero would hardly learn.
        assert torch.equal(block.ls1.factor, torch.ones(8))


@pytest.mark.parametrize("name", NETWORKS)
def test_every_branch_learns_once_the_readout_does(name):
    model = prepared(name)
    F.cross_entropy(model(X), TARGETS).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    head = "readout" if hasattr(model, "readout") else "head"
    assert reached <= {f"{head}.weight", f"{head}.bias"}
    assert f"{head}.weight" in reached
    nn.init.normal_(getattr(model, head).weight)
    model.zero_grad()
    F.cross_entropy(model(X), TARGETS).backward()
    ends = [m for m in model.modules() if "fixup_scale" in m._modules]
    assert len(ends) == sum(isinstance(m, ScalarScale) for m in model.modules())
    for module in ends:
        last = module.out_proj if isinstance(module, nn.MultiheadAttention) else module
        assert not last.weight.any()
        assert last.weight.grad.any()


def number(module):
    return module.value.detach()


def test_preactivation_against_the_formula():
    model = perturb(prepared("preactivation").double())
    for i, block in enumerate(model.blocks):
        x = torch.randn(3, (4, 4, 6)[i], 6, 6, dtype=torch.float64)
        stride = block.first.stride[0]
        u = (x + number(block.first_norm)).clamp(min=0)
        v = F.conv2d(u + number(block.first.fixup_before), block.first.weight, None, stride, 1)
        v = (v + number(block.second_norm)).clamp(min=0) + number(block.second.fixup_before)
        w = F.conv2d(v, block.second.weight, padding=1) * number(block.second.fixup_scale)
        short = x if block.match is None else F.conv2d(u, block.match.weight, None, stride)
        torch.testing.assert_close(block(x), short + w)
    x = model.blocks(model.stem(X.double()))
    x = (x + number(model.last_norm[0])).clamp(min=0).mean((2, 3))
    x = (x + number(model.readout.fixup_before)) @ model.readout.weight.T + model.readout.bias
    torch.testing.assert_close(model(X.double()), x)
    assert x.abs().max() > 0.1


def test_postactivation_against_the_formula():
    model = perturb(prepared("gated").double())
    block = model.blocks[0]
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    u = F.conv2d(x + number(block.reduce.fixup_before), block.reduce.weight)
    u = (u + number(block.norm_a)).clamp(min=0) + number(block.middle.fixup_before)
    v = F.conv2d(u, block.middle.weight, padding=1, groups=3)
    v = (v + number(block.norm_b)).clamp(min=0) + number(block.expand.fixup_before)
    w = F.conv2d(v, block.expand.weight) * number(block.expand.fixup_scale)
    w = w + number(block.expand.fixup_after)
    pooled = w.mean((2, 3), keepdim=True)
    hidden = F.conv2d(pooled, block.gate.shrink.weight, block.gate.shrink.bias).clamp(min=0)
    gate = torch.sigmoid(F.conv2d(hidden, block.gate.grow.weight, block.gate.grow.bias))
    torch.testing.assert_close(block(x), (x + w * gate).clamp(min=0))


def test_multihead_attention_against_the_formula():
    model = perturb(prepared("multihead attention").double())
    block = model.blocks[1]
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    shifted = x + number(block.attn.fixup_before)
    q, k, v = (shifted @ w.T for w in block.attn.in_proj_weight.chunk(3))
    heads = []
    for part in (slice(0, 4), slice(4, 8)):
        scores = (q[..., part] @ k[..., part].transpose(1, 2) / 2).softmax(-1)
        heads.append(scores @ v[..., part])
    out = torch.cat(heads, -1) @ block.attn.out_proj.weight.T
    y = x + out * number(block.attn.fixup_scale) * block.ls1.factor
    u = (y + number(block.fc1.fixup_before)) @ block.fc1.weight.T + number(block.fc1.fixup_after)
    w = (F.gelu(u) + number(block.fc2.fixup_before)) @ block.fc2.weight.T
    torch.testing.assert_close(block(x), y + w * number(block.fc2.fixup_scale) * block.ls2.factor)
    assert (block(x) - x).abs().max() > 0.1


@pytest.mark.parametrize("name", ["preactivation", "postactivation", "gated"])
def test_modes_and_batches(name):
    model = perturb(prepared(name))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    out = model.eval()(X)
    assert out.any()
    torch.testing.assert_close(model(X[3:4]), out[3:4])
    assert torch.equal(model.train()(X), out)


@pytest.mark.parametrize("name", NETWORKS)
def test_copies_checkpoints_and_compilation(name):
    model = perturb(prepared(name))
    expected = model(X)
    fresh = prepared(name)
    fresh.load_state_dict(model.state_dict())
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), fresh):
        assert torch.equal(copied(X), expected)
        with torch.no_grad():
            scalars_of(copied)[0].add_(1)
    assert torch.equal(model(X), expected)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(X), expected)


def test_torchs_transformer():
    """Norms in front and behind, a functional activation, attention without a dimension given."""
    for norm_first in (True, False):
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
        encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        model = nn.Sequential(nn.Linear(4, 8), encoder, nn.Linear(8, 3))
        x = torch.randn(2, 5, 4)
        model = prepare(model, Setting(batches=((x, x),)))
        assert len([m for m in model.modules() if isinstance(m, ScalarScale)]) == 6
        assert len([m for m in model.modules() if isinstance(m, ScalarBias)]) == 3 * 4 + 1
        for training in (True, False):
            model.train(training)
            y = torch.randn(2, 5, 8)
            assert torch.equal(model[1](y), y)
            assert torch.equal(model(x), torch.zeros(2, 5, 3))


def test_a_padding_mask_in_torchs_encoder():
    """In evaluation torch's encoder would take a way that asks its normalisers."""

    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

        def forward(self, x):
            mask = torch.zeros(x.shape[:2], dtype=torch.bool)
            mask[0, 3:] = True
            return self.head(self.encoder(x, src_key_padding_mask=mask))

    x = torch.randn(2, 5, 8)
    model = prepare(Padded(), Setting(batches=((x, x),))).eval()
    with torch.no_grad():
        assert torch.equal(model(x), torch.zeros(2, 5, 3))


class Pooling(nn.Module):
    """Attention outside the branches, in front of the readout."""

    def __init__(self):
        super().__init__()
        self.attn, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attn(x, x, x)[0].mean(1))


@pytest.mark.parametrize("stem_init", ["he", "default"])
def test_attention_outside_the_branches(stem_init):
    x = torch.randn(2, 5, 8)
    inner = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = nn.Sequential(Skip(inner), Pooling())
    model = prepare(model, Setting(batches=((x, x),)), stem_init=stem_init)
    bound = math.sqrt(6 / 32)
    assert 0.9 * bound < model[1].attn.in_proj_weight.abs().max().item() <= bound
    assert model[1].attn.out_proj.weight.any()
    assert torch.equal(model(x), torch.zeros(2, 3))
    for norm_first in (True, False):
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True, norm_first=norm_first)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        model = nn.Sequential(nn.Linear(8, 8), encoder, nn.Linear(8, 3))
        plan = plan_branches(model, x)
        plan = plan.without(plan.branches[0].name)
        model = fixup_any_(model, plan, Setting(batches=((x, x),))).eval()
        with torch.no_grad():
            assert torch.equal(model(x), torch.zeros(2, 5, 3))
        assert model[1].layers[0].self_attn.out_proj.weight.any()


class OutputsLast(nn.Module):
    """A linear layer whose weight stands the other way round, and which needs its bias."""

    def __init__(self, features, out):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(features, out))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x):
        return torch.addmm(self.bias, x.flatten(0, -2), self.weight).unflatten(0, x.shape[:-1])


def test_layers_of_ones_own():
    torch.manual_seed(0)
    branch = nn.Sequential(OutputsLast(20, 90), nn.ReLU(), OutputsLast(90, 20))
    model = nn.Sequential(OutputsLast(20, 20), Skip(branch), nn.Linear(20, 3))
    x = torch.randn(3, 20)
    model = prepare(model, Setting(batches=((x, x),)))
    assert torch.equal(model[1](x), x)
    assert not branch[0].bias.any()
    assert branch[0].weight.std().item() == pytest.approx(math.sqrt(2 / 90), rel=0.06)

    # In a network that attends by Xavier's rule, like torch's linear layer.
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = OutputsLast(20, 90), OutputsLast(90, 20)
            self.attn = nn.MultiheadAttention(20, 2, batch_first=True)

        def forward(self, x):
            x = x + self.attn(x, x, x)[0]
            return x + self.two(self.one(x).relu())

    model, x = nn.Sequential(Block(), nn.Linear(20, 3)), torch.randn(2, 3, 20)
    model = prepare(model, Setting(batches=((x, x),)))
    bound = math.sqrt(6 / 110) / math.sqrt(2)
    assert 0.97 * bound < model[0].one.weight.abs().max().item() <= bound


def test_a_layer_that_two_take_has_no_bias_behind_it():
    class BothSigns(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(8, 4)

        def forward(self, x):
            u = self.one(x)
            return x + self.two(torch.cat([F.relu(u), torch.tanh(-u)], 1))

    said, x = [], torch.randn(3, 4)
    model = nn.Sequential(BothSigns(), nn.Linear(4, 2))
    model = prepare(model, Setting(batches=((x, x),), say=said.append))
    assert "fixup_after" not in model[0].one._modules
    assert any("without a place for a scalar bias: tanh in 0, relu in 0" in one for one in said)


def test_a_class_token_is_warned_of():
    said = []
    model = prepare(Vision(read_token=True), setting(say=said.append))
    assert any("only batches with unequal classes" in one for one in said)
    F.cross_entropy(model(X), TARGETS).backward()
    assert max(p.grad.abs().max() for p in model.parameters() if p.grad is not None) < 1e-6
    model.zero_grad()
    F.cross_entropy(model(X[:9]), TARGETS[:9]).backward()
    assert model.head.weight.grad.abs().max() > 1e-3
    said.clear()
    prepare(Vision(), setting(say=said.append))
    assert not any("unequal" in one for one in said)


def test_stem_by_torchs_default():
    bound = 1 / math.sqrt(2 * 9)
    model = prepared("preactivation", stem_init="default")
    assert 0.8 * bound < model.stem.weight.abs().max() <= bound
    assert prepared("preactivation").stem.weight.abs().max() > bound


def test_a_corrected_plan_is_followed():
    model = NETWORKS["preactivation"]()
    block = model.blocks[1]
    plan = plan_branches(model, X).without("blocks.1")
    fixup_any_(model, plan, setting())
    assert block.second.weight.any()
    assert not model.blocks[0].second.weight.any()
    assert len([m for m in model.modules() if isinstance(m, ScalarScale)]) == 2
    deep = [nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)) for _ in range(2)]
    model = nn.Sequential(Joined(*deep), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    plan = plan_branches(model, x, branches=[("two", ("0.two.0", "0.two.2"))])
    model = fixup_any_(model, plan, Setting(batches=((x, x),)))
    assert torch.equal(model[0](x), deep[0](x))
    assert not model(x).any()


def test_a_branch_of_one_layer_starts_at_zero():
    model = nn.Sequential(Skip(nn.Linear(4, 4)), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    model = prepare(model, Setting(batches=((x, x),)))
    assert torch.equal(model[0](x), x)
    assert not model[0].branch.weight.any()


def test_layers_of_different_numbers_of_weights():
    layers = [nn.Linear(50, 50) for _ in range(3)]
    fixup_([Branch("b", layers, num_layers=4, num_last=2)], num_branches=64)
    wanted = math.sqrt(2 / 50) * 64 ** (-1 / 6)
    assert layers[0].weight.std().item() == pytest.approx(wanted, rel=0.06)
    assert not layers[1].weight.any()
    assert not layers[2].weight.any()


def test_a_scalar_is_given_once():
    layer = nn.Linear(2, 2)
    bias_before_(layer, layer.weight)
    bias_before_(layer, layer.weight)
    assert len(layer._forward_pre_hooks) == 1
    layer.fixup_before.value.data.fill_(1.0)
    x = torch.randn(3, 2)
    torch.testing.assert_close(layer(input=x), F.linear(x + 1, layer.weight, layer.bias))


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = (self.weight - self.weight.mean()) / self.weight.std()
        return F.conv2d(x, weight, padding=1)


class TwoOutputs(nn.Module):
    """Its output does not come from one readout alone."""

    def __init__(self):
        super().__init__()
        self.norm, self.block, self.head = nn.LayerNorm(4), Skip(nn.Linear(4, 4)), nn.Linear(4, 4)

    def forward(self, x):
        return torch.cat([self.head(self.block(self.norm(x))), x], 1)


def test_refused_models_are_left_as_they_were():
    shared = nn.Linear(4, 4)
    first = Skip(nn.Sequential(shared, nn.ReLU(), nn.Linear(4, 4)))
    cases = [
        ("undoes the scaling", nn.Sequential(Skip(Standardised(2, 2, 3, padding=1))), X),
        (
            "ends one branch and begins another",
            nn.Sequential(first, Skip(shared), nn.Linear(4, 2)),
            torch.randn(3, 4),
        ),
        ("expected logits of zero", TwoOutputs(), torch.randn(3, 4)),
        ("got Sequential without any", build_model("mlp", (2, 8, 8), 4), X),
    ]
    for reason, model, x in cases:
        before = {name: value.clone() for name, value in model.state_dict().items()}
        text = repr(model)
        with pytest.raises(Unsuitable, match=reason):
            prepare(model, Setting(batches=((x, x),)))
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert repr(model) == text
    wrapped = nn.DataParallel(NETWORKS["preactivation"]())
    with pytest.raises(Unsuitable, match=r"convert its \.module"):
        prepare(wrapped, setting())
