"""`/dashboard` and `/dashboard/grafana.json`: files of this package, public because they hold no data.

The page reads `/metrics` and `/v1/adapters` from the browser, with the key that its user types in.
"""

import re
from base64 import b64encode
from hashlib import sha256
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response

from peftserve.api.http.endpoint import Endpoint

_FILES = resources.files("peftserve.api.http.dashboard")
_PAGE = _FILES.joinpath("page.html").read_text("utf-8")
_GRAFANA = _FILES.joinpath("grafana.json").read_bytes()


def _sources(element: str) -> str:
    """CSP sources for the inline elements of the page: https://www.w3.org/TR/CSP3/#match-element-to-source-list."""
    texts = re.findall(rf"<{element}>(.*?)</{element}>", _PAGE, re.DOTALL)
    return " ".join(f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'" for text in texts)


_COMMON_HEADERS = {"cache-control": "no-cache", "x-content-type-options": "nosniff"}
_PAGE_HEADERS = _COMMON_HEADERS | {
    "content-security-policy": "; ".join(
        (
            "default-src 'none'",
            f"script-src {_sources('script')}",
            f"style-src {_sources('style')}",
            "connect-src 'self'",
            "img-src data:",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
            # No string ever becomes markup: adapter names are a tenant's.
            "require-trusted-types-for 'script'",
            "trusted-types 'none'",
        )
    ),
    "referrer-policy": "no-referrer",
}


async def dashboard(request: Request) -> Response:
    """A page that shows the server live. It asks for an API key if the data routes do."""
    return Response(_PAGE, media_type="text/html", headers=_PAGE_HEADERS)


async def grafana(request: Request) -> Response:
    """The same as a dashboard for Grafana 11, over a Prometheus that scrapes `/metrics`."""
    return Response(_GRAFANA, media_type="application/json", headers=_COMMON_HEADERS)


ENDPOINTS = (
    Endpoint("GET", "/dashboard", dashboard, "Live dashboard", "ops", answers={200: "text/html"}, public=True),
    Endpoint(
        "GET",
        "/dashboard/grafana.json",
        grafana,
        "Dashboard to import into Grafana",
        "ops",
        answers={200: "application/json"},
        public=True,
    ),
)
