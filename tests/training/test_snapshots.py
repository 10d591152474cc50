import pytest
import torch
from torch import nn

from fused_opt.batch_size import CyclicalBatchSize
from fused_opt.snapshots import Snapshots, average_predictions


class Constant(nn.Module):
    """Predicts its one weight, tied to a second name."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value]))
        self.tied = self.value

    def forward(self, x):
        return x * self.value


def test_hook_saves_at_the_end_of_each_largest_batch(tmp_path):
    model = Constant(0.0)
    snapshots = Snapshots(model, CyclicalBatchSize(4, levels=2, width=0.5), tmp_path / "run")
    written = []
    for update in range(1, 11):  # four updates to an epoch, a cycle to each epoch
        with torch.no_grad():
            model.value.fill_(update)
        written.append(snapshots(update / 4))
    names = [path and path.name for path in written]
    assert names == [None] * 3 + ["snapshot-1.pt"] + [None] * 3 + ["snapshot-2.pt"] + [None] * 2
    assert [torch.load(path)["value"].item() for path in snapshots.paths] == [4, 8]


def test_resumed_run_keeps_its_snapshots_and_takes_none_late(tmp_path):
    schedule = CyclicalBatchSize(4, levels=2, width=1)
    model = Constant(1.0)
    earlier = Snapshots(model, schedule, tmp_path)
    for epoch in (1, 2, 3, 4):
        earlier(epoch)
    resumed = Snapshots(model, schedule, tmp_path, epoch=3)  # snapshot 2 is of the interrupted run's future
    assert [path.name for path in resumed.paths] == ["snapshot-1.pt"]
    with torch.no_grad():
        model.value.fill_(7.0)
    assert resumed(3.5) is None
    assert torch.load(resumed(4))["value"].item() == 7
    assert [path.name for path in resumed.paths] == ["snapshot-1.pt", "snapshot-2.pt"]


def test_predictions_are_averaged_after_the_transform(tmp_path):
    model = Constant(5.0)
    torch.save(Constant(1.0).state_dict(), tmp_path / "one.pt")
    snapshots = [tmp_path / "one.pt", Constant(3.0).state_dict()]
    x = torch.tensor([[1.0, -2.0]])
    mean = average_predictions(model, snapshots, x)
    torch.testing.assert_close(mean, (x.softmax(-1) + (3 * x).softmax(-1)) / 2)
    torch.testing.assert_close(average_predictions(model, snapshots, x, transform=lambda y: y), 2 * x)
    assert model.value.item() == 5
    assert not mean.requires_grad
    with pytest.raises(ValueError, match="no snapshots to average"):
        average_predictions(model, [], x)


def test_averaging_evaluates_and_leaves_the_model_in_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.9), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].running_mean.fill_(3.0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(4, 2)
    found = average_predictions(model, [before, before], x, transform=lambda y: y)
    torch.testing.assert_close(found, model[2]((x - 3) / (1 + 1e-5) ** 0.5))
    assert model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
