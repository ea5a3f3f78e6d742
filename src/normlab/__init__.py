"""normlab: train deep networks with and without normalisation.

Names are loaded when they are first used; ``__init__.pyi`` beside this file is the one list of
them. ``import normlab`` alone loads neither torch nor any method.
"""

from importlib import import_module as _import_module

__version__ = "0.1.0"


def _public_names() -> dict[str, str]:
    """Return each public name with the module that defines it, read from the stub."""
    import ast
    from pathlib import Path

    stub = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    return {
        alias.asname or alias.name: f"{node.module}:{alias.name}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def __getattr__(name: str) -> object:
    names = {} if name.startswith("__") else _public_names()
    if name not in names:
        from difflib import get_close_matches

        near = get_close_matches(name, names, n=1)
        hint = f"; do you mean {near[0]!r}?" if near else ""
        raise AttributeError(f"module 'normlab' has no attribute {name!r}{hint}")
    module, _, attribute = names[name].partition(":")
    value = getattr(_import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_public_names()})
