"""What serving needs is tried when it is planned: each fault is refused there by variant and file, or warned of."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from families import make_family, make_tokenizer
from polymoe import LLM, SamplingParams
from polymoe.bundle.generation_defaults import GENERATION_CONFIG
from polymoe.console import Console
from polymoe.errors import CheckpointError
from polymoe.offline.checkpoint.family import Family
from polymoe.offline.checkpoint.serving_check import check_serving

VOCABULARY = 112


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_family("mixtral", tmp_path_factory.mktemp("original"), num_variants=2, tokenizer=True)


@pytest.fixture
def pair(original: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """base, and v1 for a test to change."""
    return {"base": original["base"], "v1": Path(shutil.copytree(original["v1"], tmp_path / "v1"))}


def edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | changes))


def warnings_of(paths: dict[str, Path]) -> list[str]:
    text = io.StringIO()
    check_serving(Family.open(paths), Console(file=text))
    return text.getvalue().splitlines()


def test_a_sound_family_is_not_warned_of(pair: dict[str, Path]) -> None:
    assert warnings_of(pair) == []


def write(file: str, text: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())


def generation(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / GENERATION_CONFIG, **values)


def only_sentencepiece(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")


def bad_merges(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["merges"] = [["q", "zzzz"]]
    (folder / "tokenizer.json").write_text(json.dumps(content))


def named_templates_without_default(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    edit(folder / "tokenizer_config.json", chat_template=[{"name": "rag", "template": "{{ messages }}"}])


@pytest.mark.parametrize(
    ("damage", "file", "reason"),
    [
        (write(GENERATION_CONFIG, '{"eos_token_id": 1,}'), GENERATION_CONFIG, "not readable as JSON"),
        (write(GENERATION_CONFIG, "[]"), GENERATION_CONFIG, "a JSON object is expected"),
        (generation(temperature="0.7"), GENERATION_CONFIG, "temperature must be a number, not '0.7'"),
        (generation(top_k=1.5), GENERATION_CONFIG, "top_k must be a whole number, not 1.5"),
        (generation(top_p=True), GENERATION_CONFIG, "top_p must be a number, not True"),
        (generation(do_sample="yes"), GENERATION_CONFIG, "do_sample must be true or false, not 'yes'"),
        (generation(temperature=float("nan")), GENERATION_CONFIG, "not readable as JSON"),
        (generation(eos_token_id="</s>"), GENERATION_CONFIG, "it must be a token id or a"),
        (generation(eos_token_id=[1, None]), GENERATION_CONFIG, "it must be a token id or a"),
        (generation(stop_strings=[5]), GENERATION_CONFIG, "stop_strings must be a text or a list"),
        (generation(stop_strings=["x"] * 17), GENERATION_CONFIG, "stop must be at most 16 strings"),
        (write("tokenizer.json", "{,"), "tokenizer.json", "not readable as JSON"),
        (write("tokenizer.json", '{"model": []}'), "tokenizer.json", "cannot be loaded"),
        (bad_merges, "tokenizer.json", "zzzz` out of vocabulary"),
        (write("tokenizer_config.json", "{,"), "tokenizer_config.json", "not readable as JSON"),
        (write("special_tokens_map.json", "[]"), "special_tokens_map.json", "a JSON object is expected"),
        (only_sentencepiece, "tokenizer.model", "install the package sentencepiece"),
        (write("chat_template.jinja", "{% for m in messages %}\n{{ m.content }"), "chat_template.jinja", "line 2"),
        (write("chat_template.jinja", "{{ messages[0].nothing.at_all }}"), "chat_template.jinja", "UndefinedError"),
        (write("chat_template.jinja", "{{ 1 / 0 }}"), "chat_template.jinja", "ZeroDivisionError"),
        (named_templates_without_default, "tokenizer_config.json", "no default"),
        (write("chat_template.jinja", b"\xff\xfe"), "chat_template.jinja", "not readable as UTF-8"),
    ],
)
def test_refused_by_variant_and_file(
    pair: dict[str, Path], damage: Callable[[Path], None], file: str, reason: str
) -> None:
    """`plan` said nothing, and the server died at its start or blamed every client with a 400."""
    damage(pair["v1"])
    with pytest.raises(CheckpointError) as refused:
        warnings_of(pair)
    message = str(refused.value)
    assert message.startswith("v1: ")
    assert str(pair["v1"] / file) in message
    assert reason in message


def test_a_template_that_writes_tokens_the_model_lacks_is_refused(pair: dict[str, Path]) -> None:
    fast = make_tokenizer(pair["v1"])
    fast.add_special_tokens({"additional_special_tokens": [f"<|{i}|>" for i in range(5)]})
    fast.save_pretrained(pair["v1"])
    assert any("v1: its tokenizer has tokens up to 114, its embeddings 112 rows" in line for line in warnings_of(pair))
    (pair["v1"] / "chat_template.jinja").write_text("<|4|>{{ messages[0].content }}")
    with pytest.raises(CheckpointError, match=r"v1: .*writes '<\|4\|>', which is token 114 and outside the vocabulary"):
        warnings_of(pair)


@pytest.mark.parametrize(
    ("values", "warning"),
    [
        ({"top_p": 1.5}, "top_p 1.5 is out of range; 1 is used"),
        ({"top_p": -1}, "top_p -1 is out of range; it is left out"),
        ({"temperature": -0.5}, "temperature -0.5 is out of range; it is left out"),
        ({"top_k": -7}, "top_k -7 is out of range; it is left out"),
        ({"min_p": 2}, "min_p 2 is out of range; it is left out"),
        ({"repetition_penalty": 0}, "repetition_penalty 0.0 is out of range; it is left out"),
        ({"repetition_penalty": 1e9}, "repetition_penalty 1000000000.0 is out of range; 100 is used"),
        ({"max_new_tokens": 0}, "max_new_tokens 0 is out of range; it is left out"),
        ({"eos_token_id": [1, 400]}, "eos_token_id [400] is outside the vocabulary of 112 rows"),
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size 3 is not supported and has no effect"),
        ({"num_beams": 4}, "num_beams 4 is not supported and has no effect"),
        ({"suppress_tokens": [5]}, "suppress_tokens [5] is not supported and has no effect"),
        ({"max_length": 64}, "max_length 64 is not supported and has no effect"),
    ],
)
def test_warned_of_once(pair: dict[str, Path], values: dict[str, Any], warning: str) -> None:
    edit(pair["v1"] / GENERATION_CONFIG, **values)
    (line,) = warnings_of(pair)
    assert line.startswith("warning: v1: ")
    assert warning in line


def test_what_asks_for_nothing_is_not_warned_of(pair: dict[str, Path]) -> None:
    neutral = {
        "num_beams": 1, "no_repeat_ngram_size": 0, "typical_p": 1.0, "bad_words_ids": None, "max_length": 4096,
        "diversity_penalty": 0.0, "suppress_tokens": [], "guidance_scale": None, "top_k": -1, "use_cache": True,
        "transformers_version": "4.40.0", "pad_token_id": 0, "eos_token_id": [1, -1],
    }  # fmt: skip
    edit(pair["v1"] / GENERATION_CONFIG, **neutral)
    assert warnings_of(pair) == []


def test_no_tokenizer_no_end_token(pair: dict[str, Path]) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (pair["v1"] / name).unlink()
    assert warnings_of(pair) == ["warning: v1 has no tokenizer; only token ids can be sent to it."]


@pytest.mark.parametrize(
    ("template", "warning"),
    [
        ("nothing of it", "its chat template leaves out what the user says"),
        ("{{ raise_exception('tools only') }}", "its chat template refuses plain conversations (TemplateError: tools"),
    ],
)
def test_odd_templates_are_warned_of(pair: dict[str, Path], template: str, warning: str) -> None:
    (pair["v1"] / "chat_template.jinja").write_text(template)
    (line,) = warnings_of(pair)
    assert warning in line


def test_a_template_may_insist_on_a_system_message(pair: dict[str, Path]) -> None:
    (pair["v1"] / "chat_template.jinja").write_text(
        "{% if messages[0].role != 'system' %}{{ raise_exception('who am I?') }}{% endif %}{{ messages[1].content }}"
    )
    assert warnings_of(pair) == []


def planned(paths: dict[str, Path], folder: Path) -> LLM:
    from polymoe.offline.api import make_plan

    make_plan(paths, "separate", None, folder)
    return LLM(folder, num_threads=1, kv_cache_bytes=1 << 22)


def test_defaults_of_a_variant_apply(pair: dict[str, Path], tmp_path: Path) -> None:
    """`repetition_penalty` was read by nobody; an explicit `do_sample: false` meant temperature 1."""
    edit(
        pair["v1"] / GENERATION_CONFIG,
        do_sample=False, repetition_penalty=1.3, top_k=20, min_new_tokens=30, max_new_tokens=1000, stop_strings=["zzz"],
    )  # fmt: skip
    llm = planned(pair, tmp_path / "b")
    found = llm.default_sampling_params("v1")
    assert found == SamplingParams(
        temperature=0.0, repetition_penalty=1.3, top_k=20, min_tokens=30, max_tokens=1000, stop=["zzz"]
    )
    assert llm.default_sampling_params("base") == SamplingParams()
    (long,) = llm.generate([[5] * 250], variants="v1")  # 256 tokens of context: the default is lowered, not refused
    assert len(long.outputs[0].token_ids) == 6


def test_end_tokens_are_those_of_configs_and_tokenizer(pair: dict[str, Path], tmp_path: Path) -> None:
    """A ChatML fine-tune whose configs still named its base's end token never stopped at its own."""
    fast = make_tokenizer(pair["v1"], vocab_size=108)
    fast.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    fast.eos_token = "<|im_end|>"
    fast.save_pretrained(pair["v1"])
    edit(pair["v1"] / GENERATION_CONFIG, eos_token_id=[9, 400])
    edit(pair["v1"] / "config.json", eos_token_id=1)
    llm = planned(pair, tmp_path / "b")
    end = fast.convert_tokens_to_ids("<|im_end|>")
    assert llm.processor.end_token_ids("v1") == [9, 1, end]
    assert llm.processor.end_token_ids("base") == [1]
    # Every request of v1 was answered 400 because of the id outside its vocabulary.
    for token in (9, 1, end):
        forced = SamplingParams(logit_bias={token: 100.0}, max_tokens=5)
        (output,) = llm.generate([[5, 6]], forced, variants="v1")
        assert (output.outputs[0].finish_reason, output.outputs[0].token_ids) == ("stop", [token])
