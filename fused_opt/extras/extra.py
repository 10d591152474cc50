"""What can be fused into a step beside the rule, as data: one row for each keyword."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Extra:
    """One keyword of every optimizer.

    Attributes:
        key: the keyword, and the key in ``param_groups``.
        check: raises where a value is none for it.
        doc: what ``help()`` says of it.
        default: of a group that does not set its own.
        settings: the classes of its values that checkpoints carry as strings.
        words: its values that are strings themselves, where it has classes, too.
        args: ``(group, lr) -> what a step's arguments say of it``, in a step that is not idle; None: the arguments say
            nothing of it.
        counts: what it counts in ``param_groups``.
        of_all_parameters: it is about all parameters together, or their order, and so nothing for an optimizer of some.
    """

    key: str
    check: Callable[[Any], None]
    doc: str
    default: Any = None
    settings: tuple[type, ...] = ()
    words: tuple[str, ...] = ()
    args: Callable[[Mapping[str, Any], Any], Any] | None = None
    counts: tuple[str, ...] = ()
    of_all_parameters: bool = False


def check_setting(key: str, kind: type) -> Callable[[Any], None]:
    """A check for None or an instance of a public class of this package."""

    def check(value: Any) -> None:
        if isinstance(value, type) and issubclass(value, kind):
            raise TypeError(f"{key} takes a fused_opt.{kind.__name__} or None, not the class: {value.__name__}(...)")
        if not isinstance(value, kind | None):
            raise TypeError(f"{key} takes a fused_opt.{kind.__name__} or None, not {value!r}")

    return check
