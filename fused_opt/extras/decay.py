r"""What weight decay means, and masks of update and decay: what the pass does around a rule's update u.

.. math::
    g &\leftarrow g + \mathrm{coupled} \cdot p \\
    u &= \text{the rule's update for } g \\
    m_i &= \frac{[u_i g_i > 0]}{\max(\frac{1}{n} \sum_j [u_j g_j > 0],\ 10^{-3})}
        \quad\text{cautious update, unscaled } [u_i g_i > 0] \text{, otherwise } 1 \\
    c_i &= [u_i p_i \ge 0] \quad\text{cautious decay, otherwise } 1 \\
    p_i &\leftarrow p_i - \mathrm{lr} \cdot (m_i u_i + \mathrm{decoupled} \cdot c_i p_i) - \mathrm{independent} \cdot c_i p_i

One of coupled, decoupled and independent is the weight decay, the others are 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from ..backends.interface import CautiousArgs
from .extra import Extra, check_setting

COUPLED, DECOUPLED, INDEPENDENT = DECAYS = ("coupled", "decoupled", "independent")
Decay = Literal["coupled", "decoupled", "independent"]
_MASKED = ("update", "decay", "both")


@dataclass(frozen=True)
class Cautious:
    """Leave out, element by element, the update that goes against the gradient, or the decay that goes against the update.

    Cautious updates: Liang et al., "Cautious Optimizers: Improving Training with One Line of Code" (arXiv 2411.16085): an
    update whose sign is not the gradient's is left out, and what is left of a tensor is divided by its share. This is the
    masks' mean, at least 0.001, as the authors' AdamW has it; their paper's text adds 1 to the count, which is another
    number for small tensors. Cautious decay: Chen et al., "Cautious Weight Decay" (arXiv 2510.12402), Algorithm 1: decay only
    where update and weight do not differ in sign; the decay must not be coupled, since a coupled one is in the update. One
    mask leaves what the other is about alone, and both look at the update as the rule gives it. A parameter group without one
    has None; it is one setting and not two switches, so that a checkpoint, a group and an error have one value to show.

    The gradient is that which the rule is given, clipped and with a coupled decay in it: where the update is the gradient, as
    without momentum, no update is left out.

    Args:
        what: ``"update"``, ``"decay"`` or ``"both"``.
        scaled: divide by the share that is left, which needs a second read of gradient and states before the update;
            ``False``, our definition, masks in the one pass. Nothing is scaled where only the decay is masked. A shard of a
            DTensor, which has not all elements to count, takes ``False`` only.

    Raises:
        ValueError: for another ``what``.
        TypeError: for a ``scaled`` that is neither True nor False.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
        >>> optimizer = fused_opt.SGD([weight], lr=0.1, momentum=0.5, cautious=fused_opt.Cautious("update"))
        >>> for gradient in ([1.0, 1.0], [-0.25, 1.0]):  # the momentum of the first element still points the other way
        ...     weight.grad = torch.tensor(gradient)
        ...     optimizer.step()
        >>> weight.data
        tensor([0.9000, 0.6000])
    """

    what: str = "update"
    scaled: bool = True

    def __post_init__(self) -> None:
        if self.what not in _MASKED:
            raise ValueError(f"Invalid what of Cautious: {self.what!r}; there are {', '.join(map(repr, _MASKED))}")
        if not isinstance(self.scaled, bool):
            raise TypeError(f"scaled of Cautious takes True or False, not {self.scaled!r}")

    @cached_property
    def args(self) -> CautiousArgs:
        """The switches that a backend needs."""
        update = self.what != "decay"
        return CautiousArgs(update, self.what != "update", update and self.scaled)


def _check_kind(kind: Any) -> None:
    if kind is not None and kind not in DECAYS:
        raise ValueError(
            f"Invalid decay: {kind!r}; there are {', '.join(map(repr, DECAYS))}, and None for the class's own"
        )


def check_together(options: Mapping[str, Any], kind: str) -> None:
    """Raise where the settings of a group contradict each other; ``kind``: of its decay."""
    cautious = options["cautious"]
    if cautious is not None and cautious.args.decay and kind == COUPLED:
        raise ValueError(
            f"cautious={cautious!r} masks the weight decay where it goes against the update, and decay='coupled' is in the "
            f"update. decay='decoupled' and decay='independent' can be masked, or Cautious('update') masks the update alone"
        )


DECAY = Extra(
    "decay",
    _check_kind,
    """what ``weight_decay`` is times the weights: ``"coupled"``, added to the gradient before the rule (L2
            regularization); ``"decoupled"``, added to the rule's update, and so times the learning rate and the trust ratio
            (arXiv 1711.05101); ``"independent"``, taken from the weights beside the update, not times the learning rate,
            and not in a step in which every learning rate is 0. None: as the class has it.""",
)
CAUTIOUS = Extra(
    "cautious",
    check_setting("cautious", Cautious),
    "a :class:`Cautious`, or None.",
    settings=(Cautious,),
    args=lambda group, lr: group["cautious"].args,
)
