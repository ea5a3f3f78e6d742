"""Every method of the catalogue on every model of the workbench: it fits, or refuses by reason."""

import pytest
import torch

from normlab.catalog import METHODS, find_method
from normlab.lab.models import build_model
from normlab.method import Unsuitable
from normlab.testing import METHOD_CHECKS, MethodCase

# Model options and input shape; small, because every check runs for every pair.
MODELS = {
    "mlp": ({"depth": 4, "width": 16}, (1, 6, 6)),
    "plain-conv": ({"depth": 5, "width": 8}, (2, 8, 8)),
    "resnet": ({"depth": 8, "width": 8}, (2, 8, 8)),
    "resnet projection": ({"depth": 8, "width": 8, "shortcut": "projection"}, (2, 8, 8)),
    "resnet bottleneck": ({"depth": 11, "width": 8, "block": "bottleneck"}, (2, 8, 8)),
}

# Pairs that a method refuses, with a word of its reason.
REFUSED = {
    ("instance-norm", "mlp"): "one position",
    ("fixup", "mlp"): "residual",
    ("fixup", "plain-conv"): "residual",
    ("weight-standardization", "mlp"): "convolutions",
    ("stochastic-depth", "mlp"): "residual",
    ("stochastic-depth", "plain-conv"): "residual",
    **{("class-norm", model): "ClassEmbedder" for model in MODELS},
}

LABELS = [
    *(method.card.name for method in METHODS),
    "ic-layer:stacking=ic-conv-relu",
    "ic-layer:stacking=conv-relu-ic",
    "weight-rescaling:target_norm=init",
    "fixup+dropout",
    "group-norm+dropout",
    "none+weight-standardization+adaptive-clipping",
    "weight-norm:mean_only=true",
    "gradmax:start=0.1",
    "random-growth:start=0.1",
    "random-growth:start=0.1,keep_norms=true",
    "fixup+mixup",
    "target-space:mode=optimistic",
    "none+gradinit:num_steps=6",
    "stochastic-depth:mode=mask",
    "none+elu",
    "label-smoothing+mixup",
    "lookahead+lars",
    "sam+batch-growth+lamb",
]


W = torch.nn.Parameter(torch.ones(2, 2))
GROUPS = [{"params": [W], "lr": 0.1, "max_batches": 4}]  # with what batch-growth puts there


def case(label: str, model: str) -> MethodCase:
    options, shape = MODELS[model]
    generator = torch.Generator().manual_seed(0)
    return MethodCase(
        method=find_method(label),
        make_model=lambda: build_model(model.split()[0], shape, 4, **options),
        inputs=torch.randn(12, *shape, generator=generator),
        targets=torch.arange(12) % 4,
        num_classes=4,
        lr=0.02,
    )


PAIRS = [(label, model) for label in LABELS for model in MODELS]


@pytest.mark.parametrize(
    ("label", "model"),
    [
        (label, model)
        for label, model in PAIRS
        if not any((part.partition(":")[0], model) in REFUSED for part in label.split("+"))
    ],
)
def test_contract(label, model):
    for check in METHOD_CHECKS:
        check(case(label, model))


@pytest.mark.parametrize(("label", "model"), REFUSED)
def test_misfits_are_refused_with_the_reason(label, model):
    with pytest.raises(Unsuitable, match=REFUSED[label, model]):
        case(label, model).prepared()


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.card.name)
def test_cards_are_complete(method):
    card = method.card
    assert card.summary.endswith(".")
    assert card.source is None or (card.source.year > 1980 and card.source.title)
    assert card.best_for
    assert card.name == card.name.lower()


def test_names_are_unique():
    names = [method.card.name for method in METHODS]
    assert len(set(names)) == len(names)


def test_unknown_method_names_the_nearest():
    with pytest.raises(ValueError, match="do you mean 'fixup'"):
        find_method("fixupp")


@pytest.mark.parametrize(("written", "meant"), [("LARS", "lars"), ("GELU", "gelu"), ("Sam", "sam")])
def test_capital_letters_do_not_mislead(written, meant):
    with pytest.raises(ValueError, match=f"do you mean '{meant}'"):
        find_method(written)


@pytest.mark.parametrize("name", ["", "???"])
def test_what_is_like_no_name_is_not_guessed_at(name):
    with pytest.raises(ValueError, match=r"take one of these$"):
        find_method(name)


def test_a_plus_in_a_number_joins_nothing():
    method = find_method("lars:trust_coefficient=1e+1+fixup")
    assert [part.label for part in method.parts] == ["lars:trust_coefficient=10.0", "fixup"]


def test_options_set_twice_are_those_set_last():
    method = find_method("lars:momentum=0.5")
    assert method.defaults()["momentum"] == 0.9
    again = method.with_options(momentum=0.9)
    assert again.label == "lars"
    assert again.optimizer(GROUPS, None).defaults["momentum"] == 0.9


def kinds(label):
    """The optimisers of a method, from the outermost to the one that steps."""
    optimizer = find_method(label).optimizer(GROUPS, lambda groups: torch.optim.SGD(groups))
    found = [type(optimizer).__name__]
    while hasattr(optimizer, "base"):
        optimizer = optimizer.base
        found.append(type(optimizer).__name__)
    return found


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("lookahead+lars", ["Lookahead", "LARS"]),
        ("lars+lookahead", ["Lookahead", "LARS"]),
        ("batch-growth+lamb", ["BatchGrowth", "LAMB"]),
        ("sam+batch-growth", ["SAM", "BatchGrowth", "SGD"]),
        ("asam+lookahead+lars", ["ASAM", "Lookahead", "LARS"]),
        ("lookahead+batch-growth", ["BatchGrowth", "Lookahead", "SGD"]),
    ],
)
def test_optimisers_are_nested_as_they_work_together(label, expected):
    assert kinds(label) == expected


@pytest.mark.parametrize(
    ("label", "reason"),
    [
        ("lars+lamb", "in place of the task's optimiser, got lars and lamb; keep one"),
        ("rmsprop-inside-root+fixup+lars", "got rmsprop-inside-root and lars"),
        ("sam+asam", "whose step takes several passes, got sam and asam"),
    ],
)
def test_optimisers_that_exclude_each_other(label, reason):
    with pytest.raises(ValueError, match=reason):
        find_method(label)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.card.name)
def test_a_card_says_whether_the_optimiser_is_replaced(method):
    made = []

    def make(groups):
        made.append(torch.optim.SGD(groups))
        return made[-1]

    method.optimizer(GROUPS, make)
    assert method.card.replaces_optimizer == (not made)


def test_a_composition_needs_what_its_parts_need():
    closure, replaced, bare = (
        find_method(label).card for label in ("dropout+sam", "dropout+lars", "none+sam")
    )
    assert closure.needs_closure
    assert not replaced.needs_closure
    assert replaced.replaces_optimizer
    assert closure.batch_of_one == "as the model"
    assert bare.batch_of_one == "trains"


def test_unknown_option_names_the_nearest():
    with pytest.raises(ValueError, match="do you mean 'drop_prob'"):
        find_method("ic-layer:drop_pob=0.1")


def test_a_truth_value_is_no_number():
    with pytest.raises(ValueError, match=r"like the default 5, got bool; give an int"):
        find_method("lookahead:k=true")


def test_option_of_another_type():
    with pytest.raises(ValueError, match=r"like the default 0\.05"):
        find_method("ic-layer:drop_prob=much")


def test_option_without_a_value():
    with pytest.raises(ValueError, match="name=value"):
        find_method("ic-layer:drop_prob")


def test_labels_are_canonical():
    assert find_method("ic-layer:drop_prob=0.05").label == "ic-layer"
    assert find_method("dropout:p=0.2").label == find_method("dropout: p=.2").label
    assert find_method("weight-rescaling:target_norm=init").label.endswith("target_norm=init")


def test_a_method_stands_once_in_a_composition():
    with pytest.raises(ValueError, match="one of them twice"):
        find_method("fixup+fixup")
