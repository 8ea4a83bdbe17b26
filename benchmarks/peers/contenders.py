"""The contenders of ../train.py: one process trains one of them, a few steps on command.

    train.py ──{"do": "run", "steps": 3}──> stdin    this process: model, optimizer, one batch
             <──{"seconds": [...], ...}──── stdout

Each contender is a process of its own, so that peak memory, threads and caches are its own;
between commands it sleeps on its stdin. All train the same shape on the same random batch,
from weights of the same spread, with AdamW (fused, betas 0.9 / 0.95, decay 0.1 of matrices)
and clipping at 1.0. Peers run the loop their users would write; bf16 means bf16 products with
fp32 master weights everywhere (for the peers: torch.autocast).
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], float]

BETAS, WEIGHT_DECAY, CLIP, LR, INIT_STD = (0.9, 0.95), 0.1, 1.0, 5e-4, 0.02


@dataclass(frozen=True)
class Shape:
    """Pythia's architecture (Biderman et al. 2023): parallel residual, a quarter of each head rotated, untied.

    With `kv_heads` it is Llama's: grouped queries, a gated MLP of `inner` columns, RMS norms, no biases.
    """

    layers: int
    hidden: int
    heads: int
    vocab: int = 50304
    kv_heads: int | None = None
    inner: int | None = None


SHAPES = {
    "tiny": Shape(2, 64, 4, 2048),
    "pythia-14m": Shape(6, 128, 4),
    "pythia-70m": Shape(6, 512, 8),
    "pythia-160m": Shape(12, 768, 12),
    "llama-100m": Shape(12, 640, 10, 32000, 2, 1792),
}


@dataclass(frozen=True)
class Task:
    """What is trained: shape, sequences x tokens, fp32 or bf16."""

    shape: Shape
    batch: int
    length: int
    precision: str


def castalia_config(task: Task, **model: Any) -> Any:
    """The task as Castalia's configuration; `model` are further settings of that section."""
    from castalia.config import Config

    shape = task.shape
    if shape.kv_heads:
        model |= {
            "num_kv_heads": shape.kv_heads, "intermediate_size": shape.inner, "activation": "swiglu",
            "norm": "rmsnorm", "residual": "sequential", "rotary_fraction": 1.0, "attention_bias": False,
            "mlp_bias": False,
        }  # fmt: skip
    return Config.model_validate(
        {
            "model": {
                "num_layers": shape.layers, "hidden_size": shape.hidden, "num_attention_heads": shape.heads,
                "vocab_size": shape.vocab, "rotary_fraction": 0.25, "residual": "parallel",
                "init_method": "normal", "output_init_method": "normal", "init_std": INIT_STD, **model,
            },
            "data": {"seq_length": task.length},
            "training": {"steps": 1, "batch_size": task.batch, "precision": task.precision},
            "optimizer": {"lr": LR, "betas": list(BETAS), "weight_decay": WEIGHT_DECAY, "clip_grad": CLIP},
        }
    )  # fmt: skip


COSTS = ("documents", "dropout", "masked", "accumulated")
"""What Castalia's own step may do besides, each a contender `castalia-...`."""
MICRO_BATCHES = 4


def castalia(task: Task, compiled: bool = False, besides: str | None = None) -> Step:
    """The step of castalia.train.loop, without its records.

    Args:
        besides: one of COSTS: documents of 2 to 512 tokens that do not see each other; dropout 0.1 of branches and
            probabilities; no loss on a third of the labels; or MICRO_BATCHES micro-batches in each step.
    """
    from castalia.data.loader import Batch
    from castalia.model.kernels import choose_matmul, use_matmul
    from castalia.model.transformer import build_model
    from castalia.optim import make_store
    from castalia.optim.weights import working_dtype
    from castalia.train.engine import LocalEngine

    dropout = {"hidden_dropout": 0.1, "attention_dropout": 0.1} if besides == "dropout" else {}
    config = castalia_config(task, **dropout)
    model = build_model(config.model, seed=1)
    use_matmul(model, choose_matmul(torch.device("cpu"), working_dtype(task.precision)))
    store = make_store(model, config.optimizer, task.precision, arena=True)
    engine = LocalEngine(model, store, config.loss, compiled=compiled)

    def step(tokens: Tensor, labels: Tensor) -> float:
        positions, doc_ids = torch.arange(tokens.shape[1]).expand_as(tokens), None
        if besides == "masked":
            labels = labels.masked_fill(torch.arange(labels.shape[1]) % 3 == 0, -100)
        elif besides == "documents":
            generator = torch.Generator().manual_seed(1)
            ends = torch.rand(tokens.shape, generator=generator) < 1 / 128  # documents of 128 tokens in the mean
            doc_ids = ends.cumsum(1).to(torch.int32)
            starts = (torch.arange(tokens.shape[1]) * ends).cummax(1).values
            positions = positions - starts
        batch = Batch(tokens, labels, positions, doc_ids=doc_ids, sample_ids=torch.arange(len(tokens)))
        batches = [batch] * (MICRO_BATCHES if besides == "accumulated" else 1)
        stats = engine.forward_backward(batches, sum(b.num_tokens for b in batches))
        norm = store.gradient_norm()
        clipped = norm.item() > CLIP
        store.step(LR, divisor=(norm + 1e-6) / CLIP if clipped else None)
        return stats.loss

    return step


def _peer_step(task: Task, model: torch.nn.Module, loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """The usual PyTorch loop around a function from (tokens, labels) to the loss."""
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.ndim > 1], "weight_decay": WEIGHT_DECAY},
        {"params": [w for w in weights if w.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LR, betas=BETAS, fused=True)
    low = task.precision == "bf16"

    def step(tokens: Tensor, labels: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            value = loss(tokens, labels)
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(value.detach())

    return step


def transformers(task: Task, compiled: bool) -> Step:
    """transformers' GPTNeoXForCausalLM (or Llama's), which computes its own loss (and shifts the labels itself)."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

    shape = task.shape
    llama = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.inner or 1,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        initializer_range=INIT_STD,
        max_position_embeddings=2048,
        use_cache=False,
    )
    config = GPTNeoXConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        intermediate_size=4 * shape.hidden,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        use_parallel_residual=True,
        tie_word_embeddings=False,
        initializer_range=INIT_STD,
        max_position_embeddings=2048,
        use_cache=False,
    )
    # Attention is SDPA by default.
    model = (LlamaForCausalLM(llama) if shape.kv_heads else GPTNeoXForCausalLM(config)).train()
    _same_size(model, task)
    call = torch.compile(model, dynamic=False) if compiled else model

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = call(input_ids=tokens, labels=tokens).loss
        return value

    return _peer_step(task, model, loss)


def litgpt(task: Task, compiled: bool) -> Step:
    """litgpt's GPT with its chunked_cross_entropy.

    Compiled, the loss is inside the graph: that is faster than litgpt's own script, which
    compiles the model alone.
    """
    from litgpt.config import Config
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    shape = task.shape
    more: dict[str, Any] = {"rotary_percentage": 0.25, "parallel_residual": True}
    if shape.kv_heads:
        more = {
            "rotary_percentage": 1.0, "parallel_residual": False, "n_query_groups": shape.kv_heads, "bias": False,
            "norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "intermediate_size": shape.inner,
        }  # fmt: skip
    config = Config(
        block_size=2048,
        n_layer=shape.layers,
        n_embd=shape.hidden,
        n_head=shape.heads,
        vocab_size=shape.vocab,
        padded_vocab_size=shape.vocab,
        **more,
    )
    model = GPT(config)
    model.apply(model._init_weights)
    _same_size(model, task)
    model.max_seq_length = task.length

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        value: Tensor = chunked_cross_entropy(model(tokens), labels)
        return value

    return _peer_step(task, model, torch.compile(loss, dynamic=False) if compiled else loss)


def _same_size(model: torch.nn.Module, task: Task) -> None:
    """A peer with more or fewer weights would not be the same model."""
    from castalia.model.size import model_size

    mine, wanted = (
        sum(p.numel() for p in model.parameters()),
        model_size(castalia_config(task)).total_parameters,
    )
    if mine != wanted:
        raise RuntimeError(
            f"the peer has {mine} parameters instead of {wanted}: its configuration is not the same model"
        )


CONTENDERS: dict[str, Callable[[Task], Step]] = {
    "castalia": castalia,
    "castalia-compiled": lambda task: castalia(task, True),
    **{f"castalia-{besides}": partial(castalia, besides=besides) for besides in COSTS},
    "transformers": lambda task: transformers(task, False),
    "transformers-compiled": lambda task: transformers(task, True),
    "litgpt": lambda task: litgpt(task, False),
    "litgpt-compiled": lambda task: litgpt(task, True),
}


def random_batch(task: Task, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Input and labels, int64 [batch, length] each, uniform over the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(task.shape.vocab, (task.batch, task.length + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def peak_memory() -> int | None:
    """Largest resident set of this process so far, bytes (Linux)."""
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return None


def busy_seconds() -> float | None:
    """CPU seconds of the whole machine so far, all cores and all users, stolen time included (Linux)."""
    try:
        with open("/proc/stat", encoding="ascii") as file:
            user, nice, system, _, _, irq, soft, steal, *_ = map(int, file.readline().split()[1:])
    except OSError:
        return None
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


class Share:
    """The share of the machine's CPU time that went to others while a block ran; None where unknown."""

    value: float | None = None

    def _own(self) -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    def __enter__(self) -> Share:
        self._start = (time.perf_counter(), self._own(), busy_seconds())
        return self

    def __exit__(self, *_: object) -> None:
        start, own, busy = self._start
        after = busy_seconds()
        if busy is not None and after is not None:
            elapsed = (time.perf_counter() - start) * (os.cpu_count() or 1)
            self.value = max(0.0, (after - busy - (self._own() - own)) / elapsed)


def serve(name: str, task: Task, answers: Any) -> None:
    """Obey the commands on stdin, one JSON object a line, until it is closed."""
    from castalia.model.kernels import choose_fp32_matmul

    # Peers get the quicker of torch's precisions for fp32 that is known to most; Castalia finds out by itself.
    fp32_matmul = choose_fp32_matmul(torch.device("cpu"))
    if fp32_matmul == "highest" and not name.startswith("castalia"):
        torch.set_float32_matmul_precision("medium")
        fp32_matmul = "medium"
    step = CONTENDERS[name](task)
    tokens, labels = random_batch(task)
    parts = MICRO_BATCHES if name == "castalia-accumulated" else 1

    def answer(value: dict[str, Any]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    answer({"ready": name, "threads": torch.get_num_threads(), "fp32_matmul": fp32_matmul})
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] != "run":
            raise ValueError(f"unknown command {command}")
        seconds, losses = [], []
        with Share() as foreign:
            for _ in range(command["steps"]):
                start = time.perf_counter()
                losses.append(step(tokens, labels))
                seconds.append((time.perf_counter() - start) / parts)
        answer({"seconds": seconds, "losses": losses, "peak": peak_memory(), "foreign": foreign.value})


def serve_machine(task: Task, answers: Any) -> None:
    """Answer each line with the rates of square matrix products; first, once, with what there is to know."""
    from importlib.metadata import version

    from castalia.model.kernels import choose_fp32_matmul
    from castalia.model.size import model_size
    from castalia.train.environment import environment
    from castalia.train.machine import measure_matmul_flops

    choose_fp32_matmul(torch.device("cpu"))
    facts = {k: v for k, v in environment().items() if k not in ("hostname", "command")}
    facts["peers"] = {name: version(name) for name in ("transformers", "litgpt")}
    flops = model_size(castalia_config(task)).flops_per_token
    print(json.dumps({"environment": facts, "flops_per_token": flops}), file=answers, flush=True)
    for _ in sys.stdin:
        with Share() as foreign:
            rates = {name: measure_matmul_flops(getattr(torch, name)) for name in ("float32", "bfloat16")}
        print(json.dumps({"flops": rates, "foreign": foreign.value}), file=answers, flush=True)


def main() -> None:
    """`contenders.py NAME SHAPE BATCH LENGTH PRECISION`, started by train.py."""
    name, shape, batch, length, precision = sys.argv[1:]
    task = Task(SHAPES[shape], int(batch), int(length), precision)
    # Only answers may reach the driver; whatever a library prints goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if name == "machine":
        serve_machine(task, answers)
    else:
        serve(name, task, answers)


if __name__ == "__main__":
    main()
