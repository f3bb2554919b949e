"""Context: what one call tells the adapters beside the tensors that flow through the host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any


class Context:
    """Named values of the call in progress: the token grid, a side network's maps, camera rays, number of frames ...

    One object is shared by a backbone and the adapters on it; the backbone and outer adapters write, inner adapters
    read, and the adapted model clears it when the call ends. Reading a name nobody wrote is an error that says so.
    """

    if TYPE_CHECKING:

        def __setattr__(self, name: str, value: Any) -> None: ...

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        known = ", ".join(sorted(vars(self))) or "nothing"
        raise AttributeError(
            f"the context of this call holds no {name!r} (it holds {known}): whoever provides it did not run"
        )

    def clear(self) -> None:
        self.__dict__.clear()
