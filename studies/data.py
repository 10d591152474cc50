"""The data sets: where they are looked for, what they must be, and what to do about one that is missing.

Fashion-MNIST (MIT license, Zalando SE): idx files, gzipped or not, as Debian's package or torchvision lay them out.
The King James Bible (public domain; letters patent in the United Kingdom): the module of Debian's ``sword-text-kjv``.
Display typefaces by Brian Kent (free to change and to pass on; see the package's copyright): Debian's ``fonts-aenigma``.
For ``--quick``: scikit-learn's digits (BSD) and the standard library of this Python (PSF license) as text.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import sysconfig
import zlib
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

ENVIRONMENT = "FUSED_OPT_STUDIES_DATA"

IDX = {  # SHA-256 of the files without gzip, whoever packed them
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
FASHION_FOLDERS = ("", "usr/share/datasets/fashion-mnist", "FashionMNIST/raw", "raw")
KJV_FOLDERS = ("", "usr/share/sword/modules/texts/ztext/engKJV2006eb", "engKJV2006eb")
FONT_FOLDERS = ("", "usr/share/fonts/truetype/aenigma", "aenigma")
FONTS = "2571bc7c94e978b4ff1ff79fc5918ce339616b15d823a2e2062b05a8b67207a9"  # SHA-256 of the files in the order of their names
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
KJV = "238aa7564da0ccf3835e9cffeccd56b942c5d7f8b250832825fa193f7cdfccab"  # SHA-256 of the text as kjv() returns it


class Split(NamedTuple):
    """Inputs and targets of as many examples."""

    inputs: Tensor
    targets: Tensor


class Data(NamedTuple):
    """What is trained on, what learning rates are chosen by, and what is reported."""

    train: Split
    validation: Split
    test: Split
    classes: int


class MissingData(Exception):
    """Says where a data set was looked for, and how to get it."""


def _places(given: Path | None, folders: tuple[str, ...], installed: str) -> list[Path]:
    return [*([given / folder for folder in folders] if given else []), Path(installed)]


def _find(what: str, package: str, places: list[Path], names: tuple[str, ...], otherwise: str) -> Path:
    """The first of the files that is there."""
    found = next((path for place in places for name in names if (path := place / name).is_file()), None)
    if found is None:
        raise MissingData(
            f"{what} was not found in {', '.join(map(str, places))}.\n"
            f"Debian has it: apt-get download {package} && dpkg -x {package}_*.deb DIR, and then --data DIR or "
            f"{ENVIRONMENT}=DIR. {otherwise}"
        )
    return found


def _check(content: bytes, expected: str, path: Path) -> bytes:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise MissingData(f"{path} is another file than the studies are about: SHA-256 {found}, expected {expected}")
    return content


def fashion_mnist(given: Path | None, train: int, validation: int) -> Data:
    """Images of 14x14 (means of 2x2 pixels), standardized; the test set is whole, the others are parts of the training set.

    Args:
        given: folder of the option ``--data``.
        train: images to train on.
        validation: images to choose learning rates by; no image is in both.
    """
    places = _places(given, FASHION_FOLDERS, "/" + FASHION_FOLDERS[1])
    found: dict[str, bytes] = {}
    for name, checksum in IDX.items():
        names, otherwise = (f"{name}.gz", name), "torchvision's folder will do, too."
        path = _find(f"Fashion-MNIST ({name})", "dataset-fashion-mnist", places, names, otherwise)
        content = path.read_bytes()
        found[name] = _check(gzip.decompress(content) if path.suffix == ".gz" else content, checksum, path)
    splits = []
    for part in ("train", "t10k"):
        pixels = torch.frombuffer(bytearray(found[f"{part}-images-idx3-ubyte"][16:]), dtype=torch.uint8)
        images = nn.functional.avg_pool2d(pixels.view(-1, 1, 28, 28).float() / 255, 2)
        labels = torch.frombuffer(bytearray(found[f"{part}-labels-idx1-ubyte"][8:]), dtype=torch.uint8).long()
        splits.append(Split(images, labels))
    return _divide(splits[0], splits[1], train, validation, 10)


def glyphs(given: Path | None, train: int, held_out: int) -> Data:
    """62 letters and digits of 16x16 pixels, standardized, from one typeface of each family, which is in one part alone.

    Families are told apart by the first word of their names; typefaces without small letters of their own are left out.

    Args:
        given: folder of the option ``--data``.
        train: families to train on.
        held_out: to choose learning rates by, and as many others to test with.
    """
    from PIL import ImageFont

    places = _places(given, FONT_FOLDERS, "/" + FONT_FOLDERS[1])
    place = _find("The typefaces", "fonts-aenigma", places, ("1015sn.ttf",), "").parent
    files = sorted(place.glob("*.ttf"))
    _check(b"".join(path.read_bytes() for path in files), FONTS, place)
    families: dict[str, Path] = {}
    for path in files:
        families.setdefault(ImageFont.truetype(path, 24).getname()[0].split()[0], path)
    names = sorted(families)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0)).tolist()
    needed = train + 2 * held_out
    drawn = (image for i in order if (image := _draw(families[names[i]])) is not None)
    images = torch.stack(list(islice(drawn, needed)))
    if len(images) < needed:
        raise ValueError(f"there are {len(images)} families of typefaces, and {needed} are asked for")
    parts = [part.flatten(0, 1) for part in images.split([train, held_out, held_out])]
    mean, std = parts[0].mean(), parts[0].std()
    targets = torch.arange(len(CHARACTERS))
    splits = (Split((part - mean) / std, targets.repeat(len(part) // len(targets))) for part in parts)
    return Data(*splits, len(CHARACTERS))


def _draw(path: Path) -> Tensor | None:
    """(characters, 1, 16, 16); None where too many look the same."""
    from PIL import Image, ImageDraw, ImageFont

    font, images = ImageFont.truetype(path, 24, layout_engine=ImageFont.Layout.BASIC), []
    for character in CHARACTERS:
        image = Image.new("L", (32, 32))
        ImageDraw.Draw(image).text((16, 16), character, 255, font, anchor="mm")
        images.append(image.tobytes())
    if len(set(images)) < len(images) - 6:  # o and O, and the like
        return None
    pixels = torch.frombuffer(bytearray(b"".join(images)), dtype=torch.uint8).view(-1, 1, 32, 32)
    return nn.functional.avg_pool2d(pixels.float() / 255, 2)


def digits(train: int = 600, validation: int = 300) -> Data:
    """scikit-learn's 1,797 images of 8x8, for ``--quick``."""
    from sklearn.datasets import load_digits

    found = load_digits()
    everything = Split(torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(found.target))
    test = Split(*(tensor[-300:] for tensor in everything))
    return _divide(Split(*(tensor[:-300] for tensor in everything)), test, train, validation, 10)


def _divide(source: Split, test: Split, train: int, validation: int, classes: int) -> Data:
    order = torch.randperm(len(source.targets), generator=torch.Generator().manual_seed(0))[: train + validation]
    chosen, held_out = order.split([train, validation])
    mean, std = source.inputs[chosen].mean(), source.inputs[chosen].std()
    parts = [Split(source.inputs[rows], source.targets[rows]) for rows in (chosen, held_out)]
    return Data(*(Split((x - mean) / std, y) for x, y in (*parts, test)), classes)


def with_wrong_labels(data: Data, share: float) -> Data:
    """That share of the training examples with one of the other classes, the same ones every time."""
    labels, draw = data.train.targets.clone(), torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(labels), generator=draw)[: round(share * len(labels))]
    labels[chosen] += torch.randint(1, data.classes, (len(chosen),), generator=draw)
    return data._replace(train=Split(data.train.inputs, labels % data.classes))


def kjv(given: Path | None) -> str:
    """The King James Bible without markup, one line a block of the module (a book)."""
    places = _places(given, KJV_FOLDERS, "/" + KJV_FOLDERS[1])
    place = _find("The King James Bible", "sword-text-kjv", places, ("ot.bzs",), "").parent
    books = []
    for testament in ("ot", "nt"):
        index, blocks = (place / f"{testament}.bzs").read_bytes(), (place / f"{testament}.bzz").read_bytes()
        for entry in range(0, len(index), 12):  # offset, size, size when unpacked
            offset, size = (int.from_bytes(index[entry + at : entry + at + 4], "little") for at in (0, 4))
            book = zlib.decompress(blocks[offset : offset + size]).decode("utf-8", "replace")
            book = re.sub(r"(?s)<note.*?</note>|<title.*?</title>", " ", book)
            books.append(" ".join(re.sub(r"<[^>]*>", "", book).replace("\0", " ").split()))
    text = "\n".join(books)
    _check(text.encode(), KJV, place)
    return text


def standard_library() -> str:
    """Some modules of this Python as text, for ``--quick``."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    return "\n".join((folder / name).read_text() for name in ("argparse.py", "ast.py", "calendar.py", "datetime.py"))


def language(symbols: list[str], vocabulary: int, length: int, train: int, held_out: int) -> Data:
    """Sequences of ``length`` symbols and what follows each; all but the most frequent symbols of the training part are one.

    The parts are drawn from the whole text, sequence by sequence, so that they are of one kind.
    """
    count = len(symbols) // (length + 1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    needed = train + 2 * held_out
    if count < needed:
        raise ValueError(f"the text has {count} sequences of {length} symbols, and {needed} are asked for")
    pieces = [symbols[i * (length + 1) : (i + 1) * (length + 1)] for i in order[:needed]]
    frequent = Counter(symbol for piece in pieces[:train] for symbol in piece).most_common(vocabulary - 1)
    number = {symbol: i + 1 for i, (symbol, _) in enumerate(frequent)}
    rows = torch.tensor([[number.get(symbol, 0) for symbol in piece] for piece in pieces])
    parts = rows.split([train, held_out, held_out])
    return Data(*(Split(part[:, :-1], part[:, 1:]) for part in parts), vocabulary)


def words(text: str) -> list[str]:
    """Words in lower case, and punctuation marks."""
    return re.findall(r"[a-z]+|[.,;:?!]", text.lower())
