"""Texts -> token data sets, as fast as the machine's cores allow, whatever interrupts it.

    blocks ──engine──> recipe.encode ──in order──> StoreWriter, journal

`run.py` is the whole, `recipes.py` and `chat.py` say what a block becomes, `encode.py` how texts
become ids, `engine.py` where, `journal.py` how far it has come, `shard.py` what of it is whose.
"""

from castalia.data.prepare.chat import ChatRecipe, find_template
from castalia.data.prepare.encode import Encoder, cut_at_lines
from castalia.data.prepare.engine import ENGINES
from castalia.data.prepare.recipes import IGNORED, TextRecipe
from castalia.data.prepare.run import Interrupted, Progress, prepare, run_recipe
from castalia.data.prepare.shard import parse_shard, shard_inputs

__all__ = [
    "ENGINES",
    "IGNORED",
    "ChatRecipe",
    "Encoder",
    "Interrupted",
    "Progress",
    "TextRecipe",
    "cut_at_lines",
    "find_template",
    "parse_shard",
    "prepare",
    "run_recipe",
    "shard_inputs",
]
