"""What the Hugging Face libraries raise, read for people: its causes, its HTTP status, whether the hub was reached."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType


class HubError(OSError):
    """Something could not be had from the hub, or given to it; the text is one line for people."""


def status_of(error: BaseException) -> int:
    """The HTTP status that an error is about, 0 if none."""
    found = (getattr(getattr(e, "response", None), "status_code", None) for e in chain_of(error))
    return next((status for status in found if status), 0)


def is_unreachable(error: BaseException) -> bool:
    """Whether the hub itself did not answer: no connection, or HF_HUB_OFFLINE."""
    names = {"OfflineModeIsEnabled", "ConnectError", "TransportError", "TimeoutException", "ConnectionError"}
    return any(kind.__name__ in names for e in chain_of(error) for kind in type(e).__mro__)


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def first_line(error: BaseException) -> str:
    """What an error says first, 200 characters at most; the name of its kind if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def huggingface_hub_for(what: str) -> ModuleType:
    """The library, imported only here since it takes a while; HubError, about `what`, where it is not installed."""
    try:
        import huggingface_hub
        import huggingface_hub.constants  # not loaded by the line above
    except ImportError as error:
        raise HubError(missing_package(what, error)) from error
    return huggingface_hub


def missing_package(what: str, error: ImportError) -> str:
    """What to install."""
    name = error.name or "datasets"
    return f"{what}: reading it needs the package {name}; install it with: pip install datasets"
