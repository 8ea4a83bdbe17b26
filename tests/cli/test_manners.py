"""What the command line says and spares: other people's files, one sentence for a wrong flag, any bytes."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from castalia.cli import _spoken_warnings, main
from castalia.config import load
from castalia.errors import UserError


def refusal(capsys, *argv: str) -> str:
    assert main(list(argv)) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("castalia: ")
    return error


def test_a_wrong_flag_is_one_sentence(capsys) -> None:
    assert "did you mean '--quiet'? `castalia train --help`" in refusal(capsys, "train", "a.yml", "--quite")
    assert "invalid int value" in refusal(capsys, "generate", "run", "--seed", "x")
    assert "the following arguments are required" in refusal(capsys, "evaluate")
    assert "nothing to measure: give --tasks, --text" in refusal(capsys, "evaluate", "run")
    assert "'a.yml' is none of show, explain" in refusal(capsys, "config", "a.yml")
    assert "`castalia verify checkpoint run`" in refusal(capsys, "verify", "run")
    assert "name a run or a checkpoint" in refusal(capsys, "verify", "checkpoint")
    assert "unknown flag '--versoin'" in refusal(capsys, "--versoin")
    assert "not valid text" in refusal(capsys, "generate", "run", "--prompt", "caf\udce9")


def test_texts_in_place_of_tokens_are_said(capsys, tmp_path) -> None:
    for name, said in (("a.jsonl", "give --text"), ("a.bin", f"prefix, {tmp_path / 'a'}")):
        (tmp_path / name).write_text("{}")
        assert said in refusal(capsys, "evaluate", "run", "--data", str(tmp_path / name))
    assert "does not exist: give a folder" in refusal(
        capsys, "import", str(tmp_path / "nothere"), str(tmp_path / "run")
    )


def test_a_warning_is_a_line_for_people(capsys) -> None:
    with _spoken_warnings():
        warnings.simplefilter("default")
        warnings.warn_explicit("a newer one was passed over", UserWarning, "/somewhere/castalia/a.py", 1)
    assert capsys.readouterr().err == "castalia: WARNING: a newer one was passed over\n"


def test_files_are_not_overwritten_unasked(capsys, tmp_path) -> None:
    there = tmp_path / "there.yml"
    there.write_text("name: mine\n")
    for argv in (["config", "convert", str(there)], ["config", "schema"]):
        assert "--overwrite" in refusal(capsys, *argv, "--output", str(there))
        assert there.read_text() == "name: mine\n"
    assert main(["config", "schema", "--output", str(there), "--overwrite"]) == 0
    assert there.read_text().startswith("{")


def test_home_folders_are_expanded(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load([], ["output=~/run", "data.train_paths=[~/a, b]"])
    assert config.output == f"{tmp_path}/run" and config.data.train_paths == [f"{tmp_path}/a", "b"]
    assert main(["config", "schema", "--output=~/schema.json"]) == 0
    assert (tmp_path / "schema.json").is_file()


@pytest.mark.parametrize("name", [".", "..", "../x", "a/b"])
def test_a_name_is_that_of_one_folder(name) -> None:
    with pytest.raises(UserError, match="command line: name"):
        load([], [f"name={name}"])


def test_a_wrong_value_is_blamed_on_whoever_said_it(tmp_path) -> None:
    path = tmp_path / "a.yml"
    path.write_text("optimizer:\n  lr: 1e-3\ndata: {seq_length: 8}\n")
    with pytest.raises(UserError, match=r"^command line: schedule\.min_lr"):
        load([path], ["schedule.min_lr=1"])
    path.write_text("optimizer:\n  lr: 1e-3\nschedule:\n  min_lr: 1\n")
    with pytest.raises(UserError, match=r"a\.yml:4: schedule\.min_lr"):
        load([path])


def test_a_tag_on_a_list_is_refused(tmp_path) -> None:
    path = tmp_path / "a.yml"
    path.write_text("optimizer:\n  betas: !!set [0.9, 0.95]\n")
    with pytest.raises(UserError, match=r"a\.yml:2: the tag .*set"):
        load([path])


def test_a_null_is_explained_by_what_follows(capsys) -> None:
    assert main(["config", "explain", "model.intermediate_size"]) == 0
    assert "here     model.intermediate_size = 1024: 4 x model.hidden_size 256" in capsys.readouterr().out


def test_closed_output_is_no_traceback() -> None:
    command = f"{sys.executable} -m castalia config explain optimizer.lr >&-"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and done.stderr == ""


def test_errors_of_configurations_come_before_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from castalia.cli import main; "
        "assert main(['train', 'nowhere.yml']) == 2; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=dict(os.environ), timeout=60)


def test_threads_wait_shortly_unless_told(monkeypatch, capsys):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    main(["corpora", "list"])
    assert os.environ["GOMP_SPINCOUNT"] == "10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    main(["corpora", "list"])
    assert os.environ["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    main(["corpora", "list"])
    assert "GOMP_SPINCOUNT" not in os.environ
