"""`castalia --help` answers at once: what need not be imported for it is not.

Looked up in `sys.modules` of a fresh interpreter, since a measured time would depend on
the machine.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from importlib import import_module

import pytest

from castalia import __version__
from castalia.cli import VERBS

HEAVY = ("torch", "numpy", "transformers", "pydantic", "tokenizers")


def heavy_modules(code: str, heavy: tuple[str, ...] = HEAVY) -> set[str]:
    """Those of `heavy` that are loaded after `code` ran in a fresh interpreter; SystemExit is no error."""
    program = (
        "import sys\n"
        f"try:\n    exec({code!r})\n"
        "except SystemExit as stop:\n    assert not stop.code, stop.code\n"
        f"print('LOADED', *[m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_importing_the_package_and_its_commands_is_light():
    assert heavy_modules("import castalia, castalia.cli, castalia.errors") == set()


def test_help_is_light():
    assert heavy_modules("from castalia.cli import main; raise SystemExit(main(['--help']))") == set()


def test_the_help_of_every_verb_is_light():
    # One interpreter for all of them: each starts where the last one left off, which changes nothing
    # about what is loaded in the end.
    code = (
        "from castalia.cli import VERBS, main\n"
        "for verb in VERBS:\n"
        "    try:\n        main([verb, '--help'])\n"
        "    except SystemExit as stop:\n        assert not stop.code, verb\n"
    )
    assert heavy_modules(code) == set()


def test_the_configuration_loads_without_torch_or_numpy():
    assert heavy_modules("import castalia.config", ("torch", "numpy")) == set()


def test_a_heavy_import_is_seen():
    assert heavy_modules("import sys, numpy") == {"numpy"}
    assert heavy_modules("def f():\n    import yaml\nf()", ("yaml", "torch")) == {"yaml"}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_of_the_help_exists(verb):
    module = import_module(f"castalia.cli.{verb}")
    assert callable(module.arguments) and callable(module.run)


def test_the_installed_command_is_this_one(root):
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, function = project["scripts"]["castalia"].split(":")
    assert import_module(module).main is getattr(import_module(module), function)
    assert "version" in project["dynamic"]
    assert f"version: {__version__}\n" in (root / "CITATION.cff").read_text(encoding="utf-8")
