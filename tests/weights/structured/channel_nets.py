"""Small networks, one for each way in which channels can hang together."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv(i: int, o: int, **kw) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(i, o, 3, padding=1, bias=kw.pop("bias", False), **kw), nn.BatchNorm2d(o), nn.ReLU())


class Net(nn.Module):
    """Holds layers by name; `way` is its forward."""

    def __init__(self, way, **layers):
        super().__init__()
        self.way = way
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self, x)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def plain():
    """A sigmoid makes 0.5 of a removed channel: it must not reach the next layer."""

    def way(m, x):
        return m.head(pooled(torch.sigmoid(m.two(F.max_pool2d(m.one(x), 2)))))

    return Net(way, one=conv(3, 8, bias=True), two=conv(8, 12), head=nn.Linear(12, 5))


def residual():
    def way(m, x):
        x = m.stem(x)
        x = F.relu(x + m.b(m.a(x)))
        return m.head(pooled(F.relu(m.short(x) + m.d(m.c(x)))))

    layers = {"stem": conv(3, 8), "a": conv(8, 10), "b": conv(10, 8), "c": conv(8, 6), "d": conv(6, 12)}
    return Net(way, **layers, short=nn.Conv2d(8, 12, 1), head=nn.Linear(12, 5))


def padded_shortcut():
    def way(m, x):
        x = m.stem(x)
        short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))
        return m.head(pooled(F.relu(short + m.b(m.a(x)[:, :, ::2, ::2]))))

    return Net(way, stem=conv(3, 8), a=conv(8, 10), b=conv(10, 16), head=nn.Linear(16, 5))


def dense_blocks():
    def way(m, x):
        one = m.one(x)
        two = m.two(one)
        three = m.three(torch.cat([one, two], 1))
        return m.head(torch.cat([one, two, three], 1).amax((2, 3)))

    return Net(way, one=conv(3, 6), two=conv(6, 4), three=conv(10, 8), head=nn.Linear(18, 5))


def depthwise():
    def way(m, x):
        return m.head(pooled(m.two(m.deep2(m.point(m.deep(m.stem(x)))))))

    point = nn.Conv2d(8, 12, 1)
    deep = conv(8, 8, groups=8)
    return Net(
        way,
        stem=conv(3, 8),
        deep=deep,
        point=point,
        deep2=conv(12, 24, groups=12),
        two=conv(24, 6),
        head=nn.Linear(6, 5),
    )


def grouped():
    """Few wide groups lose the same places in each, many narrow ones whole groups."""

    def way(m, x):
        return m.head(pooled(m.narrow(m.wide(m.stem(x)))))

    return Net(way, stem=conv(3, 12), wide=conv(12, 16, groups=2), narrow=conv(16, 16, groups=8), head=nn.Linear(16, 5))


def flattened():
    def way(m, x):
        return m.head(F.relu(m.hidden(torch.flatten(F.adaptive_avg_pool2d(m.one(x), 2), 1))))

    return Net(way, one=conv(3, 6), hidden=nn.Linear(24, 7), head=nn.Linear(7, 5))


def group_norm():
    def way(m, x):
        return m.head(pooled(m.two(F.silu(m.norm(m.one(x))))))

    return Net(way, one=nn.Conv2d(3, 12, 3), norm=nn.GroupNorm(4, 12), two=conv(12, 6), head=nn.Linear(6, 5))


def instance_norm():
    def way(m, x):
        return m.head(pooled(m.act(m.norm(m.one(x)))))

    return Net(
        way, one=nn.Conv2d(3, 8, 3), norm=nn.InstanceNorm2d(8, affine=True), act=nn.PReLU(8), head=nn.Linear(8, 5)
    )


def squeeze_excite():
    def way(m, x):
        x = m.one(x)
        gate = torch.sigmoid(m.up(F.relu(m.down(F.adaptive_avg_pool2d(x, 1)))))
        return m.head(pooled(m.two(x * gate)))

    return Net(
        way, one=conv(3, 8), down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1), two=conv(8, 6), head=nn.Linear(6, 5)
    )


def upsampled():
    def way(m, x):
        skip = m.one(x)
        deep = m.two(F.avg_pool2d(skip, 2))
        up = F.interpolate(deep, scale_factor=2, mode="bilinear")
        return m.head(pooled(torch.cat([m.turn(deep), up, skip], 1)))

    return Net(way, one=conv(3, 6), two=conv(6, 8), turn=nn.ConvTranspose2d(8, 4, 2, 2), head=nn.Linear(18, 5))


def reused():
    def way(m, x):
        x = m.stem(x)
        return m.head(pooled(m.same(m.same(x))))

    return Net(way, stem=conv(3, 8), same=conv(8, 8), head=nn.Linear(8, 5))


def scaled():
    """A parameter used directly, a shuffle of channels, two halves that are multiplied."""

    def way(m, x):
        x = m.one(x) * m.gamma
        x = F.channel_shuffle(x, 2)
        a, b = m.two(x).chunk(2, 1)
        return m.head(pooled(m.three(a * b)))

    net = Net(way, one=conv(3, 8), two=conv(8, 12), three=conv(6, 6), head=nn.Linear(6, 5))
    net.gamma = nn.Parameter(torch.rand(8, 1, 1))
    return net


def looped():
    """Control flow that depends on the values, which symbolic tracing cannot follow."""

    def way(m, x):
        x = m.stem(x)
        if x.shape[0] > 1 and not torch.jit.is_scripting():
            for layer in m.layers:
                x = x + layer(x) if x.shape[1] > 2 else x
        return m.head(pooled(x))

    return Net(way, stem=conv(3, 8), layers=nn.ModuleList([conv(8, 8), conv(8, 8)]), head=nn.Linear(8, 5))


NETS = (plain, residual, padded_shortcut, dense_blocks, depthwise, grouped, flattened, group_norm)
NETS += (instance_norm, squeeze_excite, upsampled, reused, scaled, looped)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions; where the channels double, the shortcut is padded with zeros (option A)."""

    def __init__(self, i: int, o: int):
        super().__init__()
        self.conv1 = nn.Conv2d(i, o, 3, 1 if i == o else 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(o)
        self.conv2 = nn.Conv2d(o, o, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(o)
        self.pad = 0 if i == o else o // 4

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.pad:
            x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class ResNet20(nn.Module):
    """For 32x32 pictures, with the names of the public weights."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*[BasicBlock(16, 16) for _ in range(3)])
        self.layer2 = nn.Sequential(BasicBlock(16, 32), *[BasicBlock(32, 32) for _ in range(2)])
        self.layer3 = nn.Sequential(BasicBlock(32, 64), *[BasicBlock(64, 64) for _ in range(2)])
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))
