"""One step through a pipeline: the same two methods as the other engine, so the loop does not know of it.

    all micro-batches ─> first stage ─> ... ─> last stage ─> loss / tokens of the global batch
                              <─ gradients, in the order of parallel.schedule <─

torch.distributed.pipelining moves activations and decides who computes when. A schedule is made for
each number and shape of micro-batches, over the same stages. Every rank learns the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from castalia.config import Config
from castalia.data.loader import Batch
from castalia.model.collected import Collected
from castalia.model.kernels import head_matrix
from castalia.model.loss import VocabularyShard
from castalia.model.registry import LOSSES, look_up
from castalia.optim import WeightStore
from castalia.parallel.context import rows_held, stretch
from castalia.parallel.experts import rebalance
from castalia.parallel.mesh import Mesh
from castalia.parallel.stages import Part, Stage, make_schedule
from castalia.train.auxiliary import Auxiliary
from castalia.train.engine import StepStats, small_part, total_of_sequences
from castalia.train.profile_timers import Timers

SUMMED = ("pipeline", "replicate", "shard", "context")


class PipelineEngine:
    """See Engine.

    Args:
        part: this rank's stages.
        store: of their weights.
        config: complete.
        mesh: the ranks.
        vocabulary: how the loss reaches rows of the output matrix that other ranks hold.
    """

    def __init__(
        self, part: Part, store: WeightStore, config: Config, mesh: Mesh, vocabulary: VocabularyShard | None
    ) -> None:
        self.part, self.store, self.config, self.mesh, self.vocabulary = part, store, config, mesh, vocabulary
        self.loss_sums = look_up(LOSSES, config.loss.function, "loss.function")
        model = config.model
        self._drops = model.hidden_dropout > 0 or model.attention_dropout > 0 or model.moe_jitter > 0
        self._expert_layers = [layer for layer in range(model.num_layers) if model.has_experts(layer)]
        self._noted: dict[int, list[Auxiliary]] = {}
        self._experts: dict[int, list[int]] = {}
        part.seed = config.training.seed
        self._stages = [Stage(part, number, self._run) for number in part.mine]
        self._schedules: dict[tuple[int, ...], Any] = {}
        self._by_tokens = config.loss.normalisation == "tokens"
        self.loss_scale, self._scale, self._micro_batches = 1.0, 1.0, 1
        self.measures_noise, self.timers = False, Timers(mesh.device)
        self._seen: list[tuple[Tensor, Tensor]] = []

    def forward_backward(self, micro_batches: Sequence[Batch], global_tokens: int, step: int = 0) -> StepStats:
        """See Engine."""
        self.part.step, self.part.drops = step, self._drops
        self._scale = self.loss_scale / max(global_tokens, 1)
        self._micro_batches = len(micro_batches) * self.mesh.layout.data
        self.store.prepare(True, True)
        self._noted.clear()
        self.part.routed = self._routed if self._expert_layers else None
        with self.timers("forward-backward"):
            seen = self._through(micro_batches, train=True)
            self.store.collect()
        small = None
        if self.measures_noise:
            valid = sum(batch.num_tokens for batch in micro_batches)
            parts = global_tokens / max(valid, 1) if self._by_tokens else self.mesh.layout.data
            small = small_part(self.store, self.mesh, valid, parts / self.loss_scale)
        with self.timers("reduce"):
            self.store.reduce()
        nll, mean, count = self.mesh.sum(seen, *SUMMED)
        loss = nll / max(count, 1) if self._by_tokens else mean / self._micro_batches
        auxiliary = self._auxiliary()
        if self._expert_layers:
            # A new schedule first learns the shapes from a pass that does not count.
            counted = [part for noted in self._noted.values() for part in noted[-len(micro_batches) :]]
            auxiliary.gather(counted, self._expert_layers, self.mesh.device)
        auxiliary.reduce(lambda values: self.mesh.sum(values, *SUMMED))
        self._experts = auxiliary.experts
        return StepStats(nll, int(count), loss, auxiliary.aux(int(count)), auxiliary.experts, small)

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[Batch]) -> StepStats:
        """See Engine; micro-batches go through in groups as large as a training step's."""
        self.part.drops, self.part.routed, self._scale = False, None, 1.0
        config, nll, tokens = self.config, 0.0, 0.0
        size = config.training.batch_size // (config.micro_batch_size * self.mesh.layout.data)
        group: list[Batch] = []
        for batch in micro_batches:
            group.append(batch)
            if len(group) == size:
                part_nll, _, part_tokens = self._through(group, train=False)
                nll, tokens, group = nll + part_nll, tokens + part_tokens, []
        assert not group, "an evaluation reads whole batches"
        nll, tokens = self.mesh.sum([nll, tokens], *SUMMED)
        return StepStats(nll, int(tokens), nll / max(tokens, 1))

    def updated(self) -> None:
        """See Engine: the biases of the routers that are held here move."""
        held = {layer for stage in self.part.mine for layer in self.part.stages[stage]}
        for layer, counts in self._experts.items():
            if layer in held:
                rebalance(self.part.experts_of(layer).router, torch.tensor(counts, device=self.mesh.device))

    def _through(self, micro_batches: Sequence[Batch], train: bool) -> list[float]:
        """Run micro-batches; sums of losses, of their means and of valid tokens on the last stage, zeros elsewhere."""
        held = [stretch(batch, self.mesh) for batch in micro_batches]
        device = self.mesh.device
        tokens, labels, positions = (
            torch.cat([getattr(b, name) for b in held]).to(device) for name in ("tokens", "labels", "positions")
        )
        if any(b.sample_ids is None for b in held):
            raise ValueError("a pipeline needs numbered samples")
        ids = torch.cat([b.sample_ids for b in held if b.sample_ids is not None]).to(device)
        self.part.rows = rows_held(tokens.shape[1] * self.mesh.layout.context, self.mesh)
        schedule = self._schedule(len(held), tuple(tokens.shape))
        self._seen.clear()
        given: dict[str, Any] = {"positions": positions, "sample_ids": ids}
        if held[0].doc_ids is not None:
            given["doc_ids"] = torch.cat([b.doc_ids for b in held if b.doc_ids is not None]).to(device)
        last = len(self.part.stages) - 1 in self.part.mine
        if last:
            given |= {"target": labels, "losses": [], "return_outputs": False}
        run = schedule.step if train else schedule.eval
        run(*((tokens,) if 0 in self.part.mine else ()), **given)
        # A new schedule first learns the shapes from a pass that does not count.
        seen = [(nll.item(), valid.item()) for nll, valid in self._seen[-len(held) :]] if last else []
        return [sum(n for n, _ in seen), sum(n / max(v, 1) for n, v in seen), sum(v for _, v in seen)]

    def _run(self, number: int, *given: Tensor | None) -> Tensor:
        out: Tensor = functional_call(self.part, self.store.working(), (number, *given))
        return out

    def _routed(self, stage: int, collected: Collected) -> Tensor:
        """The losses of a stage's experts for one micro-batch; noted for the record."""
        auxiliary = self._auxiliary()
        self._noted.setdefault(stage, []).append(auxiliary)
        share = 1 / (self._micro_batches * self.mesh.layout.context)
        return auxiliary.routed(collected, share, len(self._expert_layers))

    def _auxiliary(self) -> Auxiliary:
        return Auxiliary(self.config.loss, self.config.model, self.loss_scale, total_of_sequences(self.mesh))

    def _loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Of one micro-batch in the last stage."""
        weights, part, cfg = self.store.working(), self.part, self.config.loss
        valid = (labels >= 0).sum()
        sums = self.loss_sums(
            hidden,
            head_matrix(part, weights[part.head_name] if weights else part.head_weight),
            labels,
            bias=weights.get("head.bias") if weights else part.head_bias,
            scale=self._scale if self._by_tokens else self.loss_scale / (self._micro_batches * valid.clamp(min=1)),
            z_loss=cfg.z_loss,
            chunk_size=cfg.chunk_size,
            shard=self.vocabulary,
        )
        self._seen.append((sums.nll.detach(), valid))
        loss: Tensor = sums.scaled
        return loss

    def _schedule(self, count: int, shape: tuple[int, ...]) -> Any:
        key = (count, *shape)
        if key not in self._schedules:
            self._schedules[key] = make_schedule(
                self.config.parallel.schedule, self._stages, len(self.part.stages), count, self._loss, self.mesh
            )
        return self._schedules[key]
