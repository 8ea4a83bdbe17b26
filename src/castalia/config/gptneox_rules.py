"""Values of GPT-NeoX -> values of ours: one small function for each of our keys that is not a mere renaming.

Formulas are those of GPT-NeoX v2.0 and main, as `compat` says. Where they crash or make no
sense they are mended; where they are merely odd they are kept, so that curves come out the
same. Each rule lists the keys it reads, so that its result can say where it came from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from castalia.config.gptneox_curriculum import CURRICULUM_RULES
from castalia.config.gptneox_given import Given, Rule, near
from castalia.config.gptneox_hosts import KEYS as HOST_KEYS
from castalia.config.gptneox_hosts import counted_devices
from castalia.config.gptneox_model import MODEL_RULES, score_scaling
from castalia.config.gptneox_optimizer import OPTIMIZER_RULES
from castalia.config.gptneox_parallel import PARALLEL_RULES
from castalia.config.gptneox_run import RUN_RULES, resuming, saving
from castalia.config.gptneox_schedule import SCHEDULE_RULES

# Theirs -> ours, the value as it is.
RENAMED: dict[str, str] = {
    "num_kv_heads": "model.num_kv_heads",
    "padded_vocab_size": "model.vocab_size",
    "rotary_pct": "model.rotary_fraction",
    "rotary_emb_base": "model.rotary_base",
    "init_method_std": "model.init_std",
    "hidden_dropout": "model.hidden_dropout",
    "attention_dropout": "model.attention_dropout",
    "use_bias_in_attn_linear": "model.attention_bias",
    "use_bias_in_mlp": "model.mlp_bias",
    "gradient_clipping": "optimizer.clip_grad",
    "exit_interval": "training.exit_interval",
    "seed": "training.seed",
    "data_path": "data.path",
    "train_data_paths": "data.train_paths",
    "valid_data_paths": "data.valid_paths",
    "test_data_paths": "data.test_paths",
    "eod_mask_loss": "data.mask_loss_at_eod",
    "save": "output",
    "keep_last_n_checkpoints": "checkpoint.keep_last",
    "checkpoint_validation_with_forward_pass": "checkpoint.validate_forward",
    "log_interval": "logging.interval",
    "log_grad_pct_zeros": "logging.zero_gradients",
    "log_gradient_noise_scale": "logging.noise_scale",
    "log_dir": "logging.log_dir",
    "tensorboard_dir": "logging.tensorboard",
    "char_level_ppl": "evaluation.characters",
    "eval_tasks": "evaluation.tasks",
}
REQUIRED: dict[str, str] = {
    "num_layers": "model.num_layers",
    "hidden_size": "model.hidden_size",
    "num_attention_heads": "model.num_attention_heads",
    "max_position_embeddings": "model.max_position_embeddings",
    "seq_length": "data.seq_length",
    "train_iters": "training.steps",
}


# Batch and precision.


def batch(given: Given) -> tuple[int, int]:
    """(sequences per step over all devices, sequences per forward pass and device).

    GPT-NeoX takes gradient_accumulation_steps as 1 where it is not given, and then stops over
    a batch that needs more; here it is derived.
    """
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    left_open = [key for key in keys if given.values.get(key) == "auto"]
    if left_open and not isinstance(given.values.get("train_batch_size"), int):
        why = "a search for the batch size, which changes what is learnt"
        given.unsupported(left_open[0], why, "give train_batch_size; `castalia tune` then finds the micro-batch")
    total, micro, steps = (None if key in left_open else given.positive(key) for key in keys)
    devices = data_parallel(given)
    if left_open and micro is None and steps is None:
        given.remark(f"{left_open[0]}: auto: micro-batches of 1 until `castalia tune` has found the quickest")
        micro = 1
    if micro is None:
        if total is None:
            given.required("train_micro_batch_size_per_gpu")
        micro = (total or 0) // devices // (steps or 1)
    elif total is None:
        total = micro * (steps or 1) * devices
    if steps is None and micro:
        steps = (total or 0) // micro // devices
    if total is None or not micro or total != micro * (steps or 0) * devices:
        given.fail(
            "train_batch_size" if "train_batch_size" in given else "train_micro_batch_size_per_gpu",
            f"does not fit: a step of {total} sequences is not train_micro_batch_size_per_gpu {micro} x "
            f"gradient_accumulation_steps {steps} x {devices} devices",
        )
    return total, micro


def data_parallel(given: Given) -> int:
    """Devices that share a batch; GPT-NeoX counts them where it runs, unless the configuration says."""
    key = "global_num_gpus" if "global_num_gpus" in given else "world_size"
    devices = given.positive(key)
    if devices is None:
        key, devices = "hostfile", counted_devices(given)
    if devices is None:
        if "train_batch_size" not in given:
            given.remark("global_num_gpus: not given, so the batch is that of one device; more made it larger there")
        return 1
    if devices < 1:
        given.fail(key, "leaves no device")
    parallel = 1
    for split in ("pipe_parallel_size", "model_parallel_size"):
        parallel *= max(given.values.get(split) or 1, 1)
    if devices % parallel:
        given.fail(key, f"({devices}) does not divide by the {parallel} devices that share one model")
    return devices // parallel


def precision(given: Given) -> str:
    """fp32, bf16 or fp16, by the rules of v2.0 or of main."""
    if given.compat == "v2.0":
        return _precision_v2(given)
    if given["fp16"] is not None and "enabled" not in given["fp16"]:
        given.fail("fp16", "needs 'enabled', which is true or false")
    said = given["precision"]
    kind = "fp32" if said is None else given.choose("precision", {"fp16": "fp16", "bfloat16": "bf16", "fp32": "fp32"})
    for block, meant in (("fp16", "fp16"), ("bf16", "bf16")):
        if (given[block] or {}).get("enabled"):
            if said is not None and kind != meant:
                given.fail("precision", f"is {said}, but {block} is enabled: keep one")
            kind = meant
            if block == "fp16":
                break
    return kind


def _precision_v2(given: Given) -> str:
    """v2.0: fp16.type or precision bfloat16, else fp16.enabled, else fp32 (even `precision: fp16` alone)."""
    block = given["fp16"] or {}
    if given["fp16"] is not None and "enabled" not in block:
        given.fail("fp16", "needs 'enabled', which is true or false")
    if block.get("type", given["precision"]) == "bfloat16":
        return "bf16"
    if block.get("enabled"):
        return "fp16"
    if given["precision"] == "fp16":
        given.remark("precision: fp16 without an fp16 block means fp32 in v2.0, so it does here")
    return "fp32"


# What an fp16 block may hold -> ours; DeepSpeed's defaults are ours too.
_SCALES = {
    "loss_scale": "loss_scale",
    "initial_scale_power": "initial_scale_power",
    "loss_scale_window": "loss_scale_window",
    "hysteresis": "loss_scale_hysteresis",
    "min_loss_scale": "min_loss_scale",
}
_OTHERS = {
    "consecutive_hysteresis": "a hysteresis that each good step refills",
    "auto_cast": "inputs that are cast to fp16",
    "fp16_master_weights_and_grads": "master weights in fp16",
}


def _scale(key: str) -> Callable[[Given], Any]:
    """The value of a key of the fp16 block, where it counts: in fp16, and of a dynamic scale where the scale is one."""

    def value(given: Given) -> Any:
        if precision(given) != "fp16":
            return None
        block = _fp16_block(given)
        if key == "loss_scale":
            return float(block["loss_scale"]) if block.get("loss_scale") else None
        if block.get("loss_scale"):
            return None  # it stays: nothing moves it there either
        if key == "hysteresis" and not (given["zero_optimization"] or {}).get("stage"):
            given.remark(
                "fp16.hysteresis: without ZeRO GPT-NeoX halves the loss scale at each overflow, so it is 1 here"
            )
            return 1
        number = block.get(key)
        return float(number) if key == "min_loss_scale" and number is not None else number

    return value


def _fp16_block(given: Given) -> dict[str, Any]:
    block: dict[str, Any] = given["fp16"] or {}
    for key, number in block.items():
        if key in _OTHERS:
            if number:
                given.unsupported("fp16", _OTHERS[key], f"remove {key}")
        elif key not in (*_SCALES, "enabled", "type"):
            given.fail("fp16", f"has an unknown key '{key}'{near(key, _SCALES)}")
        elif key in _SCALES:
            whole = key not in ("loss_scale", "min_loss_scale")
            if isinstance(number, bool) or not isinstance(number, int if whole else int | float):
                given.fail("fp16", f"has {key} {number!r}: give a {'whole ' if whole else ''}number")
    return block


# Data and tokenizer.


def data_split(given: Given) -> str | None:
    """The shares, where one data set is split."""
    return str(given["split"]) if "split" in given or "data_path" in given else None


def _own_weights(key: str) -> Callable[[Given], Any]:
    return lambda given: None if given["weight_by_num_documents"] else given[key]


def _labels(key: str) -> Callable[[Given], Any]:
    return lambda given: given[key] or None  # an empty list asks for nothing


_PACKINGS = ("packed", "pack_until_overflow", "unpacked")


def packing(given: Given) -> str:
    """Our packings have the names of theirs."""
    name = given.choose("pack_impl", {name: name for name in _PACKINGS})
    if name != "packed":
        given.remark(
            f"pack_impl: {name} has GPT-NeoX's documents in GPT-NeoX's order, but no sample ends with a token of "
            "another sample's document, and padding is never learnt"
        )
    return name


def allow_chopped(given: Given) -> bool | None:
    """Of no use to what is packed."""
    return None if str(given["pack_impl"]).lower() == "packed" else bool(given["allow_chopped"])


def _by_documents(value: Callable[[Given], Any]) -> Callable[[Given], Any]:
    return lambda given: value(given) if given["weight_by_num_documents"] else None


def tokenizer_path(given: Given) -> str | None:
    """The tokenizer in Castalia's spelling; where no file is named, the one kept beside the data."""
    kind, file = str(given["tokenizer_type"]).lower(), given["vocab_file"]
    if kind in ("hftokenizer", "hfgpt2tokenizer"):
        return None if file is None else str(file)
    if kind == "charleveltokenizer":
        return "char"
    if kind in ("gpt2bpetokenizer", "tiktokentokenizer", "spmtokenizer") and file is None:
        return None
    if kind == "gpt2bpetokenizer":
        if given["merge_file"] is None:
            given.remark("vocab_file: GPT2BPETokenizer needs merge_file too; the tokenizer beside the data is taken")
            return None
        return f"gpt2:{file}:{given['merge_file']}"
    if kind == "tiktokentokenizer":
        return f"tiktoken:{file}"
    if kind == "spmtokenizer":
        return f"sentencepiece:{file}"
    given.unsupported("tokenizer_type", "another kind of tokenizer", "use HFTokenizer, with a tokenizer.json")


def merge_file(given: Given) -> None:
    """Of no use but to GPT2BPETokenizer."""
    if "merge_file" in given and str(given["tokenizer_type"]).lower() != "gpt2bpetokenizer":
        given.remark("merge_file: only GPT2BPETokenizer reads one")


def data_paths(given: Given) -> None:
    """One data set that is split, or one list for each split."""
    lists = [f"{split}_data_paths" for split in ("train", "valid", "test")]
    missing = [key for key in lists if key not in given]
    if missing and len(missing) < 3:
        first = next(key for key in lists if key in given)
        given.fail(first, f"is given without {' and '.join(missing)}: GPT-NeoX wants all three, or data_path")


_SPLITS = ("train", "valid", "test")
_BATCH = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "global_num_gpus",
    "world_size",
    *HOST_KEYS,
)

RULES: tuple[Rule, ...] = (
    *MODEL_RULES,
    *OPTIMIZER_RULES,
    *SCHEDULE_RULES,
    Rule("training.batch_size", _BATCH, lambda g: batch(g)[0]),
    Rule("training.micro_batch_size", _BATCH[1:] + _BATCH[:1], lambda g: batch(g)[1]),
    Rule("training.precision", ("precision", "fp16", "bf16"), precision),
    *(Rule(f"training.{ours}", ("fp16",), _scale(key)) for key, ours in _SCALES.items()),
    Rule("loss.normalisation", (), lambda g: "micro_batch_mean"),
    Rule("data.split", ("split",), data_split),
    *(Rule(f"data.{s}_weights", (f"{s}_data_weights",), _own_weights(f"{s}_data_weights")) for s in _SPLITS),
    *(Rule(f"data.{s}_label_paths", (f"{s}_label_data_paths",), _labels(f"{s}_label_data_paths")) for s in _SPLITS),
    Rule("data.packing", ("pack_impl",), packing),
    Rule("data.allow_chopped", ("allow_chopped", "pack_impl"), allow_chopped),
    Rule("data.weights_alpha", ("weighted_sampler_alpha",), _by_documents(lambda g: g["weighted_sampler_alpha"])),
    Rule("data.weights_formula", ("weight_by_num_documents",), _by_documents(lambda g: "gptneox")),
    Rule("tokenizer.path", ("vocab_file", "tokenizer_type", "merge_file"), tokenizer_path),
    *RUN_RULES,
    *PARALLEL_RULES,
    *CURRICULUM_RULES,
)
# What is only checked: their keys, and the check.
CHECKS: tuple[tuple[tuple[str, ...], Callable[[Given], None]], ...] = (
    (("apply_query_key_layer_scaling",), score_scaling),
    (("merge_file",), merge_file),
    (("save",), saving),
    ((), resuming),
    (("train_data_paths", "valid_data_paths", "test_data_paths"), data_paths),
)
# Keys of ours that keep their null where theirs say nothing: null means something other than our default.
NULL_COUNTS = frozenset({"checkpoint.interval", "evaluation.interval"})
