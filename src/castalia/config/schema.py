"""The map of everything: one typed tree of sections, each field with its one-line meaning.

A `Config` is what the YAML says, checked; `castalia.config.derive` fills in what follows
from it (widths, steps, padded vocabulary). Every field carries a class:

    numerics      changes the mathematical function that is computed
    performance   changes only its rounding or its speed
    cosmetic      changes neither

so that a resumed run can refuse a change that would make its curve jump and accept the
rest. This module imports no torch: planning and checking a run must be instant.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from castalia.config.schema_batch import BatchControllerConfig
from castalia.config.schema_guard import GuardConfig as GuardConfig
from castalia.config.schema_launch import LaunchConfig
from castalia.config.schema_model import ModelConfig
from castalia.config.schema_optimizer import OptimizerConfig as OptimizerConfig
from castalia.config.schema_optimizer import ScheduleConfig as ScheduleConfig
from castalia.config.schema_parallel import ParallelConfig
from castalia.config.schema_profile import ProfileConfig as ProfileConfig
from castalia.config.schema_sampling import SamplingConfig
from castalia.config.section import FieldClass as FieldClass
from castalia.config.section import Section, setting


class DataConfig(Section):
    """Which tokens are read, and in which order."""

    path: str | None = setting(None, "prefix of one data set, shared out by `split`")
    split: str = setting("969,30,1", "shares of the documents for training, validation and test")
    train_paths: list[str] | None = setting(None, "prefixes of the training data sets, instead of path and split")
    valid_paths: list[str] | None = setting(None, "prefixes of the validation data sets")
    test_paths: list[str] | None = setting(None, "prefixes of the test data sets")
    train_weights: list[float] | None = setting(None, "blend weights of train_paths; null: all equal")
    valid_weights: list[float] | None = setting(None, "blend weights of valid_paths; null: all equal")
    test_weights: list[float] | None = setting(None, "blend weights of test_paths; null: all equal")
    seq_length: int = setting(512, "tokens that the model sees at once", unit="tokens", ge=1)
    train_label_paths: list[str] | None = setting(
        None, "prefixes of what is learnt of train_paths, id by id: the id itself or -100; null: every id"
    )
    valid_label_paths: list[str] | None = setting(None, "the same of valid_paths")
    test_label_paths: list[str] | None = setting(None, "the same of test_paths")
    label_path: str | None = setting(None, "the same of path")
    packing: Literal["packed", "pack_until_overflow", "unpacked"] = setting(
        "packed",
        "what a sample is: packed is cut from all documents end to end; pack_until_overflow has whole documents "
        "until the next one does not fit, and unpacked one document: these are padded, and padding is not learnt",
    )
    allow_chopped: bool = setting(
        True, "samples of whole documents: cut one that is longer than a sample; false leaves it out"
    )
    weights_alpha: float | None = setting(
        None, "blend by document counts N_i to this power, instead of by weights; null: by weights", ge=0
    )
    weights_formula: Literal["xlmr", "gptneox"] = setting(
        "xlmr", "with weights_alpha: xlmr is N_i^alpha; gptneox has a further factor 1 - N_i / sum N"
    )
    order: Literal["gptneox", "permutation"] = setting(
        "gptneox",
        "how samples are ordered: gptneox is GPT-NeoX's order bit for bit; permutation is computed and needs no memory",
    )
    seed: int | None = setting(None, "seed of the order; null: training.seed", ge=0, le=2**32 - 1)
    mask_loss_at_eod: bool = setting(False, "no loss where the input token is the end of a document")
    document_mask: bool = setting(False, "attention does not cross documents, and positions restart at each")
    fim_rate: float = setting(
        0.0, "share of training documents rearranged to be filled in (docs/training_data.md)", ge=0, le=1
    )
    fim_spm_rate: float = setting(0.5, "share of the rearranged documents that have their suffix first", ge=0, le=1)
    fim_tokens: list[str] = setting(
        ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
        "special tokens of the tokenizer before prefix, suffix and middle",
        min_length=3,
        max_length=3,
    )
    curriculum: Literal["none", "linear", "root", "discrete"] = setting(
        "none", "sequences are shorter at first: linear or root in the step, or by a table (discrete)"
    )
    curriculum_start: int = setting(64, "linear, root: length at first", unit="tokens", ge=1, le=2**40)
    curriculum_end: int | None = setting(
        None, "linear, root: length in the end; null: seq_length", unit="tokens", ge=1, le=2**40
    )
    curriculum_steps: int | None = setting(None, "linear, root: steps to that length", unit="steps", ge=1)
    curriculum_multiple: int = setting(8, "linear, root: lengths are rounded down to a multiple", unit="tokens", ge=1)
    curriculum_root: int = setting(2, "root: the length rises with this root of the step", ge=1)
    curriculum_lengths: list[int] | None = setting(
        None, "discrete: the lengths, ascending", unit="tokens", min_length=1
    )
    curriculum_until: list[int] | None = setting(
        None, "discrete: the last step, from 1 on, of each of curriculum_lengths but the last", unit="steps"
    )
    exclude: str | None = setting(
        None,
        "list of training documents that are not learnt from here on (castalia data exclude); may change on resume",
    )

    @model_validator(mode="after")
    def _paths(self) -> DataConfig:
        lists = {"train_paths": self.train_paths, "valid_paths": self.valid_paths, "test_paths": self.test_paths}
        if self.path is not None and any(v is not None for v in lists.values()):
            raise ValueError("give either data.path with data.split, or data.train_paths and the like, not both")
        for name, paths in lists.items():
            weights = getattr(self, name.replace("paths", "weights"))
            if weights is not None and (paths is None or len(weights) != len(paths)):
                raise ValueError(f"data.{name.replace('paths', 'weights')} needs one weight for each of data.{name}")
            if weights and (min(weights) < 0 or not sum(weights) > 0):
                raise ValueError(
                    f"data.{name.replace('paths', 'weights')} must have no negative weight and one above 0"
                )
            if weights is not None and self.weights_alpha is not None:
                raise ValueError(f"give either data.{name.replace('paths', 'weights')} or data.weights_alpha, not both")
            key = name.replace("paths", "label_paths")
            labels = getattr(self, key)
            if labels is not None and (paths is None or len(labels) != len(paths)):
                raise ValueError(f"data.{key} needs one data set for each of data.{name}")
        if self.label_path is not None and self.path is None:
            raise ValueError("data.label_path goes with data.path: give data.train_label_paths with data.train_paths")
        if self.fim_rate > 0 and (self.label_path or self.train_label_paths):
            raise ValueError("data.fim_rate rearranges ids but not labels of their own: leave out the label data sets")
        if len(set(self.fim_tokens)) < 3:
            raise ValueError(f"data.fim_tokens {self.fim_tokens} must be three different tokens")
        if self.packing == "packed" and not self.allow_chopped:
            raise ValueError("data.packing packed cuts documents: set data.allow_chopped to true, or another packing")
        return self

    @model_validator(mode="after")
    def _curriculum(self) -> DataConfig:
        if self.curriculum in ("linear", "root"):
            end = self.curriculum_end or self.seq_length
            if self.curriculum_steps is None:
                raise ValueError(f"data.curriculum {self.curriculum} needs data.curriculum_steps")
            if not self.curriculum_multiple <= self.curriculum_start <= end:
                raise ValueError(
                    f"data.curriculum_start {self.curriculum_start} must lie between data.curriculum_multiple "
                    f"{self.curriculum_multiple} and the length in the end, {end}"
                )
        if self.curriculum == "discrete":
            lengths, until = self.curriculum_lengths or [], self.curriculum_until or []
            if not lengths or len(until) != len(lengths) - 1 or sorted(lengths) != lengths or lengths[0] < 1:
                raise ValueError(
                    "data.curriculum discrete needs data.curriculum_lengths, ascending from 1 on, and "
                    "data.curriculum_until with a step for each but the last"
                )
            if sorted(set(until)) != until:
                raise ValueError("data.curriculum_until must be ascending steps")
        return self

    @model_validator(mode="after")
    def _shares(self) -> DataConfig:
        try:
            shares = [float(part) for part in self.split.split("," if "," in self.split else "/")]
        except ValueError:
            shares = []
        # Neither infinity nor what is not a number passes the comparison of the sum.
        if not shares or min(shares) < 0 or not 0 < sum(shares) < 1e300:
            raise ValueError(
                f'data.split is {self.split!r}: give shares such as "969,30,1", none negative, not all zero'
            )
        if len(shares) > 3:
            raise ValueError(
                f"data.split is {self.split!r}: give at most three shares, for training, validation and test"
            )
        return self


class TokenizerConfig(Section):
    """How text becomes ids, where the data set itself does not say."""

    path: str | None = setting(
        None,
        "a tokenizer.json, its folder, or another name as in docs/tokenizers.md; null: the one kept beside the data",
    )


class TrainingConfig(Section):
    """How long, how much at once, in which precision."""

    steps: int | None = setting(None, "optimizer steps; or give tokens", unit="steps", ge=0)
    tokens: int | None = setting(None, "train for this many tokens (rounded up to whole steps); or give steps", ge=1)
    batch_size: int = setting(32, "sequences per optimizer step, over all devices", unit="sequences", ge=1)
    batch_ramp_start: int | None = setting(
        None, "sequences per step at first, growing to batch_size; null: batch_size throughout", unit="sequences", ge=1
    )
    batch_ramp_increment: int | None = setting(None, "by how much they grow at a time", unit="sequences", ge=1)
    batch_ramp_samples: int | None = setting(None, "when they have grown to batch_size", unit="sequences", ge=1)
    micro_batch_size: int | None = setting(
        None, "sequences per forward pass and device; null: the whole batch", "performance", "sequences", ge=1
    )
    precision: Literal["fp32", "bf16", "fp16", "fp8"] = setting(
        "fp32",
        "dtype of matrix products; weights are fp32 in each. fp16 scales the loss; fp8: bf16, and float8 for the "
        "products of the layers' linear maps",
    )
    loss_scale: float | None = setting(None, "fp16: what the loss is multiplied by; null: what fits, found anew", gt=0)
    initial_scale_power: int = setting(16, "fp16: the loss scale begins at 2 to this power", ge=0, le=64)
    loss_scale_window: int = setting(
        1000, "fp16: steps without an overflow after which the loss scale doubles", unit="steps", ge=1
    )
    loss_scale_hysteresis: int = setting(
        2, "fp16: the loss scale is halved at this overflow, and at each one after it until it doubles", ge=1
    )
    min_loss_scale: float = setting(1.0, "fp16: the least loss scale; a step that overflows even so ends the run", gt=0)
    seed: int = setting(1234, "seed of weights and, unless data.seed is given, of the data order", ge=0, le=2**32 - 1)
    exit_interval: int | None = setting(None, "save and stop after every so many steps", "cosmetic", "steps", ge=1)
    nonfinite: Literal["stop", "skip"] = setting(
        "stop",
        "where loss or gradient is not a number: stop the run, or skip the update (and stop after 50 in a row)",
        "cosmetic",
    )

    @model_validator(mode="after")
    def _scale(self) -> TrainingConfig:
        fields = type(self).model_fields
        moving = ("initial_scale_power", "loss_scale_window", "loss_scale_hysteresis", "min_loss_scale")
        given = [k for k in ("loss_scale", *moving) if getattr(self, k) != fields[k].default]
        if given and self.precision != "fp16":
            raise ValueError(
                f"training.{given[0]} is of use with training.precision fp16 alone: leave it out, or set "
                "training.precision=fp16"
            )
        if given and self.loss_scale is not None and given[-1] in moving:
            raise ValueError(
                f"training.{given[-1]} moves a dynamic scale, and training.loss_scale fixes it: leave one of them out"
            )
        if self.min_loss_scale > 2.0**self.initial_scale_power:
            raise ValueError(
                f"training.min_loss_scale {self.min_loss_scale} is above 2 to the power of "
                f"training.initial_scale_power {self.initial_scale_power}: lower it"
            )
        return self

    @model_validator(mode="after")
    def _length(self) -> TrainingConfig:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give one of training.steps and training.tokens")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"training.batch_size {self.batch_size} is not a multiple of "
                f"training.micro_batch_size {self.micro_batch_size}"
            )
        ramp = (self.batch_ramp_start, self.batch_ramp_increment, self.batch_ramp_samples)
        if any(value is not None for value in ramp):
            start, by, samples = ramp
            if start is None or by is None or samples is None:
                raise ValueError("give all of training.batch_ramp_start, batch_ramp_increment and batch_ramp_samples")
            if start >= self.batch_size or (self.batch_size - start) % by:
                raise ValueError(
                    f"training.batch_ramp_start {start} does not reach batch_size {self.batch_size} in steps of {by}"
                )
            micro = self.micro_batch_size
            if micro is None or start % micro or by % micro:
                raise ValueError(
                    f"training.batch_ramp_start {start} and batch_ramp_increment {by} must be multiples of "
                    "training.micro_batch_size, which must be given"
                )
        return self


class LossConfig(Section):
    """What is minimised."""

    function: str = setting("cross_entropy", "the loss: a registered name, module:attribute or file.py:attribute")
    normalisation: Literal["tokens", "micro_batch_mean"] = setting(
        "tokens",
        "tokens: sum over the batch / its valid tokens; micro_batch_mean: mean of micro-batch means (GPT-NeoX)",
    )
    chunk_size: int = setting(512, "tokens whose logits exist at once", "performance", "tokens", ge=1)
    z_loss: float = setting(0.0, "times the square of the log of each token's softmax sum, added to its loss", ge=0)
    moe_balance: float = setting(0.0, "times the load-balancing loss of each layer with experts", ge=0)
    moe_balance_scope: Literal["sequence", "micro_batch"] = setting(
        "sequence",
        "tokens whose use of experts is to be even: those of each sequence, or of each micro-batch "
        "(looser; then the loss depends on training.micro_batch_size)",
    )
    moe_z_loss: float = setting(0.0, "times the router's mean squared log-sum-exp, of each layer with experts", ge=0)
    mtp: float = setting(0.3, "times the mean loss of the model.mtp_depth further tokens", ge=0)


class EvaluationConfig(Section):
    """Validation during training."""

    interval: int | None = setting(1000, "steps between validations; null: never", "cosmetic", "steps", ge=1)
    batches: int = setting(16, "batches of training.batch_size per validation", "cosmetic", "batches", ge=1)
    at_end: bool = setting(True, "validate after the last step", "cosmetic")
    test_at_end: bool = setting(False, "evaluate the test split after the last step", "cosmetic")
    continuing: bool = setting(
        False, "go on through the validation set from one validation to the next, as GPT-NeoX does", "cosmetic"
    )
    characters: bool = setting(False, "also count the characters of the text, for char_perplexity", "cosmetic")
    tasks: list[str] = setting([], "tasks of lm-evaluation-harness to evaluate on while training", "cosmetic")
    tasks_interval: int | None = setting(
        None,
        "steps between these, a multiple of evaluation.interval; null: with each validation",
        "cosmetic",
        "steps",
        ge=1,
    )
    tasks_few_shot: int | None = setting(
        None, "examples in front of each question; null: as the task says", "cosmetic", ge=0
    )
    tasks_limit: float | None = setting(None, "documents of each task; below 1 a share; null: all", "cosmetic", gt=0)
    tasks_path: str | None = setting(None, "folder of task files of one's own", "cosmetic")

    @model_validator(mode="after")
    def _tasks(self) -> EvaluationConfig:
        given = [k for k in ("interval", "few_shot", "limit", "path") if getattr(self, f"tasks_{k}") is not None]
        if given and not self.tasks:
            raise ValueError(f"evaluation.tasks_{given[0]} is of use with evaluation.tasks alone: give that too")
        if self.tasks and self.interval is None and not self.at_end:
            raise ValueError("evaluation.tasks are evaluated at validations: give evaluation.interval or at_end")
        if self.tasks_interval is not None and (self.interval is None or self.tasks_interval % self.interval):
            raise ValueError(
                f"evaluation.tasks_interval {self.tasks_interval} must be a multiple of evaluation.interval "
                f"{self.interval}, as tasks are evaluated at validations: change one of them"
            )
        return self


class StartConfig(Section):
    """What a run begins from, where its own folder has no checkpoint yet."""

    path: str | None = setting(
        None,
        "a Castalia run or checkpoint, or a GPT-NeoX `save` folder, global_stepN or .pt file; null: initial weights",
    )
    step: int | None = setting(None, "which step of several; null: the newest", unit="steps", ge=0)
    optimizer: bool = setting(
        True, "also take the optimizer's moments and go on from that step; false: weights alone, from step 0"
    )

    @model_validator(mode="after")
    def _given(self) -> StartConfig:
        if self.step is not None and self.path is None:
            raise ValueError("start.step needs start.path: name the run or folder that the step is of")
        return self


class CheckpointConfig(Section):
    """When the state is saved, and how many copies are kept."""

    scale: Literal["linear", "log"] = setting(
        "linear", "linear: every interval steps; log: at the whole parts of log_factor's powers", "cosmetic"
    )
    interval: int | None = setting(
        1000, "linear only: steps between checkpoints; null: only at the end", "cosmetic", "steps", ge=1
    )
    log_factor: float | None = setting(None, "log only: save at int(log_factor**k), k = 0, 1, 2, ...", "cosmetic")
    extra_steps: list[int] = setting([], "further steps at which to save (0: before the first)", "cosmetic", "steps")
    keep_last: int | None = setting(None, "keep only the newest so many; null: all", "cosmetic", ge=1)
    keep_every: int | None = setting(
        None, "keep those of every so manieth step whatever keep_last says", "cosmetic", "steps", ge=1
    )
    asynchronous: bool = setting(
        True, "training waits only for a copy of the state, which is written meanwhile (memory for two)", "performance"
    )
    validate_forward: bool = setting(
        False, "keep the logits of a fixed batch, and compare them when the run goes on", "performance"
    )
    path: str | None = setting(
        None,
        "URL of a folder for copies, as s3://bucket/run; a run without a newer one here goes on from there",
        "cosmetic",
    )
    chunk_size: int = setting(100 << 20, "bytes sent to the URL at once", "performance", "bytes", ge=5 << 20)

    @model_validator(mode="after")
    def _log(self) -> CheckpointConfig:
        if self.keep_every is not None and self.keep_last is None:
            raise ValueError("checkpoint.keep_every is for checkpoint.keep_last, without which all are kept: give both")
        if self.scale == "log" and self.log_factor is None:
            raise ValueError("checkpoint.scale log needs checkpoint.log_factor, for example 2: save at 1, 2, 4, 8, ...")
        if self.scale == "linear" and self.log_factor is not None:
            raise ValueError("checkpoint.log_factor is for checkpoint.scale log: set that, or leave the factor out")
        if self.log_factor is not None and self.log_factor <= 1:
            raise ValueError(
                f"checkpoint.log_factor {self.log_factor:g} must be above 1, for the steps have to grow: "
                "give for example 2"
            )
        return self


class LoggingConfig(Section):
    """What is written while training."""

    interval: int = setting(10, "steps between records of metrics.jsonl and console lines", "cosmetic", "steps", ge=1)
    norms: list[Literal["gradient", "parameter", "optimizer"]] = setting(
        [], "L2 norms to record for each parameter: of its gradient, its weights, its optimizer's moments", "cosmetic"
    )
    zero_gradients: bool = setting(False, "record the share of zeros in each parameter's gradient", "cosmetic")
    noise_scale: bool = setting(False, "record the gradient noise scale with its 95% interval", "cosmetic")
    noise_scale_window: int = setting(100, "steps that the noise scale is a mean of", "cosmetic", "steps", ge=2)
    noise_scale_groups: list[str] = setting(
        [], "regular expressions: parameters where the first matches the same text have a noise scale too", "cosmetic"
    )
    log_dir: str | None = setting(
        None, "folder for copies of what is printed, HOST_stdout.txt and HOST_stderr.txt; null: none", "cosmetic"
    )
    tensorboard: str | None = setting(None, "folder for TensorBoard's event files; null: none", "cosmetic")
    wandb_project: str | None = setting(None, "project in Weights & Biases; null: it is not used", "cosmetic")
    wandb_group: str | None = setting(None, "group of the run there", "cosmetic")
    wandb_entity: str | None = setting(
        None, "user or team that the project belongs to; null: W&B's default", "cosmetic"
    )
    wandb_name: str | None = setting(None, "what the run is called there; null: as here", "cosmetic")
    wandb_mode: Literal["online", "offline"] | None = setting(
        None, "offline keeps W&B's records in the run's folder for `wandb sync`; null: as WANDB_MODE says", "cosmetic"
    )
    wandb_host: str | None = setting(None, "address of a W&B server of one's own; null: as W&B is set", "cosmetic")
    wandb_all_ranks: bool = setting(False, "every process has a W&B run, not the first alone", "cosmetic")
    comet_project: str | None = setting(None, "project in Comet; null: it is not used", "cosmetic")
    comet_workspace: str | None = setting(None, "workspace of the project; null: Comet's default", "cosmetic")
    comet_name: str | None = setting(None, "what the run is called there; null: as here", "cosmetic")
    comet_tags: list[str] = setting([], "tags of the run there", "cosmetic")
    comet_mode: Literal["online", "offline"] = setting(
        "online", "offline keeps an archive in the run's folder for `comet upload`", "cosmetic"
    )
    mlflow_experiment: str | None = setting(None, "experiment in MLflow; null: it is not used", "cosmetic")
    mlflow_uri: str | None = setting(
        None, "MLflow's server, database or folder; null: mlflow.db in the run's folder", "cosmetic"
    )
    trackio_project: str | None = setting(None, "project in Trackio on this machine; null: it is not used", "cosmetic")

    @model_validator(mode="after")
    def _trackers(self) -> LoggingConfig:
        if self.noise_scale_groups and not self.noise_scale:
            raise ValueError("logging.noise_scale_groups are of use with logging.noise_scale alone: set that to true")
        for key, owner in (("comet_workspace", "comet_project"), ("comet_name", "comet_project")):
            if getattr(self, key) is not None and getattr(self, owner) is None:
                raise ValueError(f"logging.{key} is of use with logging.{owner} alone: give that too")
        if self.comet_project is None and (self.comet_tags or self.comet_mode != "online"):
            raise ValueError("logging.comet_tags and comet_mode are of use with logging.comet_project: give that too")
        if self.mlflow_uri is not None and self.mlflow_experiment is None:
            raise ValueError("logging.mlflow_uri is of use with logging.mlflow_experiment alone: give that too")
        return self


class PerformanceConfig(Section):
    """What changes only speed and rounding."""

    device: str | None = setting(None, "cpu, cuda, ...; null: the accelerator if there is one", "performance")
    threads: int | None = setting(
        None, "CPU threads; null: as torch chooses (OMP_NUM_THREADS, else the physical cores)", "performance", ge=1
    )
    compile: bool = setting(False, "compile the model (pays back after minutes)", "performance")
    matmul: Literal["auto", "native", "fp32"] = setting(
        "auto",
        "what multiplies 16-bit matrices: native 16-bit instructions, or the fp32 product of the same rounded "
        "numbers, as exact or more; auto: the faster one on a CPU, measured once; native elsewhere",
        "performance",
    )
    recompute: Literal["none", "full", "selective"] = setting(
        "none",
        "activations of layers that are computed again in backward to save memory: none, all, or those that "
        "are neither of matrix products nor of attention",
        "performance",
    )
    recompute_every: int = setting(
        1, "recompute every so manieth layer, from the first on", "performance", "layers", ge=1
    )
    offload_activations: bool = setting(
        False, "inputs of recomputed layers wait in the host's memory for the backward pass", "performance"
    )
    arena: bool = setting(
        True, "keep weights, moments and gradients in flat buffers, where the optimizer allows it", "performance"
    )
    prefetch: int = setting(2, "steps of data read ahead in the background", "performance", "steps", ge=0)
    peak_flops: float | None = setting(
        None, "the device's matrix rate for MFU; null: measured when training starts", "cosmetic", "FLOP/s", gt=0
    )
    hang_timeout: float | None = setting(
        600.0, "a job of several processes that stands still so long is ended; null: never", "cosmetic", "s", gt=0
    )

    @model_validator(mode="after")
    def _inputs(self) -> PerformanceConfig:
        if self.offload_activations and self.recompute == "none":
            raise ValueError(
                "performance.offload_activations moves the inputs of recomputed layers: set performance.recompute=full"
            )
        return self


class Config(Section):
    """A whole run."""

    version: Literal[1] = setting(1, "version of this format", "cosmetic")
    name: str = setting("run", "name of the run; its folder is runs/NAME", "cosmetic", min_length=1)
    output: str | None = setting(None, "the run's folder; null: runs/NAME", "cosmetic")
    data: DataConfig = Field(default_factory=DataConfig, description="which tokens, in which order")
    tokenizer: TokenizerConfig = Field(default_factory=TokenizerConfig, description="text to ids")
    model: ModelConfig = Field(default_factory=ModelConfig, description="the function that is trained")
    training: TrainingConfig = Field(
        default_factory=lambda: TrainingConfig(steps=1000), description="how long, how much at once"
    )
    batch_controller: BatchControllerConfig = Field(
        default_factory=BatchControllerConfig, description="a batch that grows by the gradient noise"
    )
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="gradients to weights")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="learning rate by step")
    loss: LossConfig = Field(default_factory=LossConfig, description="what is minimised")
    guard: GuardConfig = Field(default_factory=GuardConfig, description="what happens where it jumps")
    start: StartConfig = Field(default_factory=StartConfig, description="what the run begins from")
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig, description="validation")
    sampling: SamplingConfig = Field(default_factory=SamplingConfig, description="texts while training")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="saved state")
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="what is written")
    profile: ProfileConfig = Field(default_factory=ProfileConfig, description="where time and memory go")
    performance: PerformanceConfig = Field(default_factory=PerformanceConfig, description="speed only")
    launch: LaunchConfig = Field(default_factory=LaunchConfig, description="who starts processes on other hosts")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="over how many processes, and how")

    _origins: dict[str, Any] = PrivateAttr(default_factory=dict)
    _notes: list[str] = PrivateAttr(default_factory=list)
    _remarks: list[str] = PrivateAttr(default_factory=list)

    @property
    def run_dir(self) -> str:
        """The run's folder."""
        return self.output or f"runs/{self.name}"

    @property
    def micro_batch_size(self) -> int:
        """Sequences per forward pass, null resolved."""
        return self.training.micro_batch_size or self.training.batch_size

    @property
    def max_positions(self) -> int:
        """Longest sequence the model accepts, null resolved."""
        return self.model.max_position_embeddings or self.data.seq_length

    @model_validator(mode="after")
    def _folder(self) -> Config:
        if self.output is None and (self.name in (".", "..") or set(self.name) & set("/\\\0")):
            raise ValueError(
                f"name {self.name!r} is not the name of a folder below runs/: leave out slashes, or give output"
            )
        return self

    @model_validator(mode="after")
    def _together(self) -> Config:
        if self.data.seq_length > self.max_positions:
            raise ValueError(
                f"data.seq_length {self.data.seq_length} is beyond model.max_position_embeddings "
                f"{self.max_positions}: shorten the one or raise the other"
            )
        if self.model.position == "learned" and self.data.seq_length + self.model.position_offset > self.max_positions:
            raise ValueError(
                f"data.seq_length {self.data.seq_length} with model.position_offset {self.model.position_offset} is "
                f"beyond model.max_position_embeddings {self.max_positions}: shorten the one or raise the other"
            )
        if self.data.curriculum != "none" and self.training.tokens is not None and self.training.steps is None:
            raise ValueError("training.tokens counts sequences of one length: with data.curriculum give training.steps")
        for name in ("moe_balance", "moe_z_loss"):
            if getattr(self.loss, name) and not self.model.moe_num_experts:
                raise ValueError(f"loss.{name} needs experts: give model.moe_num_experts, or leave it out")
        if self.loss.mtp != LossConfig.model_fields["mtp"].default and not self.model.mtp_depth:
            raise ValueError("loss.mtp weighs what model.mtp_depth predicts: give model.mtp_depth, or leave it out")
        self._addressable()
        self.batch_controller.check(self.training, self.logging, self.data)
        if self.guard.spikes != "none" and self.training.nonfinite == "skip":
            raise ValueError("training.nonfinite skip and guard.spikes both answer what is not a number: give one")
        if self.training.batch_ramp_start is not None and self.data.curriculum != "none":
            raise ValueError("training.batch_ramp_start and data.curriculum do not go together: give one of them")
        if self.schedule.min_lr > self.optimizer.lr:
            raise ValueError(f"schedule.min_lr {self.schedule.min_lr} is above optimizer.lr {self.optimizer.lr}")
        return self

    def _addressable(self) -> None:
        """Refuse sizes by a slip of the hand, which no machine could hold and torch would choke on."""
        model, most = self.model, 1 << 60
        rows = {
            "vocab_size": model.vocab_size or 0,
            "num_attention_heads": (model.num_attention_heads + 2 * model.kv_heads) * model.head_size,
            "intermediate_size": model.mlp_size,
            "moe_num_experts": model.moe_num_experts * model.expert_size,
            "moe_shared_experts": model.moe_shared_experts * model.expert_size,
            "max_position_embeddings": self.max_positions,
            "rpe_num_buckets": model.rpe_num_buckets,
            "soft_prompt_tokens": model.soft_prompt_tokens,
            "hidden_size": model.hidden_size,
        }
        key = max(rows, key=lambda name: rows[name])
        if rows[key] * max(model.hidden_size, model.num_attention_heads) > most:
            raise ValueError(
                f"model.{key} makes a matrix of {rows[key]} x {model.hidden_size} numbers, more than can be addressed: "
                "make it smaller"
            )
