"""What GradInit leaves alone, what it accepts, and how it refuses."""

import math

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from fused_opt.gradinit import gradinit

cross_entropy = nn.functional.cross_entropy


class OneWeight(nn.Module):
    """f(x) = weight * x, and the loss 0.5 f^2: every derivative is one line of school mathematics."""

    def __init__(self, name="weight"):
        super().__init__()
        self.register_parameter(name, nn.Parameter(torch.tensor([2.0])))

    def forward(self, x):
        return next(iter(self._parameters.values())) * x


def half_square(output, target):
    return 0.5 * output.square().mean()


def halves(*values):
    return [(torch.full((1,), float(value)), torch.zeros(1)) for value in values]


class Attention(nn.Module):
    """An encoder layer of torch's, whose attention torch computes with a fused kernel by default."""

    def __init__(self, dropout):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout, batch_first=True)
        self.head = nn.Linear(4, 4)

    def forward(self, x):
        return self.head(self.layer(x.flatten(1, 2)).mean(1))


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(16, 1, 4, 4, generator=generator), torch.randint(4, (16,), generator=generator)) for _ in range(5)
    ]


def state_of(model):
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: module.training for name, module in model.named_modules()},
        {
            name: (p.requires_grad, p.grad, None if p.grad is None else p.grad.clone())
            for name, p in model.named_parameters()
        },
    )


def assert_same(before, after, except_values_of=()):
    assert before[0].keys() == after[0].keys()
    for name in before[0].keys() - set(except_values_of):
        assert torch.equal(before[0][name], after[0][name]), name
    assert before[1] == after[1]
    for name, (requires_grad, grad, value) in before[2].items():
        assert after[2][name][0] == requires_grad
        assert after[2][name][1] is grad
        assert grad is None or torch.equal(after[2][name][1], value)


class Normalized(nn.Module):
    """Batch norm, dropout, a weight under two names, a zero bias."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.dropout, self.flat = nn.Dropout(0.5), nn.Flatten()
        self.first, self.again, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.again.weight = self.first.weight
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        x = self.flat(self.dropout(self.norm(self.conv(x)).tanh()))
        return self.head(self.again(self.dropout(self.first(x).tanh())).tanh())


@pytest.fixture
def prepared(images):
    torch.manual_seed(0)
    model = Normalized().train()
    cross_entropy(model(images[0][0]), images[0][1]).backward()
    model.norm.eval()
    model.first.bias.requires_grad_(False)
    return model


def test_all_but_the_scaled_parameters_stay_as_they_were(prepared, images):
    before = state_of(prepared)
    result = gradinit(prepared, cross_entropy, images, lr=0.05, iterations=8, progress=False)
    scaled = {"conv.weight", "norm.weight", "first.weight", "again.bias", "head.weight"}
    assert result.scales.keys() == scaled | {"norm.bias", "head.bias"}
    assert (result.scales["norm.bias"], result.scales["head.bias"]) == (1, 1)
    assert_same(before, state_of(prepared), scaled | {"again.weight"})
    for name in scaled:
        assert abs(result.scales[name] - 1) > 1e-3
        value, start = prepared.get_parameter(name), before[0][name]
        assert torch.equal(value, start * torch.tensor(result.scales[name]))
    assert prepared.again.weight is prepared.first.weight


def test_an_exception_leaves_everything_as_it_was(prepared, images):
    before, calls = state_of(prepared), []

    def failing(output, target):
        calls.append(1)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return cross_entropy(output, target)

    with pytest.raises(KeyboardInterrupt):
        gradinit(prepared, failing, images, iterations=8, progress=False)
    assert_same(before, state_of(prepared))


def test_surrounding_modes_do_not_matter(images):
    torch.manual_seed(0)
    models = [Attention(0.1) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    options = {"iterations": 6, "gamma": 0.23, "progress": False}
    plain = gradinit(models[0], cross_entropy, images, **options)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        inside = gradinit(models[1], cross_entropy, images, **options)
    assert inside == plain


def test_inputs_of_several_tensors():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.left, self.right = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, left, right=None):
            left, right = left.chunk(2, 1) if right is None else (left, right)
            return self.left(left) + self.right(right)

    torch.manual_seed(1)
    tensors = [(torch.randn(5, 6), torch.randint(4, (5,))) for _ in range(3)]
    forms = [
        tensors,
        [[list(x.chunk(2, 1)), t] for x, t in tensors],
        [(dict(zip(("left", "right"), x.chunk(2, 1), strict=True)), t) for x, t in tensors],
    ]
    results = [gradinit(Sum(), cross_entropy, form, iterations=5, progress=False) for form in forms]
    assert results[0] == results[1] == results[2]


class FusedAttention(Attention):
    """Selects a kernel itself."""

    def forward(self, x):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return super().forward(x)


class Once(torch.autograd.Function):
    """Marked as not differentiable twice."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


class Raw(torch.autograd.Function):
    """Computes its gradient where autograd cannot see it, as hand-written kernels do."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return torch.from_numpy(2 * ctx.saved_tensors[0].detach().numpy() * grad.detach().numpy())


class Bag(nn.Module):
    """An operation of torch's without a second derivative."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 4, mode="max")

    def forward(self, x):
        return self.bag((x.flatten(1).abs() * 2).long().clamp(max=8))


def through(function):
    class Through(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 4)

        def forward(self, x):
            return function(self.linear(x.flatten(1)))

    return Through()


OPERATIONS = {
    "attention": (
        lambda: FusedAttention(0.0),
        ["_scaled_dot_product_flash_attention_for_cpu_backward", "sdpa_kernel(SDPBackend.MATH)"],
    ),
    "once_differentiable": (lambda: through(Once.apply), ["OnceBackward", "from differentiable operations"]),
    "raw kernel": (lambda: through(Raw.apply), ["RawBackward", "from differentiable operations"]),
    "torch operation": (Bag, ["_embedding_bag_backward", "from differentiable operations"]),
    "compiled": (
        lambda: torch.compile(through(torch.tanh), backend="aot_eager"),
        ["aot_autograd", "before torch.compile"],
    ),
    "linear loss": (lambda: through(torch.neg), ["linear", "a gamma above"]),
}


@pytest.mark.parametrize("kind", OPERATIONS)
def test_operations_without_a_second_derivative(kind, images):
    torch.manual_seed(0)
    build, words = OPERATIONS[kind]
    model = build()
    before = state_of(model)
    loss_fn = (lambda output, _: output.mean()) if kind == "linear loss" else cross_entropy
    with pytest.raises(RuntimeError) as error:
        gradinit(model, loss_fn, images, gamma=1e-3, iterations=2, progress=False)
    assert all(word in str(error.value) for word in words), error.value
    assert_same(before, state_of(model))
    result = gradinit(model, loss_fn, images, gamma=math.inf, iterations=2, progress=False)
    assert max(abs(scale - 1) for scale in result.scales.values()) > 0.009  # needs no second derivative


def test_custom_functions_with_a_second_derivative(images):
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    class Blocked(Square):
        @staticmethod
        def backward(ctx, grad):
            return torch.zeros(grad.shape)

    results = []
    for function in (
        lambda x: x.square() + x.detach().square(),
        lambda x: Square.apply(x) + Blocked.apply(x),
    ):
        torch.manual_seed(0)
        model = through(function)
        results.append(gradinit(model, cross_entropy, images, gamma=0.1, iterations=8, progress=False))
    assert results[0].scales == pytest.approx(results[1].scales, rel=1e-5)
    assert all(seen.updated_loss is None for seen in results[0].history)


def test_other_errors_of_the_second_derivative_are_not_renamed(images):
    class Full(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return Fails.apply(grad)

    class Fails(Full):
        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("out of everything")

    with pytest.raises(RuntimeError, match=r"^out of everything$"):
        gradinit(through(Full.apply), cross_entropy, images, gamma=1e-3, iterations=1, progress=False)


BAD_ARGUMENTS = [
    ({"algorithm": "rmsprop"}, "Invalid algorithm: rmsprop; gradinit needs 'sgd' or 'adam'"),
    ({"eta": 0.0}, "Invalid eta: 0.0; gradinit needs a number > 0"),
    ({"gamma": math.nan}, "Invalid gamma: nan; gradinit needs a number >= 0"),
    ({"lr": -1.0}, "Invalid lr: -1.0; gradinit needs a number > 0"),
    ({"iterations": -1}, "Invalid iterations: -1; gradinit needs a number >= 0"),
    ({"min_scale": 1.5}, "Invalid min_scale: 1.5; gradinit needs a number from 0 to 1"),
    ({"scale_clip": 0.0}, "Invalid scale_clip: 0.0; gradinit needs a number > 0"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError) as error:
        gradinit(OneWeight(), half_square, halves(1), progress=False, **arguments)
    assert str(error.value).startswith(message)


BAD_INPUT = {
    "no trainable parameter": (nn.Tanh(), half_square, halves(1), ValueError, "the model has none"),
    "half precision": (OneWeight().half(), half_square, halves(1), TypeError, "float16 in 'weight'"),
    "iterator": (OneWeight(), half_square, iter(halves(1, 1, 1)), ValueError, "rather than an iterator"),
    "empty": (OneWeight(), half_square, [], ValueError, "batches are empty"),
    "no pair": (OneWeight(), half_square, [torch.ones(2)], TypeError, "pairs .* found Tensor"),
    "no tensors": (OneWeight(), half_square, [(["a"], torch.ones(1))], TypeError, "tensors: found str"),
    "no number": (OneWeight(), lambda output, _: output, halves(1), ValueError, r"found shape \(2,\)"),
    "detached": (OneWeight(), lambda o, _: o.detach().sum(), halves(1), ValueError, "requires_grad=False"),
    "overflow": (OneWeight(), half_square, halves(1e30), FloatingPointError, "gradient_norm=inf"),
    "norm overflows": (
        nn.Linear(1, 1),
        lambda output, target: 1e24 * half_square(output, target),
        [(torch.ones(1, 1), torch.zeros(1))],
        FloatingPointError,
        "gradient_norm=inf",
    ),
    "nan": (OneWeight(), half_square, halves(math.nan), FloatingPointError, "gradient_norm=nan"),
    "nan later": (
        OneWeight(),
        half_square,
        halves(0.5, 0.5, math.nan),
        FloatingPointError,
        "iteration 0 .*updated_loss=nan",
    ),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input(kind):
    model, loss_fn, batches, expected, message = BAD_INPUT[kind]
    before = state_of(model)
    with pytest.raises(expected, match=message):
        gradinit(model, loss_fn, batches, progress=False)
    assert_same(before, state_of(model))


def test_progress_bar(capsys):
    gradinit(OneWeight(), half_square, halves(1), iterations=2, progress=False)
    assert capsys.readouterr().err == ""
    gradinit(OneWeight(), half_square, halves(1), iterations=2)
    assert "gradinit: 100%" in (shown := capsys.readouterr().err)
    assert "gradient_norm=" in shown
