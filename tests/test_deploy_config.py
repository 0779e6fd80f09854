"""The deploy configuration: what it says, and what is refused before anything starts. Needs no Ray."""

import importlib.metadata
import tomllib
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from families import make_family
from polymoe.cli.main import app
from polymoe.deploy import build_app
from polymoe.deploy.check import check_bundles, check_resources
from polymoe.deploy.config import DeployConfig, of_table, read_deploy_config
from polymoe.deploy.merge import merged_info, merged_stats, renumbered
from polymoe.engine.core import EngineCore
from polymoe.errors import ConfigError
from polymoe.offline.api import make_plan
from polymoe.server.settings import ServerSettings
from servers import engine_config

TWO = """
[server]
port = 9000

[[pool]]
name = "chat"
sources = ["bundles/chat"]
replicas = 2
cpus = 2
shares = {base = 0.5}
[pool.engine]
slots = 2
kv_cache = "64MiB"

[[pool]]
name = "code"
sources = ["base=a", "code=b"]
autoscaling = {max_replicas = 4}
"""


def read(text: str) -> DeployConfig:
    return of_table(tomllib.loads(text), "deploy.toml")


def test_what_a_file_says() -> None:
    config = read(TWO)
    chat, code = config.pools
    assert config.server.port == 9000
    engine = chat.engine_config("bundles/chat")
    assert (engine.slots, engine.kv_cache_bytes, engine.num_threads) == (2, 64 << 20, 2)
    assert (chat.is_bundle, code.is_bundle) == (True, False)
    assert code.autoscaling is not None
    assert code.autoscaling.max_replicas == 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("port = 9000", "prot = 9000", "there is no option 'prot'"),
        ("port = 9000", "port = 99999", "server.port must be between 0 and 65535"),
        ("port = 9000", 'host = "0.0.0.0"', "without a key would let anybody"),
        ("port = 9000", "restart_engine = true", "server.restart_engine has no effect here"),
        ("replicas = 2", "replicas = 0", "pool 'chat': replicas must be at least 1"),
        ("replicas = 2", 'replicas = "two"', r"Expected `int`, got `str` - at `\$\[0\].replicas`"),
        ("replicas = 2", "count = 2", "unknown field `count`"),
        ("cpus = 2", "cpus = 0", "cpus must be more than 0"),
        ("slots = 2", "slots = 0", "slots must be at least 1"),
        ("slots = 2", "solts = 2", "pool chat: engine: there is no option 'solts'"),
        ("base = 0.5", "base = 1.5", "shares must be more than 0"),
        ('name = "code"', 'name = "chat"', "pool chat is given twice"),
        ('name = "code"', 'name = "a/b"', "its name must be"),
        ('"base=a", "code=b"', '"base=a", "bundle"', "one bundle, or checkpoints"),
        ('"base=a", "code=b"', "", "name a bundle or checkpoints"),
        ("max_replicas = 4", "max_replicas = 0", "min_replicas must be"),
        ("max_replicas = 4", "max_replicas = 4, ongoing_requests = 0", "ongoing_requests must be more than 0"),
        ("max_replicas = 4", "max_replicas = 4, first_token = -1", "first_token must be at least 0"),
        ("[server]", "[sever]", "there is no option 'sever'"),
        ("[server]", 'http = "nginx"\n[server]', 'http is "ingress" or "proxy"'),
        (
            "[server]",
            'http = "proxy"\n[server]\nmax_connections = 5',
            "no effect where Ray's proxy has the connections",
        ),
        ("port = 9000", "port = 0", "choose a port"),
        ('name = "code"', 'name = "limits"', "that name is taken"),
    ],
)
def test_what_is_refused(old: str, new: str, message: str) -> None:
    assert old in TWO
    with pytest.raises(ConfigError, match=message):
        read(TWO.replace(old, new))


def test_connections_belong_to_the_ingress_unless_a_proxy_has_them() -> None:
    assert read(TWO.replace("port = 9000", "max_connections = 5")).server.max_connections == 5


def test_one_ingress_changes_variants() -> None:
    config = read(TWO)
    server = ServerSettings(port=9000, api_key="key", admin_key="secret")
    with pytest.raises(ConfigError, match="with an admin key there is one ingress"):
        DeployConfig(server=server, pools=config.pools, ingresses=2)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_deploy_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[[pool")
    with pytest.raises(ConfigError, match=r"bad.toml is not a TOML file"):
        read_deploy_config(tmp_path / "bad.toml")
    with pytest.raises(ConfigError, match=r"has no \[\[pool\]\]"):
        read("")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`one` and `other` have variants of the same names from different checkpoints; `part` is a part of `one`."""
    made = {}
    for index, name in enumerate(("one", "other")):
        folder = tmp_path_factory.mktemp(name)
        paths = make_family("mixtral", folder, num_variants=2, perturb=None, seed=index)
        make_plan(paths, "separate", None, folder / "bundle")
        made[name] = folder / "bundle"
        if name == "one":
            make_plan({"base": paths["base"]}, "separate", None, folder / "part")
            made["part"] = folder / "part"
    return made


def pool(name: str, bundle: Path, more: str = "") -> str:
    return f'[[pool]]\nname = "{name}"\nsources = ["{bundle}"]\n{more}\n'


def checked(*pools: str) -> None:
    config = read("\n".join(pools))
    check_bundles(config, {pool.name: pool.sources[0] for pool in config.pools})


def test_one_name_means_one_checkpoint(bundles: dict[str, Path]) -> None:
    checked(pool("a", bundles["one"]), pool("b", bundles["part"]))
    with pytest.raises(ConfigError, match="base is one checkpoint in pool a and another in pool b"):
        checked(pool("a", bundles["one"]), pool("b", bundles["other"]))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("shares = {nobody = 0.5}", "share is given to nobody, which its bundle has not; there are base, v1"),
        ('engine = {device = "cuda"}', "needs gpus = 1"),
        ('gpus = 1\nengine = {device = "cpu"}', "would be idle"),
        ("engine = {weight = {nobody = 2}}", "weight is given to nobody"),
    ],
)
def test_pools_that_their_bundle_cannot_serve(bundles: dict[str, Path], more: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(pool("a", bundles["one"], more))


def test_a_cluster_that_is_too_small() -> None:
    config = read(TWO)
    check_resources(config, {"CPU": 5.0})
    with pytest.raises(ConfigError, match=r"ask for 5 CPUs and the cluster has 4; .* \(pool chat asks for most\)"):
        check_resources(config, {"CPU": 4.0})


def test_the_command_says_what_is_missing(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "deploy.toml"
    file.write_text(pool("a", tmp_path / "nothing"))
    result = CliRunner().invoke(app, ["deploy", str(file), "--check-config"])
    assert isinstance(result.exception, ConfigError)
    assert "pool a:" in str(result.exception)
    file.write_text(pool("a", bundles["one"]))
    assert CliRunner().invoke(app, ["deploy", str(file), "--check-config"]).exit_code == 0

    versions = {"ray": "2.9.0"}
    monkeypatch.setattr("polymoe.deploy.installed.version", versions.__getitem__)
    with pytest.raises(ConfigError, match=r"Ray 2\.9\.0 is installed, and polymoe was tried with 2\.60"):
        build_app(read_deploy_config(file))

    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("polymoe.deploy.installed.version", missing)
    with pytest.raises(ConfigError, match=r"pip install 'polymoe\[ray\]'"):
        build_app(read_deploy_config(file))


def test_figures_of_replicas_are_summed_by_variant(bundles: dict[str, Path]) -> None:
    """Two replicas of `one` and one of `part`, which has `base` only."""
    one, part = (EngineCore(engine_config(bundles[name], slots=1, prefetch=False)) for name in ("one", "part"))
    places: dict[str, int] = {}
    infos = {pool: renumbered(each.info, places) for pool, each in (("b", part), ("a", one))}
    info = merged_info(infos)
    assert [(variant.name, variant.place) for variant in info.variants] == [("base", 0), ("v1", 1)]
    assert info.names == {"base": 0, "v1": 1} == merged_info({"a": infos["a"]}).names
    busy = msgspec.structs.replace(one.stats(), running=[1, 2], kv_usage=0.5, loaded=[1])
    total = merged_stats([busy, busy, part.stats()])
    assert (total.running, total.loaded) == ([2, 4], [0, 1])
    assert total.kv_usage == pytest.approx(1 / 3)
    assert total.resident_bytes["tables"] == 2 * busy.resident_bytes["tables"] + part.stats().resident_bytes["tables"]
