"""Ray is an extra: whether it is there, and of a version that the router was tried with."""

import os
from importlib.metadata import PackageNotFoundError, version

from polymoe.errors import ConfigError

OLDEST, NEWEST = (2, 60), (2, 60)  # the router's interface is alpha; pyproject.toml has the same range


# Ray Serve reads these when it is imported, in every process. Each of our streams is cheap to serve and has many
# pieces, so that threads of their own and Ray's object store cost more than they bring. Nodes of a cluster that is not
# started here need the same variables.
VARIABLES = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
}


def require_ray() -> None:
    """Raises `ConfigError`, which says what to install. Sets `VARIABLES` where they are not set."""
    for name, value in VARIABLES.items():
        os.environ.setdefault(name, value)
    wanted = "pip install 'polymoe[ray]'"
    try:
        found = version("ray")
    except PackageNotFoundError as error:
        raise ConfigError(f"deploying needs Ray: {wanted}.") from error
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if not OLDEST <= numbers <= NEWEST:
        raise ConfigError(f"Ray {found} is installed, and polymoe was tried with {OLDEST[0]}.{OLDEST[1]}: {wanted}.")
    try:
        import ray.serve  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"Ray is installed without Ray Serve ({error}): {wanted}.") from error
