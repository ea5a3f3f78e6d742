"""Networks to compare methods on: one network a file, or a function in a file of the user's own.

Every network but the ELU networks, which go without, has its norms before the activations, no bias
in front of a norm, and each activation as a module of its own, so that methods find what they
replace.
"""

from __future__ import annotations

import hashlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from torch import nn

from normlab.lab.models import elu_net, inception, mlp, plain_conv, resnet


@dataclass(frozen=True)
class ModelEntry:
    """A network of the workbench.

    Args:
        name: The name a study uses.
        summary: What it is, in one line.
        title: The name people read; ``{depth}`` stands for that option.
        build: Makes it from ``input_shape``, ``num_classes`` and options.
    """

    name: str
    summary: str
    title: str
    build: Callable[..., nn.Module]


MODELS = (
    ModelEntry("mlp", "multi-layer perceptron of any depth", "MLP-{depth}", mlp.build),
    ModelEntry(
        "plain-conv",
        "convolutional network without shortcuts, of any depth",
        "plain ConvNet-{depth}",
        plain_conv.build,
    ),
    ModelEntry(
        "resnet",
        "residual network for small images: 20, 32, 44, 56, 110 layers or more",
        "ResNet-{depth}",
        resnet.build,
    ),
    ModelEntry(
        "inception-v3",
        "Inception-v3 by its layer table, narrow on demand; small images are enlarged",
        "Inception-v3",
        inception.build,
    ),
    ModelEntry(
        "elu-net-11",
        "the 11-layer network of the ELU paper, for images up to 32 pixels",
        "ELU-Net-11",
        elu_net.build_11,
    ),
    ModelEntry(
        "elu-net-18",
        "the 18-layer network of the ELU paper, for images up to 32 pixels",
        "ELU-Net-18",
        elu_net.build_18,
    ),
)


def build_model(
    name: str, input_shape: tuple[int, ...], num_classes: int, **options: Any
) -> nn.Module:
    """Build a network by its name, or by ``path/to/file.py:function``.

    A user's function is given those of ``input_shape``, ``num_classes`` and the options that it
    names.

    Args:
        name: ``mlp``, ``plain-conv``, ``resnet``, or a file and the function (or class) in it.
        input_shape: Shape of one sample.
        num_classes: Number of logits.
        **options: Keyword arguments of the network, such as ``depth`` and ``width``.

    Raises:
        ValueError: An unknown name or option, a network that cannot be built as asked, or a user's
            file or function that does not give a module.

    Example:
        >>> type(build_model("resnet", (1, 8, 8), 10, depth=8, width=4)).__name__
        'ResNet'
    """
    if ".py:" in name:
        return _build_own(name, input_shape, num_classes, options)
    build = _entry(name).build
    allowed = list(inspect.signature(build).parameters)[2:]
    _check_options(name, options, allowed)
    for option, value in options.items():
        expected = type(inspect.signature(build).parameters[option].default)
        if type(value) is not expected:
            kind = {int: "a whole number", str: "a word"}[expected]
            raise ValueError(
                f"build_model({name!r}, {option}={value!r}): expected {kind}, got {value!r}; "
                f"change the option"
            )
    return build(input_shape, num_classes, **options)


def model_title(name: str, options: dict[str, Any] | None = None) -> str:
    """Return the name that people read, with the options that are not at their default.

    Args:
        name: As for :func:`build_model`.
        options: As for :func:`build_model`.

    Example:
        >>> model_title("resnet", {"depth": 20}), model_title("resnet", {"depth": 32, "width": 8})
        ('ResNet-20', 'ResNet-32, width 8')
    """
    options = dict(options or {})
    if ".py:" in name:
        path, _, function = name.rpartition(":")
        title = f"{function} ({Path(path).name})"
    else:
        entry = _entry(name)
        defaults = {
            option: parameter.default
            for option, parameter in inspect.signature(entry.build).parameters.items()
        }
        title = entry.title
        if "{depth}" in title:
            title = title.format(depth=options.pop("depth", defaults["depth"]))
        options = {o: value for o, value in options.items() if value != defaults.get(o)}
    return ", ".join([title, *(f"{option} {value}" for option, value in options.items())])


def _entry(name: str) -> ModelEntry:
    for entry in MODELS:
        if entry.name == name:
            return entry
    names = [entry.name for entry in MODELS]
    raise ValueError(
        f"build_model({name!r}): expected {', '.join(names)} or path/to/file.py:function, got "
        f"{name!r}{_nearest(name, names)}"
    )


def _check_options(name: str, options: dict[str, Any], allowed: list[str]) -> None:
    for option in options:
        if option not in allowed:
            known = ", ".join(allowed) if allowed else "no options"
            raise ValueError(
                f"build_model({name!r}, {option}=...): expected {known}, got {option!r}"
                f"{_nearest(option, allowed)}"
            )


def _nearest(word: str, known: list[str]) -> str:
    matches = get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else "; choose one of these"


def _build_own(
    name: str, input_shape: tuple[int, ...], num_classes: int, options: dict[str, Any]
) -> nn.Module:
    function = _load_function(name)
    given = {"input_shape": tuple(input_shape), "num_classes": num_classes, **options}
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"build_model({name!r}): expected a function or a class, got {function!r}; name what "
            f"makes the module"
        ) from error
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        _check_options(name, options, [p for p in parameters if p not in given or p in options])
        given = {key: value for key, value in given.items() if key in parameters}
    missing = [
        p.name
        for p in parameters.values()
        if p.name not in given
        and p.default is p.empty
        and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    if missing:
        raise ValueError(
            f"build_model({name!r}): expected values for {', '.join(missing)}, got "
            f"{', '.join(given)}; give them as options of the model"
        )
    try:
        model = function(**given)
    except Exception as error:
        raise ValueError(
            f"build_model({name!r}): expected a module, got {type(error).__name__}: {error}; "
            f"correct the function"
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"build_model({name!r}): expected a torch.nn.Module, got {type(model).__name__}; "
            f"return the module from the function"
        )
    return model


def _load_function(name: str) -> Callable[..., Any]:
    path_text, _, attribute = name.rpartition(":")
    path = Path(path_text).expanduser()
    if not path.is_file():
        raise ValueError(
            f"build_model({name!r}): expected a file, got no {path_text}; check the path, which is "
            f"relative to the current folder"
        )
    digest = hashlib.blake2b(str(path.resolve()).encode(), digest_size=6).hexdigest()
    spec = importlib.util.spec_from_file_location(f"normlab_own_{path.stem}_{digest}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Registered, so that dataclasses and pickle find the classes of the file.
    sys.modules[spec.name] = module
    try:
        with _importable(path.resolve().parent):
            spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[spec.name]
        raise ValueError(
            f"build_model({name!r}): expected a file that can be imported, got "
            f"{type(error).__name__}: {error}; correct {path_text}"
        ) from error
    function = getattr(module, attribute, None)
    if function is None:
        names = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
        raise ValueError(
            f"build_model({name!r}): expected a function in {path_text}, got no {attribute!r}"
            f"{_nearest(attribute, names)}"
        )
    if not callable(function):
        raise ValueError(
            f"build_model({name!r}): expected a function, got {type(function).__name__}; name what "
            f"makes the module"
        )
    return function


@contextmanager
def _importable(folder: Path):
    """Let the user's file import its neighbours, as if it were run as a script."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
