"""Other libraries' weights <-> ours: tables of names and transforms, each read in both directions.

torch_file    a .pt file without running what is in it (safe_pickle)
gptneox       GPT-NeoX checkpoints: any layout, any tensor-parallel size, Adam's state
huggingface   transformers' GPT-NeoX and Llama: weights and config.json
"""

from castalia.convert.gptneox import GPTNeoXState, load_gptneox_checkpoint
from castalia.convert.gptneox_table import to_gptneox
from castalia.convert.huggingface import (
    from_huggingface,
    huggingface_config,
    model_config_fields,
    to_huggingface,
)
from castalia.convert.torch_file import load_pt

__all__ = [
    "GPTNeoXState",
    "from_huggingface",
    "huggingface_config",
    "load_gptneox_checkpoint",
    "load_pt",
    "model_config_fields",
    "to_gptneox",
    "to_huggingface",
]
