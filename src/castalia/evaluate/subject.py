"""What the user names -> a model that can be evaluated: a run, a checkpoint, or a Hugging Face folder.

    run folder, checkpoint ─────────castalia.generate.load──┐
    config.json + *.safetensors ────castalia.convert────────┴──> Subject (model, tokenizer, length) ──> scores

A Hugging Face folder is read as it is: nothing is written. Several processes that share the work each
hold the whole model and score every n-th request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from castalia.checkpoint import find_checkpoint
from castalia.config import ModelConfig
from castalia.data.tokenizer import Tokenizer, load_tokenizer
from castalia.errors import UserError
from castalia.evaluate.score import Progress, Request, Scored, score
from castalia.model.transformer import Transformer

if TYPE_CHECKING:
    from castalia.generate.decoder import Decoder


class Team(Protocol):
    """Processes that share the work."""

    rank: int
    size: int

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise sum over all of them."""
        ...

    def texts(self, own: Mapping[int, str], count: int) -> list[str]:
        """Texts 0 .. count-1, of which each process has some."""
        ...


@dataclass(frozen=True)
class Subject:
    """A model under evaluation.

    Attributes:
        name: what the user called it.
        model, tokenizer: as loaded.
        max_length: most inputs that the model sees at once.
        first: the id that a text without context is predicted from; None: the tokenizer has none.
        bos: put in front of every context; None, as in training here: nothing is.
        step: of the checkpoint, where there is one.
        team: processes that share the work; None: this one alone.
        decoder: where the model is one rank's part; then each rank does all the work.
    """

    name: str
    model: Transformer
    tokenizer: Tokenizer
    max_length: int
    first: int | None
    bos: int | None = None
    step: int | None = None
    team: Team | None = None
    decoder: Decoder | None = None

    @property
    def prefix(self) -> int:
        """The id that a text without context is predicted from.

        Raises:
            UserError: there is none.
        """
        if self.first is None:
            raise UserError(
                f"{self.name}: the tokenizer has no end-of-document token to predict a text's first token from: "
                "evaluate a token data set, with --data"
            )
        return self.first

    @property
    def engine(self) -> Transformer | Decoder:
        """What scores and generates."""
        return self.model if self.decoder is None else self.decoder

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.head_weight.device if self.decoder is None else self.decoder.device

    def score(self, requests: Sequence[Request], batch_size: int, progress: Progress | None = None) -> list[Scored]:
        """Score continuations (see castalia.evaluate.score), each process its share of them."""
        team = self.team
        if team is None or team.size == 1:
            return score(self.engine, requests, self.tokenizer.vocab_size, self.max_length, batch_size, progress)
        own = requests[team.rank :: team.size]
        found = score(self.model, own, self.tokenizer.vocab_size, self.max_length, batch_size, progress)
        table = torch.zeros(len(requests), 2, dtype=torch.float64)
        if found:
            table[team.rank :: team.size] = torch.tensor(found, dtype=torch.float64)
        return [Scored(logprob, greedy > 0) for logprob, greedy in team.total(table).tolist()]


def open_subject(
    path: str | Path,
    step: int | None = None,
    dtype: torch.dtype = torch.float32,
    add_bos: bool = False,
    team: Team | None = None,
) -> Subject:
    """Load what is to be evaluated.

    Args:
        path: a run's folder, one checkpoint, or a folder in Hugging Face format.
        step: of the run's checkpoint; None: the newest.
        dtype: of the matrices.
        add_bos: put the token in front of each context that the tokenizer's file puts there.
        team: processes that share the work.

    Raises:
        UserError: it is none of these.
    """
    folder = Path(path)
    if (folder / "config.json").is_file() and not (folder / "config.yaml").is_file():
        if step is not None:
            raise UserError(f"--step {step}: {folder} is a folder in Hugging Face format and has no steps")
        model, tokenizer = load_huggingface(folder, dtype)
    else:
        from castalia.generate.load import load_run

        model, tokenizer = load_run(folder, step=step, dtype=dtype)
        found = find_checkpoint(folder / "checkpoints", step, verify=False)
        step = found.step if found is not None else step
    return make_subject(str(path), model, tokenizer, step, add_bos, team)


def make_subject(
    name: str,
    model: Transformer | Decoder,
    tokenizer: Tokenizer,
    step: int | None = None,
    add_bos: bool = False,
    team: Team | None = None,
) -> Subject:
    """A model that is loaded already, or the decoder of one rank's part (see `open_subject`).

    Raises:
        UserError: the model has no length, or the tokenizer's file no first token though it is asked for.
    """
    decoder = None if isinstance(model, Transformer) else model
    whole = model if isinstance(model, Transformer) else model.model
    bos = first_token(tokenizer)
    if add_bos and bos is None:
        raise UserError("--add-bos: the tokenizer's file puts no token in front of a text: leave the flag out")
    length = whole.cfg.max_position_embeddings
    if length is None:
        raise UserError(f"{name}: says no length that it was made for: set model.max_position_embeddings")
    return Subject(
        name, whole, tokenizer, length, bos if add_bos else tokenizer.eod, bos if add_bos else None, step, team, decoder
    )


def first_token(tokenizer: Tokenizer) -> int | None:
    """The id that a tokenizer.json puts in front of every text for other programs; None: it puts none."""
    inner: Any = getattr(tokenizer, "tokenizer", None)
    if inner is None or tokenizer.kind != "hf":
        return None
    ids: list[int] = inner.encode("a").ids
    return ids[0] if ids and ids != tokenizer.encode("a") else None


def load_huggingface(folder: Path, dtype: torch.dtype = torch.float32) -> tuple[Transformer, Tokenizer]:
    """The model and the tokenizer of a folder in Hugging Face format.

    Raises:
        UserError: the architecture is none of ours, or a file is missing or damaged.
    """
    from castalia.convert import from_huggingface, model_config_fields
    from castalia.convert.huggingface_files import open_folder

    fields = model_config_fields(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    config = ModelConfig(**fields)
    weights = from_huggingface(open_folder(folder), config)
    with torch.device("meta"):
        model = Transformer(config)
    model.load_state_dict(weights, strict=not config.tie_embeddings, assign=True)
    looked_up = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Embedding)} - {id(model.head_weight)}
    for parameter in model.parameters():
        if parameter.dim() >= 2 and id(parameter) not in looked_up:
            parameter.data = parameter.data.to(dtype)
    return model.eval(), load_tokenizer(folder)
