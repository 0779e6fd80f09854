"""Which web pages may use the server from a browser (CORS)."""

import re

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from polymoe.errors import ConfigError, RequestError
from polymoe.server.errors import error_response

_ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://(\[[0-9a-f:.]+\]|[^\s/?#@:\[\]*]+)(?::(\d{1,5}))?")
_DEFAULT_PORTS = {"http": "80", "https": "443"}


def check_origin(origin: str) -> str:
    """An origin as browsers send it (lower case, without the scheme's own port), or `*`. Raises `ConfigError`."""
    if origin == "*":
        return origin
    match = _ORIGIN.fullmatch(origin.lower())
    if match is None:
        raise ConfigError(
            f"{origin[:200]!r} is not an origin; write --allowed-origin https://app.example.org or "
            "http://localhost:3000, without a path, or * for every web page."
        )
    scheme, host, port = match.groups()
    return f"{scheme}://{host}" if port in (None, _DEFAULT_PORTS.get(scheme)) else f"{scheme}://{host}:{port}"


class CorsMiddleware(CORSMiddleware):
    """Answers a browser's preflight, which carries no key, and says in every answer which pages may read it.

    Never with credentials: the key is a header that a page sends itself, so no page can use a cookie or a log-in that
    the browser keeps, whatever origins are allowed.
    """

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code != 400:
            return response
        reason = bytes(response.body).decode()
        refused = error_response(RequestError(f"{reason}: see --allowed-origin.", code="cors_refused"))
        refused.headers["Vary"] = response.headers["Vary"]
        return refused
