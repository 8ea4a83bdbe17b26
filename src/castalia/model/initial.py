"""Initial weights as a function of (seed, canonical name, index) alone.

Each parameter is drawn in blocks of rows, every block from a generator of its own, seeded by
a hash of (seed, name, block). So the weights do not depend on the layout, on the order in
which modules are built or on the device, and a rank that holds some rows draws just those.
The orthogonal methods are the exception: their rows depend on each other, so each rank draws
the whole matrix and keeps its rows.

    normal, scaled_normal, single_residual_scaled_normal   init_std; / sqrt(2L); / sqrt(L)
    small_init       sqrt(2 / 5h)                           Nguyen & Salazar 2019
    wang_init        2 / (L sqrt h)                         Wang & Komatsuzaki 2021
    xavier_normal    sqrt(2 / (rows + columns))             Glorot & Bengio 2010
    xavier_uniform   uniform within sqrt(6 / (rows + columns))
    orthogonal, scaled_orthogonal                           Saxe et al. 2013; gain sqrt(2), sqrt(2 / L)

The names are GPT-NeoX's. Rows and columns are those of the whole matrix (of qkv together, of
gate and up apart, of one expert), not of a rank's shard. Stacked experts count as rows, by
their number among all of the layer's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from castalia.config import ModelConfig, mup
from castalia.errors import UserError

BLOCK_ELEMENTS = 1 << 20
RESIDUAL_OUTPUTS = ("attention.out.weight", ".down.weight")

INIT_STD: dict[str, Callable[[ModelConfig], float]] = {
    "normal": lambda c: c.init_std,
    "scaled_normal": lambda c: c.init_std / math.sqrt(2 * c.num_layers),
    "single_residual_scaled_normal": lambda c: c.init_std / math.sqrt(c.num_layers),
    "small_init": lambda c: math.sqrt(2 / (5 * c.hidden_size)),
    "wang_init": lambda c: 2 / (c.num_layers * math.sqrt(c.hidden_size)),
}

Initialiser = Callable[[str, Tensor, ModelConfig, int], None]
"""(canonical name, whole matrix to fill, configuration, seed)."""


def _of_std(std: Callable[[ModelConfig], float]) -> Initialiser:
    return lambda name, out, cfg, seed: normal_rows(name, out, seed, std(cfg))


INITIALISERS: dict[str, Initialiser] = {
    **{method: _of_std(std) for method, std in INIT_STD.items()},
    "xavier_normal": lambda name, out, cfg, seed: normal_rows(name, out, seed, math.sqrt(2 / sum(out.shape[-2:]))),
    "xavier_uniform": lambda name, out, cfg, seed: uniform_rows(name, out, seed, math.sqrt(6 / sum(out.shape[-2:]))),
    "orthogonal": lambda name, out, cfg, seed: orthogonal(name, out, seed, math.sqrt(2)),
    "scaled_orthogonal": lambda name, out, cfg, seed: orthogonal(name, out, seed, math.sqrt(2 / cfg.num_layers)),
}


def initialise(model: nn.Module, cfg: ModelConfig, seed: int) -> None:
    """Fill every parameter of `model`, in place; raises UserError for an unknown method."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            initial_value(name, parameter, cfg, seed)


def initial_value(name: str, out: Tensor, cfg: ModelConfig, seed: int) -> None:
    """Give one parameter its initial value: biases 0, norm gains 1, matrices by the configured method.

    Four have their own whatever the method: the relative bias (xavier_normal), tables with `model.stable_embedding`
    (xavier_uniform), the soft prompt (uniform), and the spatial weights of gmlp layers (0, their biases 1: at first the
    gate lets everything through).
    """
    if name.endswith("gate.spatial.weight"):
        out.zero_()
    elif name.endswith("gate.spatial.bias"):
        out.fill_(1.0)
    elif name.endswith(".bias"):
        out.zero_()
    elif out.ndim == 1:
        out.fill_(1.0)
    elif name.removesuffix(".weight") in cfg.normed_embeddings:
        _draw("xavier_uniform", name, out, cfg, seed)
    elif name == "relative_bias.weight":
        _draw("xavier_normal", name, out, cfg, seed)
    elif name == "soft_prompt.weight":
        uniform_rows(name, out, seed, cfg.soft_prompt_range)
    else:
        residual = name.endswith(RESIDUAL_OUTPUTS)
        key, method = (
            ("model.output_init_method", cfg.output_init_method) if residual else ("model.init_method", cfg.init_method)
        )
        if method not in INITIALISERS:
            raise UserError(f"{key}: '{method}' is not known; known: {', '.join(INITIALISERS)}")
        _draw(method, name, out, cfg, seed)


def _draw(method: str, name: str, out: Tensor, cfg: ModelConfig, seed: int) -> None:
    """By the method with the base model's sizes, times what the width makes of it; see castalia.config.mup."""
    factor = mup.initial_factor(name, cfg) * cfg.mup_init_scale
    if cfg.mup and method.startswith("xavier"):
        factor *= math.sqrt(sum(out.shape[-2:]) / sum(mup.base_sides(name, out.shape, cfg)))
    INITIALISERS[method](name, out, mup.at_base(cfg), seed)
    if factor != 1:
        out.mul_(factor)


def normal_rows(name: str, out: Tensor, seed: int, std: float, first_row: int = 0) -> None:
    """Fill `out` with rows first_row, first_row + 1, ... of the parameter `name`, normal with `std`.

    The draw is made in fp32 on the CPU, so that it is the same for every device and dtype.
    """
    _draw_rows(name, out, seed, first_row, lambda block, generator: block.normal_(0.0, std, generator=generator))


def uniform_rows(name: str, out: Tensor, seed: int, bound: float, first_row: int = 0) -> None:
    """As `normal_rows`, uniform between -bound and bound."""
    _draw_rows(
        name,
        out,
        seed,
        first_row,
        lambda block, generator: block.uniform_(-bound, bound, generator=generator),
    )


def orthogonal(name: str, out: Tensor, seed: int, gain: float) -> None:
    """Fill the whole matrix with gain times orthonormal rows, or columns where these are fewer.

    Q of a normal matrix's QR, the signs fixed by R's diagonal, so that it is uniformly distributed;
    computed in fp64, whose rounding is all that a machine's library can change. Of stacked experts,
    each one's matrix is drawn by its own name.
    """
    if out.ndim == 3:
        for expert, matrix in enumerate(out):
            orthogonal(f"{name}/{expert}", matrix, seed, gain)
        return
    normal = torch.empty(out.shape, dtype=torch.float32)
    normal_rows(name, normal, seed, 1.0)
    tall = normal.double() if out.shape[0] >= out.shape[1] else normal.double().T
    q, r = torch.linalg.qr(tall)
    q = q * torch.where(r.diagonal() < 0, -1.0, 1.0) * gain
    out.copy_(q if out.shape[0] >= out.shape[1] else q.T)


def _draw_rows(
    name: str, out: Tensor, seed: int, first_row: int, fill: Callable[[Tensor, torch.Generator], Tensor]
) -> None:
    columns = out[0].numel()
    block_rows = max(1, BLOCK_ELEMENTS // columns)
    last_row = first_row + out.shape[0]
    for block in range(first_row // block_rows, -(-last_row // block_rows)):
        start = block * block_rows
        draw = fill(torch.empty(block_rows, columns), _generator(seed, name, block))
        low, high = max(start, first_row), min(start + block_rows, last_row)
        out[low - first_row : high - first_row] = draw[low - start : high - start].view(-1, *out.shape[1:])


def _generator(seed: int, name: str, block: int) -> torch.Generator:
    digest = hashlib.blake2b(f"{seed}/weights/{name}/{block}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
