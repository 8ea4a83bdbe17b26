"""Peak memory of conversions, against the size of what is converted.

random Llama weights, 1.87 GB in shards ──import──> a run ──export──> shards
each in a process of its own: peak resident and peak anonymous memory, less what importing torch takes

python benchmarks/convert.py [--layers 24] [--hidden 1024]
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path


def main() -> None:
    """Make, import and export; print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.step:
        step(args.step[0], Path(args.step[1]), args.layers, args.hidden)
        return
    with tempfile.TemporaryDirectory(dir=".") as folder:
        print("| | peak resident MB | peak anonymous MB | of them torch | weights MB |\n|---|---|---|---|---|")
        for name in ("make", "import", "export"):
            sizes = ("--layers", str(args.layers), "--hidden", str(args.hidden))
            subprocess.run([sys.executable, __file__, *sizes, "--step", name, folder], check=True)


def step(name: str, folder: Path, layers: int, hidden: int) -> None:
    """One of the three, in this process."""
    import torch

    from castalia.config import ModelConfig
    from castalia.convert.huggingface import architecture_of, huggingface_config
    from castalia.convert.huggingface_files import Part, write_folder
    from castalia.convert.table import row_to_theirs
    from castalia.data.tokenizer import load_tokenizer
    from castalia.tools.export import export_run
    from castalia.tools.export_tokenizer import tokenizer_json
    from castalia.tools.import_model import _shapes, import_model

    base, seen, over = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.02):
            status = Path("/proc/self/status").read_text(encoding="utf-8")
            seen.append(int((re.search(r"RssAnon:\s+(\d+)", status) or ["", "0"])[1]))

    threading.Thread(target=watch, daemon=True).start()
    source = folder / "source"
    if name == "make":
        cfg = ModelConfig(
            num_layers=layers,
            hidden_size=hidden,
            num_attention_heads=16,
            vocab_size=32000,
            max_position_embeddings=512,
            norm="rmsnorm",
            activation="swiglu",
            attention_bias=False,
            mlp_bias=False,
            residual="sequential",
            rotary_fraction=1.0,
            intermediate_size=4 * hidden,
        )
        shapes = _shapes(cfg)
        parts = []
        for row in architecture_of(cfg).rows(cfg):
            ours = {n: torch.empty(shapes[n], device="meta") for n in row.ours}
            theirs = {n: tuple(t.shape) for n, t in row_to_theirs(row, ours, "random weights").items()}
            parts.append(Part(theirs, lambda theirs=theirs: {n: torch.randn(s) * 0.02 for n, s in theirs.items()}))
        source.mkdir()
        write_folder(source, parts, torch.float32, 500_000_000)
        (source / "config.json").write_text(json.dumps(huggingface_config(cfg)))
        (source / "tokenizer.json").write_bytes(tokenizer_json(load_tokenizer("byte")))
    elif name == "import":
        import_model(source, folder / "run", check=False)
    else:
        export_run(folder / "run", folder / "exported", check=False, shard_size=500_000_000)
    time.sleep(0.05)
    over.set()
    size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"| {name} | {peak / 1e3:.0f} | {max(seen) / 1e3:.0f} | {base / 1e3:.0f} | {size / 1e6:.0f} |", flush=True)


if __name__ == "__main__":
    main()
