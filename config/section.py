"""What every part of the configuration is made of."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """Base of every part of the configuration: frozen, and closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


PositiveInt = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Rate = Annotated[float, Field(gt=0.0)]
OffIsAWord = BeforeValidator(lambda value: "off" if value is False else value)
"""For choices of which one is `off`, which YAML reads as false."""


def divisors(number: int) -> list[int]:
    """All divisors of `number`, ascending."""
    return [candidate for candidate in range(1, number + 1) if number % candidate == 0]
