"""API keys: who asks, and for which tenant."""

import hmac
from collections.abc import Mapping
from hashlib import sha256

from peftserve.errors import AuthenticationError

DEFAULT_TENANT = "default"


class Authenticator:
    """Maps the `Authorization` header to a tenant. Without keys everybody is the tenant `default`."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        # Digests have one length, so comparing them tells nothing about a key's length either.
        self._tenants = [(sha256(key.encode()).digest(), tenant) for key, tenant in keys.items()]

    @property
    def required(self) -> bool:
        return bool(self._tenants)

    def tenant(self, authorization: str | None) -> str:
        """The tenant that `Bearer <key>` belongs to; raises `AuthenticationError`.

        Every key is compared in constant time, and all of them always, so that timing tells nothing.
        """
        if not self._tenants:
            return DEFAULT_TENANT
        scheme, _, key = (authorization or "").partition(" ")
        presented = sha256(key.strip().encode("utf-8", "surrogateescape")).digest()
        found: str | None = None
        for digest, tenant in self._tenants:
            if hmac.compare_digest(digest, presented):
                found = tenant
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError("an API key is needed: send the header 'Authorization: Bearer <key>'")
        if found is None:
            raise AuthenticationError("unknown API key")
        return found
