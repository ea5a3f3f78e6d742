r"""Class normalisation: standardise the units of an attribute embedder across classes.

In zero-shot learning an embedder maps the attributes of each class to a prototype, with which image
features are compared. Here three things keep the logits of a deep embedder at unit variance:
attributes of a fixed length, standardisation of the hidden units over the classes present, and an
initialisation of the last layer. The batch of images enters none of them.

Source: I. Skorokhodov, M. Elhoseiny, "Class Normalization for (Continual)? Generalized Zero-Shot
Learning", 2020, arXiv 2006.11328.

Departs:
    - Units are divided by their deviation, as in the paper's equation 9; the authors' notebook
      divides by the variance (option ``divide_by="variance"``).
    - Attributes get the length :math:`\sqrt{d_a}` as in the public code; the text says 1.
    - A prototype of zeros, as a dead ReLU leaves it, has a logit of 0 instead of NaN.
    - ``seen_scale`` is 1, which changes nothing; the paper takes 0.95 (1 on CUB).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from normlab.method import Card, Method, Setting, Source, Unsuitable
from normlab.moments import wide
from normlab.norms.class_standardization import (
    ClassStandardization,
    DivideBy,
    check_divide_by,
    check_rows,
)
from normlab.surgery.swap import adopt

_SHORTEST = 1e-12


def normalize_attributes(attributes: Tensor) -> Tensor:
    r"""Give the attributes of each class the length :math:`\sqrt{d_a}`, a mean square of 1.

    Args:
        attributes: ``(K, d_a)``; a row of zeros stays.

    Returns:
        A tensor like ``attributes``.

    Example:
        >>> normalize_attributes(torch.tensor([[3.0, 4.0]])).square().mean()
        tensor(1.)
    """
    return (_directions(attributes) * math.sqrt(attributes.shape[-1])).to(attributes.dtype)


def prototype_logits(
    features: Tensor,
    prototypes: Tensor,
    scale: float = 5.0,
    *,
    seen: Tensor | None = None,
    seen_scale: float = 1.0,
) -> Tensor:
    r"""Compare features with prototypes, both brought to length g.

    .. math::
        z_{nc} = g^2 \langle x_n, p_c \rangle / (\lVert x_n \rVert \lVert p_c \rVert)

    Args:
        features: Image features ``(N, d_x)``.
        prototypes: Class prototypes ``(K, d_x)``.
        scale: The length g. Logits of features with zero mean have unit variance near
            :math:`d_x^{1/4}`: 6.7 for 2048 features.
        seen: Which classes were trained on ``(K,)``, boolean.
        seen_scale: The factor of their logits, above 0; below 1 it trades accuracy on seen
            classes for accuracy on unseen ones.

    Returns:
        Logits ``(N, K)`` in [-g^2, g^2], in the dtype of ``features``; 0 for a row of zeros.

    Raises:
        ValueError: Features and prototypes differ in length, or a scale is not above 0.

    Example:
        >>> prototype_logits(torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 9.0]]))
        tensor([[25.,  0.]])
    """
    check_rows("prototype_logits", prototypes, features.shape[-1])
    _check_scales("prototype_logits", scale, seen_scale)
    logits = scale**2 * (_directions(features) @ _directions(prototypes).T)
    if seen is not None and seen_scale != 1.0:
        logits = torch.where(seen, seen_scale * logits, logits)
    return logits.to(features.dtype)


def _directions(rows: Tensor) -> Tensor:
    return nn.functional.normalize(wide(rows), dim=-1, eps=_SHORTEST)


def class_norm_init_(layer: nn.Linear, *, generator: torch.Generator | None = None) -> nn.Linear:
    r"""Draw the weight of an embedder's last layer so that logits have unit variance (equation 10).

    .. math::
        w \sim U(-b, b), \quad b = \sqrt{3 / (d_h d_x)}

    The bias keeps torch's start, which adds about :math:`d_x / (3 d_h)` to the variance of
    :math:`\langle x, p \rangle`.

    Args:
        layer: The layer from d_h hidden units to d_x features, changed in place.
        generator: For the draws, on the CPU; torch's own by default.

    Returns:
        The layer.

    Example:
        >>> layer = class_norm_init_(nn.Linear(1024, 2048))
        >>> bool(layer.weight.abs().max() <= 1.19605e-3)
        True
    """
    bound = math.sqrt(3 / (layer.in_features * layer.out_features))
    drawn = torch.empty(layer.weight.shape)
    nn.init.uniform_(drawn, -bound, bound, generator=generator)
    with torch.no_grad():
        layer.weight.copy_(drawn)
    return layer


class ClassEmbedder(nn.Module):
    """Maps the attributes of classes to prototypes, in three linear layers.

    Linear, ReLU, Linear, S, ReLU, S, Linear, ReLU, with S a `ClassStandardization`. The last ReLU
    goes with image features that are not negative, as those of a ResNet are.

    Args:
        num_attributes: The number of attributes d_a of a class.
        num_features: The number of image features d_x.
        hidden_features: The number of hidden units d_h in both hidden layers.
        class_norm: Whether it has S and the initialisation of `class_norm_init_`; without them
            it is the plain embedder, which `prepare` turns into the other.
        divide_by: As in `class_standardize`.

    Shape:
        ``(K, d_a)`` to ``(K, d_x)``, K of at least 2 in training with ``class_norm``.

    Example:
        >>> embedder = ClassEmbedder(num_attributes=85, num_features=2048)
        >>> embedder(torch.rand(40, 85)).shape
        torch.Size([40, 2048])
    """

    def __init__(
        self,
        num_attributes: int,
        num_features: int,
        hidden_features: int = 1024,
        *,
        class_norm: bool = True,
        divide_by: DivideBy = "deviation",
    ) -> None:
        super().__init__()
        self.linear1 = nn.Linear(num_attributes, hidden_features)
        self.linear2 = nn.Linear(hidden_features, hidden_features)
        self.standardize1: nn.Module = nn.Identity()
        self.standardize2: nn.Module = nn.Identity()
        self.linear3 = nn.Linear(hidden_features, num_features)
        if class_norm:
            self.standardize1 = ClassStandardization(hidden_features, divide_by=divide_by)
            self.standardize2 = ClassStandardization(hidden_features, divide_by=divide_by)
            class_norm_init_(self.linear3)

    def forward(self, attributes: Tensor) -> Tensor:
        """Return the prototypes of classes with these attributes, whatever their length."""
        check_rows("ClassEmbedder", attributes, self.linear1.in_features)
        h = self.linear1(normalize_attributes(attributes)).relu()
        h = self.standardize2(self.standardize1(self.linear2(h)).relu())
        return self.linear3(h).relu()


class PrototypeClassifier(nn.Module):
    """Classifies image features by the classes' attributes; classes may be unseen in training.

    In training the attributes of all seen classes are embedded at every step, so the statistics of
    an embedder with class normalisation cover the seen classes and no image. Classes keep their
    numbers: the logits of unseen ones are then minus infinity, which leaves them out of a
    cross-entropy (one without label smoothing). In evaluation all classes compete.

    Args:
        embedder: Maps attributes ``(K, d_a)`` to prototypes ``(K, d_x)``.
        attributes: The attributes ``(K, d_a)`` of all classes, in the order of their numbers.
        scale: As in `prototype_logits`.
        seen: The classes trained on ``(K,)``, boolean; None for all.
        seen_scale: As in `prototype_logits`; in evaluation only.

    Shape:
        ``(N, d_x)`` to logits ``(N, K)``.

    Raises:
        ValueError: ``seen`` is not a boolean for each class, or a scale is not above 0.

    Example:
        >>> seen = torch.tensor([True, True, True, False])
        >>> model = PrototypeClassifier(ClassEmbedder(6, 8, 16), torch.rand(4, 6), seen=seen)
        >>> model(torch.rand(2, 8)).isfinite().all(0)
        tensor([ True,  True,  True, False])
    """

    attributes: Tensor
    seen_classes: Tensor

    def __init__(
        self,
        embedder: nn.Module,
        attributes: Tensor,
        *,
        scale: float = 5.0,
        seen: Tensor | None = None,
        seen_scale: float = 1.0,
    ) -> None:
        super().__init__()
        _check_scales("PrototypeClassifier", scale, seen_scale)
        seen = torch.ones(len(attributes), dtype=torch.bool) if seen is None else seen
        if seen.dtype != torch.bool or seen.shape != attributes.shape[:1] or not seen.any():
            raise ValueError(
                f"PrototypeClassifier(seen=...): expected a boolean for each of {len(attributes)} "
                f"classes, one of them true, got {seen.dtype} of shape {tuple(seen.shape)}; give "
                "seen[k] = whether class k is trained on"
            )
        self.embedder = embedder
        self.scale = scale
        self.seen_scale = seen_scale
        self.register_buffer("attributes", attributes)
        self.register_buffer("seen_classes", seen.nonzero().flatten())

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits of features ``(N, d_x)``."""
        num_classes = len(self.attributes)
        if not self.training:
            seen = torch.zeros(num_classes, dtype=torch.bool, device=features.device)
            return prototype_logits(
                features,
                self.embedder(self.attributes),
                self.scale,
                seen=seen.index_fill(0, self.seen_classes, True),
                seen_scale=self.seen_scale,
            )
        prototypes = self.embedder(self.attributes[self.seen_classes])
        logits = prototype_logits(features, prototypes, self.scale)
        if len(prototypes) == num_classes:
            return logits
        everyone = logits.new_full((len(features), num_classes), -math.inf)
        return everyone.index_copy(1, self.seen_classes, logits)


def _check_scales(operation: str, scale: float, seen_scale: float) -> None:
    for name, value, usual in (("scale", scale, 5), ("seen_scale", seen_scale, 0.95)):
        if not 0 < value < math.inf:
            raise ValueError(
                f"{operation}({name}={value!r}): expected a finite number above 0, got {value!r}; "
                f"use {usual}"
            )


def prepare(
    model: nn.Module,
    setting: Setting,
    *,
    divide_by: DivideBy = "deviation",
    standardize: bool = True,
    initialize: bool = True,
) -> nn.Module:
    """Give every `ClassEmbedder` of a model class standardisation and the initialisation.

    Args:
        model: A model that holds a `ClassEmbedder`, plain or not; changed in place.
        setting: Its generator serves the draws.
        divide_by: As in `class_standardize`.
        standardize: Whether fresh standardisation layers are put in (equation 9).
        initialize: Whether the last layer is drawn anew (equation 10). Alone it was worse
            than nothing on three of the paper's four data sets.

    Returns:
        The model.

    Raises:
        Unsuitable: The model holds no `ClassEmbedder`.
        ValueError: ``divide_by`` has no such value, or nothing is asked for.
    """
    check_divide_by("class-norm", divide_by)
    if not standardize and not initialize:
        raise ValueError(
            "class-norm(standardize=False, initialize=False): expected one of them to be true, "
            "got neither; leave the method out"
        )
    embedders = [module for module in model.modules() if isinstance(module, ClassEmbedder)]
    if not embedders:
        raise Unsuitable(
            "class-norm(model): expected a zero-shot model with a ClassEmbedder, got "
            f"{type(model).__name__} without one; class normalisation standardises units over "
            "classes and is no layer for images: take batch-norm or group-norm"
        )
    for embedder in embedders:
        if standardize:
            for name in ("standardize1", "standardize2"):
                layer = ClassStandardization(embedder.linear2.out_features, divide_by=divide_by)
                setattr(embedder, name, adopt(layer, embedder))
        if initialize:
            class_norm_init_(embedder.linear3, generator=setting.generator)
    parts = [("standardisation", standardize), ("initialisation", initialize)]
    done = " and ".join(part for part, wanted in parts if wanted)
    setting.say(f"{len(embedders)} class embedders were given class {done}")
    return model


CARD = Card(
    name="class-norm",
    title="Class normalisation",
    summary="Standardises the hidden units of a zero-shot attribute embedder across classes, and "
    "initialises its last layer to match.",
    room="norms",
    source=Source(
        authors="I. Skorokhodov, M. Elhoseiny",
        title="Class Normalization for (Continual)? Generalized Zero-Shot Learning",
        year=2020,
        arxiv="2006.11328",
        venue="ICLR 2021",
    ),
    eval_differs=True,
    state=("running mean and variance of each hidden unit", "number of steps seen"),
    best_for="Zero-shot classifiers that map class attributes to prototypes.",
    limits=(
        "Not a layer for images: it fits models with a ClassEmbedder only.",
        "A training step needs two classes at least, best all seen ones.",
        "Its initialisation without its standardisation was worse than neither on three of the "
        "paper's four data sets.",
    ),
    departures=(
        "Units are divided by their deviation, as in the paper; its notebook divides by the "
        "variance (divide_by=variance).",
        "Attributes get the length sqrt(d_a), as in the public code.",
        "A prototype of zeros has a logit of 0, where the formula is not defined.",
    ),
)

METHOD = Method(card=CARD, prepare=prepare)
