"""Generation beside the peers': new tokens per second, prefill and decoding apart, measured in turns.

    python benchmarks/train.py --setup                        # once: makes .venv-bench
    python benchmarks/generate.py [--batches 1 8 32] [--precision bf16] [--json results.json]

    round 1:  memory rate | A | B | C       every contender is a process that sleeps until its turn
    round 2:  memory rate | B | C | A       ratios are of one round; their median has a bootstrap interval

Another environment serves as well: --venv FOLDER, with --contenders for what it has. All of it takes about five
minutes on two cores.

Reading the weights once per step is what decoding cannot do without: the share of that limit is the last
column. It can pass 100 % where a CPU's last cache holds the weights and the measured rate is the memory's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "peers")]
from train import VENV, bootstrap, python_of, say  # noqa: E402

NAMES = ("castalia", "castalia-int8", "transformers", "litgpt")
VOCABULARY, LENGTH = 50304, 2048
Timing = tuple[float, float]
"""Seconds of the prefill (the first token included), and of all the tokens after it."""


def castalia(precision: str, int8: bool) -> Callable[[list[list[int]], int], Timing]:
    """castalia.generate.engine's loop, greedy: begin, then one step a token, log-probabilities included."""
    import torch
    from contenders import SHAPES, Task, castalia_config

    from castalia.generate.decoder import Decoder
    from castalia.generate.load import cast_matrices
    from castalia.generate.sampling import SamplingSettings, logprobs_of, sample
    from castalia.model.transformer import build_model

    cfg = castalia_config(Task(SHAPES["pythia-70m"], 1, LENGTH, precision)).model
    model = build_model(cfg.model_copy(update={"max_position_embeddings": LENGTH}), seed=1).eval()
    cast_matrices(model, torch.bfloat16 if precision == "bf16" and not int8 else torch.float32)
    decoder, greedy = Decoder(model, int8), SamplingSettings(0.0)
    del model

    def run(prompts: list[list[int]], count: int) -> Timing:
        with torch.inference_mode():
            start = time.perf_counter()
            logits = decoder.begin(prompts, len(prompts[0]) + count - 1)
            ids = sample(logits, greedy, [], VOCABULARY)
            ids.tolist()
            middle = time.perf_counter()
            for _ in range(count - 1):
                logits = decoder.step(ids)
                ids = sample(logits, greedy, [], VOCABULARY)
                ids.tolist(), logprobs_of(logits, ids).tolist()
            return middle - start, time.perf_counter() - middle

    return run


def transformers(precision: str) -> Callable[[list[list[int]], int], Timing]:
    """GPTNeoXForCausalLM.generate, greedy; its prefill is a call for one token."""
    import torch
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        use_parallel_residual=True,
        tie_word_embeddings=False,
        max_position_embeddings=LENGTH,
    )
    model = GPTNeoXForCausalLM(config).to(torch.bfloat16 if precision == "bf16" else torch.float32).eval()
    model.generation_config.eos_token_id = None

    def run(prompts: list[list[int]], count: int) -> Timing:
        tokens = torch.tensor(prompts)
        seconds = []
        with torch.inference_mode():
            for new in (1, count):
                start = time.perf_counter()
                out = model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    max_new_tokens=new,
                    do_sample=False,
                    pad_token_id=0,
                )
                seconds.append(time.perf_counter() - start)
                assert out.shape[1] == tokens.shape[1] + new
        return seconds[0], seconds[1] - seconds[0]

    return run


def litgpt(precision: str) -> Callable[[list[list[int]], int], Timing]:
    """litgpt's GPT with its static cache, greedy, one token after the other as litgpt.generate.base has it."""
    import torch
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(
        block_size=LENGTH,
        n_layer=6,
        n_embd=512,
        n_head=8,
        vocab_size=VOCABULARY,
        padded_vocab_size=VOCABULARY,
        rotary_percentage=0.25,
        parallel_residual=True,
    )
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = GPT(config).to(dtype).eval()

    def run(prompts: list[list[int]], count: int) -> Timing:
        tokens, length = torch.tensor(prompts), len(prompts[0])
        with torch.inference_mode():
            model.max_seq_length = length + count
            model.set_kv_cache(batch_size=len(prompts), device=torch.device("cpu"), dtype=dtype)
            start = time.perf_counter()
            ids = model(tokens, torch.arange(length))[:, -1].argmax(-1, keepdim=True)
            ids.tolist()
            middle = time.perf_counter()
            for place in range(length, length + count - 1):
                ids = model(ids, torch.tensor([place]))[:, -1].argmax(-1, keepdim=True)
                ids.tolist()
            end = time.perf_counter()
        model.clear_kv_cache()
        return middle - start, end - middle

    return run


def memory_rate() -> float:
    """Bytes per second of reading what no cache holds; the best of three."""
    import torch

    block, best = torch.ones(2**27), 0.0
    for _ in range(3):
        start = time.perf_counter()
        block.sum()
        best = max(best, block.numel() * 4 / (time.perf_counter() - start))
    return best


def serve(name: str, precision: str, length: int) -> None:
    """In a contender's process: a timing for each line of stdin, which gives the batch and the new tokens."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    from castalia.model.kernels import choose_fp32_matmul

    choose_fp32_matmul(torch.device("cpu"))
    makers: dict[str, Callable[[], Any]] = {
        "castalia": lambda: castalia(precision, False),
        "castalia-int8": lambda: castalia(precision, True),
        "transformers": lambda: transformers(precision),
        "litgpt": lambda: litgpt(precision),
    }
    run: Any = None if name == "machine" else makers[name]()
    print(json.dumps({"threads": torch.get_num_threads(), "torch": torch.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        batch, count = json.loads(line)
        prompts = torch.randint(VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(0)).tolist()
        print(json.dumps(memory_rate() if run is None else run(prompts, count)), file=answers, flush=True)


class Worker:
    """A process of `serve` and its pipe."""

    def __init__(self, python: Path, *arguments: Any) -> None:
        path = os.pathsep.join(filter(None, [str(HERE.parent / "src"), os.environ.get("PYTHONPATH")]))
        command = [str(python), str(HERE / "generate.py"), "--serve", *map(str, arguments)]
        env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
        self.greeting = self._answer()

    def ask(self, batch: int, count: int) -> Any:
        """Run once."""
        assert self.process.stdin is not None
        print(json.dumps([batch, count]), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a contender ended (code {self.process.wait()}); what it said is above")
        return json.loads(line)

    def close(self) -> None:
        """Let the process end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def weight_bytes(precision: str, name: str) -> int:
    """Bytes of the matrices that a step reads: 6 layers of 12 h^2, and the output matrix."""
    numbers = 6 * 12 * 512**2 + VOCABULARY * 512
    return numbers * (1 if name.endswith("int8") else 2 if precision == "bf16" else 4)


def measure(args: argparse.Namespace, workers: dict[str, Worker], batch: int, precision: str) -> dict[str, Any]:
    """One table."""
    for name in args.contenders:
        workers[name].ask(batch, 4)  # what is made at a first call is not counted
    rounds = []
    for number in range(args.rounds):
        shift = number % len(args.contenders)
        names = ["machine", *args.contenders[shift:], *args.contenders[:shift]]
        rounds.append({name: workers[name].ask(batch, args.new_tokens) for name in names})
        say(f"batch {batch}: round {number + 1} of {args.rounds}")
    return {"batch": batch, "precision": precision, **workers["machine"].greeting, "rounds": rounds}


def table(result: dict[str, Any], args: argparse.Namespace) -> str:
    """The measurements as text."""
    rounds, batch, new = result["rounds"], result["batch"], args.new_tokens
    memory = statistics.median(r["machine"] for r in rounds)
    lines = [
        f"batch {batch}, prompt {args.prompt}, {new} new tokens, {result['precision']}; {len(rounds)} rounds; "
        f"{result['threads']} threads, torch {result['torch']}; memory {memory / 1e9:.1f} GB/s",
        f"{'':16}{'new tok/s':>10}{'prefill tok/s':>15}{'decode tok/s':>14}  {'castalia / it, all':>20}"
        f"  {'decode':>20}{'of limit':>10}",
    ]
    for name in args.contenders:
        seconds = [r[name] for r in rounds]
        ours = [r["castalia"] for r in rounds] if "castalia" in args.contenders else seconds
        whole = bootstrap([sum(a) / sum(b) for a, b in zip(seconds, ours, strict=True)])
        steps = bootstrap([a[1] / b[1] for a, b in zip(seconds, ours, strict=True)])
        decode = statistics.median(batch * (new - 1) / s[1] for s in seconds)
        limit = batch * memory / weight_bytes(result["precision"], name)
        lines.append(
            f"{name:16}{statistics.median(batch * new / sum(s) for s in seconds):10.0f}"
            f"{statistics.median(batch * args.prompt / s[0] for s in seconds):15.0f}{decode:14.0f}"
            + "".join("  {:>20}".format("{:.2f} [{:.2f}, {:.2f}]".format(*r)) for r in (whole, steps))
            + f"{100 * decode / limit:9.0f}%"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure each batch size and precision, and print its table."""
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], sys.argv[3], int(sys.argv[4]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venv", type=Path, default=VENV, help="the peers' environment (default: .venv-bench)")
    parser.add_argument("--contenders", nargs="+", choices=NAMES, default=list(NAMES), metavar="NAME")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--precision", nargs="+", choices=("bf16", "fp32"), default=["bf16"])
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt (default 64)")
    parser.add_argument("--new-tokens", type=int, default=128, help="per prompt (default 128)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write every measurement to this file")
    args = parser.parse_args()
    args.python = python_of(args.venv)
    if not args.python.exists():
        sys.exit(f"{args.venv}: no environment with the peers; make it with: python benchmarks/train.py --setup")
    results = []
    for precision in args.precision:
        workers: dict[str, Worker] = {}
        try:
            for name in ("machine", *args.contenders):
                say(f"starting {name}")
                workers[name] = Worker(args.python, name, precision, args.prompt)
            for batch in args.batches:
                results.append(measure(args, workers, batch, precision))
                print(table(results[-1], args), end="\n\n", flush=True)
                if args.json:
                    args.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        finally:
            for worker in workers.values():
                worker.close()


if __name__ == "__main__":
    main()
