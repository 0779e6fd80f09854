"""A damaged bundle is an error that names the file: never a traceback, a wait for ever, or answers from it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from damage import Liar, damages, restore
from families import make_family
from polymoe import LLM
from polymoe.bundle.reader import Bundle
from polymoe.errors import BundleError, VariantUnusableError
from polymoe.offline.api import make_plan
from polymoe.offline.plan.options import PlanOptions

TABLES, MANIFEST = "tables.safetensors", "manifest.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases of several formats, deltas, experts in the host tier and tensors of single variants, all in one bundle."""
    root = tmp_path_factory.mktemp("damage")
    paths = make_family("gpt_oss", root, num_variants=2, tokenizer=True, frozen="q_proj", num_hidden_layers=2,
                        layer_types=["sliding_attention", "full_attention"])  # fmt: skip
    options = PlanOptions(base="int4", delta_bits=2)
    make_plan(paths, "delta", "0.8x", root / "packed", options=options)
    make_plan(paths, "separate", "0.7x", root / "tiers")
    few = make_family("mixtral", root / "few", num_variants=2, changed=0.05)
    make_plan(few, "exact-delta", None, root / "exact")
    return root


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole / "packed", tmp_path / "b"))


@pytest.fixture
def liar(folder: Path) -> Liar:
    return Liar(folder)


def use(folder: Path) -> None:
    """Serve the bundle and let every variant say something."""
    llm = LLM(folder, dtype="float32")
    try:
        llm.generate([[5, 6, 7]] * len(llm.variants), variants=llm.variants)
    except VariantUnusableError as error:  # only this one's files are damaged
        raise BundleError(str(error.__cause__)) from error


@pytest.mark.parametrize("kind", ["packed", "tiers"])
def test_every_damage_to_every_file_is_named(kind: str, whole: Path, tmp_path: Path) -> None:
    """Of 343 damages 74 were served in silence and 52 gave tracebacks. Of the second kind tensor files only: the other
    files are those of the first."""
    folder = Path(shutil.copytree(whole / kind, tmp_path / "b"))
    use(folder)
    ending = "*" if kind == "packed" else "*.safetensors"
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob(ending) if path.is_file())
    count = 0
    for number, file in enumerate(files):
        other = folder / files[number - 1]
        for name, damage in damages(folder / file, other):
            damage()
            try:
                use(folder)
            except BundleError as error:
                message = str(error)
            else:
                pytest.fail(f"{name} of {file} is served")
            if not (file == MANIFEST and name == "delete"):
                assert file in message, (file, name, message)
            restore(folder, whole / kind, file)
            count += 1
    assert count > (20 * 15 if kind == "packed" else 7 * 15)


@pytest.mark.parametrize("name", ["tokenizer.model", "sub/tokenizer.json", "added_tokens.json"])
def test_files_added_beside_a_tokenizer(folder: Path, name: str) -> None:
    """transformers reads what it finds in a variant's folder, so that a new file there changes answers too."""
    (folder / "variants/v1" / name).parent.mkdir(exist_ok=True)
    (folder / "variants/v1" / name).write_text("{}")
    with pytest.raises(BundleError, match=f"variants/v1/{name} was added"):
        Bundle.open(folder)


def test_files_of_others_beside_a_bundle_do_not_matter(folder: Path) -> None:
    (folder / "README.md").write_text("ours")
    (folder / "variants/v1/.DS_Store").write_text("a file manager's")
    Bundle.open(folder)


def test_any_change_of_the_manifest_is_found(folder: Path) -> None:
    path = folder / MANIFEST
    text = path.read_text()
    changed = [
        re.sub(r'("max_model_len": )\d+', r"\g<1>64", text),
        text.replace('"transposed": ', '"x": 1, "transposed": '),
    ]
    for content in changed:
        assert content != text
        path.write_text(content)
        with pytest.raises(BundleError, match=r"manifest\.json is damaged: it has changed since it was written"):
            Bundle.open(folder)
    path.write_text(json.dumps(json.loads(text)))  # the same in other words
    Bundle.open(folder)


def test_bundles_from_before_the_digest_open(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields = json.loads((folder / MANIFEST).read_text())
    del fields["digest"]
    (folder / MANIFEST).write_text(json.dumps(fields))
    use(folder)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{folder / MANIFEST} was planned before manifests had a hash of their own; plan it again")


def test_a_copy_and_a_link_to_a_bundle_are_the_same(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    Bundle.open(tmp_path / "link", verify=True)


def test_a_bundle_in_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    """The Hub's client keeps a snapshot as links to blobs; a bundle that was downloaded is one."""
    repo = tmp_path / "models--acme--bundle"
    (repo / "blobs").mkdir(parents=True)
    snapshot = repo / "snapshots" / "0123abcd"
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        shutil.copy(path, repo / "blobs" / str(number))
        place = snapshot / path.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(repo / "blobs" / str(number))
    Bundle.open(snapshot, verify=True)


LIES: dict[str, tuple[str, Callable[[dict[str, Any]], object]]] = {
    "path out of the bundle": ("files", lambda m: m["files"][0].update(path="../../../../etc/passwd")),
    "absolute path": ("files", lambda m: m["files"][0].update(path="/etc/passwd")),
    "path twice": ("files", lambda m: m["files"].append(m["files"][0])),
    "no path": ("files", lambda m: m["files"][0].update(path="")),
    "path with a NUL": ("files", lambda m: m["files"][0].update(path="a\0b")),
    "negative size": ("files", lambda m: m["files"][0].update(size=-1)),
    "no hash": ("files", lambda m: m["files"][0].update(sha256="")),
    "no file of a layer": ("files", lambda m: m["files"].pop(2)),
    "no files": ("files", lambda m: m.update(files=[])),
    "no variants": ("variants", lambda m: m.update(variants=[])),
    "a name that is a path": ("variants", lambda m: m["variants"][0].update(name="../base")),
    "two of one name": ("variants", lambda m: m["variants"][0].update(name="v1")),
    "no context": ("max_model_len", lambda m: m["variants"][0].update(max_model_len=-1)),
    "no vocabulary": ("vocab_size", lambda m: m["variants"][0].update(vocab_size=0)),
    "unknown dtype": ("dtype", lambda m: m["variants"][0].update(dtype="int3")),
    "no layers": ("expert_modules", lambda m: m.update(expert_modules=[])),
    "a layer less": ("base_pools", lambda m: m["base_pools"].pop()),
    "a layer less of deltas": ("delta_pools", lambda m: m["delta_pools"].pop()),
    "a layer less of the host": ("host_experts", lambda m: m["host_experts"].pop()),
    "unknown format": ("base_pools", lambda m: m["base_pools"][0].update(int77=1)),
    "delta format as base": ("base_pools", lambda m: m["base_pools"][0].update(d2=1)),
    "negative pool": ("base_pools", lambda m: m["base_pools"][0].update(int4=-3)),
    "negative host": ("host_experts", lambda m: m.update(host_experts=[-1, -1])),
    "no experts": ("num_experts", lambda m: m.update(num_experts=0)),
    "no tensors": ("expert_shapes", lambda m: m.update(expert_shapes={})),
    "negative shape": ("expert_shapes", lambda m: m["expert_shapes"].update(down_proj=[-1, 4])),
    "sources of nobody": ("nonexperts", lambda m: m["nonexperts"].update({next(iter(m["nonexperts"])): [0, 7]})),
    "sources too few": ("nonexperts", lambda m: m["nonexperts"].update({next(iter(m["nonexperts"])): [0]})),
    "negative bytes": ("resident_bytes", lambda m: m["resident_bytes"].update(deltas=-1)),
    "no positions": ("positions", lambda m: m.update(positions={})),
    "no expert bytes": ("expert_bytes", lambda m: m.update(expert_bytes=0)),
}


@pytest.mark.parametrize("lie", LIES)
def test_manifests_that_lie(liar: Liar, lie: str) -> None:
    """`../../../../etc/passwd` in a manifest was loaded."""
    field, change = LIES[lie]
    liar.edit_manifest(change)
    with pytest.raises(BundleError, match=rf"manifest\.json is damaged: {field} "):
        Bundle.open(liar.folder)


def test_every_field_of_another_type(liar: Liar, whole: Path) -> None:
    fields = json.loads((liar.folder / MANIFEST).read_text())
    for name, value in fields.items():
        others: list[Any] = [None, -1, 1e400, "text", [], {}, [[]], [None], {"a": []}]
        for wrong in others:
            if type(wrong) is type(value) and (wrong or not value):
                continue  # a text in place of a text, or what it was
            liar.edit_manifest(lambda m, n=name, w=wrong: m.update({n: w}))  # type: ignore[misc]
            if name in ("digest", "tied", "memory", "host_bytes", "bytes_per_expert_parameter", "format_version"):
                continue  # signed again, or a value that is allowed
            with pytest.raises(BundleError, match=r"manifest|which is not planned"):
                Bundle.open(liar.folder)
            restore(liar.folder, whole / "packed", MANIFEST)
    for text in ('{"format_version": 2, "files": NaN}', "[" * 100_000, '{"format_version": 1e999}', "null", "\ud800"):
        (liar.folder / MANIFEST).write_bytes(text.encode(errors="surrogatepass"))
        with pytest.raises(BundleError, match=r"manifest\.json is damaged"):
            Bundle.open(liar.folder)


def fill(name: str, value: int) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[0] = value

    return change


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("table", -1000, "a host expert that does not exist"),
        ("table", -1, "a host expert that does not exist"),
        ("table", 1000, "a resident expert that does not exist"),
        ("table", -(2**31), "a host expert that does not exist"),
        ("table", 2**31 - 1, "a resident expert that does not exist"),
        ("delta", 1000, "a delta that does not exist"),
        ("delta", -2, "a delta that does not exist"),
    ],
)
def test_ids_of_nothing(liar: Liar, name: str, value: int, what: str) -> None:
    """A table entry of −1000 killed the engine for all variants at the first request."""
    liar.edit_tensors(TABLES, fill(name, value))
    with pytest.raises(BundleError, match=rf"{TABLES} is damaged: it names {what} for variant base, layer 0, expert 0"):
        Bundle.open(liar.folder)


def test_a_delta_on_a_host_expert_and_a_sign_of_nothing(whole: Path, tmp_path: Path) -> None:
    tiers = Liar(Path(shutil.copytree(whole / "tiers", tmp_path / "tiers")))
    host = Bundle.open(tiers.folder).table < 0
    assert bool(host.any())
    tiers.edit_manifest(lambda m: m["host_experts"].__setitem__(1, 0))
    with pytest.raises(BundleError, match=r"host/layer-001\.safetensors holds"):
        Bundle.open(tiers.folder)
    packed = Liar(Path(shutil.copytree(whole / "packed", tmp_path / "packed")))
    packed.edit_tensors(TABLES, lambda t: t.update(sign=torch.zeros_like(t["table"], dtype=torch.int8)))
    with pytest.raises(BundleError, match="a sign other than 1 and -1"):
        Bundle.open(packed.folder)


def first(folder: Path, file: str, ending: str = "") -> str:
    from safetensors import safe_open

    with safe_open(folder / file, framework="pt") as handle:
        return next(str(name) for name in sorted(handle.keys()) if name.endswith(ending))


@pytest.mark.parametrize(
    ("kind", "file", "ending"),
    [
        ("packed", TABLES, ""),
        ("packed", "experts/layer-000.safetensors", ".codes"),
        ("packed", "experts/layer-000.safetensors", ".scales"),
        ("packed", "deltas/layer-001.safetensors", ".codes"),
        ("packed", "nonexperts/shared.safetensors", "weight"),
        ("packed", "nonexperts/variant.v1.safetensors", "input_layernorm.weight"),
        ("tiers", "experts/layer-000.safetensors", ""),
        ("tiers", "host/layer-000.safetensors", ""),
        ("exact", "deltas/layer-000.safetensors", "down_proj.starts"),
        ("exact", "deltas/layer-000.safetensors", "down_proj.bitmap"),
        ("exact", "deltas/layer-000.safetensors", "down_proj.values"),
    ],
)
@pytest.mark.parametrize("how", ["missing", "short", "another dtype", "one more axis"])
def test_tensors_of_another_kind(kind: str, file: str, ending: str, how: str, whole: Path, tmp_path: Path) -> None:
    """Sizes that kernels trust: reading past a pool would be silent."""
    liar = Liar(Path(shutil.copytree(whole / kind, tmp_path / "b")))
    name = first(liar.folder, file, ending)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        match how:
            case "missing":
                del tensors[name]
            case "short":
                tensors[name] = tensors[name][:-1]
            case "another dtype":
                tensors[name] = tensors[name].to(torch.int16)
            case "one more axis":
                tensors[name] = tensors[name][None]

    liar.edit_tensors(file, change)
    if how == "another dtype" and file.startswith("nonexperts/"):
        return  # it is cast when it is loaded
    with pytest.raises(BundleError) as caught:
        use(liar.folder)
    assert file in str(caught.value) or (file.startswith("nonexperts/") and name in str(caught.value))
    assert name.split(".")[-1] in str(caught.value) or "do not fit their bitmaps" in str(caught.value)


def test_exact_deltas_whose_bitmaps_count_other_values(whole: Path, tmp_path: Path) -> None:
    liar = Liar(Path(shutil.copytree(whole / "exact", tmp_path / "b")))
    file = "deltas/layer-000.safetensors"
    bitmap = first(liar.folder, file, "down_proj.bitmap")
    liar.edit_tensors(file, lambda t: t[bitmap].view(-1)[:1].bitwise_xor_(1))
    with pytest.raises(BundleError, match=f"{file} has exact deltas of down_proj that do not fit their bitmaps"):
        use(liar.folder)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 64},
        {"num_hidden_layers": 3},
        {"model_type": "evil"},
        {"auto_map": {"AutoConfig": "evil.E"}},
        {"_attn_implementation": "evil/repo"},
    ],
)
def test_configs_of_another_model(liar: Liar, change: dict[str, Any]) -> None:
    file = "variants/base/config.json"
    config = json.loads((liar.folder / file).read_text()) | change
    liar.write(file, json.dumps(config).encode())
    with pytest.raises(BundleError):
        use(liar.folder)
