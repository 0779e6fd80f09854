"""The scripts of `tests/clients` whose clients are installed for the tests; `make test-clients` runs all of them."""

import sys
from collections.abc import Iterator

import pytest

from clients.run import HERE, run_script, servers


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    with servers(tmp_path_factory.mktemp("clients")) as variables:
        yield variables


@pytest.mark.parametrize("name", ["openai_python.py", "anthropic_python.py"])
def test_client(variables: dict[str, str], name: str) -> None:
    done = run_script([sys.executable, str(HERE / name)], variables)
    assert done.returncode == 0, done.stdout + done.stderr
