"""Text that users give: plain or JSON lines, read alike for fitting and measuring; large files by pieces."""

import itertools
import json
import os
import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from families import make_family
from polymoe.errors import PolymoeError
from polymoe.evaluate.texts import encode_texts
from polymoe.offline.calibrate import text_files
from polymoe.offline.calibrate.calibrate import Calibration
from polymoe.offline.calibrate.pairs import read_pairs
from polymoe.offline.calibrate.text_files import PIECE_BYTES, PIECES, WHOLE_BYTES, is_sampled, read_lines, read_plain
from polymoe.offline.calibrate.text_tokens import TextTokenizer, read_tokens
from polymoe.offline.checkpoint.family import Family

SENTENCE = "the quick brown fox jumps over the lazy dog"
CHAT = {"messages": [{"role": "user", "content": SENTENCE}, {"role": "assistant", "content": "pack my box"}]}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_family("mixtral", tmp_path_factory.mktemp("family"), 2, tokenizer=True)


@pytest.fixture(scope="module")
def tokenizer(paths: dict[str, Path]) -> TextTokenizer:
    return TextTokenizer(paths["v1"], "v1")


def write_lines(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path


def decoded(paths: dict[str, Path], ids: list[int]) -> str:
    return str(TextTokenizer(paths["v1"], "v1")._tokenizer.decode(ids))


def test_lines_with_text_and_lines_with_messages(
    paths: dict[str, Path], tokenizer: TextTokenizer, tmp_path: Path
) -> None:
    """`--calibrate` knew messages only, and `--text` took the JSON itself for the text."""
    file = write_lines(tmp_path / "a.jsonl", {"text": "one fox"}, CHAT, {"text": "two dogs\n", "id": 7})
    want = f"one foxv1user: {SENTENCE}v1assistant: pack my boxtwo dogs"  # this tokenizer knows no line feeds
    assert decoded(paths, read_tokens("--text", [file], tokenizer)) == want


def test_calibration_and_measurement_read_the_same_tokens(paths: dict[str, Path], tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", *[CHAT, {"text": SENTENCE}] * 30)
    measured = encode_texts(paths, {"v1": file})["v1"]
    fitted = Calibration.from_files(Family.open(paths), {"v1": [file]}, window=64).windows[1]
    whole = len(measured) // 64
    assert fitted.flatten().tolist() == measured[: whole * 64]


def test_separators_of_unicode_are_text(paths: dict[str, Path], tokenizer: TextTokenizer, tmp_path: Path) -> None:
    """JSON may hold U+2028 and U+0085 as they are; `splitlines` cut such a line in two. And editors write a BOM."""
    file = write_lines(tmp_path / "a.jsonl", {"text": "one\u2028fox\u0085dog"})
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert [json.loads(line.text)["text"] for line in read_lines("--text", file)] == ["one\u2028fox\u0085dog"]
    assert decoded(paths, read_tokens("--text", [file], tokenizer)) == "onefoxdog"  # it knows no such letters
    plain = tmp_path / "a.txt"
    plain.write_bytes("\ufeffone\r\ntwo\rthree".encode())
    assert read_plain("--text", plain) == ["one\ntwo\nthree"]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"text": "a",}', "line 2 is not JSON"),
        ('["a"]', "line 2 is not an object"),
        ("{}", "line 2 has neither text nor messages"),
        ('{"text": "a", "messages": []}', "line 2 has both text and messages"),
        ('{"text": ["a"]}', "line 2: its text is no string"),
        ('{"messages": []}', "line 2: its messages are no list"),
        ('{"messages": {"role": "user"}}', "line 2: its messages are no list"),
        ('{"messages": [{"content": "a"}]}', "line 2: its messages are no list"),
        ('{"text": "\\ud800"}', "line 2 is not valid Unicode"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('{"input": "a", "target": "b"}', r'line 2 has neither text nor messages; write {"text": "…"} or {"messages"'),
    ],
)
def test_a_bad_line_is_named(line: str, reason: str, tokenizer: TextTokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "good"}) + "\n" + line + "\n")
    with pytest.raises(PolymoeError, match=r"^--text v1: .*a\.jsonl, " + reason.replace("{", r"\{")):
        read_tokens("--text v1", [tmp_path / "a.jsonl"], tokenizer)


def test_files_that_are_no_text(tokenizer: TextTokenizer, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "binary.txt").write_bytes(b"\x80\x81" * 100)
    for name, reason in {
        "pipe": "is no ordinary file", ".": "is a folder", "none": "No such file", "empty.jsonl": "is empty",
        "binary.txt": "cannot be read as UTF-8",
    }.items():  # fmt: skip
        with pytest.raises(PolymoeError, match=reason):
            read_tokens("--text", [tmp_path / name], tokenizer)


def test_a_template_that_refuses_names_the_line(paths: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "v1"
    shutil.copytree(paths["v1"], folder)
    template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    strict = TextTokenizer(folder, "v1")
    file = write_lines(tmp_path / "a.jsonl", CHAT, {"messages": [{"role": "tool", "content": "x"}]})
    with pytest.raises(PolymoeError, match=r"line 2: the chat template of v1 refuses these messages \(user first\)"):
        read_tokens("--calibrate", [file], strict)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(PolymoeError, match=r'line 1: v1 has no chat template; write {"text": "…"}'):
        read_tokens("--calibrate", [file], TextTokenizer(folder, "v1"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """60 MB of numbered lines with letters of several bytes."""
    file = tmp_path_factory.mktemp("large") / "large.txt"
    with file.open("w", encoding="utf-8") as out:
        for block in range(600):
            out.writelines(
                f"{block * 1000 + i:07d} der schöne Füchs läuft über die Straße, 大きな狐が走る。 ………\n"
                for i in range(1000)
            )
    yield file
    file.unlink()


def test_a_large_file_is_sampled_evenly_and_in_little_memory(large: Path) -> None:
    """4 MB of text took 800 MB and 14 seconds to tokenise, of which 128 windows were used."""
    assert is_sampled(large)
    tracemalloc.start()
    pieces = read_plain("--text", large)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * PIECES * PIECE_BYTES
    assert len(pieces) == PIECES
    assert pieces == read_plain("--text", large)  # the same ones each time
    lines = [line for piece in pieces for line in piece.splitlines()]
    assert all(len(line) == len(lines[0]) for line in lines)  # whole ones
    numbers = [int(line[:7]) for line in lines]
    assert numbers == sorted(set(numbers))
    gaps = [b - a for a, b in itertools.pairwise(numbers)]
    assert (numbers[0], max(gaps) < 2 * 600_000 / PIECES) == (0, True)
    assert numbers[-1] > 600_000 - 200
    assert PIECES * PIECE_BYTES // 2 < sum(len(piece.encode()) for piece in pieces) <= PIECES * PIECE_BYTES


def test_a_large_file_of_one_line(tmp_path: Path) -> None:
    file = tmp_path / "one.txt"
    file.write_text("狐" * (2 * WHOLE_BYTES // 3), encoding="utf-8")
    pieces = read_plain("--text", file)
    assert all(set(piece) == {"狐"} and len(piece) > PIECE_BYTES // 4 for piece in pieces)


@pytest.mark.parametrize("length", [300, 3000, 100_000])
def test_large_json_lines_are_sampled_whole(length: int, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    count = 3 * WHOLE_BYTES // length
    with file.open("w") as out:
        out.writelines(json.dumps({"input": f"{i}", "target": "x" * length}) + "\n" for i in range(count))
    pairs = read_pairs("--task", file)
    numbers = [int(pair.input) for pair in pairs]
    assert numbers == sorted(set(numbers))
    assert {len(pair.target) for pair in pairs} == {length}
    assert min(30, PIECES) <= len(pairs)
    assert sum(len(pair.target) for pair in pairs) <= WHOLE_BYTES
    assert numbers[0] == 0
    assert max(b - a for a, b in itertools.pairwise(numbers)) < count / 15


def test_bad_lines_of_large_files_are_named_by_their_place(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("nonsense, quite a lot of it\n" * (WHOLE_BYTES // 20))
    with pytest.raises(PolymoeError, match=r"a\.jsonl, the line at byte 0 is not JSON"):
        read_pairs("--task", file)
    file.write_text("x" * (2 * WHOLE_BYTES))
    with pytest.raises(PolymoeError, match=r"no lines shorter than 256 KiB"):
        read_lines("--text", file)
    file.write_bytes((b"a" * 1000 + b"\n") * (WHOLE_BYTES // 500) + b"\xff\n")
    with pytest.raises(PolymoeError, match=r"cannot be read as UTF-8"):
        read_lines("--text", file)


def test_a_large_file_is_tokenised_by_pieces(
    tokenizer: TextTokenizer, large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "PIECES", 8)
    lengths: list[int] = []
    encode = tokenizer.encode_plain

    def counted(text: str) -> list[int]:
        lengths.append(len(text.encode()))
        return encode(text)

    monkeypatch.setattr(tokenizer, "encode_plain", counted)
    assert len(read_tokens("--text", [large], tokenizer)) > 1000
    assert len(lengths) == 8
    assert max(lengths) <= PIECE_BYTES
