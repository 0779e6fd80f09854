"""schemathesis: requests that /openapi.json allows and requests that it does not, each answered as it says.

SCHEMA_CASES of them at least (5,000): what clients may ask with their key, then /v1/variants with the admin's.
"""

import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path

from common import KEY, URL

CASES, SEED = int(os.environ.get("SCHEMA_CASES", "5000")), os.environ.get("SCHEMA_SEED", "1")
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "allow_header_conformance", "missing_required_header", "unsupported_method",
    "ignored_auth",
)  # fmt: skip
_COVERED = 4500  # cases or so that cover each keyword of the document, before any is drawn
_ENDPOINTS = 10  # with much to draw


def run(document: str, key: str, examples: int, *more: str) -> int:
    """How many cases there were."""
    command = [
        str(Path(sys.executable).with_name("st")), "run", document, "--url", URL, "--header",
        f"Authorization: Bearer {key}", "--mode", "all", "--phases", "examples,coverage,fuzzing", "--checks",
        ",".join(CHECKS), "--max-examples", str(examples), "--seed", SEED, "--request-timeout", "120",
        "--continue-on-failure", "--suppress-health-check", "all", "--warnings", "off", *more,
    ]  # fmt: skip
    hooks = {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env={**os.environ, **hooks}, capture_output=True, text=True, check=False)
    print(done.stdout[-20_000:] + done.stderr[-2_000:])
    found = re.search(r"(\d[\d,]*) generated", done.stdout)
    assert done.returncode == 0, done.returncode
    assert found is not None, "the number of cases is not told"
    return int(found[1].replace(",", ""))


def main() -> None:
    examples = max(20, (CASES - _COVERED) // _ENDPOINTS)
    request = urllib.request.Request(f"{URL}/openapi.json", headers={"Authorization": f"Bearer {KEY}"})
    with tempfile.TemporaryDirectory() as folder, urllib.request.urlopen(request) as answer:
        (document := Path(folder) / "openapi.json").write_bytes(answer.read())
        cases = run_all(str(document), examples)
    print(f"{cases} cases")
    assert cases >= CASES


def run_all(document: str, examples: int) -> int:
    """The number of cases."""
    cases = run(document, KEY, examples, "--exclude-path-regex", "^/v1/variants")
    admin_key = os.environ["POLYMOE_ADMIN_KEY"]
    return cases + run(document, admin_key, max(5, examples // 10), "--include-path-regex", "^/v1/variants")


if __name__ == "__main__":
    main()
