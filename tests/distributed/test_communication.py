"""What features send, counted in real processes: the promise of docs/distributed.md."""

import sys

from support import ROOT
from support.processes import in_processes

# Numbers of 8 bytes: 24 tensors, of which 6 have a trust ratio, in 6 blocks.
UNDER_DDP = {
    "CLARS, parts": (1, 24),
    "CLARS, parts of 4 micro-batches": (1, 24),
    "CLARS, 4 micro-batches, max_grad_norm": (1, 24),
    "TempBalance.step": (1, 4),
}
UNDER_FSDP = {
    "relative noise": (1, 24),
    "max_grad_norm": (1, 24),
    'nonfinite="skip"': (1, 24),
    "LARS": (1, 12),
    "LAMB": (1, 12),
    "LAMB, max_grad_norm": (2, 24 + 6 + 6),
    "CLARS": (1, 12),
    "CLARS, parts": (1, 24 + 6),
    "CLARS, parts of 4 micro-batches": (1, 4 * 24 + 6),
    "CLARS, 4 micro-batches, max_grad_norm": (1, 5 * 24 + 6),
}


def check_what_features_send(rank, world):
    sys.path.insert(0, str(ROOT))
    from benchmarks.communication import measure

    rows = {(row["model"], row["feature"]): (row["calls"], row["bytes"]) for row in measure()}
    for model, expected in (("DDP", UNDER_DDP), ("FSDP2", UNDER_FSDP)):
        found = {feature: sent for (of, feature), sent in rows.items() if of == model}
        assert found.pop("gradients and weights, torch.optim")[0] >= 1
        if model == "FSDP2":
            gathered = 4 * 64 * 64 * 4 // world  # what of four layers lies here
            assert found.pop("TempBalance.step") == (4 + 1, gathered + 4 * 8)
        assert all(found[feature] == (0, 0) for feature in found if feature not in expected)
        assert {feature: found[feature] for feature in expected} == {
            feature: (calls, 8 * numbers) for feature, (calls, numbers) in expected.items()
        }


test_in_processes = in_processes(globals(), 2)
