"""What others' vulnerabilities taught (docs/operations.md lists the rules): each rule and the tests that hold it.

Rules of what the code never does are read from the code here, since no request could show them.
"""

import ast
import importlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

import polymoe
from servers import ThreadServer, engine_config, make_bundle

SOURCE = Path(polymoe.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
SERVING = ("server", "client", "engine", "protocol", "text", "model", "kernels", "bundle", "quant")

# Rule -> where its tests are.
RULES = {
    "checkpoints are safetensors, and headers are checked against the file": (
        "test_offline_tensorfile:test_inconsistent_entries", "test_offline_tensorfile:test_overlapping_tensors",
        "test_offline_tensorfile:test_truncated", "test_offline_tensorfile:test_not_safetensors",
    ),
    "code of a checkpoint is never run": (
        "test_checkpoint_lies:test_nested_auto_map_is_refused",
        "test_checkpoint_lies:test_kernels_of_the_hub_are_refused",
    ),
    "a variant comes from the operator's folder, links followed": (
        "test_live_server:test_bad_input", "test_checkpoint_lies:test_files_out_of_the_checkpoint",
    ),
    "no tensors and no addresses from clients": (
        "test_server_errors:test_wrong_completions", "test_server_fields:test_only_text_is_read",
    ),
    "counts have a cap before anything is allocated": (
        "test_server_errors:test_wrong_completions",
        "test_server_fields:test_a_batch_that_can_never_fit_is_wrong_and_not_early",
    ),
    "heads, bodies, connections and slow clients have limits": (
        "test_server_errors:test_bodies_have_a_limit", "test_server_limits:test_silent_connections_end",
        "test_server_limits:test_what_is_no_http_gets_an_error_like_all_others",
        "test_server_limits:test_large_bodies_together_have_a_limit",
        "test_server_limits:test_clients_that_never_read_are_given_up",
    ),
    "the prefix cache tells no tenant of another": (
        "test_server_keys:test_what_was_computed_for_one_key_is_not_found_with_another",
    ),
    "every path needs the key unless it is named": (
        "test_security_rules:test_no_spelling_of_a_path_gets_past_the_key", "test_server_keys:test_who_gets_in",
    ),
    "keys are compared in constant time and stored as hashes": (
        "test_security_rules:test_keys_are_compared_in_constant_time",
        "test_server_keys:test_the_file_holds_hashes_only_and_is_the_owners",
    ),
    "a template or a grammar costs its own request": (
        "test_render_pool:test_a_template_that_loops_delays_only_its_own_requests",
        "test_structured_outputs:test_hostile_schemas_take_no_time",
    ),
    "what users write is text": ("test_chat_template:test_control_tokens_that_a_message_spells_out_stay_text",),
    "errors tell nothing of the inside": ("test_server_errors:test_unknown_urls_and_methods",),
    "a frame of the engine's socket can only be a message": (
        "test_server_engine:test_messages_survive_the_wire_and_nonsense_does_not", "test_fuzz:test_a_frame_of_anything",
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_has_its_tests(rule: str) -> None:
    for place in RULES[rule]:
        module, test = place.split(":")
        assert callable(getattr(importlib.import_module(module), test)), place


def calls_and_imports(file: Path) -> Iterator[str]:
    """`pickle` and `torch.load` as they are imported or called."""
    for node in ast.walk(ast.parse(file.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names):
                yield module
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Call(func=function, keywords=keywords):
                yield ast.unparse(function)
                yield from (f"{word.arg}={ast.unparse(word.value)}" for word in keywords if word.arg)


def test_nothing_is_unpickled_and_no_string_is_run() -> None:
    forbidden = {
        "pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "torch.load", "eval", "exec", "os.system",
        "yaml.load", "yaml.unsafe_load", "shell=True", "trust_remote_code=True", "allow_pickle=True",
        "weights_only=False",
    }  # fmt: skip
    for file in FILES:
        found = forbidden.intersection(calls_and_imports(file))
        assert not found, f"{file.relative_to(SOURCE)}: {found}"


def test_what_serves_fetches_nothing() -> None:
    """No client of HTTP is imported where requests are answered: an address in one cannot be asked for."""
    clients = {"requests", "httpx", "aiohttp", "urllib.request", "http.client", "urllib3"}
    downloads = {"huggingface_hub.hf_hub_download", "huggingface_hub.snapshot_download"}
    for file in FILES:
        if file.relative_to(SOURCE).parts[0] in SERVING:
            names = {name for call in calls_and_imports(file) for name in (call, call.split(".")[0])}
            assert not (clients | downloads) & names, file


def test_keys_are_compared_in_constant_time() -> None:
    """`==` on what a client sent as its key ends earlier the earlier it is wrong."""
    for name in ("middleware", "tenants", "variants_api"):
        tree = ast.parse((SOURCE / "server" / f"{name}.py").read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq):
                compared = {ast.unparse(side) for side in (node.left, *node.comparators)}
                assert not {"key", "given", "self._api_key", "self._admin_key"} & compared, ast.unparse(node)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThreadServer]:
    config = engine_config(make_bundle(tmp_path_factory.mktemp("rules")))
    with ThreadServer(config, api_key="a key of clients", admin_key="an admin's key") as server:
        yield server


def test_one_port_is_open(server: ThreadServer) -> None:
    """Neither the engine nor the renderers listen anywhere, and nothing listens beyond this machine."""
    this = psutil.Process()
    listening = []
    for process in (this, *this.children(recursive=True)):
        listening += [c.laddr for c in process.net_connections("all") if c.status == psutil.CONN_LISTEN]
    assert server.client.pid in {child.pid for child in this.children(recursive=True)}
    ours = {(address.ip, address.port) for address in listening if address.port == server.port}
    assert ours == {("127.0.0.1", server.port)}
    engine = psutil.Process(server.client.pid)
    assert not engine.net_connections("inet")


SPELLINGS = (
    "/v1/models", "//v1/models", "/v1//models", "/V1/models", "/v1/models/", "/v1/models?x=/health",
    "/health/../v1/models", "/health%2f..%2fv1%2fmodels", "/%76%31/models", "/v1/models;/health",
    "/v1/models#/health", "/ui/../v1/models",
    "/ui/assets/../../v1/models", "/ui/assets/%2e%2e/%2e%2e/v1/models", "/./v1/models", "/metrics",
    "/metrics/", "/version", "/openapi.json", "/ui/bundle", "/ui/events", "/admin", "/admin/x", "/nothing", "*", "http://127.0.0.1/v1/models",
    "/v1/variants", "/v1/variants/base",
)  # fmt: skip


@pytest.mark.parametrize("path", SPELLINGS)
def test_no_spelling_of_a_path_gets_past_the_key(server: ThreadServer, path: str) -> None:
    """As they are, since clients tidy them up; and with a Host header that looks like an open path."""
    for host in ("a", "a/health?"):
        with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
            sock.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
            answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        head, _, body = answer.partition(b"\r\n\r\n")
        status = int(head[9:12])
        assert status in (400, 401, 404), (path, head)
        if status != 404:
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        assert b"max_model_len" not in body
