"""Everything that can happen to an optimizer's tensors between two steps."""

import collections
import copy

import torch

from .parameters import set_gradients


class Run:
    """A module, its optimizer, and every tensor that was replaced, which must not change any more."""

    def __init__(self, make, **options):
        generator = torch.Generator().manual_seed(3)
        shapes = [(3, 4), (5,), (2, 3, 2), ()]
        self.module = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes
        )
        self.optimizer = make(list(self.module), **options)
        self.retired = []
        self.rounded = False  # to float32, at some time

    def parameters(self):
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def pick(self, index):
        parameters = self.parameters()
        return parameters[index % len(parameters)]

    def state(self, p):
        return {slot: value for slot, value in self.optimizer.state.get(p, {}).items() if slot != "step"}

    def retire(self, tensor):
        self.retired.append((tensor.detach(), tensor.detach().clone()))

    def gradients(self, seed):
        set_gradients(self.parameters(), seed)

    def step(self):
        before = [(p, p._version, p.grad is not None) for p in self.parameters()]
        self.optimizer.step()
        for tensor, values in self.retired:
            assert torch.equal(tensor, values)
        return [p._version > version for p, version, _ in before], [has for *_, has in before]


def new_values(p, index):
    """Values for a parameter that depend on nothing but its shape and the index."""
    return torch.linspace(-1, 1, p.numel(), dtype=torch.float64).add(index / 7).reshape(p.shape).to(p.dtype)


def replace_data(run, index):
    p = run.pick(index)
    run.retire(p.data)
    p.data = p.data.clone()


def replace_data_by_another_layout(run, index):
    p = run.pick(index)
    run.retire(p.data)
    p.data = torch.stack([p.data, p.data + 1], -1)[..., 0]


def write_in_place(run, index):
    p = run.pick(index)
    with torch.no_grad():
        p.copy_(new_values(p, index))


def resize(run, index):
    p = run.pick(index)
    run.retire(p.data)
    p.grad = None
    run.optimizer.state.pop(p, None)
    p.data = torch.ones([2, 3, index % 4], dtype=p.dtype)
    p.grad = new_values(p, index)


def cast(run, index):
    """What a parameter and its states go through when one of them is cast by hand."""
    p = run.pick(index)
    dtype = torch.float32 if p.dtype == torch.float64 else torch.float64
    run.retire(p.data)
    p.grad = None
    p.data = p.data.to(dtype)
    for slot, value in run.state(p).items():
        run.retire(value)
        run.optimizer.state[p][slot] = value.to(dtype)
    p.grad = new_values(p, index)


def module_to(run, index):
    """``module.to()``: replaces the data of every parameter and gradient."""
    dtype = (torch.float32, torch.float64)[index % 2]
    for p in run.parameters():
        if p.dtype != dtype:
            run.retire(p.data)
    for p in run.parameters():
        if all(p is not q for q in run.module):
            run.module.append(p)
    run.module.to(dtype)
    for p in run.parameters():
        for slot, value in run.state(p).items():
            run.optimizer.state[p][slot] = value.to(dtype)


def replace_state(run, index):
    p = run.pick(index)
    for slot, value in run.state(p).items():
        run.retire(value)
        run.optimizer.state[p][slot] = value * 0.5


def replace_state_by_another_layout(run, index):
    p = run.pick(index)
    for slot, value in run.state(p).items():
        run.retire(value)
        run.optimizer.state[p][slot] = torch.stack([value, value], -1)[..., 0]


def replace_data_of_state(run, index):
    p = run.pick(index)
    for value in run.state(p).values():
        run.retire(value.data)
        value.data = value.data * 0.25


def write_state_in_place(run, index):
    for value in run.state(run.pick(index)).values():
        value.mul_(0.75)


def replace_step(run, index):
    p = run.pick(index)
    if "step" in run.optimizer.state.get(p, {}):
        run.retire(run.optimizer.state[p]["step"])
        run.optimizer.state[p]["step"] = torch.tensor(float(index + 1))


def write_step_in_place(run, index):
    p = run.pick(index)
    if "step" in run.optimizer.state.get(p, {}):
        run.optimizer.state[p]["step"].fill_(float(index + 1))


def replace_data_of_step(run, index):
    p = run.pick(index)
    if "step" in run.optimizer.state.get(p, {}):
        step = run.optimizer.state[p]["step"]
        run.retire(step.data)
        step.data = torch.tensor(float(index + 1))


def delete_state(run, index):
    p = run.pick(index)
    for value in run.state(p).values():
        run.retire(value)
    run.optimizer.state.pop(p, None)


def clear_state(run, index):
    """Empty the entry but keep the dict, as a user who wants the momentum gone does."""
    p = run.pick(index)
    if p in run.optimizer.state:
        run.optimizer.state[p].clear()


def replace_state_entry(run, index):
    p = run.pick(index)
    if p in run.optimizer.state:
        run.optimizer.state[p] = {slot: value.clone() for slot, value in run.optimizer.state[p].items()}


def replace_whole_state(run, index):
    fresh = collections.defaultdict(dict)
    for p, of_p in run.optimizer.state.items():
        fresh[p] = {slot: value.clone() for slot, value in of_p.items()}
    run.optimizer.state = fresh


def load_state_dict(run, index):
    saved = copy.deepcopy(run.optimizer.state_dict())
    for of_p in saved["state"].values():
        for value in of_p.values():
            value.mul_(1.0 if value.ndim == 0 else 0.5)
    saved["param_groups"][0]["lr"] = 0.05 + index / 1000
    for p in run.parameters():
        for value in run.state(p).values():
            run.retire(value)
    run.optimizer.load_state_dict(saved)


def add_param_group(run, index):
    p = torch.nn.Parameter(torch.linspace(0, 1, 3 + index % 3, dtype=torch.float64))
    run.optimizer.add_param_group({"params": [p], "lr": 0.01 * (1 + index % 5)})
    p.grad = new_values(p, index)


def append_parameter(run, index):
    p = torch.nn.Parameter(torch.linspace(0, 1, 3 + index % 3, dtype=torch.float64))
    run.optimizer.param_groups[0]["params"].append(p)
    p.grad = new_values(p, index)


def remove_parameter(run, index):
    parameters = run.optimizer.param_groups[0]["params"]
    if len(parameters) > 2:
        run.retire(parameters.pop(index % len(parameters)))


def exchange_parameter(run, index):
    parameters = run.optimizer.param_groups[0]["params"]
    old = parameters[index % len(parameters)]
    run.retire(old)
    new = torch.nn.Parameter(new_values(old, index))
    new.grad = new_values(new, index + 1)
    parameters[index % len(parameters)] = new


def reorder_parameters(run, index):
    run.optimizer.param_groups[0]["params"].reverse()


def replace_list(run, index):
    group = run.optimizer.param_groups[0]
    group["params"] = list(group["params"])[1:] + list(group["params"])[:1]


def gradient_appears_or_vanishes(run, index):
    p = run.pick(index)
    p.grad = new_values(p, index) if p.grad is None else None


def no_gradient_at_all(run, index):
    for p in run.parameters():
        p.grad = None


def gradient_in_another_layout(run, index):
    p = run.pick(index)
    p.grad = torch.stack([new_values(p, index), torch.full_like(p, 1e6)], -1)[..., 0]


def expanded_gradient(run, index):
    p = run.pick(index)
    p.grad = torch.full((), 0.3, dtype=p.dtype).expand_as(p)


def gradient_in_place(run, index):
    p = run.pick(index)
    if p.grad is not None:
        p.grad = p.grad.clone().zero_().add_(index)


def gradient_of_another_dtype(run, index):
    """Where a parameter is cast with the gradient left as it was; torch then computes in the wider of the two."""
    p = run.pick(index)
    if p.dtype == torch.float32 or p.grad is None or run.optimizer.state.get(p):
        return
    p.data = p.data.float()


def swap_tensors(run, index):
    p = run.pick(index)
    p.grad = None
    other = torch.nn.Parameter(new_values(p, index))
    torch.utils.swap_tensors(p, other)
    run.retire(other)
    p.grad = new_values(p, index + 1)


def freeze(run, index):
    p = run.pick(index)
    p.requires_grad_(not p.requires_grad)


def hyper_parameters(run, index):
    group = run.optimizer.param_groups[0]
    group["lr"] = 0.01 * (1 + index % 7)
    group["weight_decay"] = 0.1 * (index % 2)
    group["maximize"] = index % 3 == 0


EVENTS = [
    replace_data,
    replace_data_by_another_layout,
    write_in_place,
    resize,
    cast,
    module_to,
    replace_state,
    replace_state_by_another_layout,
    replace_data_of_state,
    write_state_in_place,
    replace_step,
    write_step_in_place,
    replace_data_of_step,
    delete_state,
    clear_state,
    replace_state_entry,
    replace_whole_state,
    load_state_dict,
    add_param_group,
    append_parameter,
    remove_parameter,
    exchange_parameter,
    reorder_parameters,
    replace_list,
    gradient_appears_or_vanishes,
    no_gradient_at_all,
    gradient_in_another_layout,
    expanded_gradient,
    gradient_in_place,
    gradient_of_another_dtype,
    swap_tensors,
    freeze,
    hyper_parameters,
]
