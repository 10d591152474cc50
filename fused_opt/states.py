"""The states of parameters: checked, made for a step, and taken back where that step is not made."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .backends.interface import ParamEntry
from .backends.pointers import DTYPES
from .eight_bits import CODES, EIGHT_BITS, LEAST, SIGNED, UNSIGNED, blocks_of, scale_of
from .exact import KEPT, exact_weights, kept_for, slot_of
from .extras.averaging import AVERAGE, initial
from .groups import GroupSpec
from .rule import Rule
from .shards import check_alike, is_spread, local
from .tensors import overlaps

#: Of the states that a step makes: all alike, or by name; None, and for a name that it lacks: the parameter's.
OneDtype: TypeAlias = torch.dtype | Literal["8bit"]
StateDtype: TypeAlias = OneDtype | Mapping[str, OneDtype] | None


def dtype_of_state(given: StateDtype, slot: str) -> OneDtype | None:
    """What ``state_dtype=`` says of one state; None: nothing, so that it is the parameter's."""
    return given.get(slot) if isinstance(given, Mapping) else given


def dtype_for(given: StateDtype, rule: Rule, slot: str, p: Tensor) -> torch.dtype | None:
    """Of a parameter's new state, of codes where it is kept in 8 bits; None: the parameter's."""
    asked = dtype_of_state(given, slot)
    if not isinstance(asked, str):
        return asked
    if p.is_complex():
        return None
    if p.numel() < LEAST:
        return torch.promote_types(p.dtype, torch.float32)
    return UNSIGNED if slot in rule.unsigned else SIGNED


def check_state_dtype(given: StateDtype) -> None:
    """Raise a ValueError unless it is None, a dtype that states can have, ``"8bit"``, or a dict of these by name."""
    for dtype in given.values() if isinstance(given, Mapping) else () if given is None else (given,):
        if dtype not in (*DTYPES, EIGHT_BITS):
            kinds = ", ".join(str(dtype) for dtype in DTYPES)
            raise ValueError(
                f"Invalid state_dtype: {given}; there are None, {kinds}, {EIGHT_BITS!r}, and dicts of these by state"
            )


def refuse_8_bits_under_zero(given: StateDtype) -> None:
    """Raise where states in 8 bits are asked for that ZeroRedundancyOptimizer is going to load."""
    if EIGHT_BITS in (given.values() if isinstance(given, Mapping) else (given,)):
        raise ValueError(
            "state_dtype='8bit': ZeroRedundancyOptimizer casts the states that it loads to the parameters' dtype, and "
            "codes are no numbers. state_dtype=torch.bfloat16 would work, and 8 bits under DistributedDataParallel"
        )


def not_in_8_bits(given: StateDtype, rule: Rule, differentiable: bool) -> str | None:
    """Why a rule cannot be stepped with the states that are asked for in 8 bits, or None."""
    asked = [slot for slot in rule.states if dtype_of_state(given, slot) == EIGHT_BITS]
    if asked and differentiable:
        return f"state_dtype={EIGHT_BITS!r}: differentiable=True has autograd follow states, and codes have no gradient"
    for slot in asked:
        if slot in rule.not_in_8_bits:
            others = {other: EIGHT_BITS for other in rule.states if other not in rule.not_in_8_bits}
            instead = others or "torch.bfloat16"
            return (
                f"the state {slot!r} of rule {rule.name!r} cannot be kept in 8 bits: {rule.not_in_8_bits[slot]}. "
                f"state_dtype={instead} would work"
            )
    return None


def check_names_of_states(given: StateDtype, optimizer: Any) -> None:
    """Raise where ``state_dtype`` names a state that no group has, or asks for one in 8 bits that cannot be."""
    rules = [optimizer._rule(group) for group in optimizer.param_groups]
    if isinstance(given, Mapping):
        known = list(dict.fromkeys(slot for rule in rules for slot in rule.states))
        if unknown := [slot for slot in given if slot not in known]:
            raise ValueError(
                f"Invalid state_dtype: it names {unknown[0]!r}, and the states of this {type(optimizer).__name__} are "
                f"{', '.join(map(repr, known)) or 'none'}"
            )
    for rule, group in zip(rules, optimizer.param_groups):
        if why := not_in_8_bits(given, rule, bool(group.get("differentiable"))):
            raise ValueError(f"Invalid state_dtype: {why}")


def check_codes(name: str, given: StateDtype, rule: Rule, p: Tensor, of_p: Mapping[str, Any]) -> bool:
    """Whether a parameter has states in 8 bits, or is about to have some; raises where it cannot, or they do not fit it."""
    found = {slot: of_p[slot] for slot in rule.states if of_p.get(slot) is not None}
    kept = [slot for slot, state in found.items() if state.dtype in CODES]
    made = [slot for slot in rule.states if slot not in found and dtype_for(given, rule, slot, p) in CODES]
    if not kept and not (made and p.grad is not None):
        return False
    why = None
    if is_spread(p):
        why = "it is a DTensor, and a block would be cut where its shards are"
    elif not p.is_contiguous():
        why = (
            f"its strides are {p.stride()}, and a block is of neighbours in row-major order; contiguous() makes them so"
        )
    if why is not None:
        raise RuntimeError(
            f"parameter {name} cannot have states in 8 bits: {why}. state_dtype=torch.bfloat16 would work, too"
        )
    for slot in kept:
        codes, scale = found[slot], of_p.get(scale_of(slot))
        dtype = UNSIGNED if slot in rule.unsigned else SIGNED
        alike = (
            type(scale) is Tensor
            and (scale.dtype, scale.shape, scale.device) == (torch.float32, (blocks_of(p.numel()),), p.device)
            and scale.is_contiguous()
        )
        if not alike or codes.dtype != dtype or not codes.is_contiguous() or overlaps(codes):
            raise RuntimeError(
                f"parameter {name} has a state {slot!r} in 8 bits that does not fit it: it must be contiguous {dtype} and "
                f"{scale_of(slot)!r} beside it float32 of shape ({blocks_of(p.numel())},), on {p.device}. Clear its entry in "
                f"optimizer.state, or load a checkpoint"
            )
    return True


class WithStates(torch.optim.Optimizer):
    """An optimizer that knows whether anyone else may have one of its states.

    Whoever has one has read ``state``. A kernel's writes to states are counted for autograd only from then on, for that
    takes a tenth of the time of a step of small tensors.
    """

    _states_are_known = False

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The states of every parameter, as torch.optim keeps them."""
        self._states_are_known = True
        return self._states

    @state.setter
    def state(self, states: defaultdict[Tensor, Any]) -> None:
        self._states_are_known = True
        self.__dict__["state"] = states  # where torch's __setstate__ puts them

    @property
    def _states(self) -> defaultdict[Tensor, Any]:
        """The same, for this package, which gives none away."""
        return self.__dict__["state"]


def check_tensor(name: str, what: str, found: Tensor, p: Tensor) -> None:
    """Raise where a gradient or a state does not fit its parameter."""
    if not isinstance(found, Tensor):
        kind = type(found).__name__
        raise RuntimeError(
            f"parameter {name} has a {kind} as its {what}; it must be a tensor of shape {tuple(p.shape)}"
        )
    check_alike(name, p, what, found)
    if found.shape != p.shape:
        raise RuntimeError(
            f"parameter {name} has shape {tuple(p.shape)} and its {what} {tuple(found.shape)}; they must be equal. If "
            f"the parameter was resized, clear its gradient and its entry in optimizer.state"
        )
    if found.device != p.device:
        raise RuntimeError(
            f"parameter {name} is on {p.device} and its {what} on {found.device}; they must be on the same device. "
            f"Move the model before making the optimizer, or load_state_dict after moving it"
        )
    coded = found.dtype in CODES and what != "gradient"
    if found.is_complex() != p.is_complex() or not (found.is_floating_point() or found.is_complex() or coded):
        raise RuntimeError(f"parameter {name} is {p.dtype} and its {what} {found.dtype}, which do not go together")


def check_parameter(name: str, spec: GroupSpec, p: Tensor, of_p: Mapping[str, Any]) -> list[Tensor]:
    """The parameter, its gradient and its states, as far as they exist, after checking that they fit each other.

    Raises:
        RuntimeError: where they do not.
    """
    if overlaps(p):
        raise RuntimeError(
            f"parameter {name} has elements that share memory (strides {p.stride()}), which cannot be written one by "
            f"one; clone() it before making it a parameter"
        )
    if spec.differentiable and p.grad is not None and p.is_leaf and p.requires_grad:
        raise RuntimeError(
            f"parameter {name} is a leaf that requires grad, and differentiable=True writes it where autograd follows, which "
            f"PyTorch does not allow; make the optimizer of what is computed from it, for instance p.clone()"
        )
    for slot in spec.rule.scalars:
        scalar = of_p.get(slot)
        if scalar is not None and not (
            isinstance(scalar, Tensor)
            and scalar.numel() == 1
            and scalar.dtype in (torch.float32, torch.float64)
            and scalar.device in (torch.device("cpu"), p.device)
        ):
            raise RuntimeError(
                f"parameter {name} has {scalar!r} as its state {slot!r}; it must be a float32 or float64 tensor of one "
                f"element on the CPU or on {p.device}"
            )
    tensors = [p]
    if p.grad is not None:
        if p.grad.is_sparse and spec.rule.refuses_sparse:
            raise RuntimeError(spec.rule.refuses_sparse)
        check_tensor(name, "gradient", p.grad, p)
        tensors.append(p.grad)
    for slot in spec.slots:
        if of_p.get(slot) is not None:
            check_tensor(name, f"state {slot!r}", of_p[slot], p)
            if overlaps(of_p[slot]) or of_p[slot]._is_zerotensor():
                raise RuntimeError(
                    f"parameter {name} has a state {slot!r} whose elements share memory or have none, which cannot be "
                    f"written one by one; clone() it"
                )
            tensors.append(of_p[slot])
    if spec.exact and (kept := slot_of(p)) and of_p.get(kept) is not None:
        _check_kept(name, kept, of_p[kept], p)
    return tensors


def _check_kept(name: str, slot: str, found: Tensor, p: Tensor) -> None:
    """Raise where what makes a parameter's weights exact does not fit it."""
    dtype = KEPT[p.dtype][1]
    if isinstance(found, Tensor):
        check_alike(name, p, f"state {slot!r}", found)
    if not isinstance(found, Tensor) or (found.dtype, found.shape, found.device) != (dtype, p.shape, p.device):
        what = (
            f"{found.dtype}, {tuple(found.shape)}, {found.device}"
            if isinstance(found, Tensor)
            else type(found).__name__
        )
        raise RuntimeError(
            f"parameter {name} has a state {slot!r} that is {what}; it must be {dtype}, {tuple(p.shape)}, {p.device}. "
            f"Without it the weights are what the parameter holds"
        )


def exact_of(p: Tensor, of_p: Mapping[str, Any], asked: bool = True) -> Tensor:
    """A parameter's float32 weights, where it has such behind it and they were asked for; otherwise itself."""
    slot = slot_of(p) if asked else None
    return p if slot is None or of_p.get(slot) is None else exact_weights(p, of_p[slot])


class NewStates:
    """What was added to ``optimizer.state`` for a step that may not be made.

    Args:
        state: the optimizer's.
        dtype: of new states.
    """

    def __init__(self, state: dict[Tensor, Any], dtype: StateDtype) -> None:
        self._state = state
        self._dtype = dtype
        self.before: dict[Tensor, dict[str, Any] | None] = {}  # the entries to which something was added

    def __bool__(self) -> bool:
        return bool(self.before)

    def keep(self) -> None:
        """They stay."""
        self.before.clear()

    def take_back(self) -> None:
        """Delete them."""
        for p, before in self.before.items():
            if before is None:
                self._state.pop(p, None)
            else:
                self._state[p].clear()
                self._state[p].update(before)
        self.before.clear()

    def _make(self, p: Tensor, slot: str, value: Tensor) -> None:
        if p not in self.before:
            self.before[p] = dict(self._state[p]) if p in self._state else None
        self._state[p][slot] = value

    def add(self, p: Tensor, rule: Rule, group: Mapping[str, Any]) -> None:
        """Make the states that a parameter lacks."""
        of_p, begin = self._state.get(p, {}), rule.initial(group)
        if rule.counts_steps and of_p.get("step") is None:
            dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
            self._make(p, "step", torch.zeros((), dtype=dtype, device="cpu"))
        if rule.scalar and of_p.get(rule.scalar) is None:
            self._make(p, rule.scalar, torch.ones((), dtype=torch.float32, device="cpu"))
        for slot in rule.states:
            if of_p.get(slot) is not None:
                continue
            kept = None if p.is_complex() else dtype_for(self._dtype, rule, slot, p)
            value = torch.full_like(
                p,
                complex(begin, begin) if p.is_complex() else begin,
                memory_format=torch.preserve_format,
                dtype=kept,
                requires_grad=False,
            )
            self._make(p, slot, value)
            if kept in CODES:  # whose code of 0 is 0; what is not 0 at first is kept in full
                self._make(p, scale_of(slot), torch.zeros(blocks_of(p.numel()), dtype=torch.float32, device=p.device))

    def _lay_out_kept(self, p: Tensor, slot: str) -> None:
        """Make what makes a parameter's weights exact, or move it to where it lies as the parameter does."""
        kept = self._state.get(p, {}).get(slot)
        if kept is None:
            self._make(p, slot, kept_for(p))
        elif local(kept).stride() != local(p).stride() or overlaps(local(kept)) or local(kept).is_inference():
            self._make(p, slot, torch.empty_like(kept_for(p)).copy_(kept))

    def fill(self, entry: ParamEntry, spec: GroupSpec, group: Mapping[str, Any], count_on_device: bool) -> None:
        """Point an entry at its parameter's states; one that has a gradient gets those it lacks."""
        p, rule = entry.parameter, spec.rule
        hold = local if entry.shard is None else entry.shard.hold
        of_p = self._state.get(p, {})
        if p.grad is not None:
            self.add(p, rule, group)
            if p in self.before:
                before = self.before[p] or {}
                entry.states_are_new = any(before.get(slot) is None for slot in rule.states)
            if spec.exact and slot_of(p):
                self._lay_out_kept(p, str(slot_of(p)))
            if spec.averaged and of_p.get(AVERAGE) is None:
                self._make(p, AVERAGE, initial(group, exact_of(p, self._state.get(p, {}), spec.exact)))
            of_p = self._state.get(p, {})
        for slot in spec.slots:
            state = of_p.get(slot)
            if state is not None and state.layout != torch.strided:  # as torch.optim.SGD's after sparse gradients
                of_p[slot] = state.to_dense()
            elif state is not None and state.is_inference():  # which may not be written outside of that mode
                of_p[slot] = state.clone()
        if count_on_device and of_p.get("step") is not None:
            of_p["step"] = of_p["step"].to(device=p.device, dtype=torch.float32)
        if rule.scalar and of_p.get(rule.scalar) is not None:
            device = p.device if count_on_device else "cpu"
            of_p[rule.scalar] = of_p[rule.scalar].to(device=device, dtype=torch.float32)
        if all(of_p.get(slot) is not None for slot in (*spec.slots, *rule.scalars)):
            entry.states = [hold(of_p[slot]) for slot in rule.states]
            entry.scales = [of_p[scale_of(s)] if of_p[s].dtype in CODES else None for s in rule.states]
            entry.step = of_p["step"] if rule.counts_steps else None
            entry.scalar = of_p[rule.scalar] if rule.scalar else None
            entry.average = hold(of_p[AVERAGE]) if spec.averaged else None
            kept = slot_of(p) if spec.exact else None
            entry.exact = None if kept is None or of_p.get(kept) is None else hold(of_p[kept])
