"""Spectra and exponents: against numpy's singular values and explicit loops."""

import math
import threading

import numpy as np
import pytest
import torch
from support.threads import threads as threads_set_to

from fused_opt.balance import assign, layer_alphas
from fused_opt.balance.hill import hill, median_start
from fused_opt.balance.spectrum import _batched, _eigenvalues, eigenvalues, matrices, spectrum, workers


def random(*shape, seed=0, decay=0.0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator)
    return weight * torch.linspace(1, 10, shape[1]).pow(-decay).reshape(-1, *[1] * (len(shape) - 2))


def by_svd(weight):
    """The published spectrum, matrix by matrix."""
    weight = weight.double().numpy()
    slices = [weight] if weight.ndim == 2 else list(weight.reshape(*weight.shape[:2], -1).transpose(2, 0, 1))
    scale = 1.0 if weight.ndim == 2 else 0.5
    return np.sort(np.concatenate([scale * np.linalg.svd(s, compute_uv=False) ** 2 for s in slices]))


def by_loops(lam, fit="median", tail="code"):
    """The exponent, threshold by threshold."""
    count = len(lam)

    def alpha_at(i):
        return 1 + (count - i) / sum(math.log(lam[j] / lam[i]) for j in range(i, count))

    if fit == "median" and tail == "code":
        return alpha_at(int(count / 2))
    if fit == "median":
        k = count // 2
        return 1 + k / sum(math.log(lam[count - i] / lam[count - k - 1]) for i in range(1, k + 1))
    thresholds = range(count - 1)
    if fit == "peak":
        heights, edges = np.histogram(np.log10(lam), bins=100)
        peak = 10 ** edges[np.argmax(heights)]
        thresholds = [i for i in thresholds if 0.95 * peak <= lam[i] <= 1.5 * peak]
    best = (math.inf, math.nan)
    for i in thresholds:
        alpha, n = alpha_at(i), count - i
        if alpha > 1:
            best = min(best, (max(abs(1 - (lam[i + j] / lam[i]) ** (1 - alpha) - j / n) for j in range(n)), alpha))
    return best[1]


@pytest.mark.parametrize(
    ("count", "tail", "alpha"),
    [(8, "code", 5.045318), (8, "paper", 3.126108), (7, "code", 4.366367), (7, "paper", 3.524776)],
)
def test_published_exponents(count, tail, alpha):
    assert hill(torch.arange(1.0, count + 1), tail=tail).alpha.item() == pytest.approx(alpha, abs=5e-7)


@pytest.mark.parametrize("fit", ["median", "ks", "peak"])
@pytest.mark.parametrize("shape", [(30, 50), (48, 20), (12, 10, 3, 3), (20, 20, 5), (6, 8, 3, 3, 2)])
def test_exponents_are_those_of_explicit_loops(shape, fit):
    weight = random(*shape, seed=1, decay=0.7)
    assert layer_alphas([weight], fit=fit)[0] == pytest.approx(by_loops(by_svd(weight), fit), rel=2e-5)


def test_paper_tail_of_a_weight():
    weight = random(31, 40)
    assert layer_alphas([weight], tail="paper")[0] == pytest.approx(by_loops(by_svd(weight), tail="paper"), rel=1e-5)


def test_hill_returns_the_threshold_of_the_tail():
    lam = torch.arange(1.0, 9.0)
    assert hill(lam).start.item() == median_start(8, "code") == 4
    assert hill(lam, tail="paper").start.item() == median_start(8, "paper") == 3
    fitted = hill(torch.cat([torch.full((20,), 1.0), 2.0 ** torch.linspace(1, 6, 40)]), "ks")
    assert fitted.start.item() == 20, "the tail begins where the plateau ends"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (7, 9, 3, 3)])
def test_spectrum_is_that_of_svd(shape, dtype):
    weight = random(*shape).to(dtype)
    torch.testing.assert_close(spectrum(weight)[0], torch.from_numpy(by_svd(weight)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_alphas_do_not_depend_on_the_batch_or_on_threads(threads):
    weights = [random(64, 64, seed=s) for s in range(4)] + [
        random(16, 24, 3, 3),
        random(300, 130),
        random(64, 64, 1, 1),
        random(400, 350),
    ]
    alone = [layer_alphas([weight])[0] for weight in weights]
    with threads_set_to(threads):
        assert layer_alphas(weights) == alone
        assert layer_alphas(weights[::-1]) == alone[::-1]
        assert torch.get_num_threads() == threads, "the caller's threads are left alone"


def test_a_batch_across_layers_gives_what_parcels_give():
    stacks = [random(3, 20, 30, seed=s) for s in range(3)] + [random(2, 30, 20)]
    for batched, parcels in zip(_batched(stacks, True), eigenvalues(stacks, double=True), strict=True):
        torch.testing.assert_close(batched, parcels, rtol=1e-12, atol=1e-12)


def test_worker_threads_use_one_thread_each_and_no_others_do():
    found = []
    with threads_set_to(3):
        workers.cache_clear()
        assert set(workers(2).map(lambda _: torch.get_num_threads(), range(8))) == {1}
        later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert [torch.get_num_threads(), *found] == [3, 3]


def test_ks_and_peak_pass_over_thresholds_without_a_tail():
    for fit, top in (("ks", 5), ("peak", 0)):
        positive = torch.cat([2.0 ** torch.linspace(0, 5, 40), torch.full((top,), 32.0)])
        found = hill(torch.cat([torch.zeros(30), positive]), fit)
        assert found.alpha.item() == pytest.approx(hill(positive, fit).alpha.item())
        assert 30 <= found.start.item() < 70
    assert math.isnan(hill(torch.ones(9), "ks").alpha.item())
    assert math.isnan(hill(torch.zeros(9), "peak").alpha.item())


def test_nearly_low_rank_layers_are_redone_in_float64():
    weight = random(80, 6) @ random(6, 80, seed=1) + 1e-4 * random(80, 80, seed=2)
    exact = by_loops(by_svd(weight))
    assert layer_alphas([weight])[0] == pytest.approx(exact, rel=1e-6)
    lam = eigenvalues([weight[None]], double=False)[0][0]
    assert abs(hill(lam).alpha.item() / exact - 1) > 1e-3, "float32 alone would have been wrong"


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e18, 1e30])
def test_tiny_and_huge_layers_have_the_exponent_of_their_shape(scale):
    weight = random(60, 70)
    assert layer_alphas([weight * scale])[0] == pytest.approx(by_loops(by_svd(weight)), rel=1e-5)


@pytest.mark.parametrize("spoil", [0.0, math.nan, math.inf])
def test_a_layer_without_a_tail_does_not_spoil_the_others(spoil):
    good, bad = random(60, 60), torch.full((60, 60), spoil)
    alphas = layer_alphas([good, bad, torch.zeros(0, 5), good])
    assert alphas[0] == alphas[3] == layer_alphas([good])[0]
    assert math.isnan(alphas[1])
    assert math.isnan(alphas[2])


def test_rank_deficient_layers_have_no_exponent():
    assert not math.isfinite(layer_alphas([random(60, 20) @ random(20, 60, seed=1)])[0])


def test_reduced_precision_products_are_not_used():
    weight, before = random(64, 200), torch.backends.mkldnn.matmul.fp32_precision
    exact = layer_alphas([weight])[0]
    try:
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        assert layer_alphas([weight])[0] == pytest.approx(exact, rel=2e-6)
        wide = weight.double()
        assert torch.equal(_eigenvalues(weight[None], False)[0], torch.linalg.eigvalsh((wide @ wide.T).float()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer_alphas([weight])[0] == pytest.approx(exact, rel=2e-6)
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer_alphas([weight])[0] == exact


def test_windows_are_evenly_spread_and_pooled():
    weight = random(30, 22)
    pooled = []
    for row in (0, 9, 18):  # step (30 - 12) // 2
        for column in (0, 7, 14):  # step (22 - 8) // 2
            pooled.extend(np.linalg.svd(weight[row : row + 12, column : column + 8].double(), compute_uv=False) ** 2)
    assert layer_alphas([weight], windows=(12, 8, 3))[0] == pytest.approx(by_loops(sorted(pooled)), rel=1e-5)


def test_small_weights_get_a_smaller_window_of_the_same_aspect():
    assert matrices(torch.zeros(64, 300), (100, 100, 9)).shape == (1, 9, 64, 64)
    assert matrices(torch.zeros(300, 40), (100, 50, 9)).shape == (1, 9, 80, 40)


def test_convolutions_in_square_blocks_take_the_mean():
    weight = random(26, 12, 3, 3)  # two blocks of 12 x 12, the last two rows left out
    blocks = [weight[:12], weight[12:24]]
    mean = sum(by_loops(by_svd(block)) for block in blocks) / 2
    assert layer_alphas([weight], windows=(100, 100, 9))[0] == pytest.approx(mean, rel=1e-5)
    assert layer_alphas([weight.transpose(0, 1)], windows=(100, 100, 9))[0] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize(
    ("assignment", "expected"),
    [
        ("linear", (0.05, 0.083333, 0.15)),
        ("sqrt", (0.078825, 0.096541, 0.124634)),
        ("log2", (0.061139, 0.096902, 0.141959)),
        ("step", (0.05, 0.083333, 0.116667)),
    ],
)
def test_published_assignments(assignment, expected):
    rates = [0.1 * multiplier for multiplier in assign([2.0, 3.0, 5.0], assignment)]
    assert rates == pytest.approx(expected, abs=5e-7)


def test_linear_assignment_ends_at_its_limits():
    for alphas in np.random.default_rng(0).uniform(1, 8, (100, 5)).tolist():
        multipliers = assign(alphas, "linear", (0.5, 3.0))
        assert (min(multipliers), max(multipliers)) == (0.5, 3.0)


def test_sigmoid_assignment():
    assert assign([2.0, 3.0, 4.0], "sigmoid") == pytest.approx((0.316261, 1, 3.161947), abs=5e-7)
    assert assign([2.0, 9999.0], "sigmoid", strength=2.0) == pytest.approx([0.1, 10.0]), "no overflow"


def test_assignment_keeps_the_order_of_the_layers():
    assert assign([5.0, 2.0, 3.0], "step") == pytest.approx([0.5 + 2 / 3, 0.5, 0.5 + 1 / 3])
    assert assign([5.0, 2.0, 3.0], limits=(1.0, 4.0)) == pytest.approx([4.0, 1.0, 2.0])


@pytest.mark.parametrize("assignment", ["linear", "sqrt", "log2", "step", "sigmoid"])
def test_equal_alphas_give_one(assignment):
    assert assign([3.0, 3.0, 3.0], assignment) == [1.0, 1.0, 1.0]
    assert assign([], assignment) == []


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda: hill(torch.ones(4), "mean"), "fit='mean' is not known; choose from median, ks, peak"),
        (lambda: hill(torch.ones(4), tail="all"), "tail='all' is not known"),
        (lambda: layer_alphas([], fit="ks", tail="paper"), "tail='paper' is defined for fit='median'"),
        (lambda: assign([2.0], "cubic"), "assignment='cubic' is not known"),
        (lambda: assign([2.0], limits=(1.5, 0.5)), r"limits=\(1.5, 0.5\) must be"),
        (lambda: assign([2.0], strength=-1), "strength=-1 must be"),
        (lambda: spectrum(torch.ones(4)), r"two or more dimensions, found shape \(4,\)"),
    ],
)
def test_bad_input_says_what_would_work(call, found):
    with pytest.raises(ValueError, match=found):
        call()
