"""Who may import whom: the layers of docs/tour.md, read off the syntax trees.

    file ─ast─> references (line, dotted name, how) ─rule─> ["castalia/x/y.py:12: ..."]

A reference is an import, an attribute chain of an imported name (`torch.cuda.sync`), or a
string that is the full name of a module of ours, since lazy imports go through strings.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

LAYER_1 = ("config",)
LAYER_2 = ("config", "data", "model", "optim")
LAYER_3 = (*LAYER_2, "parallel", "checkpoint", "convert", "generate")
# room -> what it may use: rooms, or single modules of them. `castalia.errors` is for all.
ALLOWED: dict[str, tuple[str, ...]] = {
    "config": (),
    "data": LAYER_1,
    "model": LAYER_1,
    "optim": LAYER_1,
    "parallel": (*LAYER_2, "checkpoint.tensors"),
    "checkpoint": LAYER_2,
    "convert": ("config", "model", "data.tokenizer", "checkpoint"),
    "generate": ("config", "model", "data.tokenizer", "checkpoint"),
    "evaluate": LAYER_3,
    "train": (*LAYER_3, "evaluate"),
    "tools": (*LAYER_3, "evaluate", "train"),
    "cli": (*LAYER_3, "evaluate", "train", "tools"),
}
DISTRIBUTED_ROOMS = {"parallel", "checkpoint"}
DEVICE_FILE = "castalia/parallel/world.py"
# Where the name that is imported is not the name that is installed.
DISTRIBUTIONS = {"yaml": "pyyaml", "mlflow": "mlflow-skinny"}


@dataclass(frozen=True)
class Reference:
    """A dotted name that a file uses."""

    line: int
    name: str
    kind: str  # "import", "attribute" or "string"
    lazy: bool  # inside a function, or only for the type checker


def references(path: str, text: str) -> list[Reference]:
    """Everything that a file imports or reaches through what it imported."""
    visitor = _Visitor(path)
    visitor.visit(ast.parse(text))
    return visitor.found


class _Visitor(ast.NodeVisitor):
    def __init__(self, path: str) -> None:
        parts = path.removesuffix(".py").split("/")
        self.package = parts[:-1]
        self.found: list[Reference] = []
        self.names: dict[str, str] = {}  # local name -> dotted name
        self.depth = 0

    def _add(self, node: ast.AST, name: str, kind: str) -> None:
        self.found.append(Reference(node.lineno, name, kind, self.depth > 0))  # type: ignore[attr-defined]

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self._add(node, alias.name, "import")
            first = alias.name.split(".")[0]
            self.names[alias.asname or first] = alias.name if alias.asname else first

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        up = self.package[: len(self.package) - node.level + 1] if node.level else []
        module = ".".join([*up, *filter(None, [node.module])])
        for alias in node.names:
            name = module if alias.name == "*" else f"{module}.{alias.name}"
            self._add(node, name, "import")
            self.names[alias.asname or alias.name] = name

    def visit_Attribute(self, node: ast.Attribute) -> None:
        parts, inner = [node.attr], node.value
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name) and inner.id in self.names:
            self._add(node, ".".join([self.names[inner.id], *reversed(parts)]), "attribute")
        else:
            self.visit(inner)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, str) and re.fullmatch(r"castalia(\.[a-z_0-9]+)+", node.value):
            self._add(node, node.value, "string")

    def visit_If(self, node: ast.If) -> None:
        typing_only = "TYPE_CHECKING" in ast.unparse(node.test)
        self.depth += typing_only
        for child in node.body:
            self.visit(child)
        self.depth -= typing_only
        self.visit(node.test)
        for child in node.orelse:
            self.visit(child)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    visit_AsyncFunctionDef = visit_FunctionDef
    visit_Lambda = visit_FunctionDef  # type: ignore[assignment]


def room_of(path: str) -> str | None:
    """The room of a file; None for the files that belong to none."""
    parts = path.split("/")
    return parts[1] if len(parts) > 2 else None


def _inside(name: str, module: str) -> bool:
    return name == module or name.startswith(module + ".")


def _rooms_used(path: str, text: str) -> Iterator[tuple[Reference, str]]:
    """The references that lead into another room, with that room."""
    for reference in references(path, text):
        parts = reference.name.split(".")
        if parts[0] == "castalia" and len(parts) > 1 and parts[1] != "errors" and not parts[1].startswith("__"):
            # castalia.train and castalia.load are functions of the Python interface, and castalia.train
            # a room as well: a lower room may use neither.
            room = parts[1]
            if room != room_of(path):
                yield reference, room


def layer_violations(sources: dict[str, str]) -> list[str]:
    """Imports that go up or sideways, and rooms that the table does not know."""
    found = []
    for path, text in sources.items():
        room = room_of(path)
        if path in ("castalia/__init__.py", "castalia/__main__.py"):
            continue  # the Python interface names rooms, lazily (test_cli_startup.py); the other is the command
        if room is not None and room not in ALLOWED:
            found.append(f"{path}: the room '{room}' has no row in ALLOWED of tests/rules/test_imports.py")
            continue
        allowed = ALLOWED[room] if room else ()
        for reference, _ in _rooms_used(path, text):
            if not any(_inside(reference.name, f"castalia.{entry}") for entry in allowed):
                found.append(f"{path}:{reference.line}: {room} may not use {reference.name}")
    return found


def distributed_violations(sources: dict[str, str]) -> list[str]:
    """torch.distributed outside the two rooms that may know of other ranks."""
    return _uses(sources, "torch.distributed", lambda path: room_of(path) in DISTRIBUTED_ROOMS)


def cuda_violations(sources: dict[str, str]) -> list[str]:
    """torch.cuda outside the one file that names devices."""
    return _uses(sources, "torch.cuda", lambda path: path == DEVICE_FILE)


def config_torch_violations(sources: dict[str, str]) -> list[str]:
    """torch in the room that must answer at once."""
    return _uses(sources, "torch", lambda path: room_of(path) != "config")


def _uses(sources: dict[str, str], module: str, exempt) -> list[str]:
    return [
        f"{path}:{reference.line}: {reference.name}"
        for path, text in sources.items()
        if not exempt(path)
        for reference in references(path, text)
        if _inside(reference.name, module)
    ]


def room_cycle(sources: dict[str, str]) -> list[str]:
    """One cycle of rooms as [a, b, ..., a]; empty if there is none."""
    graph: dict[str, set[str]] = {}
    for path, text in sources.items():
        if room := room_of(path):
            graph.setdefault(room, set()).update(used for _, used in _rooms_used(path, text))
    done: set[str] = set()

    def search(trail: list[str]) -> list[str]:
        for used in sorted(graph.get(trail[-1], ())):
            if used in trail:
                return [*trail[trail.index(used) :], used]
            if used not in done and (cycle := search([*trail, used])):
                return cycle
        done.add(trail[-1])
        return []

    return next((cycle for room in sorted(graph) if (cycle := search([room]))), [])


def foreign_violations(sources: dict[str, str], base: set[str], extras: set[str]) -> list[str]:
    """Packages that pyproject.toml does not name, and optional ones imported before they are needed."""
    found = []
    for path, text in sources.items():
        for reference in references(path, text):
            top = reference.name.split(".")[0]
            if reference.kind != "import" or top == "castalia" or top in sys.stdlib_module_names:
                continue
            package = DISTRIBUTIONS.get(top, top).lower().replace("_", "-")
            if package not in base | extras:
                found.append(f"{path}:{reference.line}: {top} is not a dependency in pyproject.toml")
            elif package not in base and not reference.lazy:
                found.append(f"{path}:{reference.line}: {top} is optional: import it where it is needed")
    return found


def global_statements(sources: dict[str, str]) -> list[str]:
    """`global`: state of a module that functions change behind each other's back."""
    return [
        f"{path}:{node.lineno}: global {', '.join(node.names)}"
        for path, text in sources.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Global)
    ]


def test_the_layers_hold(sources):
    assert layer_violations(sources) == []


def test_only_two_rooms_know_other_ranks(sources):
    assert distributed_violations(sources) == []


def test_one_file_names_devices(sources):
    assert cuda_violations(sources) == []


def test_the_configuration_needs_no_torch(sources):
    assert config_torch_violations(sources) == []


def test_rooms_have_no_cycle(sources):
    assert room_cycle(sources) == []


def test_no_function_changes_a_module(sources):
    assert global_statements(sources) == []


def test_packages_are_declared_and_optional_ones_lazy(sources, root):
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]

    def names(requirements):
        return {re.match(r"[\w.-]+", r)[0].lower() for r in requirements}

    extras = set().union(*map(names, project["optional-dependencies"].values()))
    assert foreign_violations(sources, names(project["dependencies"]), extras) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("castalia/model/a.py", "import castalia.train.loop"),
        ("castalia/model/a.py", "from castalia import train"),
        ("castalia/model/a.py", "from castalia.data import store"),
        ("castalia/model/a.py", "from ..data import store"),
        ("castalia/model/a.py", "import castalia\ncastalia.train('run.yml')"),
        ("castalia/data/a.py", "def f():\n    from castalia.parallel import world"),
        ("castalia/data/a.py", "HOME = {'x': 'castalia.checkpoint.load'}"),
        ("castalia/config/a.py", "from castalia.optim import SCHEDULES"),
        ("castalia/generate/a.py", "from castalia.data.store import TokenStore"),
        ("castalia/tools/a.py", "from castalia.cli import main"),
        ("castalia/errors.py", "from castalia.config import load"),
        ("castalia/attic/a.py", ""),
    ],
)
def test_a_wrong_import_is_seen(path, text):
    assert len(layer_violations({path: text})) == 1


@pytest.mark.parametrize(
    ("path", "text"),
    [
        (
            "castalia/model/a.py",
            "from castalia.config import ModelConfig\nfrom castalia.errors import UserError",
        ),
        ("castalia/model/a.py", "from castalia import __version__\nfrom .layers import Norm"),
        ("castalia/generate/a.py", "from castalia.data.tokenizer import load_tokenizer"),
        ("castalia/cli/a.py", "def run():\n    from castalia.tools.report import write_report"),
    ],
)
def test_a_right_import_is_let_through(path, text):
    assert layer_violations({path: text}) == []


@pytest.mark.parametrize(
    "text",
    [
        "import torch.distributed as dist",
        "from torch import distributed",
        "from torch.distributed.tensor import DTensor",
        "import torch\ntorch.distributed.barrier()",
        "import torch as t\ndef f():\n    return t.distributed.get_rank()",
    ],
)
def test_a_hidden_rank_is_seen(text):
    assert distributed_violations({"castalia/train/a.py": text}) != []
    assert distributed_violations({"castalia/parallel/a.py": text}) == []


@pytest.mark.parametrize("text", ["import torch\ntorch.cuda.synchronize()", "from torch.cuda import Stream"])
def test_a_named_device_is_seen(text):
    assert cuda_violations({"castalia/parallel/a.py": text}) != []
    assert cuda_violations({DEVICE_FILE: text}) == []


def test_torch_in_the_configuration_is_seen():
    assert config_torch_violations({"castalia/config/a.py": "def f():\n    import torch"}) != []


def test_a_cycle_is_seen():
    sources = {
        "castalia/data/a.py": "from castalia.model import b",
        "castalia/model/b.py": "def f():\n    from castalia.optim import c",
        "castalia/optim/c.py": "import castalia.data.a",
    }
    assert room_cycle(sources) == ["data", "model", "optim", "data"]
    del sources["castalia/optim/c.py"]
    assert room_cycle(sources) == []


def test_undeclared_and_eager_packages_are_seen():
    def check(text):
        return len(foreign_violations({"castalia/tools/a.py": text}, {"numpy", "pyyaml"}, {"wandb"}))

    assert check("import scipy") == 1
    assert check("def f():\n    import scipy") == 1
    assert check("import wandb") == 1
    assert check("if True:\n    import wandb") == 1
    assert check("def f():\n    import wandb") == 0
    assert check("import numpy as np\nimport yaml\nimport os.path") == 0


def test_a_global_is_seen():
    assert global_statements({"castalia/data/a.py": "def f():\n    global x\n    x = 1"}) != []
