"""Several replicas and pools on Ray Serve: `serve run polymoe.deploy:build_app config=deploy.toml`."""

from polymoe.deploy.build import build_app

__all__ = ["build_app"]
