"""A configuration -> one rank's part of its model, and what joins the parts when they generate.

    tensor     each rank: some heads, some inner columns, some rows of the output matrix; logits are gathered
    pipeline   embedding ─x─> ... ─x─> output matrix ─logits─> all ranks

Every rank ends each step with the same logits and draws from the same seeds, so all choose the same
tokens and no choice has to be sent around.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from castalia.config import Config
from castalia.model import Transformer
from castalia.parallel.mesh import Mesh
from castalia.parallel.parallelize import check_model, wrap
from castalia.parallel.plans import bounds


class RankLinks:
    """What joins a rank to the others (castalia.generate.decoder.Links).

    Args:
        mesh: the ranks, along `tensor` and `pipeline` alone.
        layers: the executed layers held here.
        vocab_size: rows of the whole output matrix.
    """

    def __init__(self, mesh: Mesh, layers: Sequence[int], vocab_size: int) -> None:
        self._mesh, self.layers = mesh, layers
        self._stages, self._ranks = mesh.layout.pipeline, mesh.layout.tensor
        self._widths = [e - b for b, e in (bounds(vocab_size, self._ranks, r) for r in range(self._ranks))]
        self.first, self.last = mesh.index("pipeline") == 0, mesh.index("pipeline") == self._stages - 1

    def receive(self, shape: tuple[int, ...]) -> Tensor:
        """fp32 hidden states from the stage before."""
        x = torch.empty(shape, device=self._mesh.device)
        dist.recv(x, self._mesh.world.rank - self._ranks)
        return x

    def send(self, x: Tensor) -> None:
        """Hidden states to the stage behind."""
        dist.send(x.contiguous(), self._mesh.world.rank + self._ranks)

    def whole_logits(self, local: Tensor | None, rows: int) -> Tensor:
        """fp32 `[rows, V]` on every rank; `local` `[rows, V / ranks]` on those of the last stage."""
        if local is not None and self._ranks > 1:
            parts = [local.new_zeros(rows, max(self._widths)) for _ in self._widths]
            mine = local.new_zeros(rows, max(self._widths))
            mine[:, : local.shape[1]] = local
            dist.all_gather(parts, mine, group=self._mesh.group("tensor"))
            local = torch.cat([p[:, :width] for p, width in zip(parts, self._widths, strict=True)], 1)
        if self._stages == 1:
            assert local is not None
            return local
        whole = torch.empty(rows, sum(self._widths), device=self._mesh.device) if local is None else local.contiguous()
        source = self._mesh.index("tensor") + (self._stages - 1) * self._ranks
        dist.broadcast(whole, source, group=self._mesh.group("pipeline"))
        return whole


Held = dict[str, tuple[Tensor, tuple[int, ...], tuple[int, ...]]]


def make_part(config: Config, mesh: Mesh) -> tuple[Transformer, RankLinks, Held]:
    """This rank's part of a model, fp32, in evaluation mode, its weights still to be read.

    Args:
        config: of the run, complete, with `parallel` as it is to be here: tensor and pipeline alone.
        mesh: of the layout that this describes.

    Returns:
        The part, what joins it to the others, and by name of every parameter of the whole model: what is held
        here (of another stage's nothing), the whole shape, and where the held rectangle begins.

    Raises:
        UserError: the model cannot have this layout.
    """
    check_model(config, mesh.layout)
    with torch.device("meta"):
        whole = Transformer(config.model)
    shapes = {name: tuple(p.shape) for name, p in whole.named_parameters()}
    model, places = wrap(whole, config, mesh)
    model.to_empty(device=mesh.device)
    held = dict(model.named_parameters())
    tensors = {n: (p.detach(), places[n].shape, places[n].offset) for n, p in held.items()}
    for name, shape in shapes.items():
        if name not in held:
            tensors[name] = (torch.empty(0, *shape[1:]), shape, (0,) * len(shape))
    layers: Sequence[int] = range(config.model.num_layers)
    if mesh.layout.pipeline > 1:
        layers = model.stages[mesh.index("pipeline")]  # type: ignore[index,assignment]
    return model.eval(), RankLinks(mesh, layers, shapes[whole.head_name][0]), tensors
