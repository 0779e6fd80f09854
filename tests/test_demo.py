"""`polymoe demo`, and what a shell needs: the version, completion."""

import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

import polymoe
from polymoe.demo import family_paths
from servers import free_port

COMMAND = [sys.executable, "-m", "polymoe"]


@pytest.mark.parametrize("policy", ["auto", "paper"])
def test_the_demo_serves_the_default_policy_and_names_the_papers(policy: str, tmp_path: Path) -> None:
    """It served `paper` while the tables beside it praised `auto`, and said of packed experts that none is resident."""
    port = free_port()
    options = ["--port", str(port), *(["--policy", "paper"] if policy == "paper" else [])]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    demo = subprocess.Popen([*COMMAND, "demo", *options], env=environment, stdout=subprocess.PIPE, text=True)
    assert demo.stdout is not None
    try:
        printed = []
        while not printed or not printed[-1].startswith("URL"):
            printed.append(demo.stdout.readline())
            assert printed[-1], f"the demo ended: {''.join(printed)}"
        said = "".join(printed)
        assert f"4 variants, policy {policy}, " in said
        assert ("polymoe demo --policy paper" in said) == (policy == "auto")
        assert "experts   32 resident, 0 absent" in said
        assert "1.00x one model's" in said
        for name in family_paths():
            body = {"model": name, "prompt": "Hello", "max_tokens": 4, "ignore_eos": True}
            reply = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
            assert reply.json()["usage"]["completion_tokens"] == 4, reply.text
    finally:
        demo.terminate()
        demo.communicate(timeout=60)
    assert demo.returncode == 0


@pytest.mark.parametrize("arguments", [["--version"], ["version"]])
def test_the_version(arguments: list[str]) -> None:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [polymoe.__version__]


@pytest.mark.parametrize(
    ("words", "offered"), [("polymoe se", ["serve"]), ("polymoe demo --po", ["--policy", "--port"])]
)
def test_a_shell_completes_commands_and_options(words: str, offered: list[str]) -> None:
    asked = {"_POLYMOE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    program = "import sys; sys.argv[0] = 'polymoe'; from polymoe.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | asked)
    assert sorted(done.stdout.split()) == offered
