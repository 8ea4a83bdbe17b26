"""`castalia generate RUN`: from a prompt, a file of prompts, the terminal or nothing; or score a data set."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from castalia.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder")
    add("settings", nargs="*", metavar="key=value", help="parallel.tensor, parallel.pipeline, with --procs")
    add("--prompt", action="append", help="text to continue; may be given several times (default: none)")
    add("--input", metavar="FILE", help="a file of prompts")
    add(
        "--prompt-end",
        default="\n",
        metavar="TEXT",
        help="what stands between the prompts of --input (default: a new line)",
    )
    add("--output", metavar="FILE", help="write JSON lines here (with --logprobs: the prefix of the data set to write)")
    add("--num-samples", type=int, default=1, metavar="N", help="continuations of each prompt (default 1)")
    add("--interactive", action="store_true", help="ask for prompts in the terminal")
    add("--logprobs", metavar="PREFIX", help="write the log-probabilities of a token data set instead")
    add("--max-tokens", type=int, help="new tokens (default: 128, or as many as the model has room for)")
    add("--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)")
    add("--top-k", type=int, help="sample from the k likeliest")
    add("--top-p", type=float, help="sample from the fewest tokens that hold this probability")
    add("--min-p", type=float, help="sample from tokens at least so likely, relative to the likeliest")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: what was there before becomes less likely")
    add("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be given several times")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=16, help="prompts at once (default 16); changes no text")
    add("--step", type=int, help="checkpoint to use (default: the newest whole one)")
    add("--precision", choices=["fp32", "bf16", "int8"], default="fp32", help="int8: weights alone")
    add("--no-stop", action="store_true", help="go on beyond the end of a document")
    add("--json", action="store_true", help="print one JSON object per continuation")
    add("--procs", type=int, default=1, metavar="N", help="processes that share the model (default 1)")


def run(args: argparse.Namespace) -> int:
    """Print each prompt with its continuation."""
    if args.logprobs is not None:
        return _logprobs(args)
    if sum(bool(given) for given in (args.prompt, args.input, args.interactive)) > 1:
        raise UserError("--prompt, --input and --interactive each say where prompts come from: give one of them")
    for flag in ("num_samples", "procs"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give a number from 1 on")
    if args.procs > 1:
        if args.interactive:
            raise UserError("--interactive asks one process: leave out --procs")
        from castalia.parallel.launch import supervise

        given = list(sys.argv[1:])
        command = [a for i, a in enumerate(given) if a != "--procs" and (i == 0 or given[i - 1] != "--procs")]
        command = [a for a in command if not a.startswith("--procs=")]
        return supervise([sys.executable, "-m", "castalia", *command], args.procs)
    from castalia.parallel.launch import noted_failure
    from castalia.tools.decoding import opened, parallel_of

    prompts = _prompts(args)
    with (
        noted_failure(),
        opened(args.run, args.step, args.precision, parallel_of(args.settings)) as (decoder, tokenizer),
    ):
        if args.interactive:
            return _interactive(args, decoder, tokenizer)
        return _all(args, decoder, tokenizer, prompts)


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.input is None:
        prompts = args.prompt or [""]
    else:
        from castalia.tools.generation import read_prompts

        prompts = read_prompts("--input", args.input, args.prompt_end)
    return [prompt for prompt in prompts for _ in range(args.num_samples)]


def _all(args: argparse.Namespace, decoder: Any, tokenizer: Any, prompts: list[str]) -> int:
    streaming = len(prompts) == 1 and not args.json and args.output is None and sys.stdout.isatty()
    if streaming:
        print(prompts[0], end="", flush=True)
    results = _generate(args, decoder, tokenizer, prompts, streaming)
    if streaming:
        print()
        return 0
    if args.output is not None or args.json:
        lines = [
            json.dumps(
                {
                    "prompt": r.prompt,
                    "text": r.text,
                    "finish_reason": r.finish_reason,
                    "tokens": r.tokens,
                    "logprobs": r.logprobs,
                },
                ensure_ascii=False,
            )
            for r in results
        ]
        if args.output is None:
            print("\n".join(lines))
            return 0
        import os

        if os.environ.get("RANK", "0") == "0":  # of several processes, one writes
            from castalia.config.files import write_text

            write_text(args.output, "".join(f"{line}\n" for line in lines))
            print(f"{len(lines)} continuations: {args.output}")
        return 0
    for number, result in enumerate(results):
        print(("\n" if number else "") + f"{prompts[number]}{result.text}")
    return 0


def _generate(args: argparse.Namespace, decoder: Any, tokenizer: Any, prompts: list[str], streaming: bool) -> list[Any]:
    from castalia.generate.engine import generate

    max_tokens = args.max_tokens
    if max_tokens is None:
        longest = max(max(len(tokenizer.encode(prompt)), 1) for prompt in prompts)
        room = (decoder.cfg.max_position_embeddings or longest + 128) - longest
        if room < 1:
            raise UserError(
                f"the longest prompt has {longest} tokens, which leaves no room in the "
                f"{decoder.cfg.max_position_embeddings} that the model can see at once: shorten it"
            )
        max_tokens = min(128, room)
    return generate(
        decoder,
        tokenizer,
        prompts,
        max_tokens=max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        stop=args.stop,
        seed=args.seed,
        batch_size=args.batch_size,
        stop_at_eod=not args.no_stop,
        on_token=_show if streaming else None,
    )


def _interactive(args: argparse.Namespace, decoder: Any, tokenizer: Any) -> int:
    """Rounds: a line is continued, up to the end of the input; each round has numbers of its own."""
    print("A line is a prompt; an empty one starts a document. Ctrl-D ends.", flush=True)
    while True:
        print("prompt> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            print()
            return 0
        prompt = line.rstrip("\n")
        print(prompt, end="", flush=True)
        try:
            _generate(args, decoder, tokenizer, [prompt], True)
        except UserError as error:  # a prompt that is too long: ask for another
            print(f"castalia: {error}", file=sys.stderr)
        print("\n")
        args.seed += 1


def _logprobs(args: argparse.Namespace) -> int:
    if args.output is None:
        raise UserError("--logprobs needs --output, the prefix of the data set to write: add it")
    if args.settings or args.procs > 1 or args.precision == "int8":
        raise UserError("--logprobs computes in one process, in fp32 or bf16: leave the rest out")
    if Path(args.output) == Path(args.logprobs):
        raise UserError(f"--output {args.output} is the data set that is read: give another prefix")
    import torch

    from castalia.generate.load import load_run
    from castalia.model.kernels import choose_fp32_matmul
    from castalia.tools.logprobs import write_logprobs

    choose_fp32_matmul(torch.device("cpu"))
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    model, _ = load_run(args.run, step=args.step, dtype=dtype)
    length = args.max_tokens or model.cfg.max_position_embeddings or 2048
    number = write_logprobs(model, args.logprobs, args.output, length, args.batch_size)
    print(f"log-probabilities of {number} documents: {args.output}")
    return 0


def _show(index: int, token: int, text: str) -> None:
    print(text, end="", flush=True)
