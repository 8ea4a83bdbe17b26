"""`castalia generate RUN`: from a prompt, a file of prompts, the terminal or nothing; or score a data set."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from castalia.errors import UserError


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    add = parser.add_argument
    add("run", metavar="RUN", help="run folder, one checkpoint, or a GPT-NeoX checkpoint")
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
    add("--beams", type=int, metavar="N", help="beam search of this width; --num-samples are the best of each prompt")
    add("--length-penalty", type=float, metavar="P", help="with --beams: above 0 favours longer ones (default 1)")
    add("--temperature", type=float, help="0: always the likeliest token (default 0.8)")
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
    _check(args)
    if args.procs > 1:
        from castalia.parallel.launch import supervise

        given = list(sys.argv[1:])
        command = [a for i, a in enumerate(given) if a != "--procs" and (i == 0 or given[i - 1] != "--procs")]
        command = [a for a in command if not a.startswith("--procs=")]
        return supervise([sys.executable, "-m", "castalia", *command], args.procs)
    if args.logprobs is not None:
        return _logprobs(args)
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


def _check(args: argparse.Namespace) -> None:
    """Refuse what does not go together, before anything starts."""
    if sum(bool(given) for given in (args.prompt, args.input, args.interactive)) > 1:
        raise UserError("--prompt, --input and --interactive each say where prompts come from: give one of them")
    for flag in ("num_samples", "procs"):
        if getattr(args, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')} {getattr(args, flag)}: give a number from 1 on")
    if args.interactive:
        unused = [f for f in ("output", "json") if getattr(args, f)]
        unused += ["num_samples"] if args.num_samples > 1 and args.beams is None else []
        if unused:
            raise UserError(f"--{unused[0].replace('_', '-')} is of no use with --interactive: leave it out")
    if args.length_penalty is not None and args.beams is None:
        raise UserError("--length-penalty is of use with --beams alone: leave it out")
    if args.beams is not None:
        drawn = [f for f in ("temperature", "top_k", "top_p", "min_p") if getattr(args, f) is not None]
        drawn += ["repetition_penalty"] if args.repetition_penalty != 1 else []
        if drawn:
            raise UserError(f"--{drawn[0].replace('_', '-')} is for sampling, and --beams draws nothing: give one")
        if args.beams < args.num_samples:
            raise UserError(f"--num-samples {args.num_samples}: --beams {args.beams} has no more than that many")
    if args.logprobs is not None:
        if args.output is None:
            raise UserError("--logprobs needs --output, the prefix of the data set to write: add it")
        if args.settings or args.precision == "int8":
            raise UserError("--logprobs computes with whole models, in fp32 or bf16: leave the rest out")
        if Path(args.output) == Path(args.logprobs):
            raise UserError(f"--output {args.output} is the data set that is read: give another prefix")
    elif args.procs > 1:
        if args.interactive:
            raise UserError("--interactive asks one process: leave out --procs")
        if not args.settings:
            raise UserError(f"--procs {args.procs}: say how they share the model, as parallel.tensor={args.procs}")


def _prompts(args: argparse.Namespace) -> list[str]:
    if args.input is None:
        prompts = args.prompt or [""]
    else:
        from castalia.tools.generation import read_prompts

        prompts = read_prompts("--input", args.input, args.prompt_end)
    return [prompt for prompt in prompts for _ in range(1 if args.beams else args.num_samples)]


def _all(args: argparse.Namespace, decoder: Any, tokenizer: Any, prompts: list[str]) -> int:
    streaming = (
        len(prompts) == 1 and args.beams is None and not args.json and args.output is None and sys.stdout.isatty()
    )
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
                    **({} if r.score is None else {"score": r.score}),
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
        print(("\n" if number else "") + f"{result.prompt}{result.text}")
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
    if args.beams is not None:
        from castalia.generate.beams import beam_search

        return beam_search(
            decoder,
            tokenizer,
            prompts,
            args.beams,
            max_tokens,
            1.0 if args.length_penalty is None else args.length_penalty,
            args.num_samples,
            not args.no_stop,
            args.batch_size,
            stop=args.stop,
        )
    return generate(
        decoder,
        tokenizer,
        prompts,
        max_tokens=max_tokens,
        temperature=0.8 if args.temperature is None else args.temperature,
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
    print("A line is a prompt; an empty one starts a document. Ctrl-C ends a continuation, Ctrl-D all.", flush=True)
    while True:
        print("prompt> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            print()
            return 0
        prompt = line.rstrip("\n")
        print(prompt, end="", flush=True)
        try:
            results = _generate(args, decoder, tokenizer, [prompt], True)
            if args.beams is not None:
                print(f"\n{prompt}".join(r.text for r in results), end="")
        except KeyboardInterrupt:
            pass
        except UserError as error:  # a prompt that is too long: ask for another
            print(f"castalia: {error}", file=sys.stderr)
        print("\n")
        args.seed += 1


def _logprobs(args: argparse.Namespace) -> int:
    import torch

    from castalia.evaluate.team import Ranks
    from castalia.model.kernels import choose_fp32_matmul
    from castalia.parallel.launch import noted_failure
    from castalia.parallel.world import enter_world, joined, launched
    from castalia.tools.decoding import load_whole
    from castalia.tools.logprobs import write_logprobs

    choose_fp32_matmul(torch.device("cpu"))
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    with noted_failure(), ExitStack() as stack:
        team = None
        if launched():
            world = enter_world("cpu")
            stack.enter_context(joined(world))
            team = Ranks.of(world)
        model, _ = load_whole(args.run, args.step, dtype)
        length = args.max_tokens or model.cfg.max_position_embeddings or 2048
        number = write_logprobs(model, args.logprobs, args.output, length, args.batch_size, team=team)
        if team is None or team.rank == 0:
            print(f"log-probabilities of {number} documents: {args.output}")
    return 0


def _show(index: int, token: int, text: str) -> None:
    print(text, end="", flush=True)
