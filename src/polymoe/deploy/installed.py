"""Ray is an extra: whether it is there, and of a version that the router was tried with."""

from importlib.metadata import PackageNotFoundError, version

from polymoe.errors import ConfigError

OLDEST, NEWEST = (2, 60), (2, 60)  # the router's interface is alpha; pyproject.toml has the same range


def require_ray() -> None:
    """Raises `ConfigError`, which says what to install."""
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
