"""Networks as users write them, that no zoo of ours has: functions that `ptsim cost FILE.py:NAME` takes as they are.

Each is small enough to run for real within a moment, and uses what its kind of network uses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint


def conv_bn(inputs: int, outputs: int, kernel: int = 3, *, act: nn.Module | None = None, **more: int) -> nn.Sequential:
    """Convolution, BatchNorm, activation."""
    conv = nn.Conv2d(inputs, outputs, kernel, padding=more.pop("padding", kernel // 2), bias=False, **more)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), act or nn.ReLU(inplace=True))


class UNet(nn.Module):
    """Segmentation: an encoder, a decoder of transposed convolutions, and concatenated shortcuts."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList()
        inputs = 3
        for outputs in widths:
            self.down.append(nn.Sequential(conv_bn(inputs, outputs), conv_bn(outputs, outputs)))
            inputs = outputs
        self.pool = nn.MaxPool2d(2)
        self.middle = conv_bn(inputs, 2 * inputs)
        self.up, self.merge = nn.ModuleList(), nn.ModuleList()
        for outputs in reversed(widths):
            self.up.append(nn.ConvTranspose2d(2 * outputs, outputs, 2, stride=2))
            self.merge.append(conv_bn(2 * outputs, outputs))
        self.head = nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
            x = self.pool(x)
        x = self.middle(x)
        for up, merge, skip in zip(self.up, self.merge, reversed(skips), strict=True):
            x = merge(torch.cat([up(x), skip], dim=1))
        return self.head(x)


class SEResidual(nn.Module):
    """torchvision's squeeze-and-excitation in residual blocks, with stochastic depth."""

    def __init__(self, width: int = 32) -> None:
        from torchvision.ops import SqueezeExcitation, StochasticDepth  # seconds to import

        super().__init__()
        self.stem = conv_bn(3, width, stride=2)
        self.a, self.b = conv_bn(width, width, act=nn.SiLU()), conv_bn(width, width, act=nn.SiLU())
        self.se = SqueezeExcitation(width, 8, activation=nn.SiLU)
        self.drop = StochasticDepth(0.2, "row")
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.drop(self.se(self.a(x)))
        x = F.relu(x + self.drop(self.se(self.b(x))), inplace=True)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


def inverted(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    wide = 4 * inputs
    return nn.Sequential(
        conv_bn(inputs, wide, 1, act=nn.ReLU6(inplace=True)),
        conv_bn(wide, wide, 3, act=nn.Hardswish(inplace=True), stride=stride, groups=wide),
        nn.Conv2d(wide, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
    )


class SuperResolution(nn.Module):
    """PixelShuffle behind residual blocks that share one module, PReLU, and a bicubic shortcut."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, width, 9, padding=4)
        self.act = nn.PReLU()
        self.body = nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.PReLU(width))
        self.last = nn.Conv2d(width, 3 * 4, 3, padding=1)
        self.shuffle = nn.PixelShuffle(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.first(x))
        for _ in range(3):
            y = y + self.body(y)
        return self.shuffle(self.last(y)) + F.interpolate(x, scale_factor=2, mode="bicubic")


class ConvNeXtLike(nn.Module):
    """Depthwise 7×7, LayerNorm over channels kept last, layer scale, GELU; GRN of ConvNeXt v2."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.depthwise = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.gamma, self.beta = nn.Parameter(torch.zeros(4 * width)), nn.Parameter(torch.zeros(4 * width))
        self.scale = nn.Parameter(torch.full((width,), 1e-6))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = F.gelu(self.wide(y))
        size = torch.linalg.vector_norm(y, dim=(1, 2), keepdim=True)
        y = y + self.gamma * (y * (size / (size.mean(-1, keepdim=True) + 1e-6))) + self.beta
        x = x + (self.scale * self.narrow(y)).permute(0, 3, 1, 2)
        return self.head(x.mean([-2, -1]))


class Norms(nn.Module):
    """Group, instance and local response normalisation, and functional BatchNorm."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else width, width, 3, padding=1) for i in range(4))
        self.group, self.instance = nn.GroupNorm(8, width), nn.InstanceNorm2d(width, affine=True)
        self.response = nn.LocalResponseNorm(5)
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("var", torch.ones(width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.group(self.convs[0](x)), 0.1)
        x = F.elu(self.instance(self.convs[1](x)))
        x = F.mish(self.response(self.convs[2](x)))
        x = self.convs[3](x)
        x = F.batch_norm(x, self.mean, self.var, self.weight, self.bias, self.training)
        return self.head(F.relu(x).mean((2, 3)))


class Dilated(nn.Module):
    """Atrous pyramid: dilations, a pooled branch resized back, dropout of whole channels, an auxiliary head."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = conv_bn(3, width, 7, stride=2)
        self.rates = nn.ModuleList(conv_bn(width, width, padding=rate, dilation=rate) for rate in (1, 2, 4))
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, width, 1), nn.ReLU())
        self.project = nn.Sequential(conv_bn(4 * width, width, 1), nn.Dropout2d(0.1))
        self.classify, self.auxiliary = nn.Conv2d(width, 5, 1), nn.Conv2d(width, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        size = x.shape[-2:]
        x = self.stem(x)
        branches = [rate(x) for rate in self.rates]
        branches.append(F.interpolate(self.pooled(x), size=x.shape[-2:], mode="bilinear", align_corners=False))
        y = self.classify(self.project(torch.cat(branches, 1)))
        y = F.interpolate(y, size=size, mode="bilinear", align_corners=False)
        if self.training:
            return y, self.auxiliary(x)
        return y


class OneDimensional(nn.Module):
    """Rows of the image as a signal: 1-d convolutions, transposed too, pooling, a gated (GLU) unit."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv1d(3 * 32, width, 5, padding=2)
        self.norm = nn.BatchNorm1d(width)
        self.gated = nn.Conv1d(width, 2 * width, 3, padding=2, dilation=2)
        self.pool = nn.MaxPool1d(2)
        self.up = nn.ConvTranspose1d(width, width, 4, stride=2, padding=1)
        self.head = nn.Linear(width, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x.flatten(1, 2))).relu_()
        x = self.pool(F.glu(self.gated(x), dim=1))
        return self.head(torch.tanh(self.up(x)).amax(-1))


class Volume(nn.Module):
    """The image as a volume of one channel: 3-d convolutions, BatchNorm and pooling."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv3d(1, width, 3, padding=1),
            nn.BatchNorm3d(width),
            nn.ReLU(inplace=True),
            nn.MaxPool3d((1, 2, 2)),
            nn.Conv3d(width, 2 * width, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
            nn.ReLU(inplace=True),
            nn.ConvTranspose3d(2 * width, width, (1, 2, 2), stride=(1, 2, 2)),
            nn.AdaptiveAvgPool3d(1),
        )
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x.unsqueeze(1)).flatten(1))


class Encoder(nn.Module):
    """A vision transformer from torch's own parts: nn.MultiheadAttention, class token, learned positions."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(torch.zeros(1, 65, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, dropout=0.1, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width), nn.Dropout(0.1)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        y = self.norm1(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


class Attention(nn.Module):
    """Fused attention over pixels with one projection for queries, keys and values, and RMSNorm."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.norm = nn.RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        b, n, c = x.shape
        q, k, v = self.qkv(self.norm(x)).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).reshape(b, n, c))
        return self.head(x.mean(1))


class BiasedWindows(nn.Module):
    """Attention written out with einsum, a learned bias looked up by position, and a network that makes another."""

    def __init__(self, width: int = 32, heads: int = 4, side: int = 8) -> None:
        super().__init__()
        self.heads = heads
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.zeros((2 * side - 1) ** 2, heads))
        self.mlp = nn.Sequential(nn.Linear(2, 256), nn.ReLU(inplace=True), nn.Linear(256, heads, bias=False))
        rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
        places = torch.stack([rows, columns]).flatten(1)
        apart = (places[:, :, None] - places[:, None, :]).permute(1, 2, 0)
        self.register_buffer("apart", apart.float() / side)
        self.register_buffer("index", ((apart + side - 1) * torch.tensor([2 * side - 1, 1])).sum(-1))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.heads, c // self.heads).unbind(2)
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * (c // self.heads) ** -0.5
        looked_up = self.table[self.index.view(-1)].view(n, n, self.heads).permute(2, 0, 1)
        made = 16 * torch.sigmoid(self.mlp(self.apart)).permute(2, 0, 1)
        weights = (scores + looked_up.unsqueeze(0) + made.unsqueeze(0)).softmax(-1)
        y = torch.einsum("bhnm,bmhd->bnhd", weights, v).reshape(b, n, c)
        return self.head((x + self.out(y)).mean(1))


class StandardisedConv(nn.Conv2d):
    """Weight standardisation as in BiT."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(self.weight, dim=[1, 2, 3], keepdim=True, unbiased=False)
        weight = (self.weight - mean) / torch.sqrt(variance + 1e-5)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class ScaledConv(nn.Conv2d):
    """Weight standardisation as timm writes it: BatchNorm over the filters, with a learned gain."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)
        self.gain = nn.Parameter(torch.ones(outputs, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = F.batch_norm(flat, None, None, weight=self.gain.view(-1), training=True, eps=1e-6)
        return F.conv2d(x, weight.reshape_as(self.weight), self.bias, self.stride, self.padding)


class Standardised(nn.Module):
    """Two kinds of weight standardisation, with GroupNorm and a scalar skip gain."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = StandardisedConv(3, width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, width)
        self.body = ScaledConv(width, width, 3)
        self.gain = nn.Parameter(torch.tensor(0.2))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.gain * F.relu(self.body(x)) * 1.7
        return self.head(F.avg_pool2d(x, 8).mean((2, 3)))


class Shuffle(nn.Module):
    """Channel split and shuffle, grouped convolutions, one module used twice, activations in place."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = conv_bn(3, width, stride=2)
        self.branch = nn.Sequential(conv_bn(width // 2, width // 2, 1), conv_bn(width // 2, width // 2, groups=4))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for _ in range(2):
            left, right = x.chunk(2, dim=1)
            x = torch.cat((left, self.branch(right)), dim=1)
            b, c, h, w = x.shape
            x = x.view(b, 2, c // 2, h, w).transpose(1, 2).contiguous().view(b, c, h, w)
        return self.head(x.mean((2, 3)))


class Pyramid(nn.Module):
    """Feature pyramid: several outputs, nearest upsampling, sums across scales, one head shared by all levels."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.c1, self.c2, self.c3 = (
            conv_bn(3, width),
            conv_bn(width, 2 * width, stride=2),
            conv_bn(2 * width, 64, stride=2),
        )
        self.l1, self.l2, self.l3 = nn.Conv2d(width, 32, 1), nn.Conv2d(2 * width, 32, 1), nn.Conv2d(64, 32, 1)
        self.head = nn.Conv2d(32, 6, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        c1 = self.c1(x)
        c2 = self.c2(c1)
        c3 = self.c3(c2)
        p3 = self.l3(c3)
        p2 = self.l2(c2) + F.interpolate(p3, scale_factor=2.0, mode="nearest")
        p1 = self.l1(c1) + F.interpolate(p2, scale_factor=2.0, mode="nearest")
        return {name: self.head(p) for name, p in zip("abc", (p1, p2, p3), strict=True)}


class Bilinear(nn.Module):
    """nn.Bilinear of two pooled branches; an embedding of the brightest pixel's place; a cosine at the end."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.a, self.b = conv_bn(3, width, stride=2), conv_bn(3, width, 5, stride=2)
        self.bilinear = nn.Bilinear(width, width, 32)
        self.embedding = nn.Embedding(256, 32)
        self.prototypes = nn.Parameter(torch.rand(10, 32))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        place = a.mean(1).flatten(1).argmax(1)
        y = self.bilinear(a.mean((2, 3)), b.mean((2, 3))) + self.embedding(place)
        return F.linear(F.normalize(y), F.normalize(self.prototypes)) * 10


class Checkpointed(nn.Module):
    """A block whose activations are computed again in backward."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem = conv_bn(3, width, stride=2)
        self.block = nn.Sequential(conv_bn(width, width), conv_bn(width, width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = checkpoint(self.block, self.stem(x), use_reentrant=False)
        return self.head(x.mean((2, 3)))


class Parametrised(nn.Module):
    """torch's own weight and spectral normalisation, as parametrisations."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.a = weight_norm(nn.Conv2d(3, width, 3, padding=1))
        self.b = spectral_norm(nn.Conv2d(width, width, 3, stride=2, padding=1))
        self.c = weight_norm(nn.Linear(width, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.leaky_relu(self.b(F.leaky_relu(self.a(x), 0.1)), 0.1).mean((2, 3)))


class Dense(nn.Module):
    """Dense connections with pre-activation, average-pooled transitions and dropout."""

    def __init__(self, growth: int = 12, layers: int = 4) -> None:
        super().__init__()
        width = 2 * growth
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.layers = nn.ModuleList()
        for _ in range(layers):
            conv = nn.Conv2d(width, growth, 3, padding=1, bias=False)
            self.layers.append(nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), conv, nn.Dropout(0.2)))
            width += growth
        self.transition = nn.Sequential(
            nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width // 2, 1), nn.AvgPool2d(2)
        )
        self.head = nn.Linear(width // 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        features = self.stem(x)
        for layer in self.layers:
            features = torch.cat([features, layer(features)], 1)
        return self.head(self.transition(features).mean((2, 3)))


class Gated(nn.Module):
    """Products of tensors with tensors: a multiplied gate, a minimum, `where`, a power, division by a norm, padding."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3), nn.Conv2d(3, width, 3)
        self.c = nn.Conv2d(width, width, 3, padding="same", padding_mode="reflect")
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, (1, 1, 1, 1), mode="reflect")
        y = torch.sigmoid(self.a(x)) * torch.tanh(self.b(x))
        y = torch.where(y > 0, y, 0.1 * y)
        y = torch.minimum(self.c(y), y**2)
        y = y / (y.norm(dim=1, keepdim=True) + 1e-6)
        y *= 2
        return self.head(y.flatten(2).logsumexp(-1))


class Mixer(nn.Module):
    """Linear layers over tokens and over channels in turn."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, stride=4)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.tokens = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 64))
        self.channels = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.channels(self.norm2(x))
        return self.head(x.mean(dim=1))


class MaxNormed(nn.Module):
    """As EEGNet: every call puts the weights, their norm limited, in the place of those that were."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.layers = nn.ModuleList(conv_bn(3 if i == 0 else width, width, stride=1 + i % 2) for i in range(4))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            layer[0].weight.data = torch.renorm(layer[0].weight.data, p=2, dim=0, maxnorm=0.5)
            x = layer(x)
        return self.head(x.mean((2, 3)))


def mobile(num_classes: int = 10) -> nn.Module:
    """Inverted bottlenecks in a Sequential."""
    return nn.Sequential(
        conv_bn(3, 16, stride=2), inverted(16, 24, 2), inverted(24, 24, 1), nn.Conv2d(24, 96, 1), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2, inplace=True), nn.Linear(96, num_classes),
    )  # fmt: skip


unet, se, super_resolution, convnext, norms, dilated = UNet, SEResidual, SuperResolution, ConvNeXtLike, Norms, Dilated
one_dimensional, volume, encoder, attention, biased = OneDimensional, Volume, Encoder, Attention, BiasedWindows
standardised, shuffle, pyramid, bilinear, checkpointed = Standardised, Shuffle, Pyramid, Bilinear, Checkpointed
parametrised, dense, gated, mixer, max_normed = Parametrised, Dense, Gated, Mixer, MaxNormed
