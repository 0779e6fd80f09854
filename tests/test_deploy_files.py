"""The files of deploy/, as far as they can be checked without a cluster: their YAML, and that what they tell polymoe
exists. The chart's templates are rendered by Helm where `helm` is installed; docs/deploy.md says what was tried."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from polymoe.cli.options import SERVE
from polymoe.deploy.config import of_table
from polymoe.deploy.installed import NEWEST, OLDEST, VARIABLES
from polymoe.server.settings import ServerSettings

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
CHART = DEPLOY / "helm" / "polymoe"
OPTIONS = {field.key for field in SERVE}
# What the server answers without a key.
PROBES = {"/ready": "readinessProbe", "/health": "livenessProbe"}


def documents(text: str) -> list[Any]:
    return [document for document in yaml.safe_load_all(text) if document]


def test_the_chart_gives_options_that_exist() -> None:
    """The ConfigMap's own lines, and those of values.yaml that are copied into it."""
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    template = (CHART / "templates" / "config.yaml").read_text()
    keys = set(re.findall(r"^    ([a-z_]+) = ", template, re.MULTILINE))
    assert {"host", "port", "grace", "open_metrics"} <= keys
    assert keys | values["config"].keys() <= OPTIONS
    ServerSettings(host="0.0.0.0", port=values["port"], api_key="k", grace=values["grace"],
                   open_metrics=values["openMetrics"])  # fmt: skip


def test_the_chart_names_values_that_exist() -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    for template in (CHART / "templates").iterdir():
        for path in re.findall(r"\.Values\.([A-Za-z.]+)", template.read_text()):
            found: Any = values
            for part in path.split("."):
                assert part in found, f"{template.name}: {path}"
                found = found[part]


@pytest.mark.skipif(shutil.which("helm") is None, reason="helm is not installed")
def test_helm_renders_the_chart() -> None:
    subprocess.run(["helm", "lint", "--strict", CHART], check=True)
    text = subprocess.run(
        ["helm", "template", "x", CHART, "--set", "inferencePool.enabled=true"], check=True, capture_output=True,
        text=True,
    ).stdout  # fmt: skip
    kinds = {document["kind"]: document for document in documents(text)}
    assert set(kinds) == {"ConfigMap", "Deployment", "Service", "InferencePool"}
    tomllib.loads(kinds["ConfigMap"]["data"]["polymoe.toml"])


def test_probes_and_arguments_of_the_kserve_runtime() -> None:
    runtime, service = documents((DEPLOY / "kserve-runtime.yaml").read_text())
    (container,) = runtime["spec"]["containers"]
    arguments = container["args"]
    assert arguments[:2] == ["serve", "/mnt/models"]
    assert {flag[2:].replace("-", "_") for flag in arguments if flag.startswith("--")} <= OPTIONS
    for path, probe in PROBES.items():
        assert container[probe]["httpGet"]["path"] == path
    assert service["spec"]["predictor"]["model"]["runtime"] == runtime["metadata"]["name"]


def test_the_ray_service_names_what_exists() -> None:
    (service,) = documents((DEPLOY / "rayservice.yaml").read_text())
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = serve["applications"]
    module, _, name = application["import_path"].partition(":")
    assert callable(getattr(__import__(module, fromlist=[name]), name))
    assert list(application["args"]) == ["config"]
    head = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    assert {item["name"]: item["value"] for item in head["env"]} == VARIABLES
    version = tuple(int(part) for part in service["spec"]["rayClusterConfig"]["rayVersion"].split(".")[:2])
    assert OLDEST <= version <= NEWEST


def test_the_extra_has_the_range_of_ray_that_is_checked() -> None:
    (wanted,) = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["ray"]
    newest = f"{NEWEST[0]}.{NEWEST[1] + 1}"
    assert wanted == f"ray[serve]>={OLDEST[0]}.{OLDEST[1]},<{newest}"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    program = tmp_path / "polymoe"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    unit = tmp_path / "polymoe.service"
    unit.write_text((DEPLOY / "polymoe.service").read_text().replace("/opt/polymoe/bin/polymoe", str(program)))
    run = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "polymoe.service" not in run.stderr, run.stderr


def test_the_deploy_files_of_the_documentation() -> None:
    """TOML in docs/deploy.md with pools is one that polymoe reads."""
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "docs" / "deploy.md").read_text(), re.DOTALL)
    deployments = [block for block in blocks if "[[pool]]" in block]
    assert deployments
    for block in deployments:
        of_table(tomllib.loads(block), "docs/deploy.md")
