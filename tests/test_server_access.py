"""Who gets in and how: the key, web pages of other origins, methods, and URLs that are nearly right. No engine."""

import asyncio
import functools
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from polymoe.client.client import AsyncEngineClient
from polymoe.config import EngineConfig
from polymoe.errors import ConfigError
from polymoe.server.app import create_app
from polymoe.server.settings import ServerSettings, check_origin

PAGE = "https://app.example.org"


@functools.cache  # a third of a second each
def app_of(**settings: Any) -> FastAPI:
    return create_app(AsyncEngineClient(EngineConfig(bundle="none")), ServerSettings(**settings))


def ask(method: str, path: str, headers: Any = (), **settings: Any) -> httpx.Response:
    """The answer of a server with these settings whose engine has not started."""

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app_of(**settings)), base_url="http://test") as http:
            return await http.request(method, path, headers=headers)

    return asyncio.run(run())


@pytest.mark.parametrize(
    ("value", "status"),
    [
        (b"Bearer sesame", 200),
        (b"bearer sesame", 200),
        (b"BEARER sesame", 200),
        (b"Bearer   sesame", 200),
        (b"Bearer Sesame", 401),
        (b"Bearer sesame2", 401),
        (b"Bearersesame", 401),
        (b"Basic sesame", 401),
        (b"sesame", 401),
        (b"Bearer", 401),
        (b"Bearer ", 401),
        (b"", 401),
    ],
)
def test_the_scheme_of_the_key_has_no_case(value: bytes, status: int) -> None:
    """RFC 9110, 11.1. `authorization: bearer KEY`, as several HTTP clients write it, was refused."""
    response = ask("GET", "/version", {"Authorization": value}, api_key="sesame")
    assert response.status_code == status
    if status == 401:
        assert response.headers["WWW-Authenticate"] == "Bearer"


def test_two_keys_are_no_key() -> None:
    two = [("Authorization", "Bearer sesame"), ("Authorization", "Bearer sesame")]
    assert ask("GET", "/version", two, api_key="sesame").status_code == 401


@pytest.mark.parametrize("key", ["sesame\n", " sesame", "sesame ", "a\tb", "a\r\nb", "\n"])
def test_a_key_that_no_header_can_hold(key: str) -> None:
    """A key read from a file keeps its line break, and then no request would ever have had the right one."""
    with pytest.raises(ConfigError, match="API key"):
        ServerSettings(api_key=key)


def preflight(path: str, origin: str, **settings: Any) -> httpx.Response:
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    return ask("OPTIONS", path, {"Origin": origin, **wanted}, **settings)


def test_a_preflight_needs_no_key() -> None:
    """Browsers send none with it; behind the check of the key no page could ever have used the server."""
    for path in ("/v1/chat/completions", "/v1/models"):
        response = preflight(path, PAGE, api_key="sesame", allowed_origins=(PAGE, "http://localhost:3000"))
        assert response.status_code == 200
        assert response.headers["Access-Control-Allow-Origin"] == PAGE
        assert "POST" in response.headers["Access-Control-Allow-Methods"]
        assert response.headers["Access-Control-Allow-Headers"] == "authorization,x-stainless-os"
        assert "Access-Control-Allow-Credentials" not in response.headers


def test_other_origins_are_refused() -> None:
    for origin in ("https://evil.example", "null", f"{PAGE}.evil.example", "http://app.example.org", f"{PAGE}:8443"):
        response = preflight("/v1/models", origin, allowed_origins=(PAGE,))
        assert response.status_code == 400
        assert response.json()["error"]["code"] == "cors_refused"
        assert "Access-Control-Allow-Origin" not in response.headers
        answer = ask("GET", "/version", {"Origin": origin}, allowed_origins=(PAGE,))
        assert "Access-Control-Allow-Origin" not in answer.headers
        assert "Origin" in answer.headers["Vary"]


def test_answers_and_errors_can_be_read_by_the_page() -> None:
    for path, status in (("/version", 200), ("/nothing", 404), ("/v1/models", 503)):
        response = ask("GET", path, {"Origin": PAGE}, allowed_origins=(PAGE,))
        assert (response.status_code, response.headers["Access-Control-Allow-Origin"]) == (status, PAGE)
        assert "Retry-After" in response.headers["Access-Control-Expose-Headers"]
    response = ask("GET", "/version", {"Origin": PAGE}, allowed_origins=(PAGE,), api_key="sesame")
    assert (response.status_code, response.headers["Access-Control-Allow-Origin"]) == (401, PAGE)


def test_every_origin_but_never_with_credentials() -> None:
    for response in (
        preflight("/v1/models", "https://any.example", allowed_origins=("*",)),
        ask("GET", "/version", {"Origin": "https://any.example", "Cookie": "a=b"}, allowed_origins=("*",)),
    ):
        assert response.status_code == 200
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert "Access-Control-Allow-Credentials" not in response.headers


def test_without_the_option_no_page_may_read_anything() -> None:
    assert preflight("/v1/models", PAGE).status_code == 405
    assert preflight("/v1/models", PAGE, api_key="sesame").status_code == 401
    response = ask("GET", "/version", {"Origin": PAGE})
    assert not any(name.startswith("access-control") for name in response.headers)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("https://app.example.org", "https://app.example.org"),
        ("HTTPS://App.Example.org:443", "https://app.example.org"),
        ("http://localhost:80", "http://localhost"),
        ("http://localhost:3000", "http://localhost:3000"),
        ("http://[::1]:3000", "http://[::1]:3000"),
        ("tauri://localhost", "tauri://localhost"),
        ("*", "*"),
    ],
)
def test_origins_as_browsers_write_them(given: str, meant: str) -> None:
    assert check_origin(given) == meant
    assert ServerSettings(allowed_origins=(given,)).allowed_origins == (meant,)


@pytest.mark.parametrize(
    "origin",
    ["app.example.org", "https://app.example.org/", "https://a/b", "https://*.a.org", "null", "", "https://", "a b://c",
     "https://user@a.org", "https://a.org:port", "https://a.org?x", "https://a.org,https://b.org"],
)  # fmt: skip
def test_what_is_no_origin_is_refused(origin: str) -> None:
    """An origin with a slash at its end would be accepted and then match no browser's."""
    with pytest.raises(ConfigError, match="--allowed-origin"):
        ServerSettings(allowed_origins=(origin,))


def test_no_redirect_goes_where_the_host_header_says() -> None:
    """`/version/` was answered with a redirect to `http://{Host}/version`: a cache would keep it for others."""
    for path in ("/version/", "/health/", "/tokenize/", "/v1/completions/", "/metrics/", "//version", "/v1"):
        for method in ("GET", "POST"):
            response = ask(method, path, {"Host": "evil.example"})
            # "//version" is the path "/" of a host, where browsers find the dashboard.
            no_post = path == "//version" and method == "POST"
            assert response.status_code == (405 if no_post else 404), path
            assert "Location" not in response.headers
            assert response.json()["error"]["code"] == ("method_not_allowed" if no_post else "not_found")
            assert "evil" not in response.text


@pytest.mark.parametrize("path", ["/health", "/version", "/metrics", "/v1/models", "/openapi.json"])
def test_head_is_get_without_a_body(path: str) -> None:
    """Load balancers probe with it; /health said 405."""
    assert ask("HEAD", path).status_code == ask("GET", path).status_code


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "FOO"])
def test_other_methods_are_told_which_there_are(method: str) -> None:
    for path, allowed in (("/version", {"GET", "HEAD"}), ("/v1/completions", {"POST"})):
        response = ask(method, path)
        assert response.status_code == 405
        assert response.json()["error"]["code"] == "method_not_allowed"
        assert set(response.headers["Allow"].split(", ")) == allowed
    assert ask(method, "/nothing").status_code == 404
