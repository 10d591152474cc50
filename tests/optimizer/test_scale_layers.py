"""Multipliers of the learning rate and the decay, by layer."""

import gc
import weakref

import torch
from rules import every_rule
from support.compare import assert_close
from support.parameters import pair, parameters_of, train_both

import fused_opt


@every_rule
def test_scale_layers_equals_a_group_per_layer(name, options, backend):
    """The multiplier of the decay is of weight_decay, not of lr * weight_decay."""
    rates, decays = (0.5, 1.0, 3.0), (2.0, 0.0, 1.0)
    options = {"weight_decay": 0.2, **options}

    def arrange(parameters):
        lr, weight_decay = options["lr"], options["weight_decay"]
        return [
            {"params": [p], "lr": lr * rate, "weight_decay": weight_decay * decay}
            for p, rate, decay in zip(parameters, rates, decays)
        ]

    _, oracle = pair(name, options, backend, arrange=arrange)
    optimizer, _ = pair(name, options, backend)
    parameters = parameters_of(optimizer)
    optimizer.scale_layers(lr=dict(zip(parameters, rates)))
    optimizer.scale_layers(weight_decay=dict(zip(parameters, decays)))  # those of lr stay
    train_both(optimizer, oracle)
    assert_close(parameters, parameters_of(oracle))


def test_scale_layers_takes_effect_at_the_next_step_and_stays(backend):
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = fused_opt.SGD([p], lr=1.0, backend=backend)
    for scale, expected in ((None, -1.0), (0.5, -1.5), (None, -2.0), (0.0, -2.0), (1.0, -3.0)):
        if scale is not None:
            optimizer.scale_layers(lr={p: scale})
        p.grad = torch.ones(2)
        optimizer.step()
        assert torch.equal(p, torch.full((2,), expected))
    assert optimizer.param_groups[0]["lr"] == 1.0
    assert set(optimizer.state_dict()) == {"state", "param_groups"}


def test_parameters_that_leave_are_let_go_of(backend):
    p, q = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = fused_opt.SGD([p], lr=1.0, backend=backend)
    optimizer.scale_layers(lr={p: 0.5})
    p.grad, q.grad = torch.ones(2), torch.ones(2)
    optimizer.step()
    gone = weakref.ref(p)
    optimizer.param_groups[0]["params"] = [q]
    del p
    optimizer.step()
    gc.collect()
    assert gone() is None
    assert q.tolist() == [0.0, 0.0]
