"""The shapes that the benchmarks step: small, medium and large tensors, and those of two models."""

from collections.abc import Sequence

Shape = tuple[int, ...]


def resnet50() -> list[Shape]:
    """The 161 parameters of ResNet-50 (He et al., arXiv:1512.03385), 25.6 million numbers."""

    def convolution(inputs: int, outputs: int, size: int) -> list[Shape]:
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]  # with its batch norm

    shapes, channels = convolution(3, 64, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += convolution(channels, width, 1) + convolution(width, width, 3) + convolution(width, 4 * width, 1)
            if block == 0:
                shapes += convolution(channels, 4 * width, 1)  # the shortcut
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def gpt2(width: int, layers: int) -> list[Shape]:
    """GPT-2 (Radford et al., 2019); the output layer is tied."""
    norm: list[Shape] = [(width,), (width,)]
    attention: list[Shape] = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    perceptron: list[Shape] = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(50257, width), (1024, width), *(norm + attention + norm + perceptron) * layers, *norm]


def gpt2_small() -> list[Shape]:
    """148 parameters, 124.4 million numbers."""
    return gpt2(768, 12)


def gpt2_medium() -> list[Shape]:
    """292 parameters, 354.8 million numbers."""
    return gpt2(1024, 24)


def llama_1b() -> list[Shape]:
    """The 146 parameters of Llama 3.2 1B (arXiv:2407.21783), 1.236 thousand million numbers; the output layer is tied."""
    width, hidden, keys = 2048, 8192, 512
    attention: list[Shape] = [(width, width), (keys, width), (keys, width), (width, width)]
    perceptron: list[Shape] = [(hidden, width), (hidden, width), (width, hidden)]
    return [(128256, width), *[*attention, *perceptron, (width,), (width,)] * 16, (width,)]


def block(width: int) -> list[Shape]:
    """The matrices of a transformer's block: queries, keys and values; projection; MLP."""
    return [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]


def vit_b() -> list[Shape]:
    """ViT-B/16's weights: the patches, twelve blocks, the head."""
    return [(768, 3, 16, 16), *block(768) * 12, (1000, 768)]


def resnet20() -> list[Shape]:
    """The 19 convolutions of ResNet-20 for CIFAR-10, as matrices: a row for each output channel."""
    return [(16, 27), *[(16, 144)] * 6, (32, 144), *[(32, 288)] * 5, (64, 288), *[(64, 576)] * 5]


def tiny(shapes: Sequence[Shape]) -> list[Shape]:
    """The same with every dimension cut to at most 8, to show that something runs."""
    return [tuple(min(n, 8) for n in shape) for shape in shapes]


SHAPES: dict[str, list[Shape]] = {
    "300 of 8x8": [(8, 8)] * 300,
    "300 of 64x64": [(64, 64)] * 300,
    "30 of 1024x1024": [(1024, 1024)] * 30,
    "ResNet-50": resnet50(),
    "GPT-2 small": gpt2_small(),
}
ON_GPU: dict[str, list[Shape]] = {
    "ResNet-50": resnet50(),
    "Llama-1B": llama_1b(),
    "1 G flat": [(10**9,)],
    "GPT-2 medium": gpt2_medium(),
}
