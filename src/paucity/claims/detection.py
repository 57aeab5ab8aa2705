"""A small task of finding objects at two scales: Fashion-MNIST on a canvas, a detector, and its precision."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..measure.images import Images, read_images
from ..measure.tokens import evaluating

CANVAS = 40
SIDES, STRIDES = (12, 20), (4, 8)
"""Pixels of the side of small and large objects, and of the cells of the map that finds them."""
NUM_CLASSES = 10
_NOISE = 0.1


@dataclass(frozen=True, eq=False)
class Scenes:
    """Canvases with one small and one large object each.

    Attributes:
        images: pixels ``[N, 1, 40, 40]``; the label of a canvas is its index.
        classes: ``[N, 2]`` int64, of the small and of the large object.
        corners: ``[N, 2, 2]`` int64, row and column of their upper left corner.
    """

    images: Images
    classes: Tensor
    corners: Tensor


def scenes(split: str, count: int, *, seed: int) -> Scenes:
    """``count`` canvases with articles of a split of Fashion-MNIST, each article used once, among weak noise.

    Raises:
        FileNotFoundError: if ``PAUCITY_DATA`` does not hold Fashion-MNIST; the error names its public address.
    """
    source = read_images("fashion_mnist", split, limit=10_000, mean=(0.0,), std=(1.0,)).take(2 * count, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(count, 1, CANVAS, CANVAS, generator=generator) * _NOISE
    articles, classes = source.pixels.view(count, 2, 1, 28, 28), source.labels.view(count, 2)
    sized = [F.interpolate(articles[:, place], size=side, mode="area") for place, side in enumerate(SIDES)]
    corners = torch.zeros(count, 2, 2, dtype=torch.int64)
    for index in range(count):
        large = torch.randint(CANVAS - SIDES[1] + 1, (2,), generator=generator)
        small = torch.randint(CANVAS - SIDES[0] + 1, (2,), generator=generator)
        while bool(((small + SIDES[0] > large) & (small < large + SIDES[1])).all()):  # they would overlap
            large = torch.randint(CANVAS - SIDES[1] + 1, (2,), generator=generator)
            small = torch.randint(CANVAS - SIDES[0] + 1, (2,), generator=generator)
        corners[index, 0], corners[index, 1] = small, large
        for place, side in enumerate(SIDES):
            row, column = corners[index, place].tolist()
            pixels[index, :, row : row + side, column : column + side] += sized[place][index]
    name = f"fashion_mnist {split} on canvases"
    return Scenes(Images(pixels * 2 - 0.5, torch.arange(count), name), classes, corners)


def _layer(channels: int, out_channels: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, out_channels, 3, stride, 1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class _Stage(nn.Module):
    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.down, self.one, self.two = (
            _layer(channels, out_channels, 2),
            _layer(out_channels, out_channels),
            _layer(out_channels, out_channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        out: Tensor = x + self.two(self.one(x))
        return out


class Detector(nn.Module):
    """A backbone, a neck that brings the coarse map to the fine one, and a head for each scale.

    A head gives 13 values a cell: logits of ten classes and of nothing, and where in the cell the centre lies.

    Args:
        width: channels of the first layer.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.backbone = nn.ModuleList(
            [_layer(1, width, 2), _Stage(width, 2 * width), _Stage(2 * width, 4 * width)],
        )
        self.neck = nn.ModuleDict(
            {
                "up": _layer(4 * width, 2 * width),
                "fine": _layer(4 * width, 2 * width),
                "coarse": _layer(4 * width, 4 * width),
            }
        )
        self.heads = nn.ModuleList([nn.Conv2d(size * width, NUM_CLASSES + 3, 1) for size in (2, 4)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, 1, 40, 40] -> [B, 13, 10, 10], [B, 13, 5, 5]``."""
        middle = self.backbone[1](self.backbone[0](x))
        deep = self.backbone[2](middle)
        fine = torch.cat([middle, F.interpolate(self.neck["up"](deep), scale_factor=2.0)], 1)
        return self.heads[0](self.neck["fine"](fine)), self.heads[1](self.neck["coarse"](deep))


class DetectionLoss:
    """Cross-entropy of every cell's class, nothing included, and the distance of the centres of the objects.

    Args:
        known: the canvases that are trained on.
    """

    def __init__(self, known: Scenes) -> None:
        count = len(known.classes)
        self.classes, self.cells, self.centres = [], [], []
        for place, (side, stride) in enumerate(zip(SIDES, STRIDES, strict=True)):
            centre = (known.corners[:, place] + side / 2) / stride
            cell = centre.long()
            grid = CANVAS // stride
            wanted = torch.full((count, grid, grid), NUM_CLASSES)
            wanted[torch.arange(count), cell[:, 0], cell[:, 1]] = known.classes[:, place]
            self.classes.append(wanted)
            self.cells.append(cell)
            self.centres.append(centre - cell)
        self.balance = torch.tensor([1.0] * NUM_CLASSES + [0.1])

    def __call__(self, model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
        """The loss of canvases ``labels``, for ``train(loss=...)``."""
        total = pixels.new_zeros(())
        rows = torch.arange(len(labels))
        for place, out in enumerate(model(pixels)):
            cell = self.cells[place][labels]
            at = out[rows, NUM_CLASSES + 1 :, cell[:, 0], cell[:, 1]].sigmoid()
            total = total + F.cross_entropy(out[:, : NUM_CLASSES + 1], self.classes[place][labels], self.balance)
            total = total + (at - self.centres[place][labels]).abs().mean()
        return total


def mean_average_precision(model: nn.Module, known: Scenes, *, overlap: float = 0.5) -> float:
    """Mean over the classes of the area under precision and recall, each object found once by a box that overlaps.

    Args:
        model: a `Detector`.
        known: canvases with their objects.
        overlap: least intersection over union.
    """
    with evaluating(model):
        outs = [model(batch) for batch in known.images.batches(250)]
    found = [_boxes(torch.cat([out[place] for out in outs]), place) for place in range(len(SIDES))]
    image, score, guess, box = (torch.cat(parts) for parts in zip(*found, strict=True))
    sides = torch.tensor(SIDES).view(1, 2, 1)
    truth = torch.cat([known.corners, known.corners + sides], -1).float()
    precisions = []
    for label in range(NUM_CLASSES):
        num_objects = int((known.classes == label).sum())
        mine = (guess == label).nonzero().squeeze(-1)
        mine = mine[score[mine].argsort(descending=True, stable=True)]
        taken = torch.zeros(known.classes.shape, dtype=torch.bool)
        right = torch.zeros(len(mine))
        shared = _overlap(box[mine].unsqueeze(1), truth[image[mine]])
        shared = shared.masked_fill(known.classes[image[mine]] != label, 0)
        for rank, (row, values) in enumerate(zip(image[mine].tolist(), shared, strict=True)):
            best = int(values.argmax())
            if float(values[best]) >= overlap and not taken[row, best]:
                taken[row, best], right[rank] = True, 1
        precisions.append(_area(right, num_objects))
    return sum(precisions) / NUM_CLASSES


def _boxes(out: Tensor, place: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image, score, class and box ``[4]`` (upper, left, lower, right) of every cell that may hold something."""
    probability = out[:, : NUM_CLASSES + 1].softmax(1)
    score, guess = probability[:, :NUM_CLASSES].max(1)
    image, row, column = (probability[:, NUM_CLASSES] < 0.95).nonzero(as_tuple=True)
    at = out[image, NUM_CLASSES + 1 :, row, column].sigmoid()
    centre = (torch.stack([row, column], 1) + at) * STRIDES[place]
    half = SIDES[place] / 2
    return image, score[image, row, column], guess[image, row, column], torch.cat([centre - half, centre + half], 1)


def _overlap(one: Tensor, other: Tensor) -> Tensor:
    inner = (torch.minimum(one[..., 2:], other[..., 2:]) - torch.maximum(one[..., :2], other[..., :2])).clamp_min(0)
    shared = inner.prod(-1)
    return shared / ((one[..., 2:] - one[..., :2]).prod(-1) + (other[..., 2:] - other[..., :2]).prod(-1) - shared)


def _area(right: Tensor, num_objects: int) -> float:
    """Under the curve of precision, made to fall, over recall."""
    if not len(right) or not num_objects:
        return 0.0
    hits = right.cumsum(0)
    precision = hits / torch.arange(1, len(right) + 1)
    falling = precision.flip(0).cummax(0).values.flip(0)
    return float((falling * right).sum() / num_objects)
