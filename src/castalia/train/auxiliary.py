"""What a step minimises besides the next token's loss: terms of a micro-batch, and their sums for the record.

    Collected of a forward pass ──> one scalar to add to the loss ──> backward
                                └─> sums ──> StepStats.aux, tokens of each expert

The scope of each term: the z-loss and the further tokens of multi-token prediction are sums over
tokens, divided like the loss itself. A layer's balancing loss is one number for each sequence
(or micro-batch, as loss.moe_balance_scope says), its router's z-loss one for each token; both are
averaged over the global batch, each micro-batch by its share of the sequences, and summed over layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor

from castalia.config import LossConfig, ModelConfig
from castalia.model.collected import Collected, balance_loss, expert_counts, router_z_loss
from castalia.model.loss import IGNORED, LossSums
from castalia.model.mtp import shifted

Spread = Callable[[Tensor], Tensor] | None


class Auxiliary:
    """The auxiliary terms of one step: `add` for each micro-batch, then `reduce`, then `aux` and `experts`.

    Args:
        loss: their coefficients.
        model: what is trained.
        scale: of the loss, so also of what is added to it (fp16).
        spread: sums a tensor over the ranks that share the sequences; None: they are whole.
    """

    def __init__(self, loss: LossConfig, model: ModelConfig, scale: float = 1.0, spread: Spread = None) -> None:
        self._loss, self._model, self._scale = loss, model, scale
        self._spread = spread
        # Tensors on the device until `reduce`, so that no micro-batch waits for the one before.
        self._noted: dict[str, Tensor] = {}
        self._counts: dict[int, Tensor] = {}
        self._sums: dict[str, float] = {}
        self.experts: dict[int, list[int]] = {}
        """Tokens of each expert in the global batch, by executed layer; filled by `reduce`."""

    def add(
        self,
        sums: LossSums,
        collected: Collected,
        labels: Tensor,
        share: float,
        head: Callable[[Tensor, Tensor], LossSums],
        doc_ids: Tensor | None = None,
    ) -> Tensor:
        """What to differentiate for a micro-batch: its scaled loss and all auxiliary terms.

        Args:
            sums: of the next tokens.
            collected: by its forward pass.
            labels: int64 `[B, S]`.
            share: its sequences' share of the global batch's.
            head: (hidden states, labels) to their losses, scaled as the next tokens'.
            doc_ids: `[B, S]` where documents are kept apart: no label of another one is predicted.
        """
        total = sums.scaled
        if self._loss.z_loss > 0:
            self._note("z_loss", sums.z_squares)
        if collected.routing:
            total = total + self.routed(collected, share, len(collected.routing))
        for number, hidden in enumerate(collected.ahead):
            further = shifted(labels, number + 1, IGNORED)
            if doc_ids is not None:
                further = further.masked_fill(shifted(doc_ids, number + 1, -1) != doc_ids, IGNORED)
            losses = head(hidden, further)
            total = total + self._loss.mtp / len(collected.ahead) * losses.scaled
            self._note(f"mtp_loss_{number + 2}", losses.nll)
            self._note(f"mtp_tokens_{number + 2}", (further != IGNORED).sum())
        return total

    def routed(self, collected: Collected, share: float, layers: int) -> Tensor:
        """The scaled terms of the layers with experts alone.

        Args:
            collected: by the forward pass of some of these layers.
            share: as for `add`; over the ranks that share the sequences it is divided too.
            layers: how many there are in all.
        """
        total: Tensor | float = 0.0
        for layer, routing in collected.routing.items():
            balance = balance_loss(routing, self._loss.moe_balance_scope, self._spread)
            z = router_z_loss(routing)
            terms = self._loss.moe_balance * balance + self._loss.moe_z_loss * z
            total = total + self._scale * share * terms
            self._note("moe_balance", share / layers * balance.detach())
            self._note("moe_z_loss", share / layers * z.detach())
            self._counts[layer] = self._counts.get(layer, 0) + expert_counts(routing)
        return cast(Tensor, total)

    def gather(self, parts: Sequence[Auxiliary], layers: Sequence[int], device: torch.device) -> None:
        """Take over what was noted of some micro-batches by a pipeline's stages, whose other layers count 0 here."""
        for name in ("moe_balance", "moe_z_loss"):
            found = [part._noted[name] for part in parts if name in part._noted]
            self._noted[name] = sum(found, torch.zeros((), device=device))
        for layer in layers:
            counts = [part._counts[layer] for part in parts if layer in part._counts]
            none = torch.zeros(self._model.moe_num_experts, dtype=torch.int64, device=device)
            self._counts[layer] = sum(counts, none)

    def reduce(self, total: Callable[[list[float]], Sequence[float]]) -> None:
        """Make sums over the global batch of sums over this rank's micro-batches.

        Args:
            total: sums numbers over the ranks that have other sequences.
        """
        if not self._noted:
            return
        here = torch.cat([v.double().reshape(-1) for v in (*self._noted.values(), *self._counts.values())])
        values = total(here.tolist())
        self._sums = dict(zip(self._noted, values, strict=False))
        rest = iter(values[len(self._sums) :])
        self.experts = {layer: [int(next(rest)) for _ in range(len(n))] for layer, n in self._counts.items()}

    def aux(self, tokens: int) -> dict[str, float]:
        """Means for the record: over tokens, and for experts over layers too.

        Args:
            tokens: valid labels of the global batch.
        """
        out = {n: v for n, v in self._sums.items() if not n.startswith("mtp_tokens")}
        for name in out:
            if name == "z_loss":
                out[name] /= max(tokens, 1)
            elif name.startswith("mtp_loss"):
                out[name] /= max(self._sums[name.replace("loss", "tokens")], 1)
        if self.experts:
            out["expert_load"] = max(max(n) * len(n) / max(sum(n), 1) for n in self.experts.values())
        return out

    def _note(self, name: str, value: Tensor) -> None:
        self._noted[name] = self._noted[name] + value if name in self._noted else value
