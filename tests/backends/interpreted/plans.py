"""Plans that are kept or made anew, what is left to other backends, and the self-check."""

import pytest
import torch
from rules import kernels
from support.interpreted import assert_alike, both, few, launches, train
from support.parameters import set_gradients

import fused_opt
from fused_opt import backends
from fused_opt.backends import self_check
from fused_opt.backends import triton as backend

table = backend.table


def test_gradients_that_come_and_go():
    a, b, ours, theirs = both("AdamW", {"lr": 0.01, "trust_ratio": fused_opt.TrustRatio("lars")}, make=few)
    for step in range(4):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        ours[step].grad = theirs[step].grad = None
        a.step()
        b.step()
    assert_alike(a, b, ours, theirs)
    assert [a.state[p]["step"] for p in ours] == [b.state[p]["step"] for p in theirs]


def test_a_gradient_of_another_layout_is_noticed(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", ("triton", "reference"))
    a, b, ours, theirs = both("AdamW", {"lr": 0.01}, make=lambda dtype: [torch.nn.Parameter(torch.ones(6, 4))])
    a.backend = "auto"
    for step, turned in enumerate([False, False, True, False]):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        if turned:
            ours[0].grad = ours[0].grad.t().contiguous().t()
        a.step()
        b.step()
        assert_alike(a, b, ours, theirs)


def test_a_gradient_that_becomes_sparse_is_noticed(monkeypatch):
    monkeypatch.setattr(backends, "BACKENDS", ("triton", "reference"))
    p = torch.nn.Parameter(torch.ones(4, 3))
    optimizer = fused_opt.SGD([p], lr=0.5)
    for gradient in (torch.ones(4, 3), torch.ones(4, 3).to_sparse()):
        p.grad = gradient
        optimizer.step()
    assert torch.equal(p.data, torch.zeros(4, 3))


def test_what_it_leaves_to_the_reference_and_why():
    p = torch.nn.Parameter(torch.ones(4, 6))
    for tensors, reason in (
        ([p, torch.ones(6, 4).t()], r"strides (1, 4) beside (6, 1)"),
        ([torch.nn.Parameter(torch.ones(8, 6)[::2])], "a tensor with gaps (strides (12, 1))"),
        ([p, torch.ones(()).expand(4, 6)], "strides (0, 0) beside (6, 1)"),
        ([torch.ones(2, dtype=torch.complex64)], "a torch.complex64 tensor"),
        ([torch.ones(2).to_sparse()], "a torch.sparse_coo tensor"),
        ([torch.ones(2, device="meta")], "a tensor on meta; it steps those on cpu and cuda"),
    ):
        assert reason in backend.unsupported(None, tensors)
    turned = torch.nn.Parameter(torch.ones(4, 6).t())
    assert backend.unsupported(None, [turned]) is None
    assert backend.unsupported(None, [torch.ones(5, 1), torch.ones(1, 5).t()]) is None  # alike but for idle strides


def test_a_plan_that_nothing_happened_to_is_kept():
    a, _, ours, _ = both("Adam", {"lr": 0.1}, make=few)
    set_gradients(ours, 0)
    a.step()
    plan = a._plan
    tables = [bucket_table.tensors for bucket in plan.buckets for bucket_table in bucket.tables]
    for step in range(2):
        a.zero_grad()
        set_gradients(ours, step)
        a.param_groups[0]["lr"] = 0.1 * step
        a.step()
        assert a._plan is plan
    assert [bucket_table.tensors for bucket in plan.buckets for bucket_table in bucket.tables] == tables
    ours[1].data = ours[1].detach().clone()
    a.step()
    assert a._plan is not plan


def test_a_count_that_was_moved_is_noticed():
    a, b, ours, theirs = both("AdamW", {"lr": 0.01}, make=few)
    train(a, b, ours, theirs, steps=2)
    for optimizer, p in ((a, ours[1]), (b, theirs[1])):
        optimizer.state[p]["step"].data = torch.tensor(7.0)
    train(a, b, ours, theirs, steps=2, first=2)
    assert_alike(a, b, ours, theirs)
    assert a.state[ours[1]]["step"].item() == 9.0


def self_check_of(rule, extras=frozenset()):
    variant = self_check.Variant(rule, (torch.float32,) * (2 + len(rule.states)), extras)
    return self_check.run(backend, backend.standard(torch.empty(0)), torch.device("cpu"), variant)


@pytest.mark.parametrize("rule", kernels().values(), ids=kernels())
def test_the_self_check_passes_and_runs_what_is_needed_alone(rule, monkeypatch):
    launched = launches(monkeypatch)
    assert self_check_of(rule) is None
    assert {(name, arguments[-4:]) for name, arguments in launched} == {("update", (False, False, False, None))}


def test_the_self_check_of_everything_passes_and_notices_what_is_wrong(monkeypatch):
    rule = kernels()["momentum_sgd"]
    monkeypatch.setattr(self_check, "_LAYOUTS", self_check._LAYOUTS[1:])  # tensors of two pieces are in the tests above
    assert self_check_of(rule, self_check.EXTRAS) is None
    variant = self_check.Variant(None, (torch.float32, torch.float32))
    assert self_check.run(backend, backend.standard(torch.empty(0)), torch.device("cpu"), variant) is None
    pack = table.pack

    def wrong(row):
        return row._replace(args=row.args._replace(coupled_decay=row.args.coupled_decay * 1.01))

    monkeypatch.setattr(table, "pack", lambda row: pack(wrong(row)))
    assert "numbers differ" in self_check_of(rule)
