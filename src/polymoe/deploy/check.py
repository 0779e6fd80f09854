"""What is wrong with a deployment is said before anything starts: bundles, versions, devices, resources."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from polymoe.bundle.manifest import Manifest, read_manifest
from polymoe.deploy.config import DeployConfig, Pool
from polymoe.errors import ConfigError, PolymoeError


def check_bundles(config: DeployConfig, bundles: Mapping[str, str]) -> None:
    """Raises `ConfigError` for a pool whose bundle cannot serve what the pool says, and for one name that means two
    checkpoints. bundles: pool -> folder, of those that are planned."""
    versions: dict[str, tuple[str, str]] = {}  # variant -> (hash of its checkpoint, pool)
    for pool in config.pools:
        folder = bundles.get(pool.name)
        if folder is None:
            continue
        try:
            manifest = read_manifest(Path(folder).expanduser())
        except PolymoeError as error:
            raise ConfigError(f"pool {pool.name}: {error}") from error
        _check_pool(pool, manifest)
        for variant in manifest.variants:
            known, other = versions.setdefault(variant.name, (variant.source_hash, pool.name))
            if known != variant.source_hash:
                raise ConfigError(
                    f"{variant.name} is one checkpoint in pool {other} and another in pool {pool.name}; a name means "
                    "one version. Plan both with the same checkpoint, or give one another name."
                )


def _check_pool(pool: Pool, manifest: Manifest) -> None:
    names = [variant.name for variant in manifest.variants]
    if unknown := [name for name in pool.shares if name not in names]:
        raise ConfigError(
            f"pool {pool.name}: a share is given to {', '.join(unknown)}, which its bundle has not; there are "
            f"{', '.join(names)}."
        )
    engine = pool.engine_config(".")
    engine.weights_of(names)
    device = engine.device
    if device.startswith("cuda") and pool.gpus <= 0:
        raise ConfigError(f"pool {pool.name}: device {device} needs gpus = 1 (or a part of one) for each replica.")
    if device == "cpu" and pool.gpus > 0:
        raise ConfigError(f"pool {pool.name}: gpus = {pool.gpus:g} would be idle with device cpu; leave one out.")


def check_resources(config: DeployConfig, available: Mapping[str, float]) -> None:
    """Raises `ConfigError` when the cluster is too small for the replicas. available: Ray's totals."""
    for kind, of in (("CPU", "cpus"), ("GPU", "gpus")):
        wanted = sum(getattr(pool, of) * _least(pool) for pool in config.pools)
        there = available.get(kind, 0.0)
        if wanted > there + 1e-9:
            most = max(config.pools, key=lambda pool: getattr(pool, of) * _least(pool))
            raise ConfigError(
                f"the pools ask for {wanted:g} {kind}s and the cluster has {there:g}; lower `{of}` or `replicas` (pool "
                f"{most.name} asks for most), or add nodes."
            )


def _least(pool: Pool) -> int:
    return pool.replicas if pool.autoscaling is None else pool.autoscaling.min_replicas
