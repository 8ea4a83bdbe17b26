"""`castalia plan CONFIG [--json]`: what a configuration weighs and costs, reckoned without torch."""

from __future__ import annotations

import argparse
import json

from castalia.cli import split_settings


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("settings", nargs="+", metavar="FILE|key=value", help="configuration files and overrides")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Print the sizes."""
    from castalia.config import load, notes
    from castalia.config.curriculum import trained_tokens
    from castalia.config.derive import derive
    from castalia.model.size import model_size
    from castalia.tools.plan import tokenizer_vocabulary

    config = load(*split_settings(args.settings))
    full, derivation = derive(config, tokenizer_vocabulary(config))
    size = model_size(full)
    steps = full.training.steps or 0
    tokens = trained_tokens(full, steps)
    state = size.weight_bytes + size.gradient_bytes + size.optimizer_bytes + size.working_bytes
    answer = {
        "name": full.name,
        **size.as_dict(),
        "steps": steps,
        "tokens": tokens,
        "total_flops": tokens * size.flops_per_token,
        "vocab_size": full.model.vocab_size,
        "state_bytes": state,
    }
    if args.json:
        print(json.dumps(answer, indent=2))
        return 0
    for line in [*notes(config), *derivation]:
        print(f"  {line}")
    active = size.active_parameters
    met = f", of which a token meets {active:,}" if active < size.total_parameters else ""
    rows = [
        ("parameters", f"{size.total_parameters:,}{met}"),
        ("without embeddings", f"{size.non_embedding_parameters:,}"),
        ("FLOPs per token", f"{size.flops_per_token:,}"),
        ("training", f"{steps:,} steps, {tokens:,} tokens, {answer['total_flops']:.3g} FLOPs"),
        ("weights", f"{size.weight_bytes / 2**20:,.1f} MiB fp32"),
        ("gradients", f"{size.gradient_bytes / 2**20:,.1f} MiB fp32"),
        ("optimizer", f"{size.optimizer_bytes / 2**20:,.1f} MiB of {full.optimizer.type}"),
        ("bf16 copies", f"{size.working_bytes / 2**20:,.1f} MiB"),
        ("together", f"{state / 2**20:,.1f} MiB, and activations on top"),
    ]
    for label, text in rows:
        print(f"{label:<20} {text}")
    return 0
