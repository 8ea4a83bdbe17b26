"""The section `sampling`: texts that the model writes while it is trained."""

from __future__ import annotations

from pydantic import model_validator

from castalia.config.section import Section, setting


class SamplingConfig(Section):
    """Texts that the model writes while it is trained, to be looked at; training is not touched by them."""

    interval: int | None = setting(
        None, "steps between samples, which also follow the last step; null: none", "cosmetic", "steps", ge=1
    )
    prompts: list[str] = setting(
        [""], "texts to go on from; an empty one begins as a document does", "cosmetic", min_length=1
    )
    prompts_file: str | None = setting(None, "text file with a prompt on each line, instead of prompts", "cosmetic")
    max_tokens: int = setting(64, "most tokens of each continuation", "cosmetic", "tokens", ge=1)
    temperature: float = setting(1.0, "logits are divided by it; 0: the most probable token", "cosmetic", ge=0)
    top_k: int | None = setting(None, "only so many most probable tokens; null: all", "cosmetic", ge=1)
    top_p: float | None = setting(
        None, "only the most probable tokens that reach this probability; null: all", "cosmetic", gt=0, le=1
    )
    seed: int = setting(0, "of the draws: a prompt has the same numbers each time", "cosmetic", ge=0, le=2**32 - 1)

    @model_validator(mode="after")
    def _asked_for(self) -> SamplingConfig:
        if self.prompts_file is not None and self.prompts != [""]:
            raise ValueError("give either sampling.prompts or sampling.prompts_file, not both")
        given = any(getattr(self, name) != field.default for name, field in type(self).model_fields.items())
        if self.interval is None and given:
            raise ValueError("sampling is of use with sampling.interval alone: give the steps between samples too")
        return self
