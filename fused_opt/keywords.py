"""The keywords that stand behind ``**extras``, written out where people look for them: signatures and ``help()``.

Type checkers read ``Unpack[...]`` of a TypedDict. At run time the same TypedDict says which keywords these are, the signature
of ``FusedOptimizer`` their order and defaults, and ``EXTRAS`` what is said of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from inspect import Parameter, Signature, cleandoc, signature
from textwrap import indent
from typing import Any, get_type_hints

from .extras import EXTRAS, Extras

_BESIDE = {
    "state_dtype": """dtype of the states, or a dict of dtypes by state (``{"exp_avg": torch.bfloat16}``): float32, float64,
        bfloat16 or float16; or ``"8bit"``: codes with a scale for every 128, of parameters of 4,096 elements and more. None,
        and for a state that the dict lacks: the parameter's, as torch keeps it. It holds through ``load_state_dict``, too.
        Averages and complex states keep theirs.""",
    "backend": """``"auto"`` takes for every parameter the first of :func:`fused_opt.backends.available` that can step
        it; a named one steps it or raises with the reason. On a GPU a backend that fails its self-check cannot.""",
}
_DOCS = {extra.key: cleandoc(extra.doc) for extra in EXTRAS} | {key: cleandoc(doc) for key, doc in _BESIDE.items()}
_TYPES = get_type_hints(Extras)
_DEFAULTS = {extra.key: extra.default for extra in EXTRAS} | {"state_dtype": None, "backend": "auto"}


def _keyword(name: str) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=_DEFAULTS[name], annotation=_TYPES[name])


def written_out(init: Callable[..., None], of_parent: Signature) -> Signature:
    """The signature of an ``__init__`` with the keywords behind its ``**extras: Unpack[a TypedDict]``.

    Args:
        init: of a class.
        of_parent: of the class that it passes them to, which says their order and defaults.
    """
    own = signature(init)
    *named, last = own.parameters.values()
    if last.kind is not Parameter.VAR_KEYWORD:
        return own
    try:
        hint = get_type_hints(init, include_extras=True).get(last.name)
    except NameError:  # names that only type checkers import
        return own
    keys = {key for options in getattr(hint, "__args__", ()) for key in getattr(options, "__annotations__", ())}
    if not keys:
        return own
    behind = [one.replace(kind=Parameter.KEYWORD_ONLY) for one in of_parent.parameters.values() if one.name in keys]
    return own.replace(parameters=[*named, *behind])


def documented(doc: str, keys: Sequence[str]) -> str:
    """A docstring whose line ``**extras: ...`` has become one paragraph for each of these keywords that has one."""
    text = "\n".join(
        indent(f"{key}: {_DOCS[key]}", "        ").replace(" " * 8, " " * 4, 1) for key in keys if key in _DOCS
    )
    return re.sub(r"(?m)^ *\*\*extras: .*$", lambda _: text, cleandoc(doc))


def write_out(cls: Any) -> None:
    """Give a class that was just made, below ``FusedOptimizer`` or that itself, its signature and docstring in full."""
    init = vars(cls).get("__init__")
    if init is not None:
        parents = [signature(parent.__init__) for parent in cls.__mro__[1:] if "__init__" in vars(parent)]
        init.__signature__ = written_out(init, parents[0])
    if cls.__doc__ is not None:  # as python -OO leaves it
        cls.__doc__ = documented(cls.__doc__, list(signature(cls.__init__).parameters))


def write_out_root(cls: Any) -> None:
    """The same for the class that takes the extras themselves."""
    own = signature(cls.__init__)
    named = [one for one in own.parameters.values() if one.kind is Parameter.POSITIONAL_OR_KEYWORD]
    cls.__init__.__signature__ = own.replace(parameters=[*named, *map(_keyword, _DEFAULTS)])
    write_out(cls)
