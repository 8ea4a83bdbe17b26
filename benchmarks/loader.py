"""How many samples a second the loader gives, beside megatron-core's data set on the same files.

    python benchmarks/loader.py [--tokens 20_000_000] [--seq-length 2048] [--megatron FOLDER] [--json]

FOLDER is where megatron-core lies: `pip install --no-deps --target FOLDER megatron-core==0.16.1`.

Random documents of 1 to 2000 ids; the batches are read and thrown away. Castalia's batches come with what a step
takes (tokens, labels, positions, checks of the ids); megatron-core's `data set[i]` with its mask of the whole
attention, its default, and without. All read in the caller, one thread, in turns; rates are by the CPU time of the
process, which other programs disturb less, and the ratios are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from castalia.data.loader import Loader, Shard
from castalia.data.plan import RunPlan
from castalia.data.sample import PackedDataset
from castalia.data.store import StoreWriter, TokenStore

VOCABULARY = 50_000


def megatron(folder: str, prefix: Path, seq_length: int, samples: int, mask: bool) -> Callable[[int], object]:
    """megatron-core's data set over the same files, as a function of a sample's number."""
    sys.path.insert(0, folder)
    warnings.simplefilter("ignore")
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    class Tokenizer:
        """What its configuration asks of one."""

        eod, pad, vocab_size = VOCABULARY, -1, VOCABULARY + 1
        unique_identifiers = {"class": "none"}  # noqa: RUF012

    config = GPTDatasetConfig(
        random_seed=1234,
        sequence_length=seq_length,
        blend=([str(prefix)], None),
        split="1,0,0",
        path_to_cache=str(prefix.parent),
        tokenizer=Tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=mask,
    )
    dataset = BlendedMegatronDatasetBuilder(GPTDataset, [samples, 0, 0], lambda: True, config).build()[0]
    assert dataset is not None
    return dataset.__getitem__  # type: ignore[no-any-return]


def rate(read: Callable[[int], object], samples: int, step: int = 1) -> float:
    """Samples for each second of this process's CPU time."""
    begun = time.process_time()
    for i in range(0, samples, step):
        read(i // step)
    return samples / (time.process_time() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000_000)
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--megatron", metavar="FOLDER", help="compare with the megatron-core that lies there")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    random = np.random.default_rng(0)
    result: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        prefix = Path(folder, "ds")
        start = time.perf_counter()
        with StoreWriter(prefix, np.uint16) as writer:
            while writer.num_tokens < args.tokens:
                writer.add_document(random.integers(0, VOCABULARY, random.integers(1, 2000), dtype=np.uint16))
            writer.finish()
        result["write_tokens_per_second"] = args.tokens / (time.perf_counter() - start)
        start = time.perf_counter()
        store = TokenStore(prefix)
        result["open_seconds"] = time.perf_counter() - start
        plan = RunPlan(args.batch_size, args.seq_length, args.steps)
        start = time.perf_counter()
        dataset = PackedDataset(store, (0, len(store)), plan.num_samples, args.seq_length, 1234)
        result["order_seconds"] = time.perf_counter() - start
        result["epochs"] = dataset.order.num_epochs

        def batch_of(prefetch: int) -> Loader:
            return Loader(dataset, plan, Shard(), args.batch_size, prefetch=prefetch, vocab_size=VOCABULARY)

        start = time.perf_counter()
        tokens = sum(batch.tokens.numel() for batches in batch_of(2).stream(0, args.steps) for batch in batches)
        result["tokens_per_second_prefetch_2"] = tokens / (time.perf_counter() - start)

        loader = batch_of(0)
        turns = {"castalia": lambda: rate(lambda i: loader.batch(plan.at(i)), plan.num_samples, args.batch_size)}
        if args.megatron:
            count = min(1000, plan.num_samples)
            with_mask, without = (
                megatron(args.megatron, prefix, args.seq_length, plan.num_samples, mask) for mask in (True, False)
            )
            turns["megatron_core"] = lambda: rate(with_mask, count)
            turns["megatron_core_without_mask"] = lambda: rate(without, count)
        rates: dict[str, list[float]] = {name: [] for name in turns}
        for _ in range(args.rounds):
            for name, turn in turns.items():
                rates[name].append(turn())
        for name, found in rates.items():
            result[f"{name}_samples_per_second"] = statistics.median(found)
            if name != "castalia":
                ratios = [mine / its for mine, its in zip(rates["castalia"], found, strict=True)]
                result[f"castalia_by_{name}"] = statistics.median(ratios)
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:45} {value:,.4g}")


if __name__ == "__main__":
    main()
