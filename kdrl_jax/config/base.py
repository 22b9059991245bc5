"""The base of every section, and the strict scalar types they are made of."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

# Strict: `num_steps: true` or `"12"` is a mistake to report, not a value to coerce.
# (A strict float still takes an integer.)
Int = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
AboveZero = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Decay = Annotated[float, Field(strict=True, ge=0, lt=1)]
Flag = Annotated[bool, Field(strict=True)]


class Section(BaseModel):
    """A frozen group of settings. Unknown keys are refused; attribute docstrings are the docs."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
