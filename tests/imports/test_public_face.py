"""The public face: one list of names, loaded late, and quick to import."""

import ast
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import normlab

SOURCE = Path(normlab.__file__).parent


def run(code: str, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent), **variables}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout.strip()


def stub_names() -> set[str]:
    stub = ast.parse((SOURCE / "__init__.pyi").read_text())
    imports = [node for node in stub.body if isinstance(node, ast.ImportFrom)]
    return {alias.asname for node in imports for alias in node.names}


def test_every_name_of_the_stub_loads():
    for name in stub_names():
        assert getattr(normlab, name) is not None
    assert stub_names() <= set(dir(normlab))


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(AttributeError, match="do you mean 'FilterResponseNorm'"):
        normlab.FilterResponsNorm  # noqa: B018


def test_importing_loads_neither_torch_nor_methods():
    code = (
        "import sys, normlab;print([m for m in sys.modules if m.startswith(('torch', 'normlab.'))])"
    )
    assert run(code) == "[]"


def test_using_the_library_loads_torch_only():
    code = (
        "import sys, torch; before = set(sys.modules); import normlab; normlab.METHODS;"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - {'normlab'}))"
    )
    third_party = set(ast.literal_eval(run(code))) - set(sys.stdlib_module_names) - {"torch"}
    assert not third_party


@pytest.mark.alone
def test_import_costs_little_over_torch(tmp_path):
    # Compiled once, as wherever it is installed; and a pass of the garbage collector over torch's
    # many objects, due at one import or the next, is torch's cost.
    compiled = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(tmp_path)}
    code = (
        "import gc, time; import torch; gc.collect(); start = time.perf_counter();"
        "import normlab; normlab.METHODS; print(time.perf_counter() - start)"
    )
    assert min(float(run(code, **compiled)) for _ in range(5)) < 0.1


@pytest.mark.alone
@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"]])
def test_help_is_quick_and_loads_no_torch(arguments):
    times = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run(
            [sys.executable, "-m", "normlab", *arguments], check=True, capture_output=True
        )
        times.append(time.perf_counter() - start)
    assert min(times) < 0.5
    code = "import sys, normlab.lab.cli; print('torch' in sys.modules)"
    assert run(code) == "False"


@pytest.mark.alone
def test_shell_completion_is_quick():
    environment = {
        **os.environ,
        "_NORMLAB_COMPLETE": "complete_bash",
        "COMP_WORDS": "normlab com",
        "COMP_CWORD": "1",
    }
    times, output = [], ""
    for _ in range(5):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "normlab"], capture_output=True, text=True, env=environment
        )
        times.append(time.perf_counter() - start)
        output = done.stdout
    assert "compare" in output
    assert min(times) < 0.5
