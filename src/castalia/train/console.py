"""Records -> lines for people, on standard error so that `--json` output stays clean."""

from __future__ import annotations

import sys
from typing import TextIO

from castalia.train.metrics import Record


class Console:
    """Progress for people.

    Args:
        steps: where the run ends.
        step_tokens: tokens of one step, to tell the time that is left.
        stream: where to print; None is whatever standard error is at the time.
        quiet: print nothing.
    """

    def __init__(self, steps: int, step_tokens: int, stream: TextIO | None = None, quiet: bool = False) -> None:
        self.steps, self.step_tokens, self.stream, self.quiet = steps, step_tokens, stream, quiet

    def say(self, text: str) -> None:
        """One line."""
        if self.quiet:
            return
        try:
            print(text, file=self.stream or sys.stderr, flush=True)
        except BrokenPipeError:  # whoever read along has gone; the run goes on, and metrics.jsonl has it all
            self.quiet = True

    def write(self, record: Record) -> None:
        """One line for a record of training or evaluation; events are said where they happen."""
        step = f"step {record['step']:>{len(str(self.steps))}}/{self.steps}"
        if record["kind"] == "train":
            self.say(f"{step}  {self._train(record)}")
        elif record["kind"] in ("valid", "test"):
            self.say(f"{step}  {self._evaluation(record)}")
        elif record["kind"] == "tasks":
            values = (f"{k.removeprefix('eval/')} {v:.4f}" for k, v in record.items() if k.startswith("eval/"))
            self.say(f"{step}  {'  '.join(values)}")

        elif record["kind"] == "samples":
            for sample in record["samples"]:
                self.say(f"{step}  from {sample['prompt']!r}:")
                self.say("".join(f"    {line}\n" for line in sample["text"].splitlines()).rstrip("\n"))

    def close(self, failed: bool = False) -> None:
        """Nothing to do."""

    def _train(self, record: Record) -> str:
        rate = record["tokens_per_second"]
        eta = clock((self.steps - record["step"]) * self.step_tokens / rate)
        mfu = f"  MFU {100 * record['mfu']:.0f}%" if "mfu" in record else ""
        skipped = f"  {record['skipped']} skipped" if "skipped" in record else ""
        # A skipped step has no finite loss, or no finite gradient.
        loss, norm = record.get("loss", float("nan")), record.get("grad_norm", float("nan"))
        return (
            f"loss {loss:.4f}  lr {record['lr']:.2e}  |g| {norm:.3f}  {human(rate)} tokens/s{mfu}{skipped}  ETA {eta}"
        )

    def _evaluation(self, record: Record) -> str:
        bits = f"  bits/byte {record['bits_per_byte']:.4f}" if "bits_per_byte" in record else ""
        bits += f"  perplexity/character {record['char_perplexity']:.4f}" if "char_perplexity" in record else ""
        name = "validation" if record["kind"] == "valid" else "test"
        return f"{name} loss {record.get('loss', float('nan')):.4f}{bits}"


def human(number: float, gap: str = "") -> str:
    """1234567 -> 1.23M, three significant digits; `gap` stands between number and unit."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.3g}{gap}{unit}"
    return f"{number:.3g}{gap}"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
