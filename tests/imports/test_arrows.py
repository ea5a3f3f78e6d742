"""Who may import whom: every import statement of the package is checked against the plan."""

import ast
from pathlib import Path

import pytest

import normlab

PACKAGE = Path(normlab.__file__).parent
GROUND = ("method", "parameter_groups", "moments", "kernels", "surgery")
ROOMS = ("norms", "inits", "weights", "optim", "regularizers", "activations")

# Room (the first that matches a module's name) to the rooms it may import beside itself.
ALLOWED = {
    "method": ("options", "parameter_groups"),
    "options": (),
    "parameter_groups": (),
    "moments": (),
    "kernels": ("method", "moments"),
    "surgery": ("method", "parameter_groups", "moments"),
    **dict.fromkeys(ROOMS, GROUND),
    "quantized": (*GROUND, *ROOMS),
    "growth": (*GROUND, *ROOMS),
    "instruments": ("surgery",),
    "catalog": ("method", *ROOMS, "quantized", "growth"),
    "conversion": ("catalog", *GROUND),
    "testing": ("catalog", *GROUND),
    "__main__": ("lab.cli",),
    "lab": ("", *GROUND, *ROOMS, "growth", "catalog", "conversion", "instruments"),
}

# The same within the workbench.
ALLOWED_IN_LAB = {
    "records": (),
    "schedules": (),
    "memory": (),
    "card_text": (),
    "card_page": ("card_text", "claims"),
    "statistics": (),
    "tasks": (),
    "models": (),
    "processes": (),
    "batches": ("tasks",),
    "checkpoint": ("records",),
    "environment": ("processes",),
    "report": ("records", "statistics"),
    "study": ("schedules",),
    "loops": ("batches", "checkpoint", "memory", "processes", "records", "schedules", "tasks"),
    "trial": ("batches", "checkpoint", "loops", "models", "processes", "records", "study", "tasks"),
    "convert_verb": ("checkpoint", "models"),
    "engines": ("loops", "processes", "tasks", "trial"),
    "tuning": ("loops", "processes", "records", "study", "tasks", "trial"),
    "progress": ("records", "trial"),
    "compare": None,  # the top of the workbench: it and the verbs may use every room
    "claims": None,
    "cli": None,
}

# Optional libraries, each with the one file that may import it.
HOMES = {
    "accelerate": "lab/processes.py",
    "datasets": "lab/tasks/hub.py",
    "jinja2": "lab/report/page.py",
    "optuna": "lab/tuning.py",
    "PIL": "lab/tasks/hub.py",
    "pydantic": "lab/study.py",
    "safetensors": "lab/checkpoint.py",
    "scipy": "lab/statistics.py",
    "sklearn": "lab/tasks/digits.py",
    "tomli_w": "lab/study.py",
    "typer": "lab/cli.py",
}
NEVER = ("torchvision", "timm", "torchmetrics", "lightning")


def imports(path: Path) -> set[str]:
    """Return the names of all modules that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_rooms(path):
    name = module_of(path)
    room = name.split(".")[0]
    own = {one.removeprefix("normlab.") for one in imports(path) if one.startswith("normlab.")}
    for imported in own:
        if room == "" or imported.split(".")[0] == room:
            continue
        assert room in ALLOWED, f"{name} lies in a room without a rule"
        allowed = imported.startswith("__version__") or any(
            imported == other or imported.startswith(f"{other}.")
            for other in ALLOWED[room]
            if other
        )
        assert allowed, f"{name} may not import {imported}"


@pytest.mark.parametrize("path", [path for path in FILES if "lab" in path.parts], ids=module_of)
def test_rooms_of_the_workbench(path):
    name = module_of(path).removeprefix("lab").removeprefix(".")
    room = name.split(".")[0]
    if not room or ALLOWED_IN_LAB[room] is None:
        return
    for imported in imports(path):
        if imported.startswith("normlab.lab."):
            other = imported.split(".")[2]
            assert other == room or other in ALLOWED_IN_LAB[room], f"{name} imports {other}"


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_optional_libraries_have_one_home(path):
    where = path.relative_to(PACKAGE).as_posix()
    for imported in imports(path):
        top = imported.split(".")[0]
        assert top not in NEVER, f"{where} imports {top}"
        if top in HOMES:
            assert where == HOMES[top], f"{where} imports {top}, whose home is {HOMES[top]}"


def test_rooms_of_methods_do_not_import_each_other():
    for room in ROOMS:
        assert not set(ROOMS) & set(ALLOWED[room])
