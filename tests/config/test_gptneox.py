"""GPT-NeoX files, against the facts of its two versions and a configuration that it ran."""

import json
from pathlib import Path
from typing import Any

import pytest

from castalia.config import load, notes, origins
from castalia.config.gptneox import family
from castalia.config.gptneox_keys import KNOWN, REFUSED, REPORTED, TRANSLATED
from castalia.config.gptneox_model import MODEL_RULES
from castalia.config.gptneox_rules import CHECKS, RENAMED, REQUIRED, RULES
from castalia.config.load import known_keys
from castalia.config.render import flat, to_yaml
from castalia.config.yaml12 import parse_yaml
from castalia.errors import UserError

HERE = Path(__file__).parent
FIXTURES = HERE.parent / "fixtures" / "gptneox_runs"
# The table of keys.


def test_every_key_of_both_versions_has_one_fate() -> None:
    keys = (HERE / "gptneox_keys.txt").read_text().split()
    assert len(keys) == len(set(keys)) == 325
    assert set(keys) == KNOWN - {"compat"}
    assert len(TRANSLATED) + len(REPORTED) + len(REFUSED) == len(keys)


def test_every_translated_key_is_read_and_every_result_is_a_key_of_ours() -> None:
    read = {*RENAMED, *REQUIRED}
    read |= {key for rule in RULES for key in rule.reads} | {key for keys, _ in CHECKS for key in keys}
    assert read == set(TRANSLATED)
    assert {*RENAMED.values(), *REQUIRED.values(), *(rule.ours for rule in RULES)} <= set(known_keys())
    assert set(MODEL_RULES) <= set(RULES)


def test_every_reported_key_is_accepted_with_its_reason(translated) -> None:
    plain = flat(translated())
    # Two of these names are sections of ours too; theirs are blocks with other keys.
    values: dict[str, Any] = dict.fromkeys(REPORTED, True) | {"override_lr_scheduler": False}
    values |= {"checkpoint": {"load_universal": True}, "tokenizer": {"load_universal": True}}
    config = translated(**values)
    assert flat(config) == plain
    for key, why in REPORTED.items():
        assert f"{key}: {why}" in notes(config)


@pytest.mark.parametrize("key", sorted(REFUSED))
def test_every_refused_key_is_refused_unless_it_asks_for_nothing(translated, key: str) -> None:
    refused = REFUSED[key]
    asks: Any = {"enabled": True, "fp16": 1} if refused.block or refused.passed_on else 17
    with pytest.raises(UserError) as error:
        translated(**{key: asks})
    assert f"'{key}'" in str(error.value)
    assert "not implemented yet" in str(error.value)
    assert "small.yml:" in str(error.value)
    for value in refused.harmless:
        translated(**{key: value})
    if refused.block:
        translated(**{key: {"enabled": False}})


def test_settings_passed_on_to_deepspeed_count_as_if_given_above(translated) -> None:
    translated(deepspeed_extra_args={"comms_logger": {"enabled": True}})
    with pytest.raises(UserError, match="passing settings on to DeepSpeed"):
        translated(deepspeed_extra_args={"curriculum_learning": {"enabled": True}})


# Recognising, merging, overriding.


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("num-layers: 3", "gptneox"),
        ("optimizer: {type: Adam, params: {lr: 1}}", "gptneox"),
        ("optimizer: {type: adamw, lr: 1}", "castalia"),
        ("checkpoint: {load_universal: true}", "gptneox"),
        ("checkpoint: {interval: 5}", "castalia"),
        ("model: {num_layers: 3}\nnum_layers: 3", "castalia"),
        ("model:", "castalia"),
        ("optimizer.lr: 3", "castalia"),
        ("compat: v2.0", "gptneox"),
        ("nun_layers: 3", None),
        ("", None),
    ],
)
def test_recognising_a_file(text: str, kind: str | None) -> None:
    assert family(parse_yaml(text, "f.yml")) == kind


def files(tmp_path: Path, **texts: str) -> list[Path]:
    for name, text in texts.items():
        (tmp_path / f"{name}.yml").write_text(text)
    return [tmp_path / f"{name}.yml" for name in texts]


def test_files_merge_whatever_their_dashes(tmp_path, small) -> None:
    dashed = {key.replace("_", "-"): value for key, value in small.items() if key != "train_iters"}
    a, b = files(tmp_path, a=json.dumps(dashed), b='{\n  "train-iters": 7,\n}')
    config = load([a, b])
    assert (config.training.steps, config.name) == (7, "a")
    assert str(origins(config)["training.steps"]) == f"{b}:2"
    assert str(origins(config)["schedule.arithmetic"]) == "GPT-NeoX main's default"
    assert config.model_dump() == load([b, a]).model_dump()


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ("num-layers: 3", "\nnum_layers: 4", "b.yml:2: 'num_layers' was given already at"),
        ("num-layers: 3\nnum_layers: 4", "", "a.yml:2: 'num_layers' was given before, at"),
        (
            "num_layers: 3",
            "\nhiden_size: 4",
            "b.yml:2: GPT-NeoX has no key 'hiden_size'; did you mean 'hidden_size'?",
        ),
        ("num_layers: 3", "model: {norm: rmsnorm}", "b.yml is a Castalia file and"),
        ("num_layers: 3", "compat: v1.0", "b.yml:1: 'compat' must be main or v2.0, got 'v1.0'"),
        ("num_layers: 3", "", "no file gives 'hidden_size', which GPT-NeoX requires"),
    ],
)
def test_files_that_do_not_merge(tmp_path, a: str, b: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load(files(tmp_path, a=a, b=b))
    assert message in str(error.value)


def test_a_base_may_be_a_gptneox_file(tmp_path, small) -> None:
    files(tmp_path, a=json.dumps(small))
    (b,) = files(tmp_path, b="base: a.yml\ntrain-iters: 7\n")
    config = load([b])
    assert (config.training.steps, config.model.num_layers) == (7, 2)
    assert str(origins(config)["training.steps"]) == f"{b}:2"
    assert str(origins(config)["model.num_layers"]) == f"{tmp_path / 'a.yml'}:1"


def test_overrides_are_in_their_keys_or_in_ours(translated) -> None:
    config = translated("train-iters=7", "optimizer.lr=0.5", "lr_decay_style=cosine", "compat=v2.0")
    assert (config.training.steps, config.optimizer.lr, config.schedule.type) == (7, 0.5, "cosine")
    assert config.schedule.arithmetic == "gptneox_v2.0"
    assert str(origins(config)["training.steps"]) == "command line"


def test_a_complete_file_is_written_in_our_terms(translated, tmp_path) -> None:
    config = translated()
    (tmp_path / "ours.yml").write_text(to_yaml(config))
    assert load([tmp_path / "ours.yml"]).model_dump() == config.model_dump()


def test_every_given_key_has_a_note(translated, small) -> None:
    config = translated(num_workers=0, checkpoint_factor=10, use_wandb=False)
    keys = {line.partition(":")[0] for line in notes(config)}
    assert keys >= {*small, "num_workers", "checkpoint_factor", "use_wandb"}
    assert "num_layers: became model.num_layers 2" in notes(config)
    assert "fp16: null, as if it were not given" in notes(translated("fp16=null"))


# What keys become.


def test_a_configuration_that_gptneox_ran() -> None:
    run = json.loads((FIXTURES / "seq_gptj.json").read_text())
    from castalia.config.gptneox import translate
    from castalia.config.load import Tree, check
    from castalia.config.yaml12 import Document

    said = run["config"] | {"vocab_file": run["vocab_file"], "data_path": run["data_path"]}
    translation = translate([Document("seq_gptj.json", said, {})])
    config = check(Tree(translation.values, translation.origins, translation.notes))
    values = flat(config)
    expected = {
        "name": "seq_gptj",
        "data.path": "ds",
        "data.split": "900,50,50",
        "data.seq_length": 64,
        "tokenizer.path": "tok.json",
        "model.num_layers": 3,
        "model.hidden_size": 32,
        "model.num_attention_heads": 4,
        "model.intermediate_size": 128,
        "model.vocab_multiple": 128,
        "model.max_position_embeddings": 64,
        "model.norm": "layernorm",
        "model.norm_epsilon": 1e-5,
        "model.activation": "gelu",
        "model.position": "rotary",
        "model.rotary_fraction": 0.25,
        "model.residual": "parallel",
        "model.tie_embeddings": False,
        "model.init_method": "small_init",
        "model.output_init_method": "wang_init",
        "training.steps": 30,
        "training.batch_size": 8,
        "training.micro_batch_size": 4,
        "training.precision": "fp32",
        "optimizer.type": "adamw",
        "optimizer.lr": 0.003,
        "optimizer.betas": [0.9, 0.95],
        "optimizer.weight_decay": 0.1,
        "optimizer.clip_grad": 1.0,
        "schedule.type": "cosine",
        "schedule.warmup": 0.1,
        "schedule.decay_steps": 30,
        "schedule.min_lr": 0.0003,
        "schedule.arithmetic": "gptneox_main",
        "loss.normalisation": "micro_batch_mean",
        "evaluation.interval": 10,
        "evaluation.batches": 2,
        "evaluation.continuing": True,
        "checkpoint.interval": 15,
        "checkpoint.extra_steps": [0],
        "logging.interval": 1,
    }
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("compat", "expected"),
    [
        (
            "main",
            {
                "optimizer.weight_decay": 0.1,
                "optimizer.clip_grad": 1.0,
                "schedule.arithmetic": "gptneox_main",
                "model.hidden_dropout": 0.0,
                "model.attention_dropout": 0.0,
            },
        ),
        (
            "v2.0",
            {
                "optimizer.weight_decay": 0.01,
                "optimizer.clip_grad": 0.0,
                "schedule.arithmetic": "gptneox_v2.0",
                "model.hidden_dropout": 0.1,
                "model.attention_dropout": 0.1,
            },
        ),
    ],
)
def test_defaults_are_those_of_the_version(translated, compat: str, expected: dict[str, Any]) -> None:
    plain = {"hidden_dropout": None, "attention_dropout": None, "optimizer": {"type": "Adam", "params": {}}}
    values = flat(translated(compat=compat, **plain))
    assert {key: values[key] for key in expected} == expected
    same = {
        "optimizer.lr": 0.001,
        "optimizer.betas": [0.9, 0.999],
        "model.init_method": "normal",
        "model.output_init_method": "scaled_normal",
        "model.tie_embeddings": True,
        "schedule.type": "linear",
        "schedule.warmup": 0.01,
        "evaluation.interval": 1000,
        "evaluation.batches": 100,
        "checkpoint.interval": None,
    }
    assert {key: values[key] for key in same} == same


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"no_weight_tying": True}, {"model.tie_embeddings": False}),
        ({"norm": "rmsnorm"}, {"model.norm": "rmsnorm", "model.norm_epsilon": 1e-8}),
        (
            {"norm": "te_layernorm", "layernorm_epsilon": 1e-6},
            {"model.norm": "layernorm", "model.norm_epsilon": 1e-6},
        ),
        ({"norm": "scalenorm", "scalenorm_epsilon": 1e-4}, {"model.norm": "scalenorm", "model.norm_epsilon": 1e-4}),
        (
            {"norm": "non_parametric_layernorm", "rms_norm_epsilon": 1.0},
            {"model.norm": "non_parametric_layernorm", "model.norm_epsilon": 1e-5},
        ),
        ({"use_qk_layernorm": True}, {"model.qk_norm": True}),
        ({"pos_emb": "none"}, {"model.position": "none"}),
        ({"pos_emb": None}, {"model.position": "learned", "model.position_offset": 0}),
        (
            {"pos_emb": "learned", "opt_pos_emb_offset": 2, "seq_length": 32},
            {"model.position": "learned", "model.position_offset": 2},
        ),
        ({"opt_pos_emb_offset": 2}, {"model.position_offset": 0}),
        ({"pos_emb": "Sinusoidal"}, {"model.position": "sinusoidal"}),
        ({"pos_emb": "alibi", "rpe_num_buckets": 8}, {"model.position": "alibi", "model.rpe_num_buckets": 32}),
        (
            {"pos_emb": "rpe", "rpe_num_buckets": 8, "rpe_max_distance": 20},
            {"model.position": "rpe", "model.rpe_num_buckets": 8, "model.rpe_max_distance": 20},
        ),
        ({"activation": "mish"}, {"model.activation": "mish"}),
        ({"activation": "bilinear"}, {"model.activation": "bilinear", "model.intermediate_size": 64}),
        ({"init_method": "xavier_normal"}, {"model.init_method": "xavier_normal"}),
        (
            {"hidden_dropout": 0.25, "attention_dropout": 0.5},
            {"model.hidden_dropout": 0.25, "model.attention_dropout": 0.5},
        ),
        (
            {"gpt_j_residual": True, "gpt_j_tied": True},
            {"model.residual": "parallel", "model.tie_norms": True},
        ),
        ({"gpt_j_tied": True}, {"model.residual": "sequential", "model.tie_norms": False}),
        (
            {"num_unique_layers": 1, "param_sharing_style": "spaced"},
            {"model.num_unique_layers": 1, "model.param_sharing_style": "spaced"},
        ),
        ({"num_unique_layers": 2}, {"model.num_unique_layers": None}),
        ({"soft_prompt_tuning": {"enabled": True}}, {"model.soft_prompt_tokens": 10, "model.soft_prompt_range": 0.5}),
        (
            {"soft_prompt_tuning": {"enabled": True, "num_tokens": 3, "init_range": 0.1}},
            {"model.soft_prompt_tokens": 3, "model.soft_prompt_range": 0.1},
        ),
        ({"soft_prompt_tuning": {"enabled": False, "n_tokens": 3}}, {"model.soft_prompt_tokens": 0}),
        ({"soft_prompt_tuning": {"enabled": True, "init_string": "Hello"}}, {"model.soft_prompt_text": "Hello"}),
        (
            {"rotary_emb_base": 500, "rotary_pct": 0.5},
            {"model.rotary_base": 500.0, "model.rotary_fraction": 0.5},
        ),
        ({"gpt_j_residual": "yes"}, {"model.residual": "parallel"}),
        ({"bias_gelu_fusion": True}, {"model.activation": "gelu_tanh"}),
        ({"bias_gelu_fusion": True, "activation": "swish"}, {"model.activation": "silu"}),
        ({"use_bias_in_mlp": False, "use_bias_in_attn_linear": False}, {"model.mlp_bias": False}),
        ({"num_kv_heads": 2}, {"model.num_kv_heads": 2}),
        ({"padded_vocab_size": 512}, {"model.vocab_size": 512}),
        ({"make_vocab_size_divisible_by": 64}, {"model.vocab_multiple": 64}),
        ({"attention_config": [[["flash"], "all"]]}, {"model.block": "transformer"}),
        ({"sliding_window_width": 63}, {"model.attention": "global", "model.attention_window": None}),
        ({"sliding_window_width": 16}, {"model.attention": "window", "model.attention_window": 17}),
        (
            {"sliding_window_width": 16, "attention_config": ["flash", "local"]},
            {"model.attention": [[["window", "local"], 1]], "model.attention_local_blocks": 3},
        ),
        ({"attention_config": [[["gmlp"], "all"]], "pos_emb": "none"}, {"model.attention": "gmlp"}),
        ({"attention_config": ["amlp", "global"], "gmlp_attn_dim": 32}, {"model.amlp_size": 32}),
        (
            {
                "attention_config": ["sparse_fixed", "sparse_fixed"],
                "sparsity_config": {
                    "block": 8,
                    "num_local_blocks": 6,
                    "num_global_blocks": 2,
                    "num_different_global_patterns": 3,
                    "different_layout_per_head": True,
                },
            },
            {
                "model.attention": "sparse_fixed",
                "model.attention_block": 8,
                "model.attention_local_blocks": 6,
                "model.attention_global_blocks": 2,
                "model.attention_global_patterns": 3,
                "model.attention_per_head": True,
            },
        ),
        (
            {
                "attention_config": ["sparse_variable", "bigbird"],
                "sparsity_config": {
                    "num_random_blocks": 2,
                    "local_window_blocks": [2, 3],
                    "global_block_indices": [0, 5],
                    "global_block_end_indices": [1, 7],
                    "num_sliding_window_blocks": 5,
                },
            },
            {
                "model.attention_random_blocks": 2,
                "model.attention_window_blocks": [2, 3],
                "model.attention_global_starts": [0, 5],
                "model.attention_global_ends": [1, 7],
                "model.attention_sliding_blocks": 5,
            },
        ),
        ({"eod_mask_loss": True}, {"data.mask_loss_at_eod": True}),
        ({"data_path": "d"}, {"data.path": "d", "data.split": "969, 30, 1"}),
        (
            {
                "train_data_paths": ["a", "b"],
                "train_data_weights": [1, 2.5],
                "valid_data_paths": ["c"],
                "test_data_paths": ["d"],
            },
            {"data.train_paths": ["a", "b"], "data.train_weights": [1.0, 2.5], "data.path": None},
        ),
        ({"vocab_file": "t.json", "tokenizer_type": "HFTokenizer"}, {"tokenizer.path": "t.json"}),
        ({"vocab_file": "v.json", "merge_file": "m.txt"}, {"tokenizer.path": "gpt2:v.json:m.txt"}),
        ({"vocab_file": "v.json"}, {"tokenizer.path": None}),
        ({"tokenizer_type": "CharLevelTokenizer"}, {"tokenizer.path": "char"}),
        ({"tokenizer_type": "SPMTokenizer", "vocab_file": "s.model"}, {"tokenizer.path": "sentencepiece:s.model"}),
        ({"tokenizer_type": "TiktokenTokenizer", "vocab_file": "gpt2"}, {"tokenizer.path": "tiktoken:gpt2"}),
        ({"save": "ckpt", "load": "ckpt", "checkpoint_factor": 5}, {"output": "ckpt"}),
        ({"lr_decay_iters": 50, "lr_decay_fraction": 0.9}, {"schedule.decay_steps": 50}),
        ({"lr_decay_fraction": 0.295}, {"schedule.decay_steps": 29}),
        ({"weight_decay": 0.3}, {"optimizer.weight_decay": 0.3}),
        ({"optimizer": {"type": "ADAM", "params": {"weight_decay": 0.2}}}, {"optimizer.weight_decay": 0.2}),
        ({"optimizer": None}, {"optimizer.type": "adamw", "optimizer.lr": 0.001}),
        ({"eval_iters": 0}, {"evaluation.interval": None, "evaluation.at_end": False}),
        ({"eval_tasks": ["piqa", "arc_*"]}, {"evaluation.tasks": ["piqa", "arc_*"]}),
        (
            {"eval_iters": 3},
            {"evaluation.batches": 3, "evaluation.at_end": True, "evaluation.test_at_end": True},
        ),
        (
            {"keep_last_n_checkpoints": 2, "exit_interval": 9},
            {"checkpoint.keep_last": 2, "training.exit_interval": 9},
        ),
        (
            {
                **{f"{split}_data_paths": ["a", "b"] for split in ("train", "valid", "test")},
                "train_data_weights": [1.0, 2.0],
                "train_label_data_paths": ["c", "d"],
                "valid_label_data_paths": [],
                "weight_by_num_documents": True,
            },
            {
                "data.train_weights": None,
                "data.weights_alpha": 0.3,
                "data.weights_formula": "gptneox",
                "data.train_label_paths": ["c", "d"],
                "data.valid_label_paths": None,
            },
        ),
        (
            {"pack_impl": "pack_until_overflow", "allow_chopped": False},
            {"data.packing": "pack_until_overflow", "data.allow_chopped": False},
        ),
        ({"pack_impl": "unpacked"}, {"data.packing": "unpacked", "data.allow_chopped": True}),
        ({"allow_chopped": False}, {"data.packing": "packed", "data.allow_chopped": True}),
        ({"weighted_sampler_alpha": 0.5}, {"data.weights_alpha": None, "data.weights_formula": "xlmr"}),
        ({"peak_theoretical_tflops": 312}, {"performance.peak_flops": 3.12e14}),
        ({"precision": "bfloat16"}, {"training.precision": "bf16"}),
        ({"precision": "bfloat16", "bf16": {"enabled": True}}, {"training.precision": "bf16"}),
        ({"bf16": {"enabled": True}}, {"training.precision": "bf16"}),
        ({"fp16": {"enabled": False}}, {"training.precision": "fp32"}),
        # Without ZeRO every overflow halves the scale there.
        ({"precision": "fp16"}, {"training.precision": "fp16", "training.loss_scale_hysteresis": 1}),
        (
            {
                "zero_optimization": {"stage": 1},
                "fp16": {
                    "enabled": True,
                    "type": "fp16",
                    "loss_scale": 0,
                    "initial_scale_power": 12,
                    "loss_scale_window": 500,
                    "hysteresis": 3,
                    "min_loss_scale": 2,
                    "auto_cast": False,
                },
            },
            {
                "training.precision": "fp16",
                "training.loss_scale": None,
                "training.initial_scale_power": 12,
                "training.loss_scale_window": 500,
                "training.loss_scale_hysteresis": 3,
                "training.min_loss_scale": 2.0,
            },
        ),
        (
            {"fp16": {"enabled": True, "loss_scale": 1024, "initial_scale_power": 12}},
            {"training.loss_scale": 1024.0, "training.initial_scale_power": 16, "training.loss_scale_hysteresis": 2},
        ),
        ({"compat": "v2.0", "fp16": {"enabled": True}}, {"training.precision": "fp16"}),
        ({"compat": "v2.0", "fp16": {"enabled": True, "type": "bfloat16"}}, {"training.precision": "bf16"}),
        ({"compat": "v2.0", "precision": "fp16"}, {"training.precision": "fp32"}),
    ],
)
def test_what_keys_become(translated, given: dict[str, Any], expected: dict[str, Any]) -> None:
    values = flat(translated(**given))
    assert {key: values[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pos_emb": "elbow"}, "'pos_emb' ('elbow') asks for 'elbow', which is not implemented yet: use one of"),
        ({"norm": "batchnorm"}, "'norm' ('batchnorm')"),
        ({"activation": "tanh"}, "'activation' ('tanh')"),
        ({"init_method": "zeros"}, "'init_method' ('zeros')"),
        ({"hidden_dropout": 1.0}, "model.hidden_dropout: input should be less than 1"),
        ({"num_unique_layers": 3}, "'num_unique_layers' is 3, which does not divide num_layers 2"),
        ({"param_sharing_style": "twisted"}, "'param_sharing_style' ('twisted')"),
        ({"use_qk_layernorm": True, "num_kv_heads": 2}, "model.qk_norm has one gain per query head"),
        ({"soft_prompt_tuning": {"enabled": True, "init_string": 3}}, "has the init_string '3', which must be text"),
        ({"soft_prompt_tuning": {"enabled": True, "token": 3}}, "has the unknown entry 'token'"),
        ({"soft_prompt_tuning": {"enabled": True, "n_tokens": 3, "num_tokens": 3}}, "keep one"),
        (
            {"pos_emb": "learned", "opt_pos_emb_offset": 2},
            "data.seq_length 64 with model.position_offset 2 is beyond model.max_position_embeddings 64",
        ),
        ({"use_mup": True}, "base-shapes.0"),
        ({"save_base_shapes": True}, "castalia mup shapes writes them"),
        (
            {"apply_query_key_layer_scaling": True, "pos_emb": "alibi"},
            "asks for a bias of positions that grows with the layer's number",
        ),
        ({"attention_config": ["globl", "globl"]}, "has the unknown kind 'globl'; did you mean 'global'?"),
        ({"attention_config": [[["mamba", "global"], "all"]]}, "layers of kind mamba"),
        (
            {"attention_config": ["local", "global"], "sparsity_config": {"num_locl_blocks": 3}},
            "unknown entry 'num_locl_blocks'; did you mean 'num_local_blocks'?",
        ),
        ({"attention_config": ["local", "sparse_fixed"]}, "local with 3 blocks beside sparse_fixed with 4"),
        ({"attention_config": ["gmlp", "global"], "intermediate_size": 64}, "an MLP of another width"),
        ({"attention_config": ["global"]}, "describes 1 layers, but num_layers is 2"),
        ({"attention_config": [[["global"] * 3, "all"]]}, "which leaves a rest"),
        ({"attention_config": [3]}, "has 3, which is neither a kind nor [[kinds], times]"),
        ({"sliding_window_width": -1}, "give how many earlier tokens are seen"),
        ({"optimizer": {"type": "ZeroOneAdam", "params": {}}}, "the optimizer 'ZeroOneAdam'"),
        ({"optimizer": {"params": {}}}, "needs a 'type'"),
        (
            {"optimizer": {"type": "Adam", "params": {"beta": 1}}},
            "unknown parameter 'beta' for Adam; did you mean 'betas'",
        ),
        ({"optimizer": {"type": "Adam", "params": {"weight_decay": 1}}, "weight_decay": 2}, "keep one"),
        (
            {"optimizer": {"type": "Adam", "params": {"amsgrad": True}}},
            "amsgrad True, which is not implemented",
        ),
        ({"fp16": {"enabled": True, "auto_cast": True}}, "small.yml:18: 'fp16'"),
        ({"fp16": {"enabled": True, "consecutive_hysteresis": True}}, "a hysteresis that each good step refills"),
        ({"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}}, "master weights in fp16"),
        ({"fp16": {"enabled": True, "histeresis": 2}}, "unknown key 'histeresis'; did you mean 'hysteresis'?"),
        ({"fp16": {"enabled": True, "hysteresis": 1.5}}, "has hysteresis 1.5: give a whole number"),
        ({"fp16": {"enabled": True}, "precision": "fp32"}, "is fp32, but fp16 is enabled"),
        ({"bf16": {"enabled": True}, "precision": "fp32"}, "is fp32, but bf16 is enabled"),
        ({"tokenizer_type": "WordTokenizer", "vocab_file": "v.json"}, "another kind of tokenizer"),
        ({"checkpoint_factor": 2.5}, "must be a whole number from 1 on, got 2.5"),
        ({"checkpoint_factor": 1, "checkpoint_scale": "log"}, "must be above 1"),
        ({"checkpoint_scale": "cubic"}, "use one of linear, log"),
        ({"extra_save_iters": ["a"]}, "must be a list of steps"),
        ({"num_layers": "three"}, "small.yml:2: 'num_layers' must be a whole number, got 'three'"),
        ({"rotary_pct": "half"}, "'rotary_pct' must be a number"),
        ({"gpt_j_residual": 1}, "'gpt_j_residual' must be true or false"),
        ({"num_layers": 0}, "small.yml:2: model.num_layers: input should be greater than or equal to 1"),
        ({"num_layers": 2**62}, "'num_layers' is 4611686018427387904, beyond 10000: make it smaller"),
        ({"lr_decay_iters": 0}, "'lr_decay_iters' must be at least 1"),
        ({"seq_length": 128}, "data.seq_length 128 is beyond model.max_position_embeddings 64"),
        ({"min_lr": 1.0}, "schedule.min_lr 1.0 is above optimizer.lr 0.01"),
        (
            {"data_path": "a", "train_data_paths": ["b"], "valid_data_paths": ["c"], "test_data_paths": ["d"]},
            "give either data.path with data.split",
        ),
        ({"train_data_paths": ["b"]}, "'train_data_paths' is given without valid_data_paths and test_data_paths"),
        ({"save": "ckpt"}, "'save' needs checkpoint_factor or extra_save_iters"),
        ({"fp16": {"type": "fp16"}}, "'fp16' needs 'enabled', which is true or false"),
        ({"max_position_embeddings": None}, "no file gives 'max_position_embeddings', which GPT-NeoX requires"),
        (
            {"override_lr_scheduler": True, "use_checkpoint_lr_scheduler": True},
            "'override_lr_scheduler' and 'use_checkpoint_lr_scheduler' are both true: keep one",
        ),
        ({"intermediate_size": 8, "expansion_factor": 2.0}, "both say the width of the MLP"),
    ],
)
def test_what_is_refused_names_the_key_and_its_place(translated, given: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        translated(**given)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mixture_of_experts_is_translated(translated):
    config = translated(moe_num_experts=8, moe_expert_interval=2, hidden_size=320, num_attention_heads=4)
    model = config.model
    assert (model.moe_num_experts, model.moe_top_k, model.moe_interval) == (8, 1, 2)
    assert (model.moe_router, model.moe_score, model.moe_normalise) == ("sinkhorn", "sigmoid", False)
    assert model.moe_intermediate_size == 1280 and translated(moe_num_experts=1).model.moe_num_experts == 0
    topk = translated(moe_num_experts=4, moe_top_k=2, moe_router_type="topk", moe_jitter_eps=0.01).model
    assert (topk.moe_top_k, topk.moe_score, topk.moe_router, topk.moe_jitter) == (2, "softmax", "topk", 0.01)
    assert translated(moe_num_experts=4, moe_top_k=2, moe_jitter_eps=0.01).model.moe_jitter == 0.0
    with pytest.raises(UserError, match="'activation' 'swiglu' does not gate"):
        translated(moe_num_experts=4, activation="swiglu")
