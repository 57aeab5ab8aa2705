"""Transfer of a frozen classifier, dense or sparse, to other images: a linear probe, and reprogramming by a prompt.

Papers: Misra et al. 2023, https://arxiv.org/abs/2308.14969, sections 3 and 4 (both for dense models and their lottery
tickets, with the calibration of the outcome); Chen et al. 2022, https://arxiv.org/abs/2211.11635, sections 3 and 4
(iterative label mapping). A probe trains a linear layer on what goes into the model's head. A prompt trains pixels and
nothing else: the image is made smaller, stands in the middle of the model's input, and a frame around it is learned;
each class of the target is read off one class of the source, chosen by how often the model answers so, and chosen anew
every epoch.

The prompt is added to normalised pixels and is not bounded. Not implemented: mappings of several source classes to one,
and prompts of one image.
"""

from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_int, check_ndim, check_range, fail
from ..measure.images import Images, logits_of
from ..measure.tokens import device_of, evaluating
from ..training import learning_rate_at


def fit_images(pixels: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Images of another set in the shape that a model takes.

    Args:
        pixels: ``[B, c, h, w]``, float.
        shape: (C, H, W). One channel is repeated, several become their mean where C is 1.

    Returns:
        ``[B, C, H, W]``, resized bilinearly, with antialiasing where it shrinks.

    Raises:
        InputError: if the channels cannot be matched.
    """
    check_ndim("fit_images", "pixels", pixels, 4)
    channels, *size = shape
    if pixels.shape[1] != channels:
        if 1 not in (pixels.shape[1], channels):
            raise fail("fit_images", "pixels", f"have 1 or {channels} channels", pixels.shape[1])
        pixels = pixels.mean(1, keepdim=True).expand(-1, channels, -1, -1)
    if list(pixels.shape[2:]) == size:
        return pixels
    return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True)


class LinearProbe(nn.Module):
    """A frozen model with another head: target images ``[B, c, h, w]`` to logits ``[B, num_classes]``.

    Args:
        model: of source images; run in eval mode and never changed.
        shape: (C, H, W) of its input.
        num_classes: of the target.
        head: path of its last linear layer; None takes the last ``nn.Linear`` there is.

    Raises:
        InputError: if there is no such layer.
    """

    def __init__(
        self, model: nn.Module, shape: tuple[int, int, int], num_classes: int, *, head: str | None = None
    ) -> None:
        super().__init__()
        check_int("LinearProbe", "num_classes", num_classes, 2)
        linear = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
        path = next(reversed(linear), "") if head is None else head
        if path not in linear:
            raise fail("LinearProbe", "head", f"be a linear layer of the model (it has {', '.join(linear)})", path)
        self.model, self.shape = model, shape
        self.path: str = path
        first = linear[path]
        self.head = nn.Linear(first.in_features, num_classes, device=first.weight.device, dtype=first.weight.dtype)
        nn.init.zeros_(self.head.weight)  # a convex problem: no start is better than another
        nn.init.zeros_(self.head.bias)

    def features(self, pixels: Tensor) -> Tensor:
        """What goes into the model's own head, ``[B, features]``, without gradients."""
        seen: list[Tensor] = []
        hook = self.model.get_submodule(self.path).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        try:
            with evaluating(self.model):
                self.model(fit_images(pixels, self.shape))
        finally:
            hook.remove()
        check_ndim("LinearProbe", "input of the head", seen[-1], 2)
        return seen[-1].detach()

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, c, h, w] -> [B, num_classes]``."""
        logits: Tensor = self.head(self.features(pixels))
        return logits

    def fit(
        self, images: Images, *, epochs: int = 20, batch_size: int = 128, learning_rate: float = 0.01, seed: int = 0
    ) -> Self:
        """Train the head by Adam at a falling rate, on features that are computed once."""
        with torch.no_grad():
            parts = [self.features(batch.to(device_of(self.model))) for batch in images.batches()]
        features, labels = torch.cat(parts), images.labels.to(parts[0].device)
        for chosen in _steps("LinearProbe.fit", self.head, len(images), epochs, batch_size, learning_rate, seed):
            F.cross_entropy(self.head(features[chosen]), labels[chosen]).backward()  # type: ignore[no-untyped-call]
        return self


class VisualPrompt(nn.Module):
    """A frozen model whose input is reprogrammed: target images ``[B, c, h, w]`` to logits ``[B, num_classes]``.

    Args:
        model: of source images; run in eval mode and never changed.
        shape: (C, H, W) of its input.
        num_classes: of the target, at most as many as of the source.
        border: width in pixels of the learned frame, in which the image does not stand; 0 learns a prompt that is added
            to the whole image.
    """

    frame: Tensor
    mapping: Tensor

    def __init__(self, model: nn.Module, shape: tuple[int, int, int], num_classes: int, *, border: int = 4) -> None:
        super().__init__()
        check_int("VisualPrompt", "num_classes", num_classes, 2)
        check_int("VisualPrompt", "border", border, 0, (min(shape[1:]) - 1) // 2)
        self.model, self.shape, self.border = model, shape, border
        device = device_of(model)
        frame = torch.ones(shape, device=device)
        if border:
            frame[:, border:-border, border:-border] = 0
        self.prompt = nn.Parameter(torch.zeros(shape, device=device))
        self.register_buffer("frame", frame)
        self.register_buffer("mapping", torch.arange(num_classes, device=device))

    def source_logits(self, pixels: Tensor) -> Tensor:
        """What the model says of the prompted images, ``[B, source classes]``."""
        channels, height, width = self.shape
        inner = fit_images(pixels, (channels, height - 2 * self.border, width - 2 * self.border))
        canvas, gradients = F.pad(inner, (self.border,) * 4), torch.is_grad_enabled()
        with evaluating(self.model), torch.set_grad_enabled(gradients):
            logits: Tensor = self.model(canvas + self.prompt * self.frame)
        return logits

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, c, h, w] -> [B, num_classes]``: the source logits of the classes that the target's are mapped to."""
        return self.source_logits(pixels)[:, self.mapping]

    def fit(
        self, images: Images, *, epochs: int = 10, batch_size: int = 128, learning_rate: float = 0.05, seed: int = 0
    ) -> Self:
        """Train the frame by Adam at a falling rate; the mapping is chosen before the first epoch and after each.

        Raises:
            InputError: if the model has fewer classes than the target.
        """
        wanted = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        for parameter in wanted:
            parameter.requires_grad_(False)
        device, per_epoch = self.prompt.device, -(-len(images) // batch_size)
        try:
            steps = _steps("VisualPrompt.fit", self, len(images), epochs, batch_size, learning_rate, seed)
            for step, chosen in enumerate(steps):
                if step % per_epoch == 0:
                    self._map(images)
                chosen = chosen.to(images.labels.device)
                logits = self(images.pixels[chosen].to(device))
                F.cross_entropy(logits, images.labels[chosen].to(device)).backward()  # type: ignore[no-untyped-call]
            self._map(images)
        finally:
            for parameter in wanted:
                parameter.requires_grad_(True)
        return self

    def _map(self, images: Images) -> None:
        answers = _Whole(self)
        found = label_mapping(logits_of(answers, images).argmax(-1), images.labels, *self._classes(images))
        self.mapping.copy_(found)

    def _classes(self, images: Images) -> tuple[int, int]:
        with torch.no_grad():
            source = self.source_logits(images.pixels[:1].to(self.prompt.device)).shape[1]
        return source, len(self.mapping)


class _Whole(nn.Module):
    """A prompt that answers with all source classes."""

    def __init__(self, prompt: VisualPrompt) -> None:
        super().__init__()
        self.prompt = prompt

    def forward(self, pixels: Tensor) -> Tensor:
        return self.prompt.source_logits(pixels)


def label_mapping(answers: Tensor, labels: Tensor, num_source: int, num_target: int) -> Tensor:
    """One source class for each target class, none twice: the most frequent pair first, then the next of what is left.

    Args:
        answers: int64 ``[N]``, the source class that the model answers with.
        labels: int64 ``[N]``, the target class.
        num_source: source classes.
        num_target: target classes, at most as many.

    Returns:
        int64 ``[num_target]``; between equally frequent pairs the lower target class, then the lower source class.

    Raises:
        InputError: if there are fewer source than target classes.
    """
    check_int("label_mapping", "num_target", num_target, 1, num_source)
    counts = torch.bincount(labels * num_source + answers, minlength=num_target * num_source)
    counts = counts.view(num_target, num_source)
    mapping = torch.zeros(num_target, dtype=torch.int64, device=counts.device)
    for _ in range(num_target):
        target, source = divmod(int(counts.flatten().argmax()), num_source)
        mapping[target] = source
        counts[target], counts[:, source] = -1, -1
    return mapping


def _steps(
    function: str, module: nn.Module, num: int, epochs: int, batch_size: int, learning_rate: float, seed: int
) -> Iterator[Tensor]:
    """The images of each step; between two the trained parameters of ``module`` take what ``backward`` left."""
    check_int(function, "epochs", epochs)
    check_int(function, "batch_size", batch_size)
    check_range(function, "learning_rate", learning_rate, 0, open_low=True)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer, generator = torch.optim.Adam(trained, lr=learning_rate), torch.Generator().manual_seed(seed)
    total, step = epochs * -(-num // batch_size), 0
    for _ in range(epochs):
        for chosen in torch.split(torch.randperm(num, generator=generator), batch_size):
            optimizer.param_groups[0]["lr"] = learning_rate * learning_rate_at(step, total)
            optimizer.zero_grad()
            yield chosen
            optimizer.step()
            step += 1
