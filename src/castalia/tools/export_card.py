"""A run's settings, data and results -> the README.md of its Hugging Face folder.

Everything in it is read from the run: nobody has to remember what a model was trained on. The licence is
left open, since only the user knows it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from castalia.config import Config

_OF_MODEL = (
    *("num_layers", "hidden_size", "num_attention_heads", "num_kv_heads", "intermediate_size", "vocab_size"),
    *("norm", "activation", "position", "attention", "residual", "tie_embeddings", "moe_num_experts"),
)


def model_card(
    run: Path, name: str, config: Config, state: dict[str, Any], settings: dict[str, Any], parity: dict[str, Any]
) -> str:
    """The text of README.md.

    Args:
        run: whose metrics.jsonl is read, where there is one.
        name: of the model.
        config, state: of the checkpoint.
        settings: config.json.
        parity: parity.json.
    """
    model = config.model
    facts = [
        ("class of transformers", settings["architectures"][0]),
        ("positions", f"{config.max_positions:,}"),
        *((key, str(getattr(model, key))) for key in _OF_MODEL if getattr(model, key) not in (None, 0)),
    ]
    training = [
        ("optimizer steps", f"{state['step']:,}"),
        ("tokens seen", f"{state['tokens']:,}"),
        ("sequence length, batch size", f"{config.data.seq_length:,}, {config.training.batch_size:,}"),
        ("optimizer, learning rate", f"{config.optimizer.type}, {config.optimizer.lr:g}"),
        ("precision, seed", f"{config.training.precision}, {config.training.seed}"),
        ("written by", f"Castalia {state['versions']['castalia']}, torch {state['versions']['torch']}"),
    ]
    data = [(prefix, f"`{fingerprint}`") for prefix, fingerprint in (state.get("data") or {}).items()]
    said = (
        f"Logits equal those of transformers {parity.get('transformers', '')} to "
        f"{parity['largest_relative_difference']:.1e}, relative to the largest"
        if parity["checked"]
        else "Logits were not compared with those of transformers"
    )
    parts = [
        "---\nlibrary_name: transformers\npipeline_tag: text-generation\n# license: said by whoever releases it\n---",
        f"# {name}",
        f"A language model in Hugging Face format, weights in {parity['dtype']}. {said} (`parity.json`). Tokenizer: "
        f"{parity['tokenizer']}.",
        "## Model\n\n" + _table(("setting", "value"), facts),
    ]
    if state["tokens"]:  # none where the weights were only imported
        parts.append("## Training\n\n" + _table(("", ""), training))
    if data:
        parts.append("## Data\n\n" + _table(("data set", "fingerprint"), data))
    if state.get("import"):
        parts.append(f"The run began from: {state['import']}")
    results = _results(run / "metrics.jsonl", state["step"])
    if results:
        head = ("split", "step", "loss (nats per token)", "bits per byte", "perplexity")
        parts.append("## Evaluation\n\n" + _table(head, results))
    return "\n\n".join(parts) + "\n"


def _results(metrics: Path, step: int) -> list[tuple[str, ...]]:
    """The last evaluation of each split up to a step."""
    last: dict[str, dict[str, Any]] = {}
    if not metrics.is_file():
        return []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the line that a run is writing just now
            continue
        if record.get("kind") in ("valid", "test") and record.get("step", 0) <= step:
            last[record["kind"]] = record
    figures = ("loss", "bits_per_byte", "perplexity")
    return [
        (kind, f"{r['step']:,}", *(f"{r[key]:.4f}" if key in r else "" for key in figures)) for kind, r in last.items()
    ]


def _table(head: tuple[str, ...], rows: list[Any]) -> str:
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])
