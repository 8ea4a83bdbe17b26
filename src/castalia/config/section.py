"""What every section of the configuration is made of: fields with a meaning, a class and a unit."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

FieldClass = Literal["numerics", "performance", "cosmetic"]


def setting(default: Any, text: str, kind: FieldClass = "numerics", unit: str | None = None, **limits: Any) -> Any:
    """A field with its meaning, its class and its unit; `limits` are pydantic's (gt, ge, le, ...)."""
    return Field(default, description=text, json_schema_extra={"class": kind, "unit": unit}, **limits)


class Section(BaseModel):
    """A section of the configuration: unknown keys are errors, values are not coerced, nothing is mutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)
