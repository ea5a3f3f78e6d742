"""Real architectures converted to every normaliser and back, with the proof of each conversion.

Every conversion runs the model before and after in evaluation, and one pass forward and back in
training; every undo is compared with the start. Models keep their statistics from random images,
so that outputs depend on the input.
"""

import pytest
import torch

from normlab.catalog import METHODS
from normlab.conversion import convert, fold, freeze
from normlab.method import Unsuitable
from normlab.surgery.recalibrate import recalibrate
from zoo_models import TIMM, TORCHVISION, timm_model, torchvision_model

NORMS = [
    method.card.name
    for method in METHODS
    if method.card.room == "norms" and method.card.name not in ("batch-norm", "class-norm")
]


MODELS = [
    *(("torchvision", name, side) for name, side in TORCHVISION.items()),
    *(("timm", name, 64) for name in TIMM.values()),
]

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("library", "name", "side"), MODELS, ids=lambda value: str(value))
def test_every_normaliser_and_back(library, name, side):
    torch.manual_seed(0)
    model = (torchvision_model if library == "torchvision" else timm_model)(name)
    x = torch.randn(3, 3, side, side)
    recalibrate(model, [x])
    state = {key: value.clone() for key, value in model.state_dict().items()}
    converted, refused = [], {}
    for method in NORMS:
        try:
            done = convert(model, method, x)
        except Unsuitable as error:
            refused[method] = str(error)
            continue
        assert done.plan.changes, method
        assert done.proof.depends, method
        assert done.proof.trained == "one pass forward and back", (method, done.proof.trained)
        if not done.proof.required:
            assert done.proof.difference > 0, method
        assert done.undo() is model
        converted.append(method)
    # Statistics of three samples magnify rounding; in double precision none is left.
    model.double().eval()
    for surgery in (fold, freeze):
        done = surgery(model, x.double())
        assert done.proof.required
        assert done.proof.depends
        assert done.undo() is model
    model.float()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert len(state) == len(model.state_dict())
    allowed = {"instance-norm": "one position", "ic-layer": "ic-layer"}
    assert all(allowed.get(method, "?") in reason for method, reason in refused.items()), refused


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t"])
def test_layer_norm_networks_are_refused_with_the_reason(name):
    model = torchvision_model(name)
    with pytest.raises(Unsuitable, match=r"it has \d+ LayerNorm"):
        convert(model, "group-norm", torch.randn(2, 3, 64, 64))


def test_there_are_thirty_families_and_more():
    assert len(TIMM) >= 30
    assert len(set(TIMM.values())) == len(TIMM)
