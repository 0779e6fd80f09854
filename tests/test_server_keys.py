"""Several keys: hashed at rest, each with variants, a share and limits; the administrator's; files; TLS."""

import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from polymoe.errors import ConfigError, OverloadedError
from polymoe.server.keys import Key, add_key, digest, read_keys, revoke_key
from polymoe.server.settings import ServerSettings
from polymoe.server.tenants import Tenant
from servers import CONTEXT, ThreadServer, engine_config, make_bundle, wait_for

BODY = {"model": "base", "prompt": "the fox", "max_tokens": 2}


def key(name: str, **properties: Any) -> Key:
    return Key(name=name, sha256="0" * 64, **properties)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys")


@pytest.fixture(scope="module")
def keys(folder: Path) -> dict[str, str]:
    """name -> key."""
    made = {
        "all": key("all"),
        "one": key("one", variants=("v1",)),
        "slow": key("slow", requests_per_minute=2),
        "short": key("short", tokens_per_minute=20),
        "single": key("single", concurrency=1),
    }
    return {name: add_key(folder / "keys.json", record) for name, record in made.items()}


@pytest.fixture(scope="module")
def server(folder: Path, keys: dict[str, str]) -> Iterator[ThreadServer]:  # noqa: ARG001  (they are made first)
    config = engine_config(make_bundle(folder))
    with ThreadServer(config, keys=folder / "keys.json", admin_key="root", api_key="common") as server:
        yield server


def ask(server: ThreadServer, key: str, path: str = "/v1/completions", **change: Any) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"}
    if change or path == "/v1/completions":
        return server.post(path, {**BODY, **change}, headers=headers)
    return httpx.get(server.url + path, headers=headers)


def test_the_file_holds_hashes_only_and_is_the_owners(folder: Path, keys: dict[str, str]) -> None:
    text = (folder / "keys.json").read_text()
    assert stat.S_IMODE((folder / "keys.json").stat().st_mode) == 0o600
    for name, secret in keys.items():
        assert secret not in text
        assert digest(secret) in text
        assert len(secret) > 40
        assert name in text
    with pytest.raises(ConfigError, match="has a key all"):
        add_key(folder / "keys.json", key("all"))


def test_who_gets_in(server: ThreadServer, keys: dict[str, str]) -> None:
    for secret in ("common", *keys.values()):
        assert ask(server, secret, "/version").status_code == 200
    for secret in ("x", "wrong", "root", keys["all"][:-1], digest(keys["all"])):
        response = ask(server, secret, "/version")
        assert response.status_code == 401
        assert secret == "x" or secret not in response.text
    for secret, status in (("root", 404), ("common", 401), (keys["all"], 401)):
        for path in ("/admin", "/admin/variants"):
            assert ask(server, secret, path).status_code == status


def test_the_dashboard_shows_all_tenants_and_so_opens_for_none(server: ThreadServer, keys: dict[str, str]) -> None:
    for secret, status in (("common", 200), ("root", 200), (keys["all"], 401), ("x", 401)):
        for path in ("/ui/about", "/ui/bundle"):
            assert ask(server, secret, path).status_code == status, path


def test_a_key_sees_its_variants_only(server: ThreadServer, keys: dict[str, str]) -> None:
    seen = ask(server, keys["one"], "/v1/models").json()["data"]
    assert [card["id"] for card in seen] == ["v1"]
    assert ask(server, keys["one"], "/v1/models/v1").status_code == 200
    assert ask(server, keys["one"], model="v1").status_code == 200
    headers = {"Authorization": f"Bearer {keys['one']}"}
    tries = [
        ask(server, keys["one"], "/v1/models/base"),
        ask(server, keys["one"]),
        ask(server, keys["one"], "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], prompt=None),
        server.post("/tokenize", {"model": "base", "prompt": "a"}, headers=headers),
        server.post("/detokenize", {"model": "base", "tokens": [5]}, headers=headers),
    ]
    assert [response.status_code for response in tries] == [404, 404, 400, 404, 404]
    assert "base" not in tries[1].json()["error"]["message"].partition("Available")[2]
    assert ask(server, keys["all"]).status_code == 200


def test_requests_and_tokens_a_minute(server: ThreadServer, keys: dict[str, str]) -> None:
    assert [ask(server, keys["slow"]).status_code for _ in range(3)] == [200, 200, 429]
    refused = ask(server, keys["slow"])
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 20 <= int(refused.headers["Retry-After"]) <= 31
    assert ask(server, keys["short"], max_tokens=40, ignore_eos=True).status_code == 200  # a debt of about 23 tokens
    refused = ask(server, keys["short"])
    assert refused.status_code == 429
    assert 40 <= int(refused.headers["Retry-After"]) <= 100
    assert ask(server, keys["all"]).status_code == 200


def test_requests_at_once(server: ThreadServer, keys: dict[str, str]) -> None:
    headers = {"Authorization": f"Bearer {keys['single']}"}
    body = {**BODY, "max_tokens": CONTEXT - 50, "ignore_eos": True, "stream": True, "n": 16}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, headers=headers, timeout=60) as response:
        lines = response.iter_lines()  # kept: the stream is closed with it
        next(lines)
        assert ask(server, keys["single"]).status_code == 429
    wait_for(lambda: ask(server, keys["single"]).status_code == 200)
    for wrong in ({"n": 0}, {"prompt": [5] * CONTEXT}, {"slo_class": "none"}):
        assert ask(server, keys["single"], **wrong).status_code == 400
    assert ask(server, keys["single"]).status_code == 200, "what is refused is not counted as running"


def test_what_was_computed_for_one_key_is_not_found_with_another(server: ThreadServer, keys: dict[str, str]) -> None:
    """The time of an answer would tell what others have asked; the salt was only what the client sent."""
    prompt = list(range(3, 100))

    def hits(secret: str, **change: Any) -> float:
        before = sum(server.stats().prefix_cache_hits)
        assert ask(server, secret, prompt=prompt, **change).status_code == 200
        return sum(server.stats().prefix_cache_hits) - before

    assert hits(keys["all"]) == 0
    assert hits(keys["all"]) > 0
    assert hits("common") == 0
    assert hits(keys["all"], cache_salt="x") == 0
    assert hits(keys["one"], model="v1") == 0


def test_keys_come_and_go_while_the_server_runs(server: ThreadServer, folder: Path) -> None:
    secret = add_key(folder / "keys.json", key("new"))
    wait_for(lambda: ask(server, secret, "/version").status_code == 200, timeout=5)
    revoke_key(folder / "keys.json", "new")
    wait_for(lambda: ask(server, secret, "/version").status_code == 401, timeout=5)
    kept = (folder / "keys.json").read_bytes()
    (folder / "keys.json").write_text("{")
    time.sleep(1.1)
    assert ask(server, "common", "/version").status_code == 200
    (folder / "keys.json").write_bytes(kept)


def test_a_limit_forgets() -> None:
    now = [0.0]
    tenant = Tenant(key("a", requests_per_minute=60, tokens_per_minute=600), clock=lambda: now[0])
    tenant.begin(1200)
    with pytest.raises(OverloadedError) as refused:
        tenant.begin(1)
    assert refused.value.retry_after == pytest.approx(60)
    now[0] = 60.1
    tenant.begin(1)
    assert tenant.running == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "not a file of keys"),
        ('{"keys": [{"name": "a/b", "sha256": "' + "0" * 64 + '"}]}', "no name of a key"),
        ('{"keys": [{"name": "a", "sha256": "1"}]}', "64 hexadecimal"),
        ('{"keys": [{"name": "a", "sha256": "' + "0" * 64 + '", "weight": 0}]}', "more than 0"),
        ('{"keys": [{"name": "a", "sha256": "' + "0" * 64 + '", "requests": 5}]}', "unknown field"),
        ('{"version": 2, "keys": []}', "version 2"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "keys.json").write_text(content)
    with pytest.raises(ConfigError, match=message) as refused:
        read_keys(tmp_path / "keys.json")
    assert "keys.json" in str(refused.value)


def test_the_command_line_makes_shows_and_revokes(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = "from polymoe.cli.main import main; main()"
        command = [sys.executable, "-c", script, "keys", *arguments, "--file", str(tmp_path / "k.json")]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    secret = run("add", "ann", "--variant", "v1", "--weight", "2", "--concurrency", "3").stdout.strip()
    (made,) = read_keys(tmp_path / "k.json")
    assert (made.sha256, made.variants, made.weight, made.concurrency) == (digest(secret), ("v1",), 2.0, 3)
    shown = run("list").stdout
    assert "ann" in shown
    assert secret not in shown
    assert run("revoke", "bob").returncode == 1
    assert run("revoke", "ann").returncode == 0
    assert read_keys(tmp_path / "k.json") == []


def test_keys_from_files(tmp_path: Path) -> None:
    """On a command line everybody on the machine reads them."""
    (tmp_path / "key").write_text("sesame\n")
    (tmp_path / "admin").write_text("root")
    settings = ServerSettings(host="0.0.0.0", api_key_file=tmp_path / "key", admin_key_file=tmp_path / "admin")
    assert (settings.api_key, settings.admin_key) == ("sesame", "root")
    for content, message in (("", "empty"), ("a\nb", "control"), (" a", "white space"), ("k" * 5000, "more than")):
        (tmp_path / "key").write_text(content)
        with pytest.raises(ConfigError, match=message):
            ServerSettings(api_key_file=tmp_path / "key")
    for options, message in (
        ({"api_key_file": tmp_path / "none"}, "cannot be read"),
        ({"api_key": "a", "api_key_file": tmp_path / "admin"}, "give one"),
        ({"api_key": "a", "admin_key": "a"}, "choose another"),
        ({"admin_key": "a"}, "protects nothing"),
        ({"ssl_keyfile": tmp_path / "none"}, "--ssl-certfile"),
        ({"ssl_certfile": tmp_path / "admin"}, "PEM"),
    ):
        with pytest.raises(ConfigError, match=message):
            ServerSettings(**options)  # type: ignore[arg-type]


def test_tls(folder: Path, keys: dict[str, str]) -> None:  # noqa: ARG001
    cert = folder / "cert.pem"
    cert.write_text(CERTIFICATE)
    with ThreadServer(engine_config(folder / "bundle"), ssl_certfile=cert, header_timeout=1.0) as server:
        context = ssl.create_default_context(cafile=str(cert))
        url = server.url.replace("http:", "https:")
        answer = httpx.post(f"{url}/v1/completions", json=BODY, verify=context, timeout=60)
        assert answer.json()["usage"]["completion_tokens"] in (1, 2)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{server.url}/version")


# Of localhost, for a hundred years, with its key. It protects nothing.
CERTIFICATE = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgkCyXJA/73Lkun3DX
OvNh3NTKtWx4C+Wq9p0/Iug070OhRANCAAQhABCbVCOGZnUWKmE/w7DybTZlaw18
M8Nx723VVPBcCV2I2l7HzepB1RA00/a0yqrvU3YEyNYh+3+t+VINK0AY
-----END PRIVATE KEY-----
-----BEGIN CERTIFICATE-----
MIIBmzCCAUGgAwIBAgIUDLHW8XkumlnkixFK+3C0y0DNGeEwCgYIKoZIzj0EAwIw
FDESMBAGA1UEAwwJbG9jYWxob3N0MCAXDTI2MTEyODE5NTQyN1oYDzIxMjYxMTA0
MTk1NDI3WjAUMRIwEAYDVQQDDAlsb2NhbGhvc3QwWTATBgcqhkjOPQIBBggqhkjO
PQMBBwNCAAQhABCbVCOGZnUWKmE/w7DybTZlaw18M8Nx723VVPBcCV2I2l7HzepB
1RA00/a0yqrvU3YEyNYh+3+t+VINK0AYo28wbTAdBgNVHQ4EFgQUUBKeCG6HD6EO
4tsJ0O99QajysPMwHwYDVR0jBBgwFoAUUBKeCG6HD6EO4tsJ0O99QajysPMwDwYD
VR0TAQH/BAUwAwEB/zAaBgNVHREEEzARhwR/AAABgglsb2NhbGhvc3QwCgYIKoZI
zj0EAwIDSAAwRQIgSxbxyDrXKLhrdOckdRUUXkMPDpsIRT4NxNrSfsIoHBwCIQCB
4StCnBERQhREyEZkIF2NBM1ETra9sqJ6UYPnhJtzqQ==
-----END CERTIFICATE-----
"""
