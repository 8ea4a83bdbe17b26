"""`castalia generate RUN --prompt TEXT`."""

from __future__ import annotations

import argparse
import json
import sys


def arguments(parser: argparse.ArgumentParser) -> None:
    """The verb's flags."""
    parser.add_argument("run", metavar="RUN", help="run folder")
    parser.add_argument(
        "--prompt", action="append", help="text to continue; may be given several times (default: none)"
    )
    parser.add_argument(
        "--max-tokens", type=int, help="new tokens (default: 128, or as many as the model has room for)"
    )
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (default 0.8)")
    parser.add_argument("--top-k", type=int, help="sample from the k likeliest")
    parser.add_argument("--top-p", type=float, help="sample from the fewest tokens that hold this probability")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step", type=int, help="checkpoint to use (default: the newest whole one)")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--no-stop", action="store_true", help="go on beyond the end of a document")
    parser.add_argument("--json", action="store_true", help="print one JSON object per prompt")


def run(args: argparse.Namespace) -> int:
    """Print each prompt with its continuation."""
    import torch

    from castalia.errors import UserError
    from castalia.generate.engine import generate
    from castalia.generate.load import load_run
    from castalia.model.kernels import choose_fp32_matmul

    choose_fp32_matmul(torch.device("cpu"))
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    model, tokenizer = load_run(args.run, step=args.step, dtype=dtype)
    prompts = args.prompt or [""]
    streaming = len(prompts) == 1 and not args.json and sys.stdout.isatty()
    if streaming:
        print(prompts[0], end="", flush=True)
    max_tokens = args.max_tokens
    if max_tokens is None:
        longest = max(max(len(tokenizer.encode(prompt)), 1) for prompt in prompts)
        room = (model.cfg.max_position_embeddings or longest + 128) - longest
        if room < 1:
            raise UserError(
                f"the longest prompt has {longest} tokens, which leaves no room in the "
                f"{model.cfg.max_position_embeddings} that the model can see at once: shorten it"
            )
        max_tokens = min(128, room)
    results = generate(
        model,
        tokenizer,
        prompts,
        max_tokens=max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop_at_eod=not args.no_stop,
        on_token=_show if streaming else None,
    )
    if streaming:
        print()
        return 0
    for number, result in enumerate(results):
        if args.json:
            print(json.dumps({"prompt": result.prompt, "text": result.text, "finish_reason": result.finish_reason}))
        else:
            print(("\n" if number else "") + f"{prompts[number]}{result.text}")
    return 0


def _show(index: int, token: int, text: str) -> None:
    print(text, end="", flush=True)
