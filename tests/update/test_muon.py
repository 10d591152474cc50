"""Muon: against torch.optim.Muon and the written-out iteration; what of the optimizer's contract its matrices could break."""

import copy
import io
import math
import weakref

import pytest
import torch
from support.compare import unchanged
from support.parameters import clones

import fused_opt

OPTIONS = [
    {"lr": 0.02},
    {"lr": 0.02, "momentum": 0.9, "nesterov": False, "weight_decay": 0.0},
    {"lr": 0.02, "weight_decay": 0.3, "adjust_lr_fn": "match_rms_adamw"},
    {"lr": torch.tensor(0.02), "ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-3},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=str)
SHAPES = [(8, 8)] * 4 + [(7, 13), (13, 7), (64, 32), (1, 5), (5, 1), (1, 1)]


def matrices(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(3)
    found = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return list(map(torch.nn.Parameter, [*found, torch.randn(6, 9, generator=generator).to(dtype).t()]))


def give_gradients(*several, seed):
    """The same to the parameters of every list."""
    generator = torch.Generator().manual_seed(seed)
    for same in zip(*several):
        gradient = torch.randn(same[0].shape, generator=generator, dtype=torch.float64)
        for p in same:
            p.grad = torch.empty_like(p).copy_(gradient)


@every_option
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_as_torch(options, dtype, every_kernel):
    """Where an iteration in bfloat16 rounds otherwise, its elements, at most about 1, differ by some of its roundings."""
    if dtype == torch.bfloat16 and options.get("nesterov") is False:
        pytest.skip("torch.optim.Muon divides this momentum by its norm: its iteration begins in the state's memory")
    ours, theirs = matrices(dtype), matrices(dtype)
    optimizer = fused_opt.Muon(ours, **options, backend=every_kernel)
    oracle = torch.optim.Muon(theirs, **options)
    eps, rounding = torch.finfo(dtype).eps, 4 * torch.finfo(torch.bfloat16).eps * float(options["lr"])
    for step in range(3):
        give_gradients(ours, theirs, seed=step)
        if step == 1:
            ours[2].grad = theirs[2].grad = None
        optimizer.step()
        oracle.step()
        for p, q in zip(ours, theirs):
            torch.testing.assert_close(p, q, rtol=0, atol=8 * eps * q.abs().max().item() + rounding)
            m, n = optimizer.state[p]["momentum_buffer"], oracle.state[q]["momentum_buffer"]
            torch.testing.assert_close(m, n, rtol=0, atol=eps * n.abs().max().item())


def test_the_bits_of_torch(every_kernel):
    """Of matrices multiplied together, where those of the momentum are the same: the first step from 0 without Nesterov's."""
    ours, theirs = (matrices()[:-1] for _ in range(2))
    options = {"lr": 1.0, "weight_decay": 0.0, "nesterov": False}
    steps = [fused_opt.Muon(ours, **options, backend=every_kernel).step, torch.optim.Muon(theirs, **options).step]
    give_gradients(ours, theirs, seed=0)
    for p in (*ours, *theirs):
        p.data.zero_()
    for step in steps:
        step()
    for p, q in zip(ours, theirs):
        assert torch.equal(p, q)


def orthogonalized(n, group):
    """The published iteration in float64."""
    a, b, c = group["ns_coefficients"]
    x = n / max(n.norm().item(), group["eps"])
    for _ in range(group["ns_steps"]):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@every_option
def test_no_further_from_the_iteration_than_torch(options):
    """Truth is the iteration in float64: bfloat16 is what both have of it."""
    for p in matrices(shapes=[(64, 32), (24, 96)]):
        q, start = torch.nn.Parameter(p.detach().clone()), p.detach().double()
        optimizer, oracle = fused_opt.Muon([p], **options), torch.optim.Muon([q], **options)
        give_gradients([p], [q], seed=1)
        optimizer.step()
        oracle.step()
        group, n = optimizer.param_groups[0], optimizer.state[p]["momentum_buffer"].double()
        if group["nesterov"]:
            n = (1 - group["momentum"]) * p.grad.double() + group["momentum"] * n
        rows, columns = p.shape
        scale = math.sqrt(max(1, rows / columns))
        if group["adjust_lr_fn"] is not None:
            scale = 0.2 * math.sqrt(max(rows, columns))
        lr = float(group["lr"])
        truth = start - lr * (scale * orthogonalized(n, group) + group["weight_decay"] * start)
        error, of_torch = ((x.detach().double() - truth).norm().item() for x in (p, q))
        assert 0 < error <= 1.1 * of_torch < 0.02 * lr * scale * math.sqrt(min(rows, columns))


def test_a_convolution_is_a_matrix(backend):
    """With a row for each output channel, also where channels are last in memory, or the first dimension is."""
    generator = torch.Generator().manual_seed(0)
    weight, gradient = (torch.randn(6, 3, 2, 2, generator=generator) for _ in range(2))
    layouts = [
        lambda x: x.clone(),
        lambda x: x.to(memory_format=torch.channels_last),
        lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
        lambda x: x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3),
        lambda x: torch.stack([x, x], dim=-1)[..., 0],
    ]
    ours = [torch.nn.Parameter(lay(weight)) for lay in layouts]
    flat = torch.nn.Parameter(weight.flatten(1).clone())
    optimizer, oracle = fused_opt.Muon(ours, lr=0.1, backend=backend), torch.optim.Muon([flat], lr=0.1)
    for p in ours:
        p.grad = torch.empty_like(p).copy_(gradient)
    flat.grad = gradient.flatten(1)
    optimizer.step()
    oracle.step()
    for p in ours:
        torch.testing.assert_close(p.flatten(1), flat, rtol=0, atol=0.1 * 0.02)
        assert (p.flatten(1) - weight.flatten(1)).norm() > 0.1


def test_the_rest_is_stepped_by_adamw(backend):
    """What is no matrix, and what is excluded; every group keeps to its own hyper-parameters."""
    model, other = (torch.nn.Sequential(torch.nn.Embedding(4, 3), torch.nn.Linear(3, 5)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    given = {"lr": 3e-3, "betas": (0.8, 0.9), "weight_decay": 0.1}
    optimizer = fused_opt.Muon(
        model.named_parameters(), lr=0.02, exclude=model[0].parameters(), adamw=given, backend=backend
    )
    oracles = [
        torch.optim.Muon([other[1].weight], lr=0.02),
        torch.optim.AdamW([other[0].weight, other[1].bias], **given),
    ]
    assert [group["param_names"] for group in optimizer.param_groups] == [["1.weight"], ["0.weight", "1.bias"]]
    for step in range(3):
        give_gradients(model.parameters(), other.parameters(), seed=step)
        for each in (optimizer, *oracles):
            each.step()
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    assert optimizer.state[model[1].bias].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_groups_are_divided():
    matrix, vector, output = (torch.nn.Parameter(torch.ones(*shape)) for shape in ((2, 2), (3,), (2, 3)))
    optimizer = fused_opt.Muon([{"params": [vector, matrix], "lr": 0.5}], lr=0.1, adamw={"eps": 1e-3})
    found = [(g["params"], g["use_muon"], g["lr"], g["eps"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [([matrix], True, 0.5, 1e-7, 0.1), ([vector], False, 1e-3, 1e-3, 1e-2)]
    optimizer = copy.deepcopy(optimizer)
    optimizer.add_param_group({"params": output, "use_muon": False, "lr": 0.25})
    last = optimizer.param_groups[-1]
    assert (last["params"][0] is output, last["lr"], last["eps"], last["betas"]) == (True, 0.25, 1e-3, (0.9, 0.999))
    assert len(fused_opt.Muon([matrix]).param_groups) == len(fused_opt.Muon([vector]).param_groups) == 1


def test_what_surrounds_the_products(backend):
    """Clipping, the sign, multipliers, noise and averages, against the steps of torch.optim.Muon that they amount to."""
    ours, theirs = matrices(), matrices()
    noise, average = fused_opt.WeightNoise(std=0.01, seed=4), fused_opt.EMA(0.5)
    optimizer = fused_opt.Muon(
        ours, lr=0.02, maximize=True, max_grad_norm=0.1, noise=noise, averaging=average, backend=backend
    )
    oracle = torch.optim.Muon([{"params": [q], "lr": 0.02 if i else 0.01} for i, q in enumerate(theirs)])
    for group in oracle.param_groups:
        group["weight_decay"] = 0.3 if len(group["params"][0]) == 64 else 0.1
    optimizer.scale_layers(lr={ours[0]: 0.5}, weight_decay={p: 3.0 for p in ours if len(p) == 64})
    averages = [torch.zeros_like(q) for q in theirs]
    for step in range(2):
        give_gradients(ours, theirs, seed=step)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 0.1)
        for q in theirs:
            q.grad.neg_()
        optimizer.step()
        oracle.step()
        assert optimizer.grad_norm == pytest.approx(norm.item(), rel=1e-5)
        for k, q in enumerate(theirs):
            z = fused_opt.extras.noise.normal(4, k, step, q.numel(), torch.device("cpu"))
            q.data += 0.01 * z.reshape(q.shape).to(q.dtype)
            averages[k] = q.detach().clone() if step == 0 else averages[k] + 0.5 * (q.detach() - averages[k])
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)
    with optimizer.averaged_weights():
        for p, expected in zip(ours, averages):
            torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-4)


def test_independent_decay(backend):
    """Of the weights as they were, not times the rate, and once: the momentum has none."""
    ours, theirs = matrices(torch.float64), matrices(torch.float64)
    before = [p.detach().clone() for p in ours]
    decays = fused_opt.Muon(ours, lr=0.1, weight_decay=0.25, decay="independent", backend=backend)
    decays_not = fused_opt.Muon(theirs, lr=0.1, weight_decay=0.0, backend=backend)
    give_gradients(ours, theirs, seed=0)
    decays.step()
    decays_not.step()
    for p, q, start in zip(ours, theirs, before):
        torch.testing.assert_close(p.detach(), q.detach() - 0.25 * start, rtol=0, atol=1e-12)


def test_htmuon(backend):
    """``power``: of the momentum's singular values, arXiv 2603.10067."""
    ours = matrices(torch.float64)
    before = [p.detach().clone() for p in ours]
    optimizer = fused_opt.Muon(ours, lr=0.1, weight_decay=0.0, power=0.25, backend=backend)
    give_gradients(ours, seed=0)
    optimizer.step()
    for p, start in zip(ours, before):
        u, s, v = torch.linalg.svd((0.05 + 0.95 * 0.05) * p.grad, full_matrices=False)
        expected = start - 0.1 * math.sqrt(max(1, p.shape[0] / p.shape[1])) * (u @ torch.diag(s**0.25) @ v)
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-12)


def test_checkpoints_of_torch():
    """Both ways, for models of nothing but matrices; and ours resumes to the last bit."""
    ours, theirs = matrices(), matrices()
    optimizer, oracle = fused_opt.Muon(ours), torch.optim.Muon(theirs, lr=0.02, momentum=0.9)
    give_gradients(ours, theirs, seed=0)
    oracle.step()
    optimizer.load_state_dict(oracle.state_dict())
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.02, 0.9)
    for p, q in zip(ours, theirs):
        p.data.copy_(q.data)
    another = torch.optim.Muon(clones(theirs))
    another.load_state_dict(optimizer.state_dict())
    for p, q in zip(another.param_groups[0]["params"], theirs):
        assert torch.equal(another.state[p]["momentum_buffer"], oracle.state[q]["momentum_buffer"])
    resumed = fused_opt.Muon(clones(ours))
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    for step in range(2):
        give_gradients(ours, theirs, resumed.param_groups[0]["params"], seed=step)
        for each in (optimizer, oracle, resumed):
            each.step()
    for p, q, r in zip(ours, theirs, resumed.param_groups[0]["params"]):
        assert torch.equal(p, r)
        torch.testing.assert_close(p, q, rtol=0, atol=1e-4)


def test_what_moves_between_steps_is_noticed(backend):
    """Weights in other memory, a state replaced, another layout, hyper-parameters changed, a gradient of another dtype."""
    ours, theirs = matrices(), matrices()
    optimizer, oracle = fused_opt.Muon(ours, lr=0.02, backend=backend), torch.optim.Muon(theirs, lr=0.02)

    def replace(step):
        for p, q in ((ours[0], theirs[0]), (ours[1], theirs[1])):
            p.data = p.data.clone()
            for each, key in ((optimizer, p), (oracle, q)):
                each.state[key]["momentum_buffer"] = 2 * each.state[key]["momentum_buffer"]
        ours[5].data = ours[5].data.t().contiguous().t()
        for group in (*optimizer.param_groups, *oracle.param_groups):
            group.update(adjust_lr_fn="match_rms_adamw", nesterov=False, lr=0.01)

    for step in range(4):
        if step == 2:
            replace(step)
        give_gradients(ours, theirs, seed=step)
        optimizer.step()
        oracle.step()
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-4)


@pytest.mark.parametrize(("nonfinite", "last"), [("pass", 1.0), ("skip", math.nan)])
def test_gradients_are_let_go(nonfinite, last, backend):
    p = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = fused_opt.Muon([p], backend=backend, nonfinite=nonfinite)
    for value in (1.0, 1.0, 1.0, last):
        p.grad = torch.full((4, 4), value)
        optimizer.step()
        kept = weakref.ref(p.grad)
        p.grad = None
        assert kept() is None
    assert optimizer.skipped_steps == (nonfinite == "skip")
    assert p.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "Learning rate should be >= 0 but is: -1.0"),
        ({"momentum": -1.0}, "momentum should be >= 0 but is: -1.0"),
        ({"weight_decay": -1.0}, "weight decay should be >= 0 but is: -1.0"),
        ({"adjust_lr_fn": "mine"}, "Adjust learning rate function mine is not supported"),
        ({"ns_steps": 100}, "Number of steps must be less than 100"),
        ({"ns_coefficients": (1.0, 2.0)}, "exactly 3 values"),
        ({"power": 2.0}, "Invalid power: 2.0"),
        ({"differentiable": True}, "differentiable=True: a step of Muon"),
        ({"capturable": True}, "capturable=True: a step of Muon"),
        ({"trust_ratio": fused_opt.TrustRatio("lars")}, "'lars' divides by norms of the gradient"),
        ({"decay": "coupled"}, "decay='coupled' is decay that the rule sees"),
        ({"cautious": fused_opt.Cautious("both")}, "compares every element of the update with the gradient's"),
        ({"adamw": {"beta": 1}}, "'beta', which is no key"),
    ],
    ids=str,
)
def test_refused(options, words):
    p = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises((ValueError, TypeError), match=words):
        fused_opt.Muon([p], **options)
    optimizer = fused_opt.Muon([p])
    p.grad = torch.ones(2, 2)
    if options.keys().isdisjoint({"adamw", "lr"}):  # a rate is read in every step, and not checked again
        optimizer.param_groups[0].update(options)
        with unchanged(optimizer), pytest.raises(ValueError, match=words):
            optimizer.step()


def test_what_is_no_matrix_is_refused_in_words():
    vector, matrix = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2, 2))
    optimizer = fused_opt.Muon([matrix])
    with pytest.raises(ValueError, match="at least two dimensions whereas we found one with size"):
        optimizer.add_param_group({"params": vector, "use_muon": True})
    assert len(optimizer.param_groups) == 1
    matrix.grad = torch.ones(2, 2).to_sparse()
    with unchanged(optimizer), pytest.raises(RuntimeError, match="Muon does not support sparse gradients"):
        optimizer.step()
