"""Every model family -> five checks each, one table: does it compute what the released models compute?

small form ──> logits          against transformers', every parameter random, read from exported files
           ├─> each tensor     replaced by other numbers in theirs: the logits must part
           ├─> cached          generation in pieces against one pass (fp64)
           ├─> copying         trained until it copies
           └─> gradient        autograd against finite differences, tensor by tensor (fp64)
configs/models/*.yml ──> parameters, against the released checkpoints' counts (by a test)

python -m castalia.tools.certify families
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from castalia.config import Config, DataConfig, ModelConfig, load
from castalia.config.derive import derive
from castalia.convert.huggingface import ARCHITECTURES, architecture_of, huggingface_config, to_huggingface
from castalia.errors import CheckFailed
from castalia.model import Transformer
from castalia.model.size import model_size
from castalia.tools.model_matrix import (
    CACHE_TOLERANCE,
    COPIED,
    GRADIENT_TOLERANCE,
    VOCABULARY,
    cache_error,
    copy_task,
    gradient_error,
)
from castalia.tools.model_matrix import random_model as random_fp64_model

LOGIT_TOLERANCE = 1e-5
LEAST_EFFECT = 1e-4  # of another tensor in a single place; ten times what equal models may differ by

_SHAPE: dict[str, Any] = {
    "num_layers": 3, "hidden_size": 64, "num_attention_heads": 8, "vocab_size": 160, "max_position_embeddings": 64,
}  # fmt: skip
_GPT: dict[str, Any] = _SHAPE | {"norm_epsilon": 1e-5, "activation": "gelu_tanh"}
_LLAMA: dict[str, Any] = _SHAPE | {
    "norm": "rmsnorm", "norm_epsilon": 1e-6, "activation": "swiglu", "attention_bias": False, "mlp_bias": False,
    "intermediate_size": 96, "num_kv_heads": 2,
}  # fmt: skip
_LEARNED: dict[str, Any] = {"position": "learned", "tie_embeddings": True}
_EXPERTS: dict[str, Any] = {"moe_num_experts": 4, "moe_top_k": 2, "intermediate_size": 48}

FAMILIES: dict[str, dict[str, Any]] = {
    "gpt-neox": _GPT | {"activation": "gelu", "rotary_fraction": 0.25, "residual": "parallel"},
    "gpt-2": _GPT | _LEARNED,
    "gpt-j": _GPT
    | {"rotary_fraction": 0.5, "residual": "parallel", "tie_norms": True, "attention_bias": False, "head_bias": True},
    "opt": _GPT | _LEARNED | {"activation": "relu", "position_offset": 2},
    "llama": _LLAMA | {"num_kv_heads": None},
    "llama, linear scaling": _LLAMA | {"rotary_scaling": "linear", "rotary_scaling_factor": 4.0},
    "llama 3.1": _LLAMA
    | {
        **{"rotary_base": 500000.0, "rotary_scaling": "llama3", "rotary_scaling_factor": 8.0},
        **{"rotary_original_length": 32, "tie_embeddings": True},
    },
    "llama, yarn": _LLAMA
    | {
        "rotary_scaling": "yarn",
        "rotary_scaling_factor": 4.0,
        "rotary_original_length": 32,
        "rotary_scaling_high": 8.0,
    },
    "mistral": _LLAMA | {"attention": "window", "attention_window": 5},
    "qwen2": _LLAMA | {"attention_bias": True, "attention_out_bias": False, "rotary_base": 1e6},
    "qwen3": _LLAMA | {"qk_norm": "head", "head_dim": 16, "tie_embeddings": True},
    "olmo2": _LLAMA | {"qk_norm": "full", "norm_placement": "post"},
    "mixtral": _LLAMA | _EXPERTS,
    "qwen3-moe": _LLAMA
    | _EXPERTS
    | {"qk_norm": "head", "head_dim": 16, "intermediate_size": 80}
    | {"moe_intermediate_size": 48, "moe_interval": 2, "moe_first_layer": 1},
    "olmoe": _LLAMA | _EXPERTS | {"qk_norm": "full", "moe_normalise": False},
}


def random_model(cfg: ModelConfig, std: float = 0.2) -> Transformer:
    """Every parameter random, biases and gains too, large enough that logits spread by more than 1."""
    model = Transformer(cfg).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            mean = 1.0 if name.endswith("norm.weight") else 0.0
            p.copy_(mean + std * torch.randn(p.shape, generator=generator))
    return model


def read_by_transformers(model: Transformer, folder: Path) -> Any:
    """Export a model's weights and have the class of transformers read the files.

    Raises:
        CheckFailed: it misses a tensor, or does not know one.
    """
    import transformers
    from safetensors.torch import save_file

    weights = {n: t.contiguous() for n, t in to_huggingface(model.state_dict(), model.cfg).items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    settings = huggingface_config(model.cfg)
    (folder / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    reference, report = loaded
    if type(reference).__name__ != settings["architectures"][0]:
        raise CheckFailed(f"{settings['architectures'][0]}: was read as {type(reference).__name__}")
    wrong = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if wrong:
        raise CheckFailed(f"{settings['architectures'][0]}: {wrong[0]} is missing, not known, or of another shape")
    return reference.eval()


def tokens(length: int = 24) -> Tensor:
    """Two rows of ids."""
    return torch.randint(0, 160, (2, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logit_difference(model: Transformer, reference: Any) -> float:
    """Largest difference of logits, relative to the largest logit."""
    mine, theirs = model.logits(model(tokens())), reference(tokens()).logits
    return float((mine - theirs).abs().max() / theirs.abs().max())


def pieces(reference: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Their tensors; of stacked experts each expert's matrix, gate and up apart."""
    for name, p in reference.named_parameters():
        if p.ndim < 3:
            yield name, p.detach()
            continue
        for expert, matrix in enumerate(p.detach()):
            parts = matrix.chunk(2) if "gate_up" in name else (matrix,)
            for number, part in enumerate(parts):
                yield f"{name}[{expert}].{number}", part


def has_no_effect(model: ModelConfig, name: str) -> bool:
    """Whether softmax hides a tensor: a bias of keys adds the same to all scores of a query, if nothing rotates it."""
    return model.position != "rotary" and name.endswith("k_proj.bias")


@torch.no_grad()
def least_effect(model: Transformer, reference: Any) -> tuple[float, str, int]:
    """Replace each of their tensors by other numbers, one at a time.

    Returns:
        The smallest difference of logits that this makes, which tensor makes it, and how many were tried.
    """
    least, at, tried = float("inf"), "", 0
    for name, value in pieces(reference):
        if has_no_effect(model.cfg, name):
            continue
        before, generator = value.clone(), torch.Generator().manual_seed(2)
        value.copy_(torch.randn(value.shape, generator=generator))
        difference = logit_difference(model, reference)
        value.copy_(before)
        tried += 1
        if difference < least:
            least, at = difference, name
    return least, at, tried


@dataclass(frozen=True)
class FamilyRow:
    """One family's figures."""

    name: str
    class_name: str
    logits: float
    effect: float
    tensor: str
    tried: int
    copy_loss: float
    copy_steps: int
    cached: float
    gradient: float
    gradient_at: str

    @property
    def failures(self) -> list[str]:
        """Which checks failed, in words."""
        checks = (
            (self.logits < LOGIT_TOLERANCE, f"logits differ by {self.logits:.1e}"),
            (self.effect > LEAST_EFFECT, f"{self.tensor} hardly counts: {self.effect:.1e}"),
            (self.copy_loss < COPIED, f"copies only to {self.copy_loss:.3f} nats after {self.copy_steps} steps"),
            (self.cached < CACHE_TOLERANCE, f"cached and uncached differ by {self.cached:.1e}"),
            (self.gradient < GRADIENT_TOLERANCE, f"the gradient of {self.gradient_at} is off by {self.gradient:.1e}"),
        )
        return [words for good, words in checks if not good]


def small(cfg: dict[str, Any]) -> ModelConfig:
    """The form for the checks in fp64 and for copying: two layers, few tokens."""
    layers = 3 if cfg.get("moe_interval", 1) > 1 else 2
    changes = {"num_layers": layers, "hidden_size": 32, "num_attention_heads": 4, "vocab_size": VOCABULARY}
    if cfg.get("num_kv_heads"):
        changes["num_kv_heads"] = 2
    if cfg.get("head_dim"):
        changes["head_dim"] = 8
    return ModelConfig(**(cfg | changes))


def check_family(name: str, folder: Path) -> FamilyRow:
    """All checks of one family; `folder` is for the exported files."""
    cfg = ModelConfig(**FAMILIES[name])
    model = random_model(cfg)
    reference = read_by_transformers(model, folder)
    effect, tensor, tried = least_effect(model, reference)
    loss, steps = copy_task(small(FAMILIES[name]))
    wide = random_fp64_model(small(FAMILIES[name]))
    gradient, at = gradient_error(wide)
    logits = logit_difference(model, reference)
    kind = type(reference).__name__
    return FamilyRow(name, kind, logits, effect, tensor, tried, loss, steps, cache_error(wide), gradient, at)


def released_count(model: ModelConfig) -> int:
    """Parameters of transformers' own class of a model's size, built without allocating them."""
    import transformers

    settings = huggingface_config(model)
    config = transformers.AutoConfig.for_model(**{k: v for k, v in settings.items() if k != "architectures"})
    with torch.device("meta"):
        reference: Any = getattr(transformers, settings["architectures"][0])(config)
    return sum(p.numel() for p in reference.parameters())


def shipped() -> Iterator[tuple[str, ModelConfig]]:
    """The configurations of `configs/models/` that a class of transformers computes."""
    for path in sorted((Path(__file__).resolve().parents[3] / "configs" / "models").glob("*.yml")):
        model = derive(load([path]))[0].model
        if model.vocab_size is not None and any(not a.obstacles(model) for a in ARCHITECTURES.values()):
            yield path.stem, model


def count_lines() -> list[str]:
    """Parameters of the shipped configurations, in all and those that a token meets, beside transformers'.

    Raises:
        CheckFailed: a count differs.
    """
    lines = ["| configuration | parameters | a token meets | class of transformers |", "|---|---|---|---|"]
    for name, model in shipped():
        size, theirs = model_size(Config(model=model, data=DataConfig(seq_length=1))), released_count(model)
        if size.total_parameters != theirs:
            raise CheckFailed(f"{name}: {size.total_parameters:,} parameters, in transformers {theirs:,}")
        met = f"{size.active_parameters:,}" if size.active_parameters < theirs else "all"
        lines.append(f"| {name} | {size.total_parameters:,} | {met} | {architecture_of(model).class_name}, equal |")
    return lines


def certify_families(_: Path | None = None, say: Callable[[str], None] = lambda text: None) -> str:
    """Every family: logits of transformers, each tensor counts, learns to copy, generates as it trains."""
    import transformers

    rows = []
    for name in FAMILIES:
        with tempfile.TemporaryDirectory(prefix="castalia-family-") as folder:
            rows.append(check_family(name, Path(folder)))
        say(f"{name}: {', '.join(rows[-1].failures) or 'passed'}")
    failed = [row for row in rows if row.failures]
    if failed:
        raise CheckFailed(f"{len(failed)} of {len(rows)} families; {failed[0].name}: {failed[0].failures[0]}")
    head = ("family", "class", "logits", "least effect of a tensor (of)", "copy: steps", "cached", "gradient")
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for r in rows:
        cells = (
            *(r.name, r.class_name, f"{r.logits:.0e}", f"{r.effect:.0e} ({r.tried})"),
            *(f"{r.copy_steps}", f"{r.cached:.0e}", f"{r.gradient:.0e}"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    text = f"""
logits: largest difference from transformers {transformers.__version__}, which reads the exported files, relative to
the largest logit; fp32, every parameter random, bound {LOGIT_TOLERANCE:g}.
least effect: the same difference after one of their tensors is replaced, for the tensor that counts least (of how
many); bound {LEAST_EFFECT:g} from below. Left out: the key biases of OPT, which softmax cancels.
copy: steps until a sequence that repeats is predicted (bound {COPIED:.2f} nats).
cached: generation in pieces against one pass, relative, fp64, bound {CACHE_TOLERANCE:g}.
gradient: autograd against central differences, the worst tensor, fp64, bound {GRADIENT_TOLERANCE:g}.
Published counts are held file by file by tests/rules/test_configs.py; below they are counted again by transformers.
"""
    return "\n".join([*lines, text, "## Parameters", "", *count_lines()]) + "\n"
