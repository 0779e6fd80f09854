"""Which web pages may use the server from a browser (CORS)."""

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from polymoe.errors import RequestError
from polymoe.server.errors import error_response


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
