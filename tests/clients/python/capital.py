"""The form of an answer as a Pydantic model, for the clients that read it so. The same as `cell.CAPITAL`."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Capital(BaseModel):
    """The capital of a country."""

    capital: Literal["Paris", "Rome"]
    rivers: int = Field(ge=1, le=9)
