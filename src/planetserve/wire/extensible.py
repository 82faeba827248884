"""JSON objects to which later versions add fields: what a reader does not know, it ignores.

Known fields are checked strictly: exact types, bounds, nothing coerced. Of unknown ones there may
be `MAX_UNKNOWN_FIELDS` with names as `FieldName` allows; how long they are, the limit of the whole
message bounds. Their values are dropped while the object is parsed. A sender that must not be
misunderstood names fields in `critical`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

MAX_UNKNOWN_FIELDS = 32
MAX_NAMES = 16
"""Names in one list: capabilities, or fields that are critical."""

_NAME = r"[a-z][a-z0-9_]{0,31}"
FieldName = Annotated[str, Field(pattern=rf"^{_NAME}$")]
Names = Annotated[list[FieldName], Field(max_length=MAX_NAMES)]


class Extensible(BaseModel):
    """Base of all that peers send as JSON."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True)

    OMITTED: ClassVar[frozenset[str]] = frozenset()
    """Fields that are not sent while they have their default: peers from before them, some of
    which refuse what they do not know, get the form that they know."""

    def to_json(self) -> str:
        """Compact JSON."""
        fields = type(self).model_fields
        left_out = {
            name
            for name in self.OMITTED
            if getattr(self, name) == fields[name].get_default(call_default_factory=True)
        }
        return self.model_dump_json(exclude=left_out)

    @model_validator(mode="before")
    @classmethod
    def _check_unknown(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            cls.check_unknown(value)
        return value

    @classmethod
    def check_unknown(cls, fields: Mapping[str, object]) -> None:
        """Refuse what may not be ignored.

        Raises:
            ValueError: too many unknown fields, or names that are none.
        """
        unknown = fields.keys() - cls.model_fields.keys()
        if len(unknown) > MAX_UNKNOWN_FIELDS:
            raise ValueError("too many unknown fields")
        if not all(re.fullmatch(_NAME, name) for name in unknown):
            raise ValueError("an unknown field without a proper name")
