"""What every file that a user writes is read into: frozen, of known keys only, each of its own kind."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


class Config(BaseModel):
    """A mapping of a recipe, a mix or a study. Raises: pydantic's ValidationError, for `true` or `false` in a number's
    place too, which Python would take for 1 and 0."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Not a validator of fields: pydantic wants none on the key by which it tells methods apart.
    @model_validator(mode="wrap")
    @classmethod
    def _truths_are_no_numbers(cls, data: Any, read: ModelWrapValidatorHandler[Self]) -> Self:
        made = read(data)
        given = data if isinstance(data, dict) else {}
        taken = [k for k, v in given.items() if isinstance(v, bool) and type(getattr(made, k)) in (int, float)]
        if taken:
            rule = PydanticCustomError("no_number", "Input should be a number")
            errors = [InitErrorDetails(type=rule, loc=(k,), input=given[k]) for k in taken]
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return made
