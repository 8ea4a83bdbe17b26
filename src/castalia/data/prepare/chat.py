"""Conversations -> ids, labels on the generating role's turns alone, and rewards.

    {"conversation": [{"role": "user", "content": "..."}, ...], "reward": 1}
        ──template, turn by turn──> what each turn adds ──> ids, labels = ids or -100, reward

The lengths that turns add are found as GPT-NeoX's preprocess_data_with_chat_template finds them: the
template is applied to the first turns, to one more, and so on, and what is longer belongs to the
new one. Labels stand at their token's own place; they are shifted when a batch is made.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from castalia.data.prepare.encode import Encoder
from castalia.data.prepare.recipes import IGNORED, Output, Part, Parts
from castalia.data.sources import Block, SourceOptions
from castalia.data.tokenizer import Tokenizer, encode_flat
from castalia.errors import UserError


@dataclass
class ChatRecipe:
    """Conversations under one key of .jsonl files.

    Attributes:
        template: a chat template in Jinja, as tokenizer_config.json has it.
        key: of the conversation, a list of {"role", "content"}.
        generation_role: whose turns the loss is taken on.
        only_last: take it on the last turn alone.
        no_mask: take it on every token.
        for_reward_model: the whole conversation and two ends of document; the loss on the last one alone.
        reward_key: key of a number that is written to PREFIX_reward; None: none.
        binary_reward: write +1 for what is true or above 0, else -1.
    """

    tokenizer: Tokenizer
    options: SourceOptions
    template: str
    key: str = "conversation"
    generation_role: str = "assistant"
    only_last: bool = False
    no_mask: bool = False
    for_reward_model: bool = False
    reward_key: str | None = None
    binary_reward: bool = False
    append_eod: bool = True
    encoder: str = "auto"
    _encoder: Encoder | None = field(default=None, repr=False)
    _compiled: Any = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_encoder": None, "_compiled": None}

    @property
    def quick(self) -> Encoder:
        """The tokenizer itself: a conversation is encoded again with each turn, in small pieces."""
        if self._encoder is None:
            self._encoder = Encoder(self.tokenizer, self.encoder)
        return self._encoder

    def outputs(self) -> list[Output]:
        """Ids and labels, and rewards where a key is given."""
        found = [Output("", np.dtype("<i4")), Output("_label", np.dtype("<i4"), is_ids=False)]
        if self.reward_key is not None:
            found.append(Output("_reward", np.dtype("<i4" if self.binary_reward else "<f4"), is_ids=False))
        return found

    def describe(self) -> dict[str, Any]:
        """Everything that the output depends on besides the inputs, as JSON."""
        own = ("template", "key", "generation_role", "only_last", "no_mask", "for_reward_model", "reward_key")
        return {
            "recipe": "chat",
            "tokenizer": self.tokenizer.identity(),
            **{name: getattr(self, name) for name in (*own, "binary_reward", "append_eod")},
        }

    def sample(self, block: Block) -> list[str]:
        """Texts of a block, for the proof."""
        return [self._render(turns, False, where) for turns, _, where in self._conversations(block)]

    def encode(self, block: Block) -> Parts:
        """The parts of a block."""
        ids: list[list[int]] = []
        labels: list[list[int]] = []
        rewards: list[float] = []
        size = 0
        for turns, reward, where in self._conversations(block):
            text, tokens, marks = self._conversation(turns, where)
            ids.append(tokens)
            labels.append(marks)
            rewards.append(reward)
            size += len(text.encode())
        sizes = np.array([len(one) for one in ids], np.int32)
        parts = [Part(np.array([i for one in lists for i in one], "<i4"), sizes, size) for lists in (ids, labels)]
        if self.reward_key is not None:
            dtype = self.outputs()[-1].dtype
            parts.append(Part(np.array(rewards, dtype), np.ones(len(rewards), np.int32), size))
        return Parts(parts)

    def _conversation(self, turns: list[dict[str, Any]], where: str) -> tuple[str, list[int], list[int]]:
        end = [self.tokenizer.eod] if self.append_eod and self.tokenizer.eod is not None else []
        text = self._render(turns, False, where)
        if self.for_reward_model:
            tokens = [*self._ids([text])[0], *end, *end]
            return text, tokens, [IGNORED] * (len(tokens) - 1) + tokens[-1:]
        begun = [self._render(turns[: i + 1], self._speaks(turns, i + 1), where) for i in range(len(turns))]
        tokens, labels = [], []
        for i, whole in enumerate(self._ids(begun)):
            new = whole[len(tokens) :]
            tokens += new
            heard = self.no_mask or (self._speaks(turns, i) and (not self.only_last or i == len(turns) - 1))
            labels += new if heard else [IGNORED] * len(new)
        last = not labels or labels[-1] != IGNORED
        return text, tokens + end, labels + (end if last else [IGNORED] * len(end))

    def _speaks(self, turns: list[dict[str, Any]], i: int) -> bool:
        return i < len(turns) and turns[i].get("role") == self.generation_role

    def _ids(self, texts: list[str]) -> list[list[int]]:
        ids, ends = self.quick.encode(texts) if self.quick.fast is not None else encode_flat(self.tokenizer, texts)
        return [part.tolist() for part in np.split(ids, ends[:-1])]

    def _render(self, turns: list[dict[str, Any]], begin: bool, where: str) -> str:
        if self._compiled is None:
            self._compiled = compile_template(self.template)
        ending = self.tokenizer.decode([self.tokenizer.eod]) if self.tokenizer.eod is not None else ""
        try:
            text: str = self._compiled.render(
                messages=turns, add_generation_prompt=begin, bos_token="", eos_token=ending
            )
        except Exception as error:  # whatever a template runs into
            raise UserError(f"{where}: the chat template does not fit this conversation ({error})") from None
        return text

    def _conversations(self, block: Block) -> list[tuple[list[dict[str, Any]], float, str]]:
        """The turns, the reward and the place of each conversation of a block."""
        if block.kind != "jsonl":
            raise UserError(f"{block.source}: conversations are read from .jsonl, a conversation on each line")
        found = []
        for number, line in enumerate(block.data.split(b"\n"), start=block.first + 1):
            if not line.strip():
                continue
            where = f"{block.source}:{number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                raise UserError(f"{where} is not valid JSON") from None
            if not isinstance(value, dict) or self.key not in value:
                raise UserError(f"{where} has no key {self.key!r}: name the conversation's key with --text-key")
            turns = value[self.key]
            if not isinstance(turns, list) or not all(isinstance(turn, dict) and "role" in turn for turn in turns):
                raise UserError(f"{where}: a conversation is a list of objects with a role and a content")
            if turns:
                found.append((turns, self._reward(value, where), where))
        return found

    def _reward(self, value: dict[str, Any], where: str) -> float:
        if self.reward_key is None:
            return 0.0
        reward = value.get(self.reward_key)
        reward = reward[0] if isinstance(reward, list) and len(reward) == 1 else reward
        if not isinstance(reward, bool | int | float):
            raise UserError(f"{where}: {self.reward_key!r} should be a number, not {reward!r}")
        if self.binary_reward:
            return 1.0 if reward > 0 else -1.0
        return float(reward)


def compile_template(template: str) -> Any:
    """A chat template in Jinja's sandbox, with what templates in the wild expect to find.

    Raises:
        UserError: it is no template, or the package is missing.
    """
    try:
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise UserError("chat templates need a package: pip install 'castalia[chat]'") from None

    def fail(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = fail
    environment.filters["tojson"] = lambda value, **how: json.dumps(value, ensure_ascii=False, **how)
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template is no Jinja ({error})") from None


def find_template(spec: str | None, tokenizer: str) -> str:
    """The template: a file, or the `chat_template` of the tokenizer_config.json beside the tokenizer.

    Raises:
        UserError: there is none.
    """
    if spec is not None:
        path = Path(spec).expanduser()
        if not path.is_file():
            raise UserError(f"{path} does not exist: give a file with a chat template in Jinja")
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".json":
            return text
    else:
        folder = Path(tokenizer).expanduser()
        path = (folder if folder.is_dir() else folder.parent) / "tokenizer_config.json"
        text = path.read_text(encoding="utf-8") if path.is_file() else "{}"
    try:
        template = json.loads(text).get("chat_template")
    except (ValueError, AttributeError):
        template = None
    if isinstance(template, list):  # several with names
        template = next((one["template"] for one in template if one.get("name") == "default"), None)
    if not isinstance(template, str):
        raise UserError(f"{path} has no chat template: name a file with one (--chat-template)")
    return template
