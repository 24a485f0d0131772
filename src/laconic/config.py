"""The base class of everything that is read from a user's files: recipes, studies, mixes."""

from __future__ import annotations

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError


class Config(BaseModel):
    """A frozen mapping with known keys only.

    Validation also rejects `true` and `false` in place of a number, which Python takes for 1 and 0.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # A validator of the model, because pydantic allows none on the discriminator field of a union.
    @model_validator(mode="wrap")
    @classmethod
    def _reject_bool_for_number(cls, data: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        config = validate(data)
        values = data if isinstance(data, dict) else {}
        wrong = [k for k, v in values.items() if isinstance(v, bool) and type(getattr(config, k)) in (int, float)]
        if wrong:
            rule = PydanticCustomError("no_number", "Input should be a number")
            errors = [InitErrorDetails(type=rule, loc=(k,), input=values[k]) for k in wrong]
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return config
