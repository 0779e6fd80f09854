"""Bundles that `polymoe serve NAME=PATH…` planned on the fly, kept for the next start."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

import polymoe
from polymoe.console import Console
from polymoe.errors import BundleError
from polymoe.offline.bundle import Bundle
from polymoe.offline.family import parse_variant_specs
from polymoe.offline.manifest import FORMAT_VERSION
from polymoe.offline.source import resolve


def default_root() -> Path:
    """`$XDG_CACHE_HOME/polymoe/bundles`, by default under `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "polymoe" / "bundles"


def plan_cached(
    specs: Sequence[str], policy: str, memory: str | None, root: Path, console: Console | None = None
) -> Path:
    """The bundle of these checkpoints with this policy and budget: found under `root`, or planned now.

    A checkpoint whose files changed (name, size or modification time) gives another bundle.
    Raises what `make_plan` does.
    """
    named = parse_variant_specs(specs)
    folder = root / f"{'-'.join(named)[:80]}-{_key(named, policy, memory)}"
    try:
        Bundle.open(folder)
    except BundleError:
        from polymoe.offline.api import make_plan  # here, since it loads transformers

        root.mkdir(parents=True, exist_ok=True)
        make_plan(specs, policy, memory, folder, overwrite=folder.exists(), console=console)
    else:
        if console is not None:
            console.print(f"Planned before: {folder}", soft_wrap=True)
    return folder


def _key(named: dict[str, str], policy: str, memory: str | None) -> str:
    """16 hex digits over everything that decides what the bundle holds."""
    variants = []
    for name, spec in named.items():
        folder = resolve(spec).resolve()
        files = sorted((p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in folder.iterdir() if p.is_file())
        variants.append((name, str(folder), files))
    facts = (FORMAT_VERSION, polymoe.__version__, policy, memory, variants)
    return hashlib.sha256(msgspec.json.encode(facts)).hexdigest()[:16]
