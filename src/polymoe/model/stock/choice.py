"""Which modules of a stock model run once for each variant: found in one attempt after another at a trial run."""

from collections.abc import Iterable

from transformers import PreTrainedModel

from polymoe.model.stock.module_trial import NotPerVariantError
from polymoe.model.stock.skeleton import expert_modules
from polymoe.model.stock.stateful import enclosing


class Choice:
    """Which modules run once for each variant: those with a state, and, attempt after attempt, where one failed."""

    def __init__(self, stateful: list[str]) -> None:
        self.paths = _outermost(stateful)
        self._impossible: set[type] = set()
        self._first: Exception | None = None

    def widen(self, model: PreTrainedModel, inside: str, error: Exception) -> None:
        """Choose the module at which an attempt failed, or the one around it, and all of its class.

        Raises the error where there is none.
        """
        if isinstance(error, NotPerVariantError):  # of the chosen module, however deep in it something failed
            inside = next((p for p in self.paths if f"{inside}.".startswith(f"{p}.")), inside)
            self._impossible.add(type(model.get_submodule(inside)))
        elif self._first is None:
            self._first = error
        kinds = {type(model.get_submodule(path)) for path in self.paths}
        path: str | None = inside
        while path and self._is_out_of_question(model, path, kinds):
            path = enclosing(model, path)
        if not path:
            raise self._first or error
        chosen = type(model.get_submodule(path))
        more = [p for p, module in model.named_modules() if type(module) is chosen]
        kept = [p for p in self.paths if type(model.get_submodule(p)) not in self._impossible]
        self.paths = _outermost([*kept, *more])

    def _is_out_of_question(self, model: PreTrainedModel, path: str, kinds: set[type]) -> bool:
        module = model.get_submodule(path)
        experts = any(name == path or name.startswith(f"{path}.") for name, _ in expert_modules(model))
        return experts or type(module) in self._impossible | kinds


def _outermost(paths: Iterable[str]) -> list[str]:
    """Those that lie in no other."""
    known = set(paths)
    return sorted(p for p in known if not any(p.startswith(f"{other}.") for other in known))
