"""schemathesis: requests that /openapi.json allows and requests that it does not, each answered as it says.

SCHEMA_CASES of them at least (5,000), over all endpoints, or over those whose path matches SCHEMA_PATHS.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from common import KEY, URL

CASES, PATHS = int(os.environ.get("SCHEMA_CASES", "5000")), os.environ.get("SCHEMA_PATHS", "")
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_headers_conformance",
    "response_schema_conformance", "allow_header_conformance", "missing_required_header", "unsupported_method",
    "ignored_auth",
)  # fmt: skip
_POSTED = 7  # endpoints with a body; of the others there are few cases


def main() -> None:
    examples = max(1, CASES // (1 if PATHS else _POSTED))
    command = [
        str(Path(sys.executable).with_name("st")), "run", f"{URL}/openapi.json", "--url", URL, "--header",
        f"Authorization: Bearer {KEY}", "--mode", "all", "--phases", "examples,coverage,fuzzing", "--checks",
        ",".join(CHECKS), "--max-examples", str(examples), "--seed", os.environ.get("SCHEMA_SEED", "1"),
        "--request-timeout", "120", "--continue-on-failure", "--suppress-health-check", "all", "--warnings", "off",
    ]  # fmt: skip
    if PATHS:
        command += ["--include-path-regex", PATHS]
    hooks = {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env={**os.environ, **hooks}, capture_output=True, text=True, check=False)
    print(done.stdout[-12_000:] + done.stderr[-2_000:])
    done.check_returncode()
    found = re.search(r"(\d[\d,]*) generated", done.stdout)
    assert found is not None, "the number of cases is not told"
    assert int(found[1].replace(",", "")) >= (0 if PATHS else CASES), found[0]


if __name__ == "__main__":
    main()
