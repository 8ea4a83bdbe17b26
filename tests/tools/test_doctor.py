"""The doctor finds what is wrong, and passes what is right."""

import json

import pytest
import torch

from castalia.cli import main
from castalia.parallel.check import collective_faults
from castalia.parallel.testing import run_in_processes
from castalia.tools import doctor

CPU = torch.device("cpu")


def test_a_right_device_passes_in_both_precisions():
    for precision in ("fp32", "bf16"):
        assert "of the CPU in fp64" in doctor._against_cpu({"position": "alibi"}, precision, CPU)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_kernel_that_errs_is_found(precision, monkeypatch):
    right = torch.nn.functional.scaled_dot_product_attention

    def wrong(q, *args, **kwargs):
        out = right(q, *args, **kwargs)
        return out if q.dtype == torch.float64 else out.roll(1, 2)  # as if the mask were shifted by a token

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong)
    finding = doctor._tried("kernel", lambda: doctor._against_cpu({}, precision, CPU))
    assert not finding.good and "from the CPU in fp64" in finding.detail


def test_collectives_are_right_on_gloo():
    for faults in run_in_processes(2, collective_faults):
        assert len(faults) == 6 and not any(faults.values())


def test_the_verb_reports_failures_and_goes_on(monkeypatch, tmp_path, capsys):
    def fails(*_):
        raise RuntimeError("no kernel image\nsecond line")

    monkeypatch.setattr(doctor, "_against_cpu", fails)
    monkeypatch.setattr(doctor, "_learns", lambda *_: "learnt")
    output = tmp_path / "report.json"
    assert main(["doctor", "--procs", "1", "--output", str(output)]) == 4
    report = json.loads(output.read_text())
    assert report["failed"] == 14 and len(report["findings"]) == 17
    assert report["findings"][0]["detail"].startswith("RuntimeError: no kernel image (")
    assert report["environment"]["torch"] == torch.__version__
    assert main(["doctor", "--procs", "1", "--output", str(output)]) == 2
    assert "exists already" in capsys.readouterr().err
