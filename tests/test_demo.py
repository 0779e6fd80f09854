"""`polymoe demo`, and what a shell needs: the version, completion."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

import polymoe
from polymoe.demo import family_paths
from servers import LIMIT, free_port
from zygote import RUN_COMMAND, Forked, zygote

COMMAND = [sys.executable, "-m", "polymoe"]


@dataclass(frozen=True)
class Demo:
    """What `polymoe demo` printed until it was ready, how many tokens each variant gave of 4, and what it left."""

    printed: str
    tokens: dict[str, int]
    rest: str
    exit_code: int

    @staticmethod
    def run(*options: str, fresh: bool = True, **environment: str) -> "Demo":
        port, tokens, printed = free_port(), {}, list[str]()
        read_end, write_end = os.pipe()
        demo = start(["demo", "--port", str(port), *options], write_end, environment, fresh)
        os.close(write_end)
        with os.fdopen(read_end) as output:
            try:
                while not printed or not printed[-1].startswith("curl "):
                    printed.append(output.readline())
                    assert printed[-1], f"the demo ended: {''.join(printed)}"
                for name in family_paths():
                    body = {"model": name, "prompt": "Hello", "max_tokens": 4, "ignore_eos": True}
                    reply = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=LIMIT)
                    tokens[name] = reply.json()["usage"]["completion_tokens"]
            finally:
                demo.terminate()
                rest = output.read()
        return Demo("".join(printed), tokens, rest, demo.wait(LIMIT))


def start(
    arguments: list[str], output: int, environment: dict[str, str], fresh: bool
) -> "subprocess.Popen[bytes] | Forked":
    """`polymoe …`, in a Python of its own, or forked from one that has imported what it needs."""
    asked = os.environ | environment | {"PYTHONUNBUFFERED": "1"}
    if fresh or sys.platform != "linux":
        return subprocess.Popen([*COMMAND, *arguments], env=asked, stdout=output, stderr=output)
    return zygote.fork(RUN_COMMAND, *arguments, out=output, error=output, environment=asked, engines=1)


@pytest.fixture(scope="module")
def temporary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tmp")


@pytest.fixture(scope="module")
def auto(temporary: Path) -> Demo:
    """In a container without a home: nothing can be written but the temporary folder."""
    return Demo.run(XDG_CACHE_HOME="/dev/null/cache", TMPDIR=str(temporary))


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    return Demo.run("--policy", "paper", fresh=False, XDG_CACHE_HOME=str(tmp_path_factory.mktemp("home")))


@pytest.mark.parametrize("policy", ["auto", "paper"])
def test_the_demo_serves_the_default_policy_and_names_the_papers(policy: str, request: pytest.FixtureRequest) -> None:
    """It served `paper` while the tables beside it praised `auto`, and said of packed experts that none is resident."""
    demo: Demo = request.getfixturevalue(policy)
    assert f"4 variants, policy {policy}, " in demo.printed
    assert ("polymoe demo --policy paper" in demo.printed) == (policy == "auto")
    assert "experts   32 resident, 0 absent" in demo.printed
    assert "1.00x one model's" in demo.printed
    assert demo.tokens == dict.fromkeys(family_paths(), 4)
    assert demo.exit_code == 0


def test_the_demo_in_a_container_without_a_home(auto: Demo, temporary: Path) -> None:
    """The whole command: nothing can be written but the temporary folder."""
    printed = " ".join((auto.printed + auto.rest).split())
    assert f"what is planned is kept in {temporary}/polymoe-{os.getuid()}" in printed
    assert "curl " in printed
    assert "Traceback" not in printed
    assert auto.exit_code == 0


@pytest.mark.parametrize("arguments", [["--version"], ["version"]])
def test_the_version(arguments: list[str]) -> None:
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [polymoe.__version__]


@pytest.mark.parametrize(
    ("words", "offered"), [("polymoe se", ["serve"]), ("polymoe demo --po", ["--policy", "--port"])]
)
def test_a_shell_completes_commands_and_options(words: str, offered: list[str]) -> None:
    asked = {"_POLYMOE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    program = "import sys; sys.argv[0] = 'polymoe'; from polymoe.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | asked)
    assert sorted(done.stdout.split()) == offered
