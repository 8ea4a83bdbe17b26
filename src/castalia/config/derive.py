"""Configuration -> the same with everything filled in that follows from it, and how it followed.

    training.tokens ──> training.steps ──> schedule.decay_steps
    model.hidden_size, heads ──> head_dim, num_kv_heads, intermediate_size
    tokenizer's ids ──> model.vocab_size

A derived configuration is a fixed point: deriving it again changes nothing, so that a run's
config.yaml starts the same run. What depends on the machine (device, threads) or on where
the run is kept (output) stays null, and so does schedule.warmup_steps: GPT-NeoX's warm-up
is a real number of steps, and rounding it would move the whole curve.
"""

from __future__ import annotations

from typing import Any

from castalia.config.fields import flat
from castalia.config.load import Tree, check
from castalia.config.ramp import levels, steps_for
from castalia.config.schema import Config
from castalia.config.yaml12 import Origin
from castalia.errors import UserError

DERIVED = Origin("derived")


class _Derivation:
    """Values filled in so far, each with its sentence."""

    def __init__(self, config: Config) -> None:
        self.values: dict[str, Any] = {}
        self.lines: list[str] = []
        self._config = config

    def fill(self, key: str, value: Any, how: str) -> None:
        """Fill `key` if the configuration leaves it open; `how` says in words and numbers how it follows."""
        section, name = key.split(".")
        if getattr(getattr(self._config, section), name) is None:
            self.values[key] = value
            self.lines.append(f"{key} = {value}: {how}")


def derive(config: Config, tokenizer_vocab_size: int | None = None) -> tuple[Config, list[str]]:
    """Fill in what follows from a configuration.

    Args:
        config: a checked configuration.
        tokenizer_vocab_size: number of ids of the tokenizer; None: there is none, and then
            `model.vocab_size` stays as given.

    Returns:
        The complete configuration, and a line of derivation for each value filled in.

    Raises:
        UserError: the tokenizer has more ids than `model.vocab_size`, or no ids.
    """
    out = _Derivation(config)
    _training(config, out)
    _data(config, out)
    _model(config, out)
    _vocabulary(config, tokenizer_vocab_size, out)
    tree = Tree(flat(config) | out.values, dict(config._origins), list(config._notes), list(config._remarks))
    if "training.steps" in out.values:
        tree.values["training.tokens"] = None
    for key in out.values:
        tree.origins[key] = DERIVED
    return check(tree), out.lines


def padded_vocab_size(ids: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that holds `ids` ids."""
    return -(-ids // multiple) * multiple


def _training(config: Config, out: _Derivation) -> None:
    training, schedule = config.training, config.schedule
    per_step = training.batch_size * config.data.seq_length
    steps = training.steps
    if steps is None:
        tokens = training.tokens or 0
        steps = steps_for(levels(training), -(-tokens // config.data.seq_length))
        ramp = f", from {training.batch_ramp_start} on as training.batch_ramp_start says" * bool(
            training.batch_ramp_start
        )
        out.fill(
            "training.steps",
            steps,
            f"training.tokens {tokens:,} / ({training.batch_size} sequences "
            f"x {config.data.seq_length} tokens = {per_step:,} a step{ramp}), rounded up",
        )
    out.fill("training.micro_batch_size", training.batch_size, "the whole batch of training.batch_size at once")
    out.fill("schedule.decay_steps", max(steps, 1), "the decay lasts as long as the training, training.steps")
    horizon = schedule.decay_steps or max(steps, 1)
    if schedule.warmup_steps is None and schedule.warmup > 0:
        out.lines.append(
            f"warm-up of {schedule.warmup * horizon:.6g} steps: schedule.warmup {schedule.warmup:g} "
            f"x schedule.decay_steps {horizon}, not rounded"
        )


def _data(config: Config, out: _Derivation) -> None:
    data = config.data
    out.fill("data.seed", config.training.seed, "as training.seed")
    for split in ("train", "valid", "test"):
        paths = getattr(data, f"{split}_paths")
        if paths is not None and data.weights_alpha is None:
            out.fill(f"data.{split}_weights", [1.0] * len(paths), f"equal shares of data.{split}_paths")


def _model(config: Config, out: _Derivation) -> None:
    model = config.model
    heads = model.num_attention_heads
    out.fill("model.num_kv_heads", heads, f"one key/value head for each of {heads} query heads")
    out.fill(
        "model.head_dim",
        model.head_size,
        f"model.hidden_size {model.hidden_size} / {heads} model.num_attention_heads",
    )
    how = "8/3 x model.hidden_size {}, rounded up to a multiple of 64, as the MLP is gated"
    how = how if model.gated else "4 x model.hidden_size {}"
    out.fill("model.intermediate_size", model.mlp_size, how.format(model.hidden_size))
    if model.moe_num_experts:
        out.fill("model.moe_intermediate_size", model.expert_size, "as model.intermediate_size")
    out.fill("model.max_position_embeddings", config.max_positions, "as data.seq_length")


def _vocabulary(config: Config, ids: int | None, out: _Derivation) -> None:
    model = config.model
    if ids is None:
        return
    if ids < 1:
        raise UserError("the tokenizer has no ids: name another in tokenizer.path")
    if model.vocab_size is not None and ids > model.vocab_size:
        at = config._origins.get("model.vocab_size")
        least = padded_vocab_size(ids, model.vocab_multiple)
        raise UserError(
            f"{f'{at}: ' if at else ''}the tokenizer has {ids} ids, more than model.vocab_size "
            f"{model.vocab_size}: raise model.vocab_size to at least {least}, or leave it out"
        )
    out.fill(
        "model.vocab_size",
        padded_vocab_size(ids, model.vocab_multiple),
        f"the tokenizer's {ids} ids, rounded up to a multiple of model.vocab_multiple {model.vocab_multiple}",
    )
