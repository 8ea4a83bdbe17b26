"""GPT-NeoX's own tests have twins here: docs/design/gptneox_tests.md names them, and what it names exists."""

import ast
import re

import pytest

from castalia.config import Config, load
from castalia.errors import UserError

TABLE = "docs/design/gptneox_tests.md"
# Their files, as of v2.0 and main.
THEIRS = """
    neox_args/test_neoxargs_commandline.py neox_args/test_neoxargs_implementation.py neox_args/test_neoxargs_load.py
    neox_args/test_neoxargs_usage.py model/test_model_instantiation.py model/test_model_train.py
    model/test_model_checkpoint.py model/test_model_generation.py model/test_fused_kernels.py unit/test_arguments.py
    unit/test_launcher_scripts.py unit/test_format_conversion_scripts.py unit/test_tokenizer.py
    unit/test_url_accessibility.py unit/test_dependencies.py requirements/test_requirements.py
""".split()


def rows(text):
    """Their test -> the nodes of ours that its row names."""
    lines = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    return {cells[0].strip(" `"): re.findall(r"`(tests/[^`]+)`", "".join(cells[1:])) for cells in lines}


def missing(root, nodes):
    """Those of some nodes (FILE or FILE::FUNCTION) that do not exist."""
    out = []
    for node in nodes:
        path, _, name = node.partition("::")
        if not (root / path).is_file():
            out.append(node)
            continue
        tree = ast.parse((root / path).read_text(encoding="utf-8"))
        if name and name not in {f.name for f in ast.walk(tree) if isinstance(f, ast.FunctionDef)}:
            out.append(node)
    return out


def test_each_of_their_files_has_a_row_whose_tests_exist(root):
    table = rows((root / TABLE).read_text(encoding="utf-8"))
    assert table.keys() == set(THEIRS)
    assert all(table.values())
    assert missing(root, [node for nodes in table.values() for node in nodes]) == []


def test_a_test_that_is_not_there_is_seen(root):
    found = rows("| `a.py` | `tests/rules/test_twins.py::rows`, `tests/rules/test_twins.py::gone`, `tests/gone.py` |")
    assert missing(root, found["a.py"]) == ["tests/rules/test_twins.py::gone", "tests/gone.py"]


def test_a_machine_without_a_model_is_no_configuration(root):
    with pytest.raises(UserError, match="which GPT-NeoX requires"):
        load([root / "configs/gptneox/local_setup.yml"], ["checkpoint_factor=10"])


def undeclared(sources):
    """Settings that the code reads as config.SECTION.KEY, and that no section has."""
    sections = {
        n: f.annotation.model_fields for n, f in Config.model_fields.items() if hasattr(f.annotation, "model_fields")
    }
    reads = re.compile(rf"\b(?:cfg|config)\.({'|'.join(sections)})\.([a-z_0-9]+)\b(?!\()")
    return [
        f"{path}: {section}.{key}"
        for path, text in sources.items()
        for section, key in reads.findall(text)
        if key not in sections[section] and not hasattr(Config.model_fields[section].annotation, key)
    ]


def test_every_setting_that_is_read_is_declared(sources):
    assert undeclared(sources) == []
    assert undeclared({"a.py": "config.model.hidden_size + config.model.hiden_size"}) == ["a.py: model.hiden_size"]
