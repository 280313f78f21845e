"""Bodies to models, and what is wrong with them in words: field, value and limit, all faults at once within reason.

Everything here runs in the event loop, so a hostile body must cost what a good one of its size costs: lists end at
their first fault (`api.schemas`), there may not be more names, lists and objects than any real body has, and only the
first faults are written out.
"""

import difflib
import re
from collections.abc import Collection, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from peftserve.api.schemas import BodyT
from peftserve.errors import InvalidRequestError

MAX_NODES = 1 << 15
MAX_FAULTS = 32
_MAX_STRINGS = 3 * MAX_NODES  # each name is one, most values are one, and there are a few thousand prompts at most
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def parse_body(model: type[BodyT], raw: bytes) -> BodyT:
    """`raw` JSON as a `model`; raises `InvalidRequestError` with its faults."""
    _check_structure(raw)
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise invalid(error, model) from None


def invalid(error: ValidationError, model: type[BaseModel]) -> InvalidRequestError:
    """The faults of `error`, the first `MAX_FAULTS` of them, as one error; its field is the first fault's."""
    faults: list[str] = []
    fields: list[str] = []
    for fault in error.errors(include_url=False, include_context=False)[:MAX_FAULTS]:
        # pydantic adds its own words for which type of a union and which side of a mapping it was looking at.
        field = ".".join(str(part) for part in fault["loc"] if not str(part).startswith("["))
        text = fault["msg"].removeprefix("Value error, ").replace("Input should", "must")
        if fault["type"] == "extra_forbidden":
            close = difflib.get_close_matches(str(fault["loc"][-1])[:64], _fields_at(model, fault["loc"]), n=1)
            text = "no such field" + (f"; did you mean {close[0]}?" if close else "")
        elif fault["type"] not in ("missing", "value_error", "json_invalid"):
            text += f" (got {_shorten(fault['input'])})"
        fields.append(_cut(field, 256))
        faults.append(f"{_cut(field, 256)}: {text}" if field else text)
    more = error.error_count() - len(faults)
    if more:
        faults.append(f"and {more} more faults")
    return InvalidRequestError("; ".join(faults), field=fields[0] or None, faults=faults)


def _check_structure(raw: bytes) -> None:
    """Raise `InvalidRequestError` for JSON of more than `MAX_NODES` names, lists and objects, before it is parsed."""
    if _nodes(raw) <= MAX_NODES:
        return
    # As a rule such bytes are in texts; those outside of strings are what counts. A good body has few strings too.
    skeleton, strings = _STRING.subn(b"", raw, count=_MAX_STRINGS)
    if strings == _MAX_STRINGS or _nodes(skeleton) > MAX_NODES:
        raise InvalidRequestError(f"the body has more than {MAX_NODES} fields, lists and objects in all")


def _nodes(raw: bytes) -> int:
    return raw.count(b":") + raw.count(b"[") + raw.count(b"{")


def _fields_at(model: type[BaseModel], path: Sequence[str | int]) -> Collection[str]:
    """The names that the last part of `path` could have been."""
    for part in path[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return ()
        model = field.annotation
    return model.model_fields


def _shorten(value: Any) -> str:
    text = repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__name__
    return _cut(text, 64)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 4] + "..."
