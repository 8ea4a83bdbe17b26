"""Does a model follow its width as muP promises? A few steps at several widths, and slopes in log and log.

    widths ──copies of the model, narrow and shallow──> a few steps on one batch ──> mean |x| of each part
       start   |x|               after initialisation: must not grow with the width, nor fall but where it may
       change  |x - x at start|  after the steps: must neither grow nor fall
       end     |x|               after the steps, of attention scores: the same
       decay   of each weight by one update without a gradient: must be the same at all widths; the
               other updates go without, as it would hide that they vanish

The coordinate check of Yang et al. 2022 (Tensor Programs V, appendix D.1) as numbers. Changes are looked
at, not values, as these hide an update that vanishes. The smallest width is the base, so muP and the
standard parametrisation begin as the same model there. Products that begin as sums of independent terms and
align as they learn would be noise for a few steps. Of these the reach is taken, what they are once aligned:
|q| |k| times the scale for attention, |row| |x| for the logits of words and of experts.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from castalia.config import Config, ModelConfig
from castalia.data.loader import Batch
from castalia.errors import UserError
from castalia.model.attention import Attention
from castalia.model.attention_mask import Drop, MaskSpec
from castalia.model.layers import Linear
from castalia.model.moe import MoE, Router
from castalia.model.transformer import Transformer, build_model
from castalia.optim import make_store
from castalia.train.engine import LocalEngine

TOLERANCE = 0.25
MOST = {"layers": 2, "heads": 4, "experts": 4, "vocabulary": 256}
TOKENS = 4, 32

Measures = dict[tuple[str, str], list[float]]
"""(kind, part) -> a number per width; kinds are start, change, end, decay."""


@dataclass(frozen=True)
class Row:
    """A part of the model.

    Attributes:
        kind: start, change, end or decay.
        part: name of a module, or of a parameter.
        mup, standard: slopes of log |x| by log width.
        good: whether muP's is as it should be.
    """

    kind: str
    part: str
    mup: float
    standard: float
    good: bool


@dataclass(frozen=True)
class Check:
    """What was found: the numbers of both parametrisations, and a row for each of muP's."""

    widths: list[int]
    mup: Measures
    standard: Measures
    rows: list[Row]

    @property
    def good(self) -> bool:
        """Whether all slopes are as they should be."""
        return all(row.good for row in self.rows)


def coordinate_check(
    config: Config,
    widths: Sequence[int] = (64, 128, 256, 512),
    steps: int = 4,
    lr: float = 0.003,
    seeds: int = 2,
    tolerance: float = TOLERANCE,
    say: Callable[[str], None] = lambda line: None,
) -> Check:
    """Train copies at the widths for a few steps, with muP and without, and compare.

    Args:
        config: whose model and optimizer count; widths, layers and vocabulary are those of the copies.
        widths: ascending hidden sizes; the first is the base.
        steps: updates.
        lr: of them all.
        seeds: runs per width, averaged (geometrically).
        tolerance: how far from 0 a slope may be.
        say: is told of each width.

    Raises:
        UserError: fewer than two widths, or a model that has no rule.
    """
    widths = list(widths)
    if len(widths) < 2 or widths != sorted(set(widths)):
        raise UserError(f"--widths: {', '.join(map(str, widths))} must be two or more, each above the one before")
    found: list[Measures] = []
    for mup in (True, False):
        every: Measures = defaultdict(list)
        for width in widths:
            say(f"{'muP' if mup else 'standard'} at width {width}")
            cfg = narrowed(config.model, width, widths[0] if mup else None)
            logs: dict[tuple[str, str], float] = defaultdict(float)
            for seed in range(seeds):
                for key, value in measure(cfg, config, steps, lr, seed).items():
                    logs[key] += math.log(max(value, 1e-30)) / seeds
            for key, value in logs.items():
                every[key].append(math.exp(value))
        found.append(every)
    with_mup, standard = found
    rows = []
    for (kind, part), values in with_mup.items():
        if max(values) < 1e-20:  # begins as zeros
            continue
        slope = fitted_slope(widths, values)
        rows.append(Row(kind, part, slope, fitted_slope(widths, standard[kind, part]), abs(slope) <= tolerance))
    return Check(widths, with_mup, standard, rows)


def fitted_slope(widths: Sequence[int], values: Sequence[float]) -> float:
    """Of log value by log width, by least squares; infinite where a value is no number."""
    if not all(math.isfinite(v) for v in values):
        return math.inf
    x, y = [math.log(w) for w in widths], [math.log(max(v, 1e-30)) for v in values]
    x0, y0 = sum(x) / len(x), sum(y) / len(y)
    return sum((a - x0) * (b - y0) for a, b in zip(x, y, strict=True)) / sum((a - x0) ** 2 for a in x)


def at_width(cfg: ModelConfig, hidden: int, base: int | None) -> ModelConfig:
    """The same model, so wide: heads and MLP in the same ratio, the number of heads kept.

    Args:
        base: hidden size of muP's base, the others in the same ratio; None: without muP.
    """
    changes: dict[str, Any] = {"hidden_size": hidden, "head_dim": _part(cfg.head_size, hidden, cfg)}
    if cfg.position == "rotary":
        changes["head_dim"] += changes["head_dim"] % 2
    changes["intermediate_size"] = _part(cfg.mlp_size, hidden, cfg)
    if cfg.moe_intermediate_size:
        changes["moe_intermediate_size"] = _part(cfg.moe_intermediate_size, hidden, cfg)
    none = dict.fromkeys(("mup_base_hidden_size", "mup_base_intermediate_size", "mup_base_head_dim"))
    changes |= none | {"mup": base is not None, "mup_base_hidden_size": base}
    values = {name: getattr(cfg, name) for name in type(cfg).model_fields} | changes
    try:
        return ModelConfig(**values)
    except ValueError as error:
        first = str(error).splitlines()
        raise UserError(f"at width {hidden}: {first[2].strip() if len(first) > 2 else first[0]}") from None


def _part(size: int, hidden: int, cfg: ModelConfig) -> int:
    return max(1, round(size * hidden / cfg.hidden_size))


def narrowed(cfg: ModelConfig, hidden: int, base: int | None) -> ModelConfig:
    """A copy for the check: so wide, and with few layers, heads, experts and words, as these cost time alone."""
    heads = max(n for n in range(1, MOST["heads"] + 1) if cfg.num_attention_heads % n == 0)
    group = max(g for g in range(1, heads + 1) if heads % g == 0 and g <= cfg.num_attention_heads // cfg.kv_heads)
    layers = min(cfg.num_layers, MOST["layers"])
    kinds = list(cfg.attention_kinds[:layers])
    changes: dict[str, Any] = {
        "num_attention_heads": heads,
        "num_kv_heads": heads // group,
        "head_dim": max(1, round(cfg.head_size * cfg.num_attention_heads / heads)),
        "num_layers": layers,
        "attention": kinds,
        "num_unique_layers": None,
        "vocab_size": min(cfg.vocab_size or MOST["vocabulary"], MOST["vocabulary"]),
        "max_position_embeddings": max(TOKENS[1] + cfg.position_offset, 64),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "intermediate_size": cfg.mlp_size,
    }
    if cfg.moe_num_experts:
        experts = min(cfg.moe_num_experts, MOST["experts"])
        changes |= {"moe_num_experts": experts, "moe_top_k": min(cfg.moe_top_k, experts)}
        changes |= {"moe_first_layer": min(cfg.moe_first_layer, layers - 1), "moe_jitter": 0.0}
    return at_width(cfg.model_copy(update=changes), hidden, base)


def measure(cfg: ModelConfig, config: Config, steps: int, lr: float, seed: int) -> dict[tuple[str, str], float]:
    """The numbers of one model, by kind and part."""
    model = build_model(cfg, seed)
    out = {("decay", name): value for name, value in decays(model, config, lr).items()}
    store = make_store(model, config.optimizer.model_copy(update={"weight_decay": 0.0}), "fp32", arena=False)
    engine = LocalEngine(model, store, config.loss, seed=seed)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(cast(int, cfg.vocab_size), (TOKENS[0], TOKENS[1] + 1), generator=draw)
    positions = torch.arange(TOKENS[1]).expand(*TOKENS)
    batch = Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), positions, sample_ids=torch.arange(TOKENS[0]))
    readers = {"logits": model.head_name} | {
        name: f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Router)
    }
    initial = {name: model.get_parameter(weight).detach().clone() for name, weight in readers.items()}
    before = activations(model, batch.tokens)
    for step in range(steps):
        engine.forward_backward([batch], batch.num_tokens, step)
        store.step(lr)
    for part, after in activations(model, batch.tokens).items():
        if part in readers:
            out["start", part] = _reach(initial[part], before[part])
            out["change", part] = _reach(model.get_parameter(readers[part]).detach() - initial[part], after)
            continue
        out["start", part] = before[part].abs().mean().item()
        if part.endswith(".scores"):
            out["end", part] = after.mean().item()
        else:
            out["change", part] = (after - before[part]).abs().mean().item()
    return out


def _reach(weight: Tensor, x: Tensor) -> float:
    """The mean of |row| |x|."""
    return (torch.linalg.vector_norm(weight.double(), dim=-1).mean() * x.norm(dim=-1).mean()).item()


@torch.no_grad()
def decays(model: Transformer, config: Config, lr: float) -> dict[str, float]:
    """By what share an update without a gradient makes each weight smaller; the model is left as it was."""
    if not config.optimizer.weight_decay:
        return {}
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.clone() for n, p in parameters.items()}
    store = make_store(model, config.optimizer, "fp32", arena=False)
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    store.step(lr)
    shares = {}
    for name, parameter in parameters.items():
        if parameter.ndim > 1 and before[name].any():
            shares[name] = 1 - (parameter.double().norm() / before[name].double().norm()).item()
        parameter.copy_(before[name])
    return {name: share for name, share in shares.items() if share > 0}


@torch.no_grad()
def activations(model: Transformer, tokens: Tensor) -> dict[str, Tensor]:
    """What each part of the model gives: embeddings, linear maps, layers; of attention the reach of its scores.

    Of the output matrix (`logits`) and of routers it is what they are given.
    """
    found: dict[str, Tensor] = {}
    undo: list[Callable[[], None]] = []

    def note(name: str, given: bool = False) -> Callable[..., None]:
        return lambda module, x, y: found.__setitem__(name, (x[0] if given else y).double())

    blocks = {f"layers.{i}" for i in range(len(model.layers))}
    for name, module in model.named_modules():
        if isinstance(module, Router):
            undo.append(module.register_forward_hook(note(name, given=True)).remove)
        elif isinstance(module, Linear | MoE) or name in blocks | {"embedding", "position_embedding"}:
            undo.append(module.register_forward_hook(note(name)).remove)
        elif isinstance(module, Attention):
            undo.append(_watch_scores(module, name, found))
    try:
        found["logits"] = model(tokens).double()
    finally:
        for each in undo:
            each()
    return found


def _watch_scores(module: Attention, name: str, found: dict[str, Tensor]) -> Callable[[], None]:
    """Put a core in front that notes the reach of scores and the biases of a table; returns what takes it away."""
    core = module.core

    def watching(
        q: Tensor, k: Tensor, v: Tensor, mask: MaskSpec, drop: Drop | None = None, scale: float | None = None
    ) -> Tensor:
        wide = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        lengths = torch.linalg.vector_norm(q.double(), dim=-1) * torch.linalg.vector_norm(wide.double(), dim=-1)
        found[f"{name}.scores"] = lengths * (scale or 1 / math.sqrt(q.shape[-1]))
        if mask.bias is not None and mask.bias.table is not None:
            everything = slice(None)
            found[f"{name}.bias"] = mask.bias.part(everything, everything, everything, everything).double().tril()
        return core(q, k, v, mask, drop, scale)

    module.core = watching

    def restore() -> None:
        module.core = core

    return restore
