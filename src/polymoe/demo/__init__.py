"""The family that comes with the package: a small base model and three full fine-tunes of it. See MODEL_CARD.md."""

from pathlib import Path

_HERE = Path(__file__).parent


def family_paths() -> dict[str, Path]:
    """Variant name -> checkpoint folder."""
    return {name: _HERE / "family" / name for name in ("base", "math", "drama", "code")}


def text_paths() -> dict[str, Path]:
    """Variant name -> a short held-out text of its domain (the base gets the encyclopaedia's)."""
    texts = {"base": "wiki", "math": "math", "drama": "drama", "code": "code"}
    return {name: _HERE / "text" / f"{domain}.txt" for name, domain in texts.items()}
