"""One definition of an option: flag before variable before file before default, and what is wrong in any of them."""

import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from polymoe.cli.main import app
from polymoe.cli.options import PLAN, SERVE
from polymoe.config import EngineConfig
from polymoe.errors import ConfigError
from polymoe.offline.plan.options import PlanOptions
from polymoe.options import options_of, resolve
from polymoe.server.settings import ServerSettings

ROOT = Path(__file__).parents[1]
Check = Callable[..., Result]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Check:
    """`serve --check-config` with a file of this text and these variables."""

    def run(*flags: str, text: str = "", **variables: str) -> Result:
        (tmp_path / "polymoe.toml").write_text(text, encoding="utf-8")
        monkeypatch.chdir(tmp_path)
        arguments = ["serve", "--config", "polymoe.toml", "--check-config", *flags]
        return CliRunner().invoke(app, arguments, env={f"POLYMOE_{name}": value for name, value in variables.items()})

    return run


def line(result: Result, key: str) -> str:
    assert result.exit_code == 0, result.exception
    [found] = [text for text in result.output.splitlines() if text.startswith((f"{key} =", f"# {key} is"))]
    return " ".join(found.split())


def test_a_flag_goes_before_a_variable_before_a_file_before_the_default(check: Check) -> None:
    text = 'sources = ["b"]\nmax_num_seqs = 3\nmax_waiting = 4\nthreads = 5\n'
    result = check("--threads", "9", text=text, MAX_WAITING="8", THREADS="7")
    assert line(result, "sources") == 'sources = ["b"] # polymoe.toml'
    assert line(result, "max_num_seqs") == "max_num_seqs = 3 # polymoe.toml"
    assert line(result, "max_waiting") == "max_waiting = 8 # $POLYMOE_MAX_WAITING"
    assert line(result, "threads") == "threads = 9 # --threads"
    assert line(result, "kv_cache") == 'kv_cache = "auto" # default'
    assert line(result, "slots") == "# slots is not set # default"


def test_a_flag_that_says_the_default_is_a_flag(check: Check) -> None:
    assert line(check("b", "--max-num-seqs", "64", text="max_num_seqs = 3"), "max_num_seqs").endswith(
        "64 # --max-num-seqs"
    )


def test_what_is_printed_is_a_file_that_says_the_same(check: Check) -> None:
    text = (
        'kv_cache = "2GiB"\nweight = {"a b" = 2, c = 0.5}\nallowed_origin = ["http://localhost:3000"]\nverify = true\n'
    )
    first = check("b", "--slo", "fast=0.5", text=text, API_KEY="s3cret")
    assert first.exit_code == 0, first.output
    assert "s3cret" not in first.output
    second = check(text=first.output, API_KEY="s3cret")
    assert tomllib.loads(first.output) == tomllib.loads(second.output)


def test_every_source_gives_the_same_values() -> None:
    fields = options_of(EngineConfig)
    flags = {"kv_cache": "2GiB", "expert_cache": "0", "weight": ["a=2", "b=0.5"], "admission_factor": 0.0, "slots": 1}
    variables = {"kv_cache": "2GiB", "expert_cache": "0", "weight": "a=2 b=0.5", "admission_factor": "0", "slots": "1"}
    python = EngineConfig(
        bundle="x",
        kv_cache_bytes=2 << 30,
        expert_cache_bytes=0,
        weights={"a": 2.0, "b": 0.5},
        admission_factor=None,
        slots=1,
    )
    typed = resolve(fields, flags, {})
    told = resolve(fields, {}, {f"POLYMOE_{name.upper()}": value for name, value in variables.items()})
    assert (
        EngineConfig(bundle="x", **typed.of(EngineConfig))
        == EngineConfig(bundle="x", **told.of(EngineConfig))
        == python
    )


def test_a_file_is_typed(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(
        'kv_cache = 4096\nslo = {fast = 1}\nprefetch = false\nadmission_factor = 0\ncache = "c"\ngrace = 5\n'
    )
    found = resolve(SERVE, {}, {}, tmp_path / "a.toml")
    assert [found[key] for key in ("kv_cache", "slo", "prefetch", "admission_factor", "cache", "grace")] == [
        4096, {"fast": 1.0}, False, None, Path("c"), 5,
    ]  # fmt: skip
    assert found.of(ServerSettings)["grace"] == 5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_num_seq = 3", "polymoe.toml: there is no option 'max_num_seq'; did you mean max_num_seqs?"),
        ("max-num-seqs = 3", "did you mean max_num_seqs?"),
        ("[engine]\nslots = 1", "there is no option 'engine'"),
        ('max_num_seqs = "3"', "polymoe.toml: max_num_seqs must be a whole number, got '3'."),
        ("max_num_seqs = 2.5", "polymoe.toml: max_num_seqs must be a whole number, got 2.5."),
        ("verify = 1", "polymoe.toml: verify must be True or False, got 1."),
        ("slots = true", "polymoe.toml: slots must be a whole number or None, got True."),
        ("max_num_seqs = 0", "polymoe.toml: max_num_seqs must be at least 1, got 0."),
        ("port = 70000", "polymoe.toml: port must be between 0 and 65535, got 70000."),
        ("target_itl = nan", "polymoe.toml: target_itl must be more than 0, got nan; leave it out"),
        ("grace = inf", "polymoe.toml: grace must be a finite number, got inf."),
        ('kv_cache = "lots"', "polymoe.toml: kv_cache: 'lots' is not a size"),
        ("kv_cache = -1", "polymoe.toml: kv_cache must be at least 0"),
        ('weight = ["a"]', "polymoe.toml: weight 'a': write NAME=WEIGHT"),
        ("weight = {a = 0}", "polymoe.toml: weight: the weight of a must be more than 0"),
        ('weight = {a = "2"}', "polymoe.toml: weight must be a dict of texts to numbers"),
        ('slo = {"a b" = 1}', "polymoe.toml: slo: 'a b' is no name of an SLO class"),
        ('allowed_origin = "*"', "polymoe.toml: allowed_origin must be a list of texts, got '*'."),
        ('allowed_origin = ["x"]', "polymoe.toml: allowed_origin: 'x' is not an origin"),
        ('api_key = ""', "polymoe.toml: api_key: the API key is empty"),
        ("cache = 1", "polymoe.toml: cache must be a path, got 1."),
        ('dtype = "int4"', "polymoe.toml: dtype must be auto, float32, bfloat16 or float16, got 'int4'."),
        ('host = "0.0.0.0"', "give one with --api-key"),
        ("slots = ", "polymoe.toml is not a TOML file: Invalid value"),
        ("max_num_seqs = 1\nmax_num_seqs = 2", "polymoe.toml is not a TOML file"),
        ("a = " + "[" * 5000, "polymoe.toml is not a TOML file"),
    ],
)
def test_a_mistake_in_a_file_names_it(text: str, message: str, check: Check) -> None:
    result = check("b", text=text)
    assert isinstance(result.exception, ConfigError), result.output
    assert message in str(result.exception)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("MAX_SEQS", "3", "$POLYMOE_MAX_SEQS means nothing to polymoe; did you mean POLYMOE_MAX_NUM_SEQS?"),
        ("MAX_NUM_SEQS", "many", "$POLYMOE_MAX_NUM_SEQS must be a whole number, got 'many'."),
        ("MAX_NUM_SEQS", "0", "$POLYMOE_MAX_NUM_SEQS must be at least 1, got 0."),
        (
            "PORT",
            "tcp://10.0.0.1:8000",
            "$POLYMOE_PORT must be a whole number",
        ),  # of Kubernetes, for a service `polymoe`
        ("KV_CACHE", "lots", "$POLYMOE_KV_CACHE: 'lots' is not a size"),
        ("SLO", "a=1 b", "$POLYMOE_SLO 'b': write NAME=SECONDS"),
        ("VERIFY", "perhaps", "$POLYMOE_VERIFY must be True or False"),
        ("BLOCK_SIZE", "0", "$POLYMOE_BLOCK_SIZE must be at least 1"),
    ],
)
def test_a_mistake_in_the_environment_names_the_variable(name: str, value: str, message: str, check: Check) -> None:
    result = check("b", **{name: value})
    assert isinstance(result.exception, ConfigError), result.output
    assert message in str(result.exception)


def test_what_a_flag_replaces_is_checked_all_the_same(check: Check) -> None:
    result = check("b", "--threads", "1", text="threads = 0")
    assert "polymoe.toml: threads must be at least 1" in str(result.exception)


def test_variables_of_other_commands_and_empty_ones_are_no_mistakes(check: Check) -> None:
    result = check("b", DELTA_BITS="2", NO_KERNELS="1", SLOTS="", VERIFY="TRUE")
    assert line(result, "slots").endswith("# default")
    assert line(result, "verify") == "verify = true # $POLYMOE_VERIFY"


def test_other_commands_read_variables_too(check: Check) -> None:
    check("b")
    for command in (
        ["plan", "a=x", "b=y", "--out", "o"],
        ["generate", "b", "--prompt", "a"],
        ["eval", "b", "--text", "a=b"],
    ):
        result = CliRunner().invoke(app, command, env={"POLYMOE_MAX_SEQS": "3"})
        assert "$POLYMOE_MAX_SEQS means nothing" in str(result.exception)
    result = CliRunner().invoke(app, ["plan", "a=x", "b=y", "--out", "o"], env={"POLYMOE_POLICY": "magic"})
    assert "unknown policy 'magic'" in str(result.exception)


def test_nothing_to_serve_is_a_usage_error(check: Check) -> None:
    assert check().exit_code == 2


def test_options_have_one_name_and_a_meaning() -> None:
    for fields in (SERVE, PLAN):
        assert len({field.key for field in fields}) == len(fields)
        assert all(field.option.help for field in fields)
    for kind in (EngineConfig, ServerSettings):
        assert {field.attribute for field in options_of(kind)} == {*kind.__struct_fields__} - {"bundle"}
    assert {*PlanOptions.__struct_fields__} - {field.attribute for field in options_of(PlanOptions)} == {
        "caution", "accept_unrelated",
    }  # fmt: skip


def test_the_documented_file_and_table(check: Check) -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    example = page.partition("```toml\n")[2].partition("```")[0]
    assert check(text=example, API_KEY="key").exit_code == 0
    assert all(f"`{field.key}`" in page for field in SERVE if not field.option.flag)


def test_the_command_line_needs_no_torch() -> None:
    lazy = "import sys, polymoe.cli.main; assert not {'torch', 'starlette', 'numpy', 'pydantic'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", lazy], check=True)
