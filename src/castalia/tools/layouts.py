"""The whole matrix of layouts and models against one process, as a table (`certify layouts`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from castalia.config import load
from castalia.errors import CheckFailed
from castalia.tools.verify import LAYOUTS, TOLERANCE, refusal, verify_layouts, verify_resume
from castalia.tools.verify_compare import Verdict
from castalia.tools.verify_faults import FAULTS

MODELS: dict[str, tuple[str, ...]] = {
    "rotary, parallel residual, dropout": (
        "model.residual=parallel",
        "model.rotary_fraction=0.25",
        "model.hidden_dropout=0.1",
        "model.attention_dropout=0.1",
    ),
    "grouped queries, swiglu, rmsnorm": ("model.num_kv_heads=4", "model.activation=swiglu", "model.norm=rmsnorm"),
    "mixture of experts": ("model.moe_num_experts=4", "model.moe_shared_experts=1", "model.activation=swiglu"),
    "mixture of experts, losses, dropout": (
        "model.moe_num_experts=4",
        "loss.moe_balance=0.05",
        "loss.moe_z_loss=0.01",
        "model.moe_jitter=0.1",
        "model.hidden_dropout=0.1",
        "model.attention_dropout=0.1",
    ),
    "documents apart, dropout": (
        "data.document_mask=true",
        "model.hidden_dropout=0.1",
        "model.attention_dropout=0.1",
    ),
    "T5's relative bias": ("model.position=rpe",),
    "ALiBi": ("model.position=alibi",),
    "learned positions, tied embeddings": ("model.position=learned", "model.tie_embeddings=true"),
}
RESUMPTIONS = (("zero3", "tp2"), ("tp2sp", "zero3pp2"), ("pp2", "cp2"), ("dp4", "hsdp"))
FAULTY = ("dp2", "tp2sp", "zero3", "pp2")


def certify_layouts(folder: Path) -> str:
    """See `castalia.tools.certify`.

    Raises:
        CheckFailed: a layout differs, or a planted fault passed.
    """
    path = folder / "run.yml"
    path.write_text(json.dumps({"version": 1, "training": {"steps": 10}}), encoding="utf-8")
    rows: list[tuple[str, ...]] = []
    refused: list[tuple[str, ...]] = []
    for model, overrides in MODELS.items():
        config = load([path], overrides)
        # Eight processes once: that is slow on a small machine.
        for name in [n for n, (processes, _) in LAYOUTS.items() if processes < 8 or model == next(iter(MODELS))]:
            why = refusal(config, name)
            if why is not None:
                refused.append((model, name, why))
                continue
            (verdict,) = verify_layouts(config, [name], timeout=300)
            rows.append((model, *_row(verdict)))
        for before, after in RESUMPTIONS:
            if refusal(config, before) or refusal(config, after):
                continue
            rows.append((model, *_row(verify_resume(config, before, after, timeout=300))))
    faults = []
    for fault in FAULTS:
        for name in FAULTY:
            (verdict,) = verify_layouts(load([path]), [name], fault=fault, timeout=300)
            # One rank has nothing to reduce or to average in these.
            faults.append((fault, name, f"found: {verdict.guilty}" if verdict.guilty else "changes nothing"))
    from castalia.tools.certify import table

    said = f"Largest relative differences, at most {TOLERANCE:g}. `a -> b`: killed under a, gone on under b.\n\n"
    head = ("model", "layout", "processes", "loss", "norm", "gradient", "weights")
    said += table(head, rows) + "\nRefused:\n\n" + table(("model", "layout", ""), refused)
    return said + "\nPlanted faults:\n\n" + table(("fault", "layout", ""), faults)


def _row(verdict: Verdict) -> tuple[str, ...]:
    numbers = [f"{x:.1e}" for x in (verdict.loss, verdict.norm, verdict.gradient, verdict.weight)]
    print(verdict.layout, *numbers, file=sys.stderr, flush=True)
    if not verdict.good:
        raise CheckFailed(f"{verdict.layout}: differs from one process, first in {verdict.first}: {numbers}")
    return (verdict.layout, str(verdict.processes), *numbers)
