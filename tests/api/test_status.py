"""The error table covers the whole tree."""

from collections.abc import Iterator

import pytest

from peftserve.api.auth import Authenticator
from peftserve.api.status import STATUS, status_of
from peftserve.errors import AuthenticationError, InternalError, PeftserveError


def tree(cls: type[PeftserveError]) -> Iterator[type[PeftserveError]]:
    for child in cls.__subclasses__():
        yield child
        yield from tree(child)


@pytest.mark.parametrize("cls", [cls for cls in tree(PeftserveError) if cls.__module__ == "peftserve.errors"])
def test_every_class_is_in_the_table(cls: type[PeftserveError]) -> None:
    assert cls in STATUS
    assert 400 <= STATUS[cls].http < 600
    assert (STATUS[cls].http >= 500) == (STATUS[cls].type == "server_error") or STATUS[cls].http == 499


def test_a_class_outside_takes_its_nearest_ancestors_status() -> None:
    class LocalError(AuthenticationError):
        pass

    assert status_of(LocalError("x")) == STATUS[AuthenticationError]
    assert status_of(PeftserveError("x")) == STATUS[InternalError]


KEYS = {"key-a": "tenant-a", "key-b": "tenant-b"}


@pytest.mark.parametrize(("header", "tenant"), [("Bearer key-a", "tenant-a"), ("bearer  key-b ", "tenant-b")])
def test_known_keys(header: str, tenant: str) -> None:
    assert Authenticator(KEYS).tenant(header) == tenant


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer ", "Basic key-a", "key-a"])
def test_no_key(header: str | None) -> None:
    with pytest.raises(AuthenticationError, match="Authorization: Bearer"):
        Authenticator(KEYS).tenant(header)


@pytest.mark.parametrize("header", ["Bearer key-", "Bearer key-aa", "Bearer KEY-A", "Bearer k\udcff"])
def test_unknown_key(header: str) -> None:
    with pytest.raises(AuthenticationError, match="unknown"):
        Authenticator(KEYS).tenant(header)


def test_without_keys_everybody_is_the_default_tenant() -> None:
    assert Authenticator({}).tenant(None) == "default"
