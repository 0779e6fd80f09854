"""The clients that others wrote, each a script of this folder, against servers that run here: `make test-clients`.

They are installed into an environment of their own (`.venv-clients`; openai-node with npm into a folder of it), because
some of them are large. Each script ends with an error where its client does not get what it expects.
"""

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from polymoe.client.client import AsyncEngineClient
from polymoe.config import EngineConfig
from polymoe.server.app import create_app
from polymoe.server.keys import Key, add_key
from polymoe.server.settings import ServerSettings
from servers import ThreadServer, engine_config, free_port, wait_for
from tool_bundle import make_tool_bundle

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parent.parent / ".venv-clients"
KEY, ADMIN_KEY = "clients' key", "admin's key"
SCRIPTS = (
    "openai_python.py", "anthropic_python.py", "litellm_client.py", "langchain_client.py", "instructor_client.py",
    "llama_index_client.py", "openai_node.mjs",
)  # fmt: skip
# Not among them: it takes minutes, and has a target of its own (`make test-schema`).
LONG = "schemathesis_cases.py"
_LIMIT = 300.0  # seconds for one script


@contextlib.contextmanager
def servers(folder: Path) -> Iterator[dict[str, str]]:
    """The variables that scripts read: a server, a key and one that has used up its tokens, a server that loads."""
    bundle = make_tool_bundle(folder)
    spent = add_key(folder / "keys.json", Key(name="spent", sha256="0" * 64, tokens_per_minute=1))
    port = free_port()
    app = create_app(AsyncEngineClient(EngineConfig(bundle="none")), ServerSettings(port=port, api_key=KEY))
    loading = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=loading.run, daemon=True)
    thread.start()
    options: dict[str, Any] = {"api_key": KEY, "keys": folder / "keys.json", "aliases": ("alias=base",)}
    options |= {"admin_key": ADMIN_KEY, "variants_root": folder / "checkpoints"}
    try:
        with ThreadServer(engine_config(bundle), **options) as server:
            wait_for(lambda: loading.started)
            body = {"model": "base", "prompt": [5], "max_tokens": 500, "ignore_eos": True}  # for eight hours
            server.post("/v1/completions", body, headers={"Authorization": f"Bearer {spent}"}).raise_for_status()
            yield {
                "POLYMOE_URL": server.url,
                "POLYMOE_LOADING_URL": f"http://127.0.0.1:{port}",
                "POLYMOE_KEY": KEY,
                "POLYMOE_ADMIN_KEY": ADMIN_KEY,
                "POLYMOE_SPENT_KEY": spent,
            }
    finally:
        loading.should_exit = True
        thread.join()


def run_script(
    command: list[str], variables: dict[str, str], limit: float = _LIMIT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env={**os.environ, **variables}, timeout=limit, capture_output=True, text=True, check=False
    )


def install(python: str) -> None:
    if not (ENVIRONMENT / "bin" / "python").exists():
        venv.create(ENVIRONMENT, with_pip=True)
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", "-r", str(HERE / "requirements.txt")],
        check=True,
    )
    if shutil.which("npm") is not None:
        subprocess.run(["npm", "install", "--silent", "--prefix", str(ENVIRONMENT / "node"), "openai@>=7"], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scripts", nargs="*", default=SCRIPTS, help="which; all without")
    parser.add_argument("--python", help="one that has the clients already, in place of .venv-clients")
    parser.add_argument("--limit", type=float, default=_LIMIT, help="seconds for one script")
    arguments = parser.parse_args()
    python = arguments.python or str(ENVIRONMENT / "bin" / "python")
    if arguments.python is None:
        install(python)
    failed = 0
    with tempfile.TemporaryDirectory() as folder, servers(Path(folder)) as variables:
        for name in arguments.scripts:
            script = HERE / name
            if script.suffix == ".mjs":
                if shutil.which("node") is None:
                    print(f"{name:24} not run: there is no node")
                    failed += 1
                    continue
                # node looks for packages from the script's folder upwards.
                script = Path(shutil.copy(script, ENVIRONMENT / "node"))
            started = time.monotonic()
            done = run_script(["node" if script.suffix == ".mjs" else python, str(script)], variables, arguments.limit)
            print(f"{name:24} {'passed' if done.returncode == 0 else 'FAILED'} in {time.monotonic() - started:.1f} s")
            if done.returncode != 0 or name == LONG:
                print(done.stdout + done.stderr)
            failed += done.returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
