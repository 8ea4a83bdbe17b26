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
from typing import Any

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor], float]

BETAS, WEIGHT_DECAY, CLIP, LR, INIT_STD = (0.9, 0.95), 0.1, 1.0, 5e-4, 0.02


@dataclass(frozen=True)
class Shape:
    """Pythia's architecture (Biderman et al. 2023): parallel residual, a quarter of each head rotated, untied."""

    layers: int
    hidden: int
    heads: int
    vocab: int = 50304


SHAPES = {
    "tiny": Shape(2, 64, 4, 2048),
    "pythia-70m": Shape(6, 512, 8),
    "pythia-160m": Shape(12, 768, 12),
}


@dataclass(frozen=True)
class Task:
    """What is trained: shape, sequences x tokens, fp32 or bf16."""

    shape: Shape
    batch: int
    length: int
    precision: str


def castalia_config(task: Task) -> Any:
    """The task as Castalia's configuration."""
    from castalia.config import Config

    shape = task.shape
    return Config.model_validate(
        {
            "model": {
                "num_layers": shape.layers, "hidden_size": shape.hidden, "num_attention_heads": shape.heads,
                "vocab_size": shape.vocab, "rotary_fraction": 0.25, "residual": "parallel",
                "init_method": "normal", "output_init_method": "normal", "init_std": INIT_STD,
            },
            "data": {"seq_length": task.length},
            "training": {"steps": 1, "batch_size": task.batch, "precision": task.precision},
            "optimizer": {"lr": LR, "betas": list(BETAS), "weight_decay": WEIGHT_DECAY, "clip_grad": CLIP},
        }
    )  # fmt: skip


def castalia(task: Task, compiled: bool) -> Step:
    """The step of castalia.train.loop, without its records."""
    from castalia.data.loader import Batch
    from castalia.model.kernels import choose_matmul, use_matmul
    from castalia.model.transformer import build_model
    from castalia.optim import make_store
    from castalia.optim.weights import working_dtype
    from castalia.train.engine import LocalEngine

    config = castalia_config(task)
    model = build_model(config.model, seed=1)
    use_matmul(model, choose_matmul(torch.device("cpu"), working_dtype(task.precision)))
    store = make_store(model, config.optimizer, task.precision, arena=True)
    engine = LocalEngine(model, store, config.loss, compiled=compiled)

    def step(tokens: Tensor, labels: Tensor) -> float:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        batch = Batch(tokens, labels, positions)
        stats = engine.forward_backward([batch], batch.num_tokens)
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
    """transformers' GPTNeoXForCausalLM, which computes its own loss (and shifts the labels itself)."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    shape = task.shape
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
    model = GPTNeoXForCausalLM(config).train()  # attention is SDPA by default
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
    config = Config(
        block_size=2048,
        n_layer=shape.layers,
        n_embd=shape.hidden,
        n_head=shape.heads,
        vocab_size=shape.vocab,
        padded_vocab_size=shape.vocab,
        rotary_percentage=0.25,
        parallel_residual=True,
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
    "castalia": lambda task: castalia(task, False),
    "castalia-compiled": lambda task: castalia(task, True),
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

    fp32_matmul = choose_fp32_matmul(torch.device("cpu"))
    step = CONTENDERS[name](task)
    tokens, labels = random_batch(task)

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
                seconds.append(time.perf_counter() - start)
        answer({"seconds": seconds, "losses": losses, "peak": peak_memory(), "foreign": foreign.value})


def serve_machine(task: Task, answers: Any) -> None:
    """Answer each line with the rate of square matrix products; first, once, with what there is to know."""
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
    dtype = torch.bfloat16 if task.precision == "bf16" else torch.float32
    for _ in sys.stdin:
        with Share() as foreign:
            rate = measure_matmul_flops(dtype)
        print(json.dumps({"flops": rate, "foreign": foreign.value}), file=answers, flush=True)


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
