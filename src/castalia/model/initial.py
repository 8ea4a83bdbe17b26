"""Initial weights as a function of (seed, canonical name, index) alone.

Each parameter is drawn in blocks of rows, every block from a generator of its own, seeded by
a hash of (seed, name, block). So the weights do not depend on the layout, on the order in
which modules are built or on the device, and a rank that holds some rows draws just those.

Formulas: small_init sqrt(2 / 5h) for the inner matrices (Nguyen & Salazar 2019), wang_init
2 / (L sqrt h) for what writes to the residual stream (Wang & Komatsuzaki 2021), as GPT-NeoX
names them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from castalia.config import ModelConfig
from castalia.errors import UserError

BLOCK_ELEMENTS = 1 << 20
RESIDUAL_OUTPUTS = ("attention.out.weight", "mlp.down.weight")

INIT_STD: dict[str, Callable[[ModelConfig], float]] = {
    "normal": lambda c: c.init_std,
    "scaled_normal": lambda c: c.init_std / math.sqrt(2 * c.num_layers),
    "single_residual_scaled_normal": lambda c: c.init_std / math.sqrt(c.num_layers),
    "small_init": lambda c: math.sqrt(2 / (5 * c.hidden_size)),
    "wang_init": lambda c: 2 / (c.num_layers * math.sqrt(c.hidden_size)),
}


def initialise(model: nn.Module, cfg: ModelConfig, seed: int) -> None:
    """Fill every parameter of `model`, in place; raises UserError for an unknown method."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            initial_value(name, parameter, cfg, seed)


def initial_value(name: str, out: Tensor, cfg: ModelConfig, seed: int) -> None:
    """Give one parameter its initial value: biases 0, norm gains 1, matrices normal."""
    if name.endswith(".bias"):
        out.zero_()
    elif out.ndim == 1:
        out.fill_(1.0)
    else:
        residual = name.endswith(RESIDUAL_OUTPUTS)
        key, method = (
            ("model.output_init_method", cfg.output_init_method) if residual else ("model.init_method", cfg.init_method)
        )
        if method not in INIT_STD:
            raise UserError(f"{key}: '{method}' is not known; known: {', '.join(INIT_STD)}")
        normal_rows(name, out, seed, INIT_STD[method](cfg))


def normal_rows(name: str, out: Tensor, seed: int, std: float, first_row: int = 0) -> None:
    """Fill `out` with rows first_row, first_row + 1, ... of the parameter `name`, normal with `std`.

    The draw is made in fp32 on the CPU, so that it is the same for every device and dtype.
    """
    columns = out[0].numel()
    block_rows = max(1, BLOCK_ELEMENTS // columns)
    last_row = first_row + out.shape[0]
    for block in range(first_row // block_rows, -(-last_row // block_rows)):
        start = block * block_rows
        draw = torch.empty(block_rows, columns).normal_(0.0, std, generator=_generator(seed, name, block))
        low, high = max(start, first_row), min(start + block_rows, last_row)
        out[low - first_row : high - first_row] = draw[low - start : high - start].view(-1, *out.shape[1:])


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/weights/{name}/{block}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
