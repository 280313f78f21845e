"""Adapter names: `[a-z0-9][a-z0-9._-]{0,63}` in a tenant's namespace, optionally with an exact version."""

import difflib
import re
from collections.abc import Container, Sequence

from peftserve.adapters.blobs import is_digest
from peftserve.adapters.faults import quote
from peftserve.errors import AdapterNotFoundError, InvalidRequestError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")


def check_name(name: str, reserved: Container[str]) -> None:
    """Raises `InvalidRequestError` unless an adapter may be called `name`."""
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"adapter_id {quote(name)} is not a valid name: 1 to 64 lower-case letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit",
            field="adapter_id",
        )
    if name in reserved:
        raise InvalidRequestError(
            f"adapter_id {quote(name)} is the base model's name; choose another", field="adapter_id"
        )


def split_reference(reference: str) -> tuple[str, str | None]:
    """`name` or `name@sha256:<64 hex digits>` -> (name, digest or None); raises `AdapterNotFoundError`."""
    name, at, version = reference.partition("@")
    if not at:
        return name, None
    digest = version.removeprefix("sha256:")
    if digest == version or not is_digest(digest):
        raise AdapterNotFoundError(
            f"{quote(reference)} names no adapter version; write name@sha256: and 64 hexadecimal digits",
            field="adapter_id",
        )
    return name, digest


def not_found(name: str, candidates: Sequence[str]) -> AdapterNotFoundError:
    """The error for an unknown name, with up to 5 similar ones of `candidates`."""
    near = difflib.get_close_matches(name[:64], candidates, n=5, cutoff=0.5)
    hint = f"; similar names: {', '.join(near)}" if near else ""
    return AdapterNotFoundError(f"no adapter is called {quote(name)}{hint}", field="adapter_id")
