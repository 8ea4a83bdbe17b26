"""Every key of GPT-NeoX's configuration, v2.0 (March 2023) and main (2026), with its fate here.

    TRANSLATED   its value becomes values of ours          (gptneox_rules.py says how)
    REPORTED     it means nothing here; a note says why
    REFUSED      what it asks for is not implemented yet, unless the value asks for nothing

No key is in none of the three, so none is dropped silently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["int", "number", "bool", "text", "list", "mapping", "any"]


@dataclass(frozen=True)
class Translated:
    """A key that is translated: the kind of its value, and its default in main and in v2.0."""

    kind: Kind
    main: Any = None
    v2: Any = None

    def default(self, compat: str) -> Any:
        """The value where no file gives one."""
        return self.main if compat == "main" else self.v2


@dataclass(frozen=True)
class Refused:
    """A key that asks for something missing.

    Attributes:
        what: what it asks for.
        harmless: values that ask for nothing.
        block: it is a mapping, which asks for nothing unless `enabled`.
        passed_on: it is a mapping of further keys, which asks for nothing if all of them are REPORTED.
    """

    what: str
    harmless: tuple[Any, ...] = ()
    block: bool = False
    passed_on: bool = False

    @property
    def instead(self) -> str:
        """What to do about it."""
        values = [str(v).lower() if isinstance(v, bool) else str(v) for v in self.harmless if v not in ([], {})]
        return f"remove it, or set it to {' or '.join(values)}" if values else "remove it"

    def asks(self, value: Any) -> bool:
        """Whether this value asks for what is missing; null never does."""
        if self.passed_on and isinstance(value, dict):
            return not value.keys() <= REPORTED.keys()
        if self.block:
            return value is not None and not (isinstance(value, dict) and not value.get("enabled", False))
        return value is not None and value not in self.harmless


def _same(kind: Kind, default: Any = None) -> Translated:
    return Translated(kind, default, default)


TRANSLATED: dict[str, Translated] = {
    # model
    "num_layers": _same("int"),
    "hidden_size": _same("int"),
    "num_attention_heads": _same("int"),
    "num_kv_heads": _same("int"),
    "intermediate_size": _same("int"),
    "expansion_factor": _same("number"),
    "mlp_multiple_of": _same("int", 1),
    "seq_length": _same("int"),
    "max_position_embeddings": _same("int"),
    "norm": _same("text", "layernorm"),
    "layernorm_epsilon": _same("number", 1e-5),
    "rms_norm_epsilon": _same("number", 1e-8),
    "scalenorm_epsilon": _same("number", 1e-8),
    "use_qk_layernorm": _same("bool", False),
    "pos_emb": _same("text", "learned"),
    "rotary_pct": _same("number", 1.0),
    "rotary_emb_base": _same("number", 10000),
    "opt_pos_emb_offset": _same("int", 0),
    "apply_query_key_layer_scaling": _same("bool", False),
    "rpe_num_buckets": _same("int", 32),
    "rpe_max_distance": _same("int", 128),
    "hidden_dropout": Translated("number", 0.0, 0.1),
    "attention_dropout": Translated("number", 0.0, 0.1),
    "num_unique_layers": _same("int"),
    "param_sharing_style": _same("text", "grouped"),
    "soft_prompt_tuning": _same("mapping"),
    "curriculum_learning": _same("mapping"),
    "no_weight_tying": _same("bool", False),
    "attention_config": _same("list"),
    "sliding_window_width": _same("int"),
    "sparsity_config": _same("mapping"),
    "gmlp_attn_dim": _same("int", 64),
    "make_vocab_size_divisible_by": _same("int", 128),
    "padded_vocab_size": _same("int"),
    "activation": _same("text", "gelu"),
    "bias_gelu_fusion": _same("bool", False),
    "init_method": _same("text", "normal"),
    "output_layer_init_method": _same("text", "scaled_normal"),
    "init_method_std": _same("number", 0.02),
    "moe_num_experts": _same("int", 1),
    "moe_expert_interval": _same("int", 1),
    "moe_top_k": _same("int", 1),
    "moe_router_type": _same("text", "sinkhorn"),
    "moe_jitter_eps": _same("number"),
    "gpt_j_residual": _same("bool", False),
    "gpt_j_tied": _same("bool", False),
    "use_bias_in_attn_linear": _same("bool", True),
    "use_bias_in_mlp": _same("bool", True),
    # parallel
    "pipe_parallel_size": _same("int", 0),
    "model_parallel_size": _same("int", 1),
    "sequence_parallel": _same("bool", False),
    "zero_optimization": _same("mapping"),
    "checkpoint_activations": _same("bool", False),
    "checkpoint_in_cpu": _same("bool", False),
    "pipe_partition_method": _same("text", "type:transformer|mlp"),
    "use_mup": _same("bool", False),
    "base_shapes_file": _same("text", "base-shapes"),
    "mup_init_scale": _same("number", 1.0),
    "mup_attn_temp": _same("number", 1.0),
    "mup_output_temp": _same("number", 1.0),
    "mup_embedding_mult": _same("number", 1.0),
    "mup_rp_embedding_mult": _same("number", 1.0),
    # optimizer and schedule
    "optimizer": _same("mapping"),
    "use_bnb_optimizer": _same("bool", False),
    "weight_decay": Translated("number", 0.1, 0.01),
    "gradient_clipping": Translated("number", 1.0, 0.0),
    "scheduler": _same("mapping"),
    "lr_decay_style": _same("text", "linear"),
    "lr_decay_iters": _same("int"),
    "lr_decay_fraction": _same("number"),
    "min_lr": _same("number", 0.0),
    "warmup": _same("number", 0.01),
    # batch, length, precision
    "train_batch_size": _same("int"),
    "train_micro_batch_size_per_gpu": _same("int"),
    "gradient_accumulation_steps": _same("int"),
    "global_num_gpus": _same("int"),
    "world_size": _same("int"),
    "hostfile": _same("text"),
    "include": _same("text"),
    "exclude": _same("text"),
    "num_nodes": _same("int", -1),
    "num_gpus": _same("int"),
    "launcher": _same("text", "pdsh"),
    "deepspeed_slurm": _same("bool", False),
    "deepspeed_mpi": _same("bool", False),
    "force_multi": _same("bool", False),
    "no_ssh_check": _same("bool", False),
    "master_addr": _same("text"),
    "master_port": _same("int", 29500),
    "comment": _same("text"),
    "account": _same("text"),
    "train_iters": _same("int"),
    "exit_interval": _same("int"),
    "seed": _same("int", 1234),
    "precision": _same("text"),
    "fp16": _same("mapping"),
    "bf16": _same("mapping"),
    # data and tokenizer
    "data_path": _same("text"),
    "split": _same("any", "969, 30, 1"),
    "train_data_paths": _same("list"),
    "valid_data_paths": _same("list"),
    "test_data_paths": _same("list"),
    "train_data_weights": _same("list"),
    "valid_data_weights": _same("list"),
    "test_data_weights": _same("list"),
    "eod_mask_loss": _same("bool", False),
    "train_label_data_paths": _same("list"),
    "valid_label_data_paths": _same("list"),
    "test_label_data_paths": _same("list"),
    "weight_by_num_documents": _same("bool", False),
    "pack_impl": _same("text", "packed"),
    "allow_chopped": _same("bool", True),
    "weighted_sampler_alpha": _same("number", 0.3),
    "tokenizer_type": _same("text", "GPT2BPETokenizer"),
    "vocab_file": _same("text"),
    "merge_file": _same("text"),
    # evaluation, checkpoints, logging
    "eval_interval": _same("int", 1000),
    "eval_iters": _same("int", 100),
    "save": _same("text"),
    "load": _same("text"),
    "finetune": _same("bool", False),
    "no_load_optim": _same("bool", False),
    "iteration": _same("int"),
    "checkpoint_factor": _same("number"),
    "checkpoint_scale": _same("text", "linear"),
    "extra_save_iters": _same("list"),
    "keep_last_n_checkpoints": _same("int"),
    "checkpoint_validation_with_forward_pass": _same("bool", False),
    "s3_path": _same("text"),
    "s3_chunk_size": _same("int", 104857600),
    "char_level_ppl": _same("bool", False),
    "eval_tasks": _same("list"),
    "log_interval": _same("int", 100),
    "log_dir": _same("text"),
    "log_grad_norm": _same("bool", False),
    "log_param_norm": _same("bool", False),
    "log_optimizer_states": _same("bool", False),
    "log_gradient_noise_scale": _same("bool", False),
    "use_comet": _same("bool", False),
    "comet_workspace": _same("text"),
    "comet_project": _same("text"),
    "comet_experiment_name": _same("text"),
    "comet_tags": _same("list"),
    "log_grad_pct_zeros": _same("bool", False),
    "tensorboard_dir": _same("text"),
    "use_wandb": _same("bool"),
    "wandb_project": _same("text", "neox"),
    "wandb_group": _same("text"),
    "wandb_team": _same("text"),
    "wandb_run_name": _same("text"),
    "wandb_host": _same("text", "https://api.wandb.ai"),
    "wandb_init_all_ranks": _same("bool", False),
    "peak_theoretical_tflops": _same("number"),
    "profile": _same("bool", False),
    "profile_step_start": _same("int", 10),
    "profile_step_stop": _same("int", 12),
    "memory_profiling": _same("bool", False),
    "memory_profiling_path": _same("text"),
    "flops_profiler": _same("mapping"),
    "wall_clock_breakdown": _same("bool", False),
    "profile_backward": _same("bool", False),
}

_REPORTED = {
    "fused kernels: torch's own are used, and compute the same function": """
        layernorm_fusion rmsnorm_fusion scaled_upper_triang_masked_softmax_fusion scaled_masked_softmax_fusion
        bias_dropout_fusion rope_fusion fused_kernels_build_path use_flashattn_swiglu onnx_safe""",
    "TransformerEngine is not used; products run in the configured precision": """
        te_columnparallel te_rowparallel te_layernorm_mlp te_mha te_fp8_format te_fp8_wgrad
        te_fp8_amax_history_len te_fp8_amax_compute_algo te_fp8_margin te_fp8_mha""",
    "the softmax is always taken in fp32": "attention_softmax_in_fp32",
    "initial weights never depend on the device or the layout": "use_cpu_initialization lazy_mpu_init",
    "rotary frequencies are computed, not saved": "rotary_save_freqs_buffer",
    "blocks of sparse attention are in sparsity_config": "sparse_attention",
    "used only by Mamba layers": """
        mamba_selective_scan_fusion mamba_causal_conv_fusion mamba_inner_func_fusion
        mamba_selective_fp32_params mamba_use_bias_in_conv mamba_use_bias_in_linears""",
    "used only by RWKV layers": "dim_att head_size ffn_dim",
    "GPT-NeoX has no load-balancing loss that it could act on": "moe_lbl_in_fp32",
    "used only to write base shapes: castalia mup shapes": "mup_width_scale",
    "used only by preference training": """
        dpo_fp32 dpo_reference_free dpo_beta kto_fp32 kto_desirable_weight kto_undesirable_weight
        z_loss kto_beta fp32_reinforce kl_impl kl_div_beta reinforce_leave_one_out precompute_model_name""",
    "used only by online reinforcement learning": """
        weight_server_port online_dataserver_ips online_dataserver_ports""",
    "has no effect in GPT-NeoX either": """
        use_bias_in_norms short_seq_prob adlr_autoresume
        adlr_autoresume_object adlr_autoresume_interval deepscale deepscale_config no_save_optim hysteresis
        loss_scale loss_scale_window min_scale deepspeed_activation_checkpointing""",
    "derived by GPT-NeoX from other keys": """
        is_pipe_parallel optimizer_type zero_stage zero_reduce_scatter zero_contiguous_gradients
        zero_reduce_bucket_size zero_allgather_bucket_size lr local_rank rank do_train do_valid
        do_test save_iters batch_size gas clip_grad dynamic_loss_scale config_files git_hash
        curriculum_seqlen""",
    "an object or a counter of the running program, not a setting": """
        tensorboard_writer comet_experiment tokenizer user_script""",
    "how weights and moments are spread over devices changes no value": "zero_allow_untested_optimizer",
    "the output matrix is spread by rows of the vocabulary": "output_layer_parallelism",
    "gradients are summed in fp32": """
        fp32_allreduce prescale_gradients gradient_predivide_factor sparse_gradients communication_data_type
        data_types""",
    "recomputing activations saves memory and changes no value": """
        checkpoint_num_layers contiguous_checkpointing
        synchronize_each_layer activation_checkpointing""",
    "changes no value; parallel.sequence shares the inputs of layers among tensor ranks": "partition_activations",
    "DeepSpeed is not used": """
        deepspeed steps_per_print dump_state comms_logger checkpoint""",
    "the collective backend follows from the device": "distributed_backend",
    "links between devices are found by the collective library": "detect_nvlink_pairs",
    "metrics go to metrics.jsonl in the run's folder, and to TensorBoard or W&B if they are asked for above": """
        wandb tensorboard csv_monitor""",
    "a run's records have nowhere to put free words; tags are kept": "comet_others",
    "the gradient noise scale is taken within each step, without keeping gradients": """
        gradient_noise_scale_n_batches gradient_noise_scale_cpu_offload""",
    "data is read by background threads: performance.prefetch": "num_workers mmap_warmup",
    "the kind of data set is seen from its files": "data_impl",
    "the order of samples is computed, and not written beside the data": "use_shared_fs",
    "randomness depends on the seed and the step alone: there is no state to keep": "no_save_rng no_load_rng",
    "a resumed run compares its schedule with the checkpoint's": """
        override_lr_scheduler use_checkpoint_lr_scheduler""",
    "generation takes its settings on the command line": """
        text_gen_type temperature top_p top_k return_logits maximum_tokens prompt_end sample_input_file
        sample_output_file num_samples recompute""",
    "castalia deepy eval.py names its file of results so": "eval_results_prefix",
    "castalia tune searches with these files, for the quickest step, with flags of its own": "autotuning",
}
REPORTED: dict[str, str] = {key: why for why, keys in _REPORTED.items() for key in keys.split()}

_SPLITS = ("train", "valid", "test")
_SPECIAL_DATA = [f"{split}_reward_data_paths" for split in _SPLITS] + [
    f"{sign}_{split}{label}_data_paths" for sign in ("pos", "neg") for split in _SPLITS for label in ("", "_label")
]
REFUSED: dict[str, Refused] = {
    "fp16_lm_cross_entropy": Refused("a loss in fp16", (False,)),
    "serve_model_weights": Refused("serving weights to other programs", (False,)),
    "coord_check": Refused("the coordinate check in place of training (castalia mup check makes it)", (False,)),
    "save_base_shapes": Refused("base shapes in place of training (castalia mup shapes writes them)", (False,)),
    "amp": Refused("Apex AMP", block=True),
    "data_efficiency": Refused("DeepSpeed's data efficiency", block=True),
    "elasticity": Refused("DeepSpeed's elasticity", block=True),
    "autotuning_run": Refused("a search in place of training (castalia tune makes it, with the same files)"),
    "compression_training": Refused("DeepSpeed's compression", ({},)),
    "deepspeed_extra_args": Refused("passing settings on to DeepSpeed", passed_on=True),
    "train_epochs": Refused("a length in epochs instead of train_iters"),
    "dataset_impl": Refused("data sets of pairs or online data", ("gpt2",)),
    "train_impl": Refused("preference training", ("normal",)),
} | {key: Refused("data sets of rewards or pairs", ([],)) for key in _SPECIAL_DATA}

# Why a translated key may become nothing: what a note says of it then.
IDLE: dict[str, str] = {
    "scalenorm_epsilon": "used only by norm scalenorm",
    "rms_norm_epsilon": "used only by norm rmsnorm",
    "layernorm_epsilon": "used only by norm layernorm and non_parametric_layernorm",
    "opt_pos_emb_offset": "used only by pos_emb learned",
    "rpe_num_buckets": "used only by pos_emb rpe",
    "rpe_max_distance": "used only by pos_emb rpe",
    "apply_query_key_layer_scaling": "scores are divided and multiplied back by it: the same function",
    "attention_config": "every layer has full causal attention, of which flash is a kernel",
    "sliding_window_width": "the window holds the whole sequence",
    "sparsity_config": "used only by block-sparse layers",
    "gmlp_attn_dim": "used only by amlp layers",
    "weighted_sampler_alpha": "used only with weight_by_num_documents",
    "allow_chopped": "used only with pack_impl pack_until_overflow or unpacked",
    **dict.fromkeys(
        ("train_data_weights", "valid_data_weights", "test_data_weights"), "replaced by weight_by_num_documents"
    ),
    "scheduler": "OneBitAdam has one of its own, and an empty one asks for nothing",
    **dict.fromkeys(
        ("lr_decay_style", "lr_decay_iters", "lr_decay_fraction", "warmup", "min_lr"),
        "DeepSpeed's scheduler sets the rate in its place",
    ),
    "checkpoint_in_cpu": "used only with checkpoint_activations",
    "load": "is the run's own folder",
    "finetune": "used only with load",
    "no_load_optim": "used only with load",
    "iteration": "used only with load",
    **dict.fromkeys(
        ("wandb_project", "wandb_group", "wandb_team", "wandb_run_name", "wandb_host", "wandb_init_all_ranks"),
        "used only with use_wandb: true",
    ),
    "s3_chunk_size": "used only with s3_path",
    "use_wandb": "W&B is not used",
    "use_comet": "Comet is not used",
    **dict.fromkeys(
        ("comet_workspace", "comet_project", "comet_experiment_name", "comet_tags"), "used only with use_comet: true"
    ),
    "gpt_j_tied": "used only with gpt_j_residual",
    **dict.fromkeys(
        ("base_shapes_file", "mup_init_scale", "mup_attn_temp", "mup_output_temp", "mup_embedding_mult"),
        "used only with use_mup",
    ),
    "moe_num_experts": "one expert is a plain MLP",
    "moe_jitter_eps": "used only by moe_router_type topk with moe_num_experts above 1",
    **dict.fromkeys(("moe_expert_interval", "moe_top_k", "moe_router_type"), "used only with moe_num_experts above 1"),
    "param_sharing_style": "used only with num_unique_layers",
    "flops_profiler": "used only where it is enabled",
    **dict.fromkeys(
        ("profile_step_start", "profile_step_stop", "memory_profiling_path"),
        "used only with profile or memory_profiling",
    ),
    "sequence_parallel": "used only with model_parallel_size above 1",
    "pipe_partition_method": "used only with pipe_parallel_size above 1",
}

COMPAT = "compat"  # ours: whose defaults and formulas a file follows
KNOWN: frozenset[str] = frozenset(TRANSLATED) | frozenset(REPORTED) | frozenset(REFUSED) | {COMPAT}
