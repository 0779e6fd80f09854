"""What is printed is printed as it is, whoever wrote it; what goes wrong for a user is one line and no traceback."""

import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.progress import Progress
from rich.table import Table
from typer.testing import CliRunner

import polymoe
from families import make_family
from polymoe.bundle.atomic import check_can_write
from polymoe.cli.main import app, main
from polymoe.cli.main import console as cli_console
from polymoe.config import EngineConfig, parse_bytes
from polymoe.console import Console, DescriptionColumn, print_error, printable, warn
from polymoe.demo import family_paths, text_paths
from polymoe.errors import ConfigError, PlanError, PolymoeError, RequestError, explain
from polymoe.evaluate.fidelity import Samples
from polymoe.evaluate.report import window_progress
from polymoe.offline.api import check_picture, make_plan
from polymoe.offline.plan.budget import parse_memory
from polymoe.progress import Listener, byte_progress, stage_progress, step_progress
from servers import free_port
from zygote import run_python

SPECS = [f"{name}={path}" for name, path in family_paths().items()]
HOSTILE = "[INST] hi [/INST] [red]y[/red] :smile: \x1b[2J\x07 \udcff [/] [@click=x]z[/]"
SHOWN = "[INST] hi [/INST] [red]y[/red] :smile: \\x1b[2J\\x07 \\udcff [/] [@click=x]z[/]"


@dataclass(frozen=True)
class Result:
    code: int
    stdout: str
    stderr: str

    @property
    def error(self) -> str:
        """The line that says what is wrong."""
        assert self.code == 1, self.stdout + self.stderr
        assert "Traceback" not in self.stderr
        (line,) = (line for line in self.stderr.splitlines() if line.startswith("error: "))
        return line


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """The command line as it is entered, in this process, since a new one takes seconds to load torch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli_console, "_width", 400)

    def run(*arguments: str) -> Result:
        monkeypatch.setattr(sys, "argv", ["polymoe", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return Result(int(ended.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plan(family_paths(), "paper", "1.0x", tmp_path_factory.mktemp("printed") / "bundle").path


@pytest.mark.parametrize("terminal", [True, False])
def test_strings_are_printed_as_they_are_wherever_they_stand(terminal: bool) -> None:
    """`[INST]` vanished, `[/INST]` was a traceback, and an answer could clear the screen."""
    file = io.StringIO()
    console = Console(file=file, width=400, force_terminal=terminal, color_system=None, legacy_windows=False)
    console.print(HOSTILE)
    table = Table(HOSTILE, title=HOSTILE, caption=HOSTILE)
    table.add_row(HOSTILE)
    console.print(table)
    warn(console, HOSTILE)
    print_error(console, PolymoeError(HOSTILE))
    assert file.getvalue().count(SHOWN) == 7
    assert "\x1b[2J" not in file.getvalue()


def test_progress_says_what_it_is_about_as_it_is() -> None:
    file = io.StringIO()
    console = Console(file=file, width=400, force_terminal=True, color_system=None)
    with Progress(DescriptionColumn(), console=console) as progress:
        progress.add_task(HOSTILE, total=1)
    with console.status(HOSTILE):
        pass
    assert file.getvalue().count(SHOWN) >= 2
    assert "\x1b[2J" not in file.getvalue()


def test_printable() -> None:
    assert printable("a\tb\r\nc\nü😀") == "a\tb\nc\nü😀"
    assert printable("\x00\x9b\r\x7f") == r"\x00\x9b\r\x7f"


def test_there_is_one_door_to_the_terminal() -> None:
    """Another console of `rich`, or markup in a string of ours, would bring the fault back."""
    for path in Path(polymoe.__file__).parent.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if path.name != "console.py":
            assert "rich.console" not in source, path
            assert "TextColumn" not in source, path
        assert not re.search(r"\[(bold|red|yellow|green)\b[^\]\n]*\]|\[/[a-z]*\]", source), path


def test_prompts_and_answers_with_brackets(bundle: Path, run: Callable[..., Result]) -> None:
    result = run("generate", str(bundle), "--variant", "math", "--max-tokens", "2", "--prompt", "[INST] hi [/INST]",
                 "--prompt", "[red]y[/red]")  # fmt: skip
    assert result.code == 0, result.stderr
    assert "[INST] hi [/INST]" in result.stdout
    assert "[red]y[/red]" in result.stdout


def test_errors_show_brackets_and_bytes_that_are_no_text(run: Callable[..., Result], tmp_path: Path) -> None:
    assert "[/bold] is not" in run("generate", "[/bold]", "--prompt", "a").error
    result = subprocess.run(
        [sys.executable, "-m", "polymoe", "generate", b"no\xff", "--prompt", "a"], capture_output=True, cwd=tmp_path,
        timeout=120, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert result.stderr.startswith(rb"error: no\udcff is not a directory")


def test_help_keeps_its_brackets() -> None:
    """`org/model[@revision]` was read as markup, and the revision was missing."""
    assert "org/model[@revision]" in CliRunner().invoke(app, ["plan", "--help"]).output
    assert "[NAME=PATH…]" in CliRunner().invoke(app, ["bench", "throughput", "--help"]).output


def test_plan_inspect_and_eval_with_brackets_in_paths(run: Callable[..., Result], tmp_path: Path) -> None:
    folder = tmp_path / "a [red] [/x]"
    folder.mkdir(parents=True)  # two folders: "a [red] [" and "x]"
    text = folder / "t [i].txt"
    text.write_text(text_paths()["math"].read_text(encoding="utf-8")[:4000], encoding="utf-8")
    out = folder / "b[b]"
    planned = run("plan", *SPECS[:2], "--out", str(out), "--text", f"math={text}")
    assert planned.code == 0, planned.stderr
    assert "b[b]: policy auto" in planned.stdout
    assert "t [i].txt" in run("inspect", str(out)).stdout
    evaluated = run("eval", str(out), "--text", f"math={text}", "--limit", "1")
    assert evaluated.code == 0, evaluated.stderr
    pictured = run("inspect", *SPECS[:2], "--png", str(folder / "h[u].png"))
    assert f"Heat map: {folder}/h[u].png" in pictured.stdout
    missing = run("eval", str(out), "--text", f"math={folder}/[/none]")
    assert "[/none] does not exist" in missing.error


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("24G", 24 << 30), ("24g", 24 << 30), ("24GiB", 24 << 30), ("24 gib", 24 << 30), ("24Gi", 24 << 30),
        ("24GB", 24 * 10**9), ("1.5G", 3 << 29), ("512m", 512 << 20), ("2T", 2 << 40), ("3kb", 3000), ("7K", 7168),
        ("4096", 4096), ("4096B", 4096), ("0", 0),
    ],
)  # fmt: skip
def test_sizes(text: str, count: int) -> None:
    assert parse_bytes(text) == count


@pytest.mark.parametrize(
    "text", ["", "G", "4 apples", "-1G", "1.5", "1.5B", "1,5G", "9" * 400 + "G", "nan", "1e9", "١G"]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.0", r"did you mean 1\.0x, .* or 1\.0GiB"),
        ("1", "did you mean 1x"),
        ("24", "did you mean 24x.* or 24GiB"),
        ("0", "did you mean 0x"),
        ("lots", "write 1.0x"),
        ("9" * 400 + "x", "write 1.0x"),
        ("9" * 400, "write 1.0x"),
        ("4096.5", "write 1.0x"),
    ],
)
def test_a_budget_without_a_unit_is_asked_about(text: str, message: str) -> None:
    """`--memory 1.0` was one byte, and so "below the minimum"."""
    with pytest.raises(PlanError, match=message):
        parse_memory(text)


def test_budgets() -> None:
    assert (parse_memory("1.0x").multiple, parse_memory("0X").multiple, parse_memory("2×").multiple) == (1, 0, 2)
    found = parse_memory(" 1.5x-all ")
    assert (found.multiple, found.of_all, found.num_bytes, found.text) == (1.5, True, None, "1.5x-all")
    assert not parse_memory("1.5x").of_all
    assert parse_memory("24G").num_bytes == parse_memory("24GiB").num_bytes == 24 << 30
    assert parse_memory(str(24 << 30)).num_bytes == 24 << 30  # as `serve` writes it


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "dtype must be auto, float32, bfloat16 or float16, got 'int4'"),
        ({"kv_cache_bytes": "1GiB"}, "kv_cache_bytes must be a whole number or None"),
        ({"max_num_seqs": 2.5}, "max_num_seqs must be a whole number"),
        ({"slots": True}, "slots must be a whole number or None"),
        ({"weights": {"math": "2"}}, "weights must be a dict of texts to numbers"),
        ({"max_num_seq": 3}, "no option 'max_num_seq'; did you mean max_num_seqs"),
        ({"gpu_memory_utilization": 0.9}, "no option 'gpu_memory_utilization'; there are device, dtype"),
        ({"bundle": "x"}, "no option 'bundle'"),
    ],
)
def test_options_of_the_engine_that_do_not_exist(options: dict[str, object], message: str) -> None:
    """`LLM(dtype="int4")` was `KeyError: 'int4'`, a wrong type a TypeError of the first comparison."""
    with pytest.raises(ConfigError, match=message):
        EngineConfig.of("bundle", options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": "0.7"}, "temperature must be a number, got '0.7'"),
        ({"max_tokens": None}, "max_tokens must be a whole number, got None"),
        ({"stop": "ab"}, "stop must be a list of texts"),  # was the two stop strings "a" and "b"
        ({"stop": [1]}, "stop must be a list of texts"),
        ({"logit_bias": {"5": 1.0}}, "logit_bias must be a dict of whole numbers to numbers"),
        ({"ignore_eos": 1}, "ignore_eos must be True or False"),
        ({"n": 2.0}, "n must be a whole number"),
    ],
)
def test_sampling_parameters_of_a_wrong_type(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        polymoe.SamplingParams(**options)
    assert caught.value.param == next(iter(options))


def test_errors_of_the_system_say_what_to_do() -> None:
    assert explain(OSError(28, "No space left on device", "/x/y")) == (
        "/x/y: No space left on device; free some space, or choose a folder on another disk."
    )
    assert explain(OSError("a library's own words")) == "a library's own words"


LONG = "n" * 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", *SPECS, "--out", LONG], "File name too long"),
        (["plan", *SPECS, "--out", "n" * 250], "File name too long"),  # the folder beside it has a longer one
        (["plan", *SPECS, "--out", "file/b"], "file is a file"),
        (["plan", *SPECS, "--out", "file"], "is not a folder"),
        (["plan", *SPECS, "--out", "b", "--memory", "1.0"], "did you mean 1.0x"),
        (["plan", *SPECS, "--out", "b", "--text", f"math={LONG}"], "File name too long"),
        (["plan", *SPECS, "--out", "b", "--text", "math=folder"], "folder is a folder; give a file of text"),
        (["plan", *SPECS, "--out", "b", "--text", "math=bad.jsonl"], "bad.jsonl, line 2 is not JSON"),
        (["plan", *SPECS, "--out", "b", "--calibrate", "math=folder"], "folder is a folder; give a file of text"),
        (["plan", *SPECS, "--out", "b", "--calibrate", "math=latin.txt"], "cannot be read as UTF-8"),
        (["plan", "a=file", "--out", "b"], "is a file; give the folder"),
        (["inspect", *SPECS, "--png", LONG], "give a file that ends in .png"),
        (["inspect", *SPECS, "--png", LONG + ".png"], "File name too long"),
        (["inspect", *SPECS, "--png", "folder.png"], "is a folder"),
        (["inspect", *SPECS, "--png", "nowhere/h.png"], "does not exist"),
        (["generate", "BUNDLE", "--prompt", "a", "--dtype", "int4"], "dtype must be"),
        (["generate", "BUNDLE", "--prompt", ""], "The prompt is empty"),
        (["generate", "BUNDLE", "--prompt", "a", "--variant", "[/x]"], "`[/x]` does not exist"),
        (["generate", "BUNDLE", "--prompt", "a", "--temperature", "nan"], "temperature must be between"),
        (["generate", LONG, "--prompt", "a"], "File name too long"),
        (["generate", "file", "--prompt", "a"], "is not a directory"),
        (["eval", "BUNDLE", "--text", "math=folder"], "folder is a folder; give a file of text"),
        (["eval", "BUNDLE", "--text", "math=bad.jsonl"], "bad.jsonl, line 2 is not JSON"),
        (["eval", "BUNDLE", "--text", "math=good.txt", "--dtype", "int4"], "dtype must be"),
        (["serve", *SPECS, "--port", "0", "--cache", "file/x"], "Not a directory"),
        (["serve", "BUNDLE", "--kv-cache", "1.5"], "no fractions of a byte"),
        (["bench", "throughput", "--shape", "tiny", "--out", "file/x"], "file is a file"),
        (["bench", "throughput", "--shape", "tiny", "--cache", "file"], "the cache cannot be written to"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], message: str, bundle: Path, run: Callable[..., Result], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "good.txt").write_text("the quick brown fox " * 400)
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": "b",}\n')
    (tmp_path / "latin.txt").write_bytes("für ".encode("latin-1") * 500)
    arguments = [str(bundle) if argument == "BUNDLE" else argument for argument in arguments]
    if "--port" in arguments:
        arguments[arguments.index("--port") + 1] = str(free_port())
    assert message in run(*arguments).error
    assert not (tmp_path / "b").exists()


def test_a_variant_without_a_tokenizer_cannot_be_calibrated(run: Callable[..., Result], tmp_path: Path) -> None:
    paths = make_family("mixtral", tmp_path / "family", 2)
    (tmp_path / "t.txt").write_text("the quick brown fox " * 400)
    specs = [f"{name}={path}" for name, path in paths.items()]
    for option in ("--calibrate", "--text"):
        result = run("plan", *specs, "--out", "b", option, "v1=t.txt")
        assert re.search(r"(base|v1) has no tokenizer that can be loaded, .* add its files", result.error)


@pytest.mark.parametrize("content", ['{"temperature": 0.5,}', "[]", "\x00"])
def test_a_broken_generation_config_names_its_file(content: str, trio: dict[str, Path], tmp_path: Path) -> None:
    """It was a JSONDecodeError out of `LLM()`. The other variants are served."""
    made = make_plan(trio, "separate", None, tmp_path / "bundle")
    (made.variant_folder(1) / "generation_config.json").write_text(content)
    with polymoe.LLM(made.path, device="cpu", kv_cache_bytes=1 << 24) as llm:
        with pytest.raises(RequestError, match=r"`v1` is not served: .*v1/generation_config\.json"):
            llm.generate("a", variants="v1")
        assert llm.generate("a", variants="base")[0].finished


def test_a_disk_without_room_is_named(tmp_path: Path) -> None:
    """A limit on the size of files is what comes nearest to a full disk without rights to mount one."""
    arguments = ["polymoe", "plan", *SPECS, "--out", str(tmp_path / "b")]
    script = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        f"from polymoe.cli.main import main; sys.argv = {arguments!r}; main()"
    )
    result = run_python(script)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert "choose another folder" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_costs_the_picture_only(run: Callable[..., Result], tmp_path: Path) -> None:
    """A container's working directory is often read-only: the table needs no file."""
    (tmp_path / "distances.png").mkdir()
    result = run("inspect", *SPECS[:2])
    assert result.code == 0, result.stderr
    assert "identical experts" in result.stdout
    assert "There will be no heat map; name a file for it with --png" in result.stdout


@pytest.mark.skipif(
    os.geteuid() != 0, reason="root may write everywhere, so somebody else must be asked; only root can"
)
def test_a_folder_of_somebody_else() -> None:
    with tempfile.TemporaryDirectory() as name:  # not pytest's own, which nobody else may enter
        folder = Path(name)
        folder.chmod(0o755)
        printed = asked_by_nobody(folder / "a" / "b")
    assert f"{folder} is read-only for you; choose another folder" in printed


def asked_by_nobody(path: Path) -> str:
    script = (
        "import os; from pathlib import Path; from polymoe.bundle.atomic import check_can_write\n"
        "from polymoe.errors import PlanError\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        f"try: check_can_write(Path({str(path)!r}))\n"
        "except PlanError as error: print(error)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    return result.stdout


def test_what_can_be_written(tmp_path: Path) -> None:
    check_can_write(tmp_path / "new" / "folder")
    check_picture(tmp_path / "a.PNG")


class Clock:
    """Time goes on when a test says so."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr("polymoe.progress.time", found)
    monkeypatch.setattr("polymoe.evaluate.report.time", found)
    return found


def piped() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=False), out


def test_stages_in_a_pipe_are_a_line_each(clock: Clock) -> None:
    """A stage ends when the next begins, at 1, or with the block; what was quick is not told."""
    console, out = piped()
    with stage_progress(console) as show:
        told = [("reading", 0.0, 5), ("quick", 0.0, 1), ("encoding", 0.2, 3), ("encoding", 1.0, 9), ("loading", 0.0, 4)]
        for stage, fraction, seconds in told:
            show(stage, fraction)
            clock.now += seconds
    assert out.getvalue() == "reading, after 5 s\nencoding, after 3 s\nloading, after 4 s\n"


def test_windows_in_a_pipe_are_a_line_a_variant(clock: Clock) -> None:
    console, out = piped()
    samples = {"math": Samples([[1, 2]] * 4), "code": Samples([[1, 2]] * 2)}
    with window_progress(samples, console) as advance:
        for name, count in (("math", 2), ("math", 2), ("code", 2)):
            clock.now += 3
            advance(name, count)
    assert out.getvalue() == "math: 4 windows, after 6 s\ncode: 2 windows, after 3 s\n"


def test_a_program_hears_how_far_a_stage_is(clock: Clock) -> None:
    heard: list[tuple[str, float]] = []
    console = Listener(lambda stage, fraction: heard.append((stage, fraction)))
    with byte_progress("Writing", 10, console) as wrote, step_progress("Measuring", 4, console) as measured:
        for _ in range(4):
            clock.now += 0.3
            wrote(2)
            measured()
    assert heard[:2] == [("Writing", 0.0), ("Measuring", 0.0)]
    assert heard[2:6] == [("Writing", 0.2), ("Measuring", 0.25), ("Writing", 0.4), ("Measuring", 0.5)]
    console.print("nothing of it is printed")
