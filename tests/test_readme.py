"""The README's commands work as they are printed, in the order that they are printed."""

import os
import re
import subprocess
from pathlib import Path

from zygote import RUN_COMMAND, run_python

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands_of(script: str) -> list[list[str]]:
    """What a shell makes of each `polymoe …` of `script`: its arguments."""
    told = """polymoe() { printf '%s\\0' "$#" "$@"; }\n"""
    said = subprocess.run(["bash", "-euc", told + script], capture_output=True, text=True, check=True).stdout
    words, commands = said.split("\0")[:-1], []
    while words:
        count = int(words[0])
        commands.append(words[1 : 1 + count])
        words = words[1 + count :]
    return commands


def test_a_new_users_first_commands_and_program(tmp_path: Path) -> None:
    """They named checkpoints that nobody has. `serve` does not end, so it is left to the tests of the server."""
    (tmp_path / "src").symlink_to(ROOT / "src")
    (script,) = blocks(section("Your own models"), "bash")
    assert re.findall(r"^polymoe +(\w+)", script, re.MULTILINE) == ["inspect", "plan", "eval", "verify", "serve"]
    script = re.sub(r"^polymoe +serve.*", "", script, flags=re.MULTILINE)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    printed = ""
    for command in commands_of(script):
        done = run_python(RUN_COMMAND, *command, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        printed += done.stdout
    assert (tmp_path / "distances.png").exists()
    assert '"top1_agreement"' in printed

    (program,) = (block for block in blocks(README, "python") if "bundles/mine" in block)
    done = run_python(program, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_commands_that_make_has_are_those_that_the_readme_names() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    documents = [README, (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")]
    documents += [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))]
    named = {name for text in documents for name in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE)}
    assert named <= targets
