"""TempBalance: layer-wise learning rates from the spectra of the weights."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from .assignment import Assignment, assign, check_assignment
from .groups import SCALED, layer_table
from .hill import Fit, Tail, check_fit
from .layers import LAYERS, NORMS, Layer, Norms, find_layers, left_out
from .plot import plot
from .presets import takes_preset
from .spectrum import Windows, matrices
from .sweep import Sweep, Task
from .team import is_partial, reshard, team_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FLAT = 1e4  # above it the tail's eigenvalues are equal but for rounding, as in an orthogonal matrix


class TempBalance:
    r"""Layer-wise learning rates from the spectra of the weights (arXiv 2312.00359).

    A layer whose spectrum has a heavy tail (a small Hill exponent) is well trained and gets a smaller
    learning rate, a layer with a light tail a larger one:

    .. math::
        \alpha = 1 + n \Big/ \sum_{j \ge i} \ln(\lambda_j / \lambda_i), \qquad
        \text{multiplier} = s_1 + (s_2 - s_1) \frac{\alpha - \min}{\max - \min}

    Call :meth:`step` where a learning-rate scheduler is called. Multipliers apply on top of whatever the
    scheduler sets; momentum is not touched. Optimizers of fused_opt hold them in their layer table. Any other
    torch optimizer has its groups split for the duration of each step (see
    :class:`~fused_opt.balance.groups.SplitGroups`), so that schedulers and checkpoints never see it. The
    settings that were published are presets: ``TempBalance(model, optimizer, preset="farms")``.

    Balanced are the modules in ``include`` whose weight the optimizer trains, without the first and the last
    in module order and those with few eigenvalues; where fewer than two are left, a warning says why. Layers
    and parameters are looked for again at each recomputation, and where the optimizer trains others than at
    the last call. A layer's bias and the norm behind it share its multiplier; a tied weight is one layer. A
    layer whose exponent is not a number above 1, or comes from a tail that is flat but for rounding (alpha
    above 1e4), keeps multiplier 1, with one warning (our definition): it is zero, of low rank, orthogonal, or
    carries a NaN.

    Args:
        model: the model whose layers are balanced.
        optimizer: what trains it.
        preset: a name in ``PRESETS``, for settings that are not given.
        fit: threshold of the tail: ``"median"``, ``"ks"`` or ``"peak"``; see
            :func:`~fused_opt.balance.hill.hill`.
        tail: ``"code"`` as in the published runs, or ``"paper"``; they differ by one eigenvalue.
        assignment: ``"linear"``, ``"sqrt"``, ``"log2"``, ``"step"`` or ``"sigmoid"``; see
            :func:`~fused_opt.balance.assignment.assign`.
        limits: least and largest multiplier of ``linear`` and ``step``.
        strength: decades between the least and the largest multiplier of ``sigmoid``.
        target: ``"lr"``, or ``"weight_decay"`` (AlphaDecay).
        skip_first: leave the first layer out.
        skip_last: leave the last layer out.
        skipped: the multiplier of a first or last layer that is left out.
        min_eigenvalues: layers with fewer are left out; at least 2.
        norms: ``"batch"``: a BatchNorm follows its convolution (by name, ``bn1`` and ``conv1``, or the one
            before it); ``"all"``: every norm follows the layer before it; ``"none"``.
        include: module types that are layers; each has a ``weight`` (out, in, ...). Add ``nn.Embedding`` for
            embeddings. ``nn.Linear`` stands for transformers' ``Conv1D``, too.
        blocks: a regular expression; layers whose names match it at the start with the same text share their
            mean exponent (Model Balancing). The assignment still counts layers, not blocks (our definition).
        windows: height, width and positions along each dimension of the windows that weights are cut into
            (FARMS).
        every: a recomputation begins at every so-many-th call of :meth:`step`.
        ramp: calls over which new multipliers are reached linearly (LLR).
        active: share of ``total_steps`` after which no recomputation begins (LLR); 1 for all.
        total_steps: number of calls of :meth:`step` in the run; needed where ``active`` is below 1.
        budget: largest share of a recomputation done in one call, in estimated operations; a layer above it
            is done in a call of its own. New multipliers are written when all layers are done. 1 for all at
            once.
        background: compute in a thread (on a GPU in a stream of its own) on copies of the weights, and write
            the multipliers at the first call after they are ready. When that is depends on the machine's
            load, so it is refused where several processes train together.

    Raises:
        ValueError: on a setting outside its range, or a ``target`` that the optimizer's groups lack.
        TypeError: if ``optimizer`` is not one.

    Example:
        >>> torch.manual_seed(0) and None
        >>> model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> balance = TempBalance(model, optimizer)
        >>> balance.step()
        >>> {name: round(alpha, 3) for name, alpha in balance.alphas.items()}
        {'1': 2.181, '2': 2.099, '3': 2.164}
        >>> {name: round(value, 3) for name, value in balance.multipliers.items() if "weight" in name}
        {'0.weight': 1.0, '1.weight': 1.5, '2.weight': 0.5, '3.weight': 1.288, '4.weight': 1.0}
    """

    @takes_preset
    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        preset: str | None = None,
        fit: Fit = "median",
        tail: Tail = "code",
        assignment: Assignment = "linear",
        limits: tuple[float, float] = (0.5, 1.5),
        strength: float = 1.0,
        target: Literal["lr", "weight_decay"] = "lr",
        skip_first: bool = True,
        skip_last: bool = True,
        skipped: float = 1.0,
        min_eigenvalues: int = 50,
        norms: Norms = "batch",
        include: tuple[type[nn.Module], ...] = LAYERS,
        blocks: str | None = None,
        windows: Windows | None = None,
        every: int = 1,
        ramp: int = 0,
        active: float = 1.0,
        total_steps: int | None = None,
        budget: float = 1.0,
        background: bool = False,
    ) -> None:
        check_fit(fit, tail)
        check_assignment(assignment, limits, strength)
        _require(target in SCALED, f"target={target!r} is not known; choose from {', '.join(SCALED)}")
        _require(norms in NORMS, f"norms={norms!r} is not known; choose from {', '.join(NORMS)}")
        _require(
            windows is None or (len(windows) == 3 and min(windows) >= 1),
            f"windows={windows} needs three sizes >= 1",
        )
        _require(0 <= skipped < math.inf, f"skipped={skipped} must be a multiplier, 0 or more")
        _require(min_eigenvalues >= 2, f"min_eigenvalues={min_eigenvalues} must be 2 or more: a tail needs two")
        _require(every >= 1 and ramp >= 0, f"every={every} must be 1 or more, and ramp={ramp} 0 or more")
        _require(0 < budget <= 1, f"budget={budget} must be a share of the work, 0 < budget <= 1")
        _require(0 < active <= 1, f"active={active} must be a share of the run, 0 < active <= 1")
        _require(
            active == 1 or total_steps is not None,
            f"active={active} needs total_steps, the run's calls of step()",
        )
        alone = not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1
        _require(
            alone or not background,
            "background=True would write at different steps in different processes; use budget instead",
        )
        _require(
            not is_partial(optimizer),
            "ZeroRedundancyOptimizer has an optimizer of some of the layers in every process, and multipliers compare all of "
            "them; FSDP2 (fully_shard) divides the states, too",
        )
        lacking = [i for i, group in enumerate(getattr(optimizer, "param_groups", [])) if target not in group]
        _require(not lacking, f"target={target!r}, but the optimizer's groups {lacking} have no such entry")
        self.model, self.optimizer, self.target = model, optimizer, target
        self.estimator: dict[str, Any] = {"fit": fit, "tail": tail, "windows": windows}
        self.assignment: tuple[Assignment, tuple[float, float], float] = (assignment, limits, strength)
        self.blocks = re.compile(blocks) if blocks else None
        self.every, self.ramp = every, ramp
        self._until = math.inf if active == 1 or total_steps is None else active * total_steps

        reshard(model)
        self._choice: tuple[tuple[type[nn.Module], ...], Norms] = (include, norms)
        self._skips, self._skipped, self._least = (skip_first, skip_last), skipped, min_eigenvalues
        tasks = self._find()
        self.alphas: dict[str, float] = {}
        """Module name to exponent, as last computed."""
        self.history: list[tuple[int, dict[str, float]]] = []
        """What ``alphas`` was after each recomputation, with the number of the call."""
        self._sweep = Sweep(tasks, self.estimator, budget, background)
        self._calls = 0
        self._due = False
        self._since = 0
        self._start: dict[str, float] = {}
        self._goal: dict[str, float] = {}
        self._written = WeakTensorKeyDictionary()
        self._warned: set[str] = set()
        self._told = False  # that there is nothing to balance
        self._before: set[int] = set()  # what the optimizer trained at the last call
        self._table = layer_table(optimizer)  # last: it may register hooks, which a failure above must not leave

    @torch.no_grad()
    def step(self, *, force: bool = False) -> None:
        """Recompute the exponents where it is time to, and write the multipliers.

        A layer is not recomputed while its weights are the same: neither replaced nor written since, as far
        as torch counts, and equal in a sample of about a thousand elements, which is for writes through
        ``.data`` or raw pointers. A write that evades both goes unseen.

        Args:
            force: recompute now, and every layer, the same or not.
        """
        if force:
            self._sweep.forget()
        self._due |= force or (self._calls % self.every == 0 and self._calls < self._until)
        trained = self._trained()
        changed, self._before = trained != self._before, trained
        if changed or self._due or self._sweep.busy:
            reshard(self.model)
        if changed or (self._due and not self._sweep.busy):
            self._sweep.tasks = self._find()
        if self._due and not self._sweep.busy:
            self._due = False
            names = [name for name, task in self._sweep.tasks.items() if _is_trained(task.layer, trained)]
            self._sweep.begin(names)
            if len(names) < 2 and not self._told:
                self._told = True
                warnings.warn(self._why(trained), stacklevel=3)
        found = self._sweep.advance()
        if found is not None:
            self._settle(found)
        self._calls += 1
        if changed or self._calls - self._since <= max(1, self.ramp):
            self._write()

    @property
    def multipliers(self) -> dict[str, float]:
        """Parameter name to multiplier, for all parameters of the model."""
        reshard(self.model)
        return {name: self._written.get(p, 1.0) for name, p in self.model.named_parameters()}

    def log(self, writer: Any = None, step: int | None = None) -> dict[str, float]:
        """Exponents and multipliers as a flat dictionary, also written to a TensorBoard-like writer.

        Args:
            writer: what has ``add_scalar(tag, value, step)``; without one only the dictionary is made.
            step: the step to log at; the number of calls of :meth:`step` by default.

        Raises:
            TypeError: if ``writer`` has no ``add_scalar``.
        """
        _require(writer is None or hasattr(writer, "add_scalar"), f"{writer!r} has no add_scalar", TypeError)
        scalars = {f"temp_balance/alpha/{name}": alpha for name, alpha in self.alphas.items()}
        multipliers = self._layer_multipliers()
        scalars |= {f"temp_balance/{self.target}/{name}": value for name, value in multipliers.items()}
        if writer is not None:
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, self._calls if step is None else step)
        return scalars

    def plot(self, layers: Sequence[str] | None = None) -> Figure:
        """Exponents over time and spectra with their tails; see :func:`~fused_opt.balance.plot.plot`."""
        return plot(self.layers, self.history, self.estimator, layers)

    def __repr__(self) -> str:
        def span(values: Collection[float]) -> str:
            return f"{min(values):.3g} .. {max(values):.3g}" if values else "none yet"

        balanced = {name: value for name, value in self._layer_multipliers().items() if name in self.alphas}
        return (
            f"{type(self).__name__}({len(self._sweep.tasks)} of {len(self.layers)} layers, {self._calls} calls, "
            f"{len(self.history)} recomputations{' and one begun' if self._sweep.busy else ''}: "
            f"alpha {span(self.alphas.values())}, {self.target} times {span(balanced.values())})"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs, as plain types; waits for a computation in the background."""
        return {
            "calls": self._calls,
            "due": self._due,
            "sweep": self._sweep.state_dict(),
            "alphas": dict(self.alphas),
            "since": self._since,
            "start": dict(self._start),
            "goal": dict(self._goal),
            "warned": sorted(self._warned),
            "history": [[calls, dict(alphas)] for calls, alphas in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`; the settings stay those of the constructor.

        Raises:
            ValueError: if the state names layers that this model lacks; nothing is changed then.
        """
        named = {name for portion in state["sweep"]["queue"] for name in portion}
        named |= {*state["sweep"]["found"], *state["alphas"], *state["goal"]}
        unknown = sorted(named - self.layers.keys())
        _require(not unknown, f"the state has layers {unknown}, this model only {list(self.layers)}")
        self._sweep.load_state_dict(state["sweep"])
        self._calls, self._due, self._since = state["calls"], state["due"], state["since"]
        self._start, self._goal = dict(state["start"]), dict(state["goal"])
        self.alphas = dict(state["alphas"])
        self._warned = set(state["warned"])
        self.history = [(calls, dict(alphas)) for calls, alphas in state["history"]]
        self._write()

    def _trained(self) -> set[int]:
        return {id(p) for group in self.optimizer.param_groups for p in group["params"] if p.requires_grad}

    def _find(self) -> dict[str, Task]:
        """Look for the layers, and return what is to be computed of them."""
        layers, *ends = find_layers(self.model, *self._choice)
        self.layers = {layer.name: layer for layer in layers}
        skipped = {name for name, skip in zip(ends, self._skips, strict=True) if skip}
        self._fixed = {name: self._skipped for name in self.layers if name in skipped}
        tasks = {}
        for layer in layers:
            shape = matrices(torch.empty(layer.shape(), device="meta"), self.estimator["windows"]).shape
            if layer.name not in skipped and _count(shape) >= self._least:
                tasks[layer.name] = Task(layer, _cost(shape), team_of(layer, self.model))
        return tasks

    def _why(self, trained: set[int]) -> str:
        """Why there are fewer than two layers to balance."""
        reasons = {}
        for name, layer in self.layers.items():
            if name in self._fixed:
                reasons[name] = "the first or the last in module order (skip_first=, skip_last=)"
            elif name not in self._sweep.tasks:
                reasons[name] = f"fewer than {self._least} eigenvalues (min_eigenvalues=)"
            elif not _is_trained(layer, trained):
                reasons[name] = f"not trained by this {type(self.optimizer).__name__}"
            else:
                reasons[name] = "the only one, whose multiplier is 1"
        found = left_out(self.model, self._choice[0], reasons) or "no module has a matrix for a weight"
        return f"TempBalance compares layers and has fewer than two: {found}"

    def _settle(self, alphas: dict[str, float]) -> None:
        """Turn the exponents of a finished recomputation into multipliers to move to."""
        self.alphas = {name: alphas[name] for name in self._sweep.tasks if name in alphas}
        self.history.append((self._calls, dict(self.alphas)))
        sound = {name: alpha for name, alpha in self.alphas.items() if 1 < alpha < FLAT}
        self._warn({name: alpha for name, alpha in self.alphas.items() if name not in sound})
        blocks: dict[str, list[str]] = {}
        for name in sound:
            match = self.blocks and self.blocks.match(name)
            blocks.setdefault(match[0] if match else name, []).append(name)
        means = {name: _mean(sound, block) for block in blocks.values() for name in block}
        multipliers = dict(zip(means, assign(list(means.values()), *self.assignment), strict=True))
        self._start, self._since = self._layer_multipliers(), self._calls
        self._goal = dict.fromkeys(self.layers, 1.0) | self._fixed | multipliers

    def _warn(self, alphas: dict[str, float]) -> None:
        new = {name: alpha for name, alpha in alphas.items() if name not in self._warned}
        if new:
            self._warned.update(new)
            listed = ", ".join(f"{name} (alpha {alpha:g})" for name, alpha in new.items())
            warnings.warn(f"no tail to fit, multiplier 1: {listed}", stacklevel=5)

    def _layer_multipliers(self) -> dict[str, float]:
        share = min(1.0, (self._calls - self._since) / self.ramp) if self.ramp else 1.0
        return {name: (1 - share) * self._start.get(name, 1.0) + share * goal for name, goal in self._goal.items()}

    def _write(self) -> None:
        trained = self._trained()
        wanted: dict[Tensor, float] = {}
        for name, value in self._layer_multipliers().items():
            for p in self.layers[name].parameters if name in self.layers else ():
                wanted.setdefault(p, value)
        wanted = {p: value for p, value in (dict.fromkeys(self._written, 1.0) | wanted).items() if id(p) in trained}
        if wanted != {p: self._written.get(p) for p in wanted}:
            self._table.scale_layers(**{self.target: wanted}, source="temp_balance")
            self._written.update(wanted)


def _is_trained(layer: Layer, trained: set[int]) -> bool:
    return not trained.isdisjoint(map(id, layer.sources()))


def _mean(alphas: dict[str, float], names: list[str]) -> float:
    return math.fsum(alphas[name] for name in names) / len(names)


def _count(shape: Sequence[int]) -> int:
    fits, pooled, rows, columns = shape
    return fits * pooled * min(rows, columns)


def _cost(shape: Sequence[int]) -> float:
    """Operations of the Gram matrix and of its eigenvalues; these run at about a fifth of the rate."""
    small, large = sorted(shape[2:])
    return shape[0] * shape[1] * small**2 * (2.0 * large + 5 * 4 / 3 * small)


def _require(holds: bool, otherwise: str, error: type[Exception] = ValueError) -> None:
    if not holds:
        raise error(otherwise)
