"""The reference: a rule in plain PyTorch, tensor by tensor. Runs anywhere; what the others are tested against."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..eight_bits import encode
from ..exact import exact_weights, set_exact_weights
from ..extras.noise import normal, normal_at
from ..extras.rounding import bits_of, rounded
from ..rule import UNKNOWN, Rule
from ..tensors import norm2
from .interface import (
    CautiousArgs,
    DeviceScalars,
    Kind,
    Norms,
    ParamEntry,
    PartNorms,
    Standard,
    StepArgs,
    StepKey,
    is_known,
    norms_table,
)

DEVICES = ("cpu", "cuda")  # and every other
REUSABLE = False  # it does not see what was replaced; a plan of nothing but its buckets is made anew for every step


def unavailable() -> str | None:
    """None: plain PyTorch always runs."""
    return None


def unsupported(
    rule: Rule | None, tensors: Sequence[Tensor], noisy: bool = False, sharded: bool = False, coded: bool = False
) -> str | None:
    """Nothing that torch.optim can step is beyond it."""
    return None


def steps_on_device(p: Tensor) -> bool:
    """No: the host reads every number."""
    return False


def standard(p: Tensor) -> Standard | None:
    """None: it is what others are compared with."""
    return None


@torch.no_grad()
def accumulate(total: Tensor | None, part: Tensor) -> tuple[float, float]:
    """``total += part``, and the sums of squares of both."""
    if total is None:
        return norm2(part), norm2(part)
    total.add_(part)
    return norm2(part), norm2(total)


def _kind(grad: Tensor | None) -> tuple[Any, ...] | None:
    """What may be the reason why another backend does not step a gradient."""
    return None if grad is None else (type(grad), grad.layout, grad.is_neg(), grad._is_zerotensor())


def masked(masks: CautiousArgs, update: Tensor, given: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """The update where it goes the way of the gradient that the rule was given, and p where it does not go against that."""
    kept, decaying = update, p
    if masks.update:
        keep = (update.sign() * given.sign() > 0).to(p.dtype)
        if masks.scaled and (n := keep.numel()):
            keep *= n / max(keep.double().sum().item(), n / 1000)
        kept = update * keep
    if masks.decay:
        decaying = torch.where(update.sign() * p.sign() < 0, 0.0, p)
    return kept, decaying


def trust_ratio(member: ParamEntry, args: StepArgs, norms: Norms, sum_of_norms: float, decay: Any) -> float:
    """The ratio of fused_opt.extras.trust_ratio; ``sum_of_norms``: of the gradient's parts, where known."""
    assert args.ratio is not None
    kind, coefficient, cap, eps, _ = args.ratio
    weight, scale = math.sqrt(norms.weight2), abs(args.grad_scale)
    if kind == Kind.LARS:
        grad = scale * math.sqrt(norms.grad2)
        denominator = grad + decay * weight + eps if grad else 0.0
    elif kind == Kind.CLARS:
        total = scale * (sum_of_norms if is_known(sum_of_norms) else math.sqrt(norms.grad2))
        denominator = total + eps if total else 0.0
    else:
        denominator = math.sqrt(norms.direction2) + eps if norms.direction2 else 0.0
    if not (math.isfinite(weight) and math.isfinite(denominator)):
        member.warn_not_finite()
        return min(cap, 1.0)
    return min(cap, coefficient * weight / denominator if weight > 0 and denominator > 0 else 1.0)


def _unknown() -> list[float]:
    return list(Norms())


class Bucket:
    """Parameters that are stepped one by one."""

    device = None

    def __init__(self, rule: Rule, members: Sequence[ParamEntry]) -> None:
        self.rule = rule
        self.members = members
        self.active: list[tuple[ParamEntry, int]] = []
        self._kinds = [_kind(m.tensor.grad) for m in members]
        self._norms: dict[int, list[float]] = defaultdict(_unknown)  # by index: of weights, gradient, direction
        self._parts: dict[int, float] = {}
        self._ratios: dict[int, float] = {}  # by index, of those that the last step has stepped

    def collect_gradients(
        self, param_groups: list[dict[str, Any]], state: Mapping[Tensor, Any]
    ) -> list[StepKey] | None:
        """Find this step's gradients: the keys that ``run`` needs arguments for, or None: plan anew."""
        self.active = []
        self._norms.clear()
        self._parts = {}
        keys: dict[StepKey, int] = {}
        for member, kind in zip(self.members, self._kinds):
            if member.tensor.grad is None:
                continue
            if member.states is None or _kind(member.tensor.grad) != kind:  # another backend may be able to
                return None
            self.active.append((member, keys.setdefault(member.key(), len(keys))))
        return list(keys)

    def set_part_norms(self, norms: Sequence[PartNorms | None]) -> None:
        """For every member the sum of its gradient's parts' norms and the gradient's sum of squares, where known."""
        for member, known in zip(self.members, norms):
            if known is not None:
                self._parts[member.index], self._norms[member.index][1] = known

    @torch.no_grad()
    def norms(
        self, args: Sequence[StepArgs], gradients: bool, directions: bool, scalars: DeviceScalars | None = None
    ) -> Tensor:
        """Squared norms of weights, gradient and direction (where asked for) by member; UNKNOWN without a gradient."""
        for member, row in self.active:
            p, g, direction, *_ = self._direct(member, args[row])
            for which, tensor in enumerate((p, g, direction) if directions else (p, g)):
                self._norm2(member, which, tensor)
        return norms_table([self._norms[member.index] for member in self.members])

    def set_norms(self, norms: Tensor) -> None:
        """Set the norms of the whole tensors, where the members are shards of them."""
        self._norms.update({member.index: row for member, row in zip(self.members, norms.tolist())})

    def _norm2(self, member: ParamEntry, which: int, tensor: Tensor) -> float:
        known = self._norms[member.index]
        if not is_known(known[which]):
            known[which] = norm2(tensor)
        return known[which]

    def grad_norm2(self) -> float:
        """Sum of squares of all gradients, as they lie in memory."""
        return sum(self._norm2(m, 1, m.tensor.grad) for m, _ in self.active if m.tensor.grad is not None)

    def run(self, args: Sequence[StepArgs]) -> None:
        """Step every parameter that has a gradient."""
        self._ratios = {}
        for member, row in self.active:
            with torch.set_grad_enabled(member.differentiable):
                self._step(member, args[row])
                member.advance(args[row])

    def _direct(self, member: ParamEntry, args: StepArgs) -> tuple[Tensor, ...]:
        """Parameter, gradient, direction, what of p decays, new states: real and dense, in the arithmetic's dtype."""
        assert member.tensor.grad is not None
        weights = member.tensor if member.exact is None else exact_weights(member.tensor, member.exact)
        tensors = [weights, member.tensor.grad, *member.values()]
        if member.differentiable:  # autograd keeps what is multiplied, and the step writes these
            tensors = [tensor.clone() for tensor in tensors]
        if member.tensor.is_complex():
            tensors = [torch.view_as_real(tensor.resolve_conj()) for tensor in tensors]
        dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
        if tensors[1]._is_zerotensor():  # one without dimensions times a number would be float64
            tensors[1] = tensors[1].clone()
        p, g, *states = ((tensor.to_dense() if tensor.is_sparse else tensor).to(dtype) for tensor in tensors)
        coupled, decoupled = args.coupled_decay * member.decay_scale, args.decoupled_decay * member.decay_scale
        given = args.grad_scale * g + coupled * p
        update, *new = self.rule.update(given, *states, *args.coefficients)
        decaying = p
        if args.cautious is not None:
            update, decaying = masked(args.cautious, update, given, p)
        return p, g, update + decoupled * decaying, decaying, *new

    @staticmethod
    def _elements(member: ParamEntry, p: Tensor) -> Tensor:
        """The places of a member's numbers in the whole parameter."""
        if member.layout is None:
            return torch.arange(p.numel(), device=p.device)
        elements = member.layout.elements(member.tensor.shape).to(p.device)
        if member.tensor.is_complex():  # each two numbers
            elements = torch.stack([2 * elements, 2 * elements + 1], dim=1).flatten()
        return elements

    def _noise(self, member: ParamEntry, seed: int, step: int, p: Tensor) -> Tensor:
        if member.layout is None:
            return normal(seed, member.index, step, p.numel(), p.device)
        return normal_at(seed, member.index, step, self._elements(member, p))

    def _store(self, member: ParamEntry, args: StepArgs, place: int, tensor: Tensor, value: Tensor) -> None:
        """Put a value where it belongs, rounded; ``place``: among all that the step stores, see extras/rounding.py."""
        if tensor is member.tensor and member.exact is not None:
            set_exact_weights(tensor, member.exact, value)
            return
        scales = member.scales[place] if place < len(member.scales) else None
        if scales is not None:
            encode(value, tensor, scales)
            return
        if args.rounding is not None and tensor.dtype in (torch.bfloat16, torch.float16):
            elements = self._elements(member, value)
            bits = bits_of(args.rounding, member.index, elements, place).reshape(value.shape)
            value = rounded(value, tensor.dtype, bits)
        # Not through the real view: that of a lazy conjugate is a copy.
        tensor.copy_(torch.view_as_complex(value.contiguous()) if tensor.is_complex() else value)

    def _step_rows(self, member: ParamEntry, args: StepArgs) -> bool:
        """Step only the rows that a sparse gradient has, where all else would stay as it is; False: it would not."""
        grad, decay = member.tensor.grad, any(args[2:5])
        if (
            grad is None
            or not grad.is_sparse
            or self.rule.coefficient_count
            or decay
            or any(args[6:])
            or member.exact is not None
        ):
            return False
        member.tensor.add_(grad, alpha=-float(args.lr) * member.lr_scale * args.grad_scale)
        return True

    def _step(self, member: ParamEntry, args: StepArgs) -> None:
        self._ratios[member.index] = 1.0
        if self._step_rows(member, args):
            return
        p, g, direction, decaying, *new = self._direct(member, args)
        ratio = 1.0
        if args.ratio is not None and member.tensor.ndim > args.ratio.exempt:
            norms = Norms(*[self._norm2(member, which, tensor) for which, tensor in enumerate((p, g, direction))])
            decay = (args.coupled_decay + args.decoupled_decay) * member.decay_scale
            ratio = trust_ratio(member, args, norms, self._parts.get(member.index, UNKNOWN), decay)
        self._ratios[member.index] = ratio
        updated = p - args.lr * member.lr_scale * ratio * direction
        if isinstance(args.independent_decay, Tensor) or args.independent_decay:
            updated = updated - args.independent_decay * member.decay_scale * decaying
        if args.noise is not None:
            updated = updated + self._sigma(member, args, p) * self._noise(
                member, args.noise.seed, args.noise.step, p
            ).to(p.dtype).reshape(p.shape)
        for place, (tensor, value) in enumerate(zip([*(member.states or ()), member.tensor], [*new, updated])):
            self._store(member, args, place, tensor, value)
        if args.rounding is not None and member.exact is None and not member.tensor.is_complex():
            updated = member.tensor.to(updated.dtype)
        if args.fold is not None and member.average is not None:
            self._fold(member, args, updated)

    def _sigma(self, member: ParamEntry, args: StepArgs, p: Tensor) -> float:
        """Standard deviation of the noise."""
        assert args.noise is not None
        if not args.noise.relative or not p.numel():
            return args.noise.sigma
        elsewhere = 0 if member.layout is None else member.layout.elsewhere * p.numel() // member.tensor.numel()
        return args.noise.sigma * math.sqrt(self._norm2(member, 0, p) / (p.numel() + elsewhere))

    def _fold(self, member: ParamEntry, args: StepArgs, updated: Tensor) -> None:
        """Take a sample of the weights as they were stored."""
        assert args.fold is not None
        assert member.average is not None
        add, share, restart, write_back, follow = args.fold
        average = torch.view_as_real(member.average) if member.average.is_complex() else member.average
        stored = torch.empty(0, dtype=member.tensor.dtype, device="cpu").real.dtype
        p = updated.to(stored).to(updated.dtype) if member.exact is None else updated
        v = torch.zeros_like(p) if restart else average.to(p.dtype)
        by = add * (p - share * v)
        v = v + by
        average.copy_(v)
        if write_back or (follow and not restart):
            w = v if write_back else p + follow * by
            self._store(member, args, len(self.rule.states) + 1, member.tensor, w)

    def written_states(self) -> list[Tensor]:
        """None: autograd sees what PyTorch writes."""
        return []

    def ratios(self) -> list[float]:
        """The trust ratio of every member in the last step; NaN where it was not stepped."""
        return [self._ratios.get(member.index, math.nan) for member in self.members]


def bucket(
    rule: Rule,
    members: Sequence[ParamEntry],
    param_groups: list[dict[str, Any]],
    state: Mapping[Tensor, Any],
) -> Bucket:
    """The parameters; nothing needs to be prepared."""
    return Bucket(rule, members)
