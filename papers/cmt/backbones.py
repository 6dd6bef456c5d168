"""The branches that feed CMT: images to tokens, points to a bird's-eye map.

VoVNet-99-eSE and ResNet-50 with a two-level pyramid; voxels, sparse convolution, SECOND and its pyramid; and two small
branches that a CPU trains. Sizes and initialisation are those of the authors' configurations.

State dicts: ``backbone`` and ``neck`` of an image branch; ``encoder``, ``backbone`` and ``neck`` of a LiDAR branch.
Inside of the LiDAR branch names are those of MMDetection3D, inside of ResNet those of torchvision.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from model import Architecture


# ---- image branch ----------------------------------------------------------------------------------------------


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


def _kaiming(module: nn.Module) -> None:
    """MMCV's "Kaiming" initialisation: normal, by fan-out."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


class OneShotBlock(nn.Module):
    """One-shot aggregation: five convolutions in a row, all outputs concatenated once, then channel attention (eSE)."""

    def __init__(self, inputs: int, hidden: int, outputs: int, identity: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_conv(inputs if i == 0 else hidden, hidden) for i in range(5))
        self.concat = _conv(inputs + 5 * hidden, outputs, kernel=1)
        self.ese = nn.Conv2d(outputs, outputs, 1)
        self.identity = identity

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        parts = [x]
        for layer in self.layers:
            parts.append(layer(parts[-1]))
        out = self.concat(torch.cat(parts, 1))
        out = out * F.relu6(self.ese(out.mean((2, 3), keepdim=True)) + 3) / 6
        return out + x if self.identity else out


class VoVNet99(nn.Module):
    """VoVNetV2-99 with eSE in every block."""

    channels = (768, 1024)
    norm_eval = True

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 64, stride=2), _conv(64, 64), _conv(64, 128, stride=2))
        sizes = ((128, 256, 1), (160, 512, 3), (192, 768, 9), (224, 1024, 3))
        inputs, stages = 128, []
        for hidden, outputs, blocks in sizes:
            made = [OneShotBlock(outputs if i else inputs, hidden, outputs, identity=i > 0) for i in range(blocks)]
            stages.append(nn.Sequential(*made))
            inputs = outputs
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> stages 4 and 5: strides 16 and 32."""
        x = self.stem(x)
        outs = []
        for i, stage in enumerate(self.stages):
            x = stage(x if i == 0 else F.max_pool2d(x, 3, 2, ceil_mode=True))
            outs.append(x)
        return outs[2:]


class ResNet50(nn.Module):
    """ResNet-50 of torchvision without its classifier; parameters are named as there."""

    channels = (1024, 2048)
    norm_eval = True

    def __init__(self) -> None:
        super().__init__()
        from torchvision.models import resnet50  # costs seconds to import

        net = resnet50(weights=None)
        for name in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"):
            self.add_module(name, getattr(net, name))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> C4 and C5: strides 16 and 32."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        c4 = self.layer3(self.layer2(self.layer1(x)))
        return [c4, self.layer4(c4)]


class SmallImageNet(nn.Module):
    """Four convolutions, stride 8: for images of some fifty pixels."""

    norm_eval = False

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            _conv(3, 16, stride=2), _conv(16, 32, stride=2), _conv(32, width, stride=2), _conv(width, width)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map of stride 8."""
        return [self.layers(x)]


class CPFPN(nn.Module):
    """Feature pyramid of two levels that computes what is used: the finer level."""

    def __init__(self, inputs: Sequence[int], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in inputs)
        self.output = nn.Conv2d(width, width, 3, padding=1)
        for layer in (*self.lateral, self.output):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps of strides 16 and 32 -> (B, width, H / 16, W / 16)."""
        fine, coarse = (layer(x) for layer, x in zip(self.lateral, maps, strict=True))
        return self.output(fine + F.interpolate(coarse, size=fine.shape[2:], mode="nearest"))


def grid_mask(height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """GridMask with ratio 0.5, inverted: keep what lies under a random grid of bars, of random period.

    Returns:
        (height, width) of 0 and 1.
    """

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    period = draw(2, max(3, height))
    length = min(max(int(period * 0.5 + 0.5), 1), period - 1)
    bars = []
    for size in (height, width):
        whole, start = int(1.5 * size), draw(0, period)  # drawn larger and cut from the middle
        position = torch.arange(whole)
        inside = ((position - start) % period < length) & (position >= start)
        inside &= position < start + whole // period * period
        bars.append(inside[(whole - size) // 2 :][:size])
    return (bars[0].unsqueeze(1) | bars[1]).float()


class ImageBranch(nn.Module):
    """Cameras to tokens: backbone and, for the large ones, neck.

    Args:
        backbone: vovnet99, resnet50 or small. width: channels of a token.
        masked: with GridMask in training, with probability 0.7.
    """

    def __init__(self, backbone: str, width: int, masked: bool = False) -> None:
        super().__init__()
        self.masked = masked
        if backbone == "small":
            self.backbone: nn.Module = SmallImageNet(width)
            self.neck = None
        else:
            self.backbone = VoVNet99() if backbone == "vovnet99" else ResNet50()
            self.neck = CPFPN(self.backbone.channels, width)

    def train(self, mode: bool = True) -> ImageBranch:
        """As usual, but the large backbones' batch norms keep their statistics."""
        super().train(mode)
        if self.backbone.norm_eval:
            for layer in self.backbone.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """(B, V, 3, H, W) -> (B, V, width, H', W')."""
        flat = images.flatten(0, 1)
        if self.training and self.masked and torch.rand(()) < 0.7:
            flat = flat * grid_mask(*flat.shape[2:]).to(flat)
        maps = self.backbone(flat)
        out = maps[0] if self.neck is None else self.neck(maps)
        return out.unflatten(0, images.shape[:2])


# ---- LiDAR branch: voxels and sparse convolution ----------------------------------------------------------------


class Sites(NamedTuple):
    """Occupied cells of B grids.

    Attributes:
        cells: (N, 4) int64, sample z y x. keys: (N,) int64, their ascending positions in the dense grids.
        shape: cells along z, y, x. batch: B.
    """

    cells: Tensor
    keys: Tensor
    shape: tuple[int, int, int]
    batch: int

    @staticmethod
    def of(keys: Tensor, shape: tuple[int, int, int], batch: int) -> Sites:
        """Sites from ascending keys."""
        z, y, x = shape
        cells = [keys // (z * y * x), keys // (y * x) % z, keys // x % y, keys % x]
        return Sites(torch.stack(cells, 1), keys, shape, batch)


def _keys(cells: Tensor, shape: tuple[int, int, int]) -> Tensor:
    z, y, x = shape
    return ((cells[:, 0] * z + cells[:, 1]) * y + cells[:, 2]) * x + cells[:, 3]


def voxelise(points: Sequence[Tensor], architecture: Architecture, most: int) -> tuple[Tensor, Sites]:
    """Hard voxelisation with the mean of each voxel's first points as its feature.

    Args:
        points: B tensors (N, F). architecture: range, voxel and ``max_points``.
        most: voxels a sample; those whose first point comes first in the sweep are kept.

    Returns:
        (voxels, F) and their sites; the grid has one cell more along z than the range, as SECOND has it.

    Raises:
        ValueError: no point of a sample is in range.
    """
    nx, ny, nz = architecture.grid
    device = points[0].device
    low, size = (torch.tensor(v, device=device) for v in (architecture.pc_range[:3], architecture.voxel))
    limit = torch.tensor((nx, ny, nz), device=device)
    features, keys = [], []
    for sample, cloud in enumerate(points):
        cell = ((cloud[:, :3] - low) / size).floor().long()
        inside = ((cell >= 0) & (cell < limit)).all(1)
        if not inside.any():
            raise ValueError(f"sample {sample}: none of {len(cloud)} points is inside of {architecture.pc_range}")
        cloud, cell = cloud[inside], cell[inside]
        key = (cell[:, 2] * ny + cell[:, 1]) * nx + cell[:, 0]
        key, order = key.sort(stable=True)
        voxel, group, count = torch.unique_consecutive(key, return_inverse=True, return_counts=True)
        start = count.cumsum(0) - count
        rank = torch.arange(len(key), device=device) - start[group]
        held = rank < architecture.max_points
        table = cloud.new_zeros(len(voxel), architecture.max_points, cloud.shape[1])
        table[group[held], rank[held]] = cloud[order[held]]
        mean = table.sum(1) / count.clamp(max=architecture.max_points).unsqueeze(1)
        if len(voxel) > most:
            first = order[start].argsort()[:most].sort().values
            voxel, mean = voxel[first], mean[first]
        features.append(mean)
        keys.append(voxel + sample * ((nz + 1) * ny * nx))
    return torch.cat(features), Sites.of(torch.cat(keys), (nz + 1, ny, nx), len(points))


class Rules(NamedTuple):
    """Which input site meets which output site under each entry of a kernel.

    Attributes:
        pairs: for each kernel entry (source, target) positions, or ``None`` where it maps each site to itself.
        native: mmcv's table of pairs and their numbers, on CUDA, in place of ``pairs``.
        outputs: number of output sites. submanifold: whether the output sites are the input sites.
    """

    pairs: list[tuple[Tensor, Tensor] | None]
    native: tuple[Tensor, Tensor] | None
    outputs: int
    submanifold: bool


def submanifold_rules(sites: Sites) -> Rules:
    """Rules of a 3 x 3 x 3 submanifold convolution: outputs exist where inputs do.

    Neighbours are found in the sorted keys. An offset and its opposite have the same pairs the other way round, so
    thirteen searches serve all 27 entries.
    """
    if sites.cells.is_cuda:
        return _native_rules(sites, (3, 3, 3), (1, 1, 1), (1, 1, 1), True)[1]
    z, y, x = sites.shape
    pairs: list[tuple[Tensor, Tensor] | None] = [None] * 27
    limit = torch.tensor(sites.shape)
    for entry in range(13):
        offset = torch.tensor((entry // 9 - 1, entry // 3 % 3 - 1, entry % 3 - 1))
        there = sites.cells[:, 1:] + offset
        wanted = sites.keys + int((offset[0] * y + offset[1]) * x + offset[2])
        found = torch.searchsorted(sites.keys, wanted).clamp_(max=len(sites.keys) - 1)
        hit = (sites.keys[found] == wanted) & ((there >= 0) & (there < limit)).all(1)
        target = hit.nonzero().squeeze(1)
        source = found[target]
        pairs[entry], pairs[26 - entry] = (source, target), (target, source)
    return Rules(pairs, None, len(sites.keys), True)


def strided_rules(
    sites: Sites, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Sites, Rules]:
    """Output sites and rules of a strided sparse convolution: an output exists where any input reaches it."""
    if sites.cells.is_cuda:
        return _native_rules(sites, kernel, stride, padding, False)
    shape = tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(sites.shape, kernel, stride, padding, strict=True))
    step, limit, pad = torch.tensor(tuple(stride)), torch.tensor(shape), torch.tensor(tuple(padding))
    sources, keys = [], []
    for entry in range(math.prod(kernel)):
        at = (entry // (kernel[1] * kernel[2]), entry // kernel[2] % kernel[1], entry % kernel[2])
        moved = sites.cells[:, 1:] + pad - torch.tensor(at)
        out = moved.div(step, rounding_mode="floor")
        source = ((moved % step == 0) & (out >= 0) & (out < limit)).all(1).nonzero().squeeze(1)
        sources.append(source)
        keys.append(_keys(torch.cat([sites.cells[source, :1], out[source]], 1), shape))
    every, inverse = torch.cat(keys).unique(return_inverse=True)
    targets = inverse.split([len(source) for source in sources])
    return Sites.of(every, shape, sites.batch), Rules(list(zip(sources, targets)), None, len(every), False)


def _native_rules(
    sites: Sites, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], submanifold: bool
) -> tuple[Sites, Rules]:
    """The same by mmcv's compiled operator, on CUDA."""
    from mmcv.ops.sparse_ops import get_conv_output_size, get_indice_pairs

    shape = sites.shape
    if not submanifold:
        shape = tuple(get_conv_output_size(sites.shape, kernel, stride, padding, (1, 1, 1)))
    cells, pairs, number = get_indice_pairs(
        sites.cells.int(), sites.batch, list(sites.shape), list(kernel), list(stride), list(padding), 1, 0, submanifold
    )
    cells = cells.long()
    return Sites(cells, _keys(cells, shape), shape, sites.batch), Rules([], (pairs, number), len(cells), submanifold)


def sparse_conv(x: Tensor, weight: Tensor, rules: Rules) -> Tensor:
    """Sparse convolution without a dense grid: gather, multiply and add for each entry of the kernel.

    Args:
        x: (sites, c_in). weight: (k_z, k_y, k_x, c_in, c_out).

    Returns:
        (output sites, c_out).
    """
    if rules.native is not None:
        from mmcv.ops.sparse_functional import indice_conv, indice_subm_conv

        return (indice_subm_conv if rules.submanifold else indice_conv)(x, weight, *rules.native, rules.outputs)
    entries = weight.flatten(0, 2)
    out = x @ entries[13] if rules.submanifold else x.new_zeros(rules.outputs, weight.shape[-1])
    for pair, entry in zip(rules.pairs, entries, strict=True):
        if pair is not None and len(pair[0]):
            out = out.index_add_(0, pair[1], x.index_select(0, pair[0]) @ entry)
    return out


class SparseConv(nn.Module):
    """Weights of a sparse convolution, in mmcv's layout (k_z, k_y, k_x, c_in, c_out)."""

    def __init__(self, inputs: int, outputs: int, kernel: Sequence[int] = (3, 3, 3)) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs * math.prod(kernel))
        self.weight = nn.Parameter(torch.empty(*kernel, inputs, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor, rules: Rules) -> Tensor:
        """(sites, inputs) -> (output sites, outputs)."""
        return sparse_conv(x, self.weight, rules)


def _sparse_norm(channels: int) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels, eps=1e-3, momentum=0.01)


class SparseBlock(nn.Module):
    """Residual block of two submanifold convolutions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = SparseConv(channels, channels), _sparse_norm(channels)
        self.conv2, self.bn2 = SparseConv(channels, channels), _sparse_norm(channels)

    def forward(self, x: Tensor, rules: Rules) -> Tensor:
        """(sites, channels) -> the same."""
        hidden = F.relu(self.bn1(self.conv1(x, rules)))
        return F.relu(self.bn2(self.conv2(hidden, rules)) + x)


class SparseEncoder(nn.Module):
    """Voxels to a bird's-eye map of an eighth of the grid, in the arrangement of SECOND."""

    def __init__(self, inputs: int = 5) -> None:
        super().__init__()
        self.conv_input = nn.ModuleList([SparseConv(inputs, 16), _sparse_norm(16)])
        stages = ((16, 32), (32, 64), (64, 128), (128, None))
        self.encoder_layers = nn.ModuleDict()
        for i, (channels, after) in enumerate(stages):
            blocks: list[nn.Module] = [SparseBlock(channels), SparseBlock(channels)]
            if after is not None:
                blocks.append(nn.ModuleList([SparseConv(channels, after), _sparse_norm(after)]))
            self.encoder_layers[f"encoder_layer{i + 1}"] = nn.ModuleList(blocks)
        self.conv_out = nn.ModuleList([SparseConv(128, 128, (3, 1, 1)), _sparse_norm(128)])

    def forward(self, x: Tensor, sites: Sites) -> Tensor:
        """(voxels, inputs) -> (B, 256, grid / 8, grid / 8)."""
        rules = submanifold_rules(sites)
        conv, norm = self.conv_input
        x = F.relu(norm(conv(x, rules)))
        for i, stage in enumerate(self.encoder_layers.values()):
            for block in stage[:2]:
                x = block(x, rules)
            if len(stage) == 3:
                padding = (0, 1, 1) if i == 2 else (1, 1, 1)
                sites, down = strided_rules(sites, (3, 3, 3), (2, 2, 2), padding)
                x = F.relu(stage[2][1](stage[2][0](x, down)))
                rules = submanifold_rules(sites)
        conv, norm = self.conv_out
        sites, down = strided_rules(sites, (3, 1, 1), (2, 1, 1), (0, 0, 0))
        x = F.relu(norm(conv(x, down)))
        dense = x.new_zeros(sites.batch * math.prod(sites.shape), x.shape[1]).index_copy(0, sites.keys, x)
        depth, height, width = sites.shape
        dense = dense.view(sites.batch, depth, height, width, -1).permute(0, 4, 1, 2, 3)
        return dense.reshape(sites.batch, -1, height, width)  # channel by channel, depth within


class Second(nn.Module):
    """Two stages of six convolutions on the bird's-eye map."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for inputs, outputs, stride in ((256, 128, 1), (128, 256, 2)):
            layers: list[nn.Module] = []
            for i in range(6):
                conv = nn.Conv2d(outputs if i else inputs, outputs, 3, 1 if i else stride, 1, bias=False)
                layers += [conv, nn.BatchNorm2d(outputs, eps=1e-3, momentum=0.01), nn.ReLU(inplace=True)]
            self.blocks.append(nn.Sequential(*layers))
        _kaiming(self)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 256, H, W) -> (B, 128, H, W) and (B, 256, H / 2, W / 2)."""
        fine = self.blocks[0](x)
        return [fine, self.blocks[1](fine)]


class SecondFPN(nn.Module):
    """Both stages at the finer resolution, concatenated."""

    def __init__(self) -> None:
        super().__init__()
        ups = (nn.Conv2d(128, 256, 1, bias=False), nn.ConvTranspose2d(256, 256, 2, 2, bias=False))
        self.deblocks = nn.ModuleList(
            nn.Sequential(up, nn.BatchNorm2d(256, eps=1e-3, momentum=0.01), nn.ReLU(inplace=True)) for up in ups
        )
        _kaiming(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """-> (B, 512, H, W)."""
        return torch.cat([block(x) for block, x in zip(self.deblocks, maps, strict=True)], 1)


class LidarBranch(nn.Module):
    """Voxelisation, sparse encoder, SECOND and its pyramid, in float32 whatever the autocast (voxels and encoder)."""

    channels = 512

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.encoder, self.backbone, self.neck = SparseEncoder(), Second(), SecondFPN()

    def forward(self, points: Sequence[Tensor]) -> Tensor:
        """B clouds (N, 5) -> (B, 512, grid / 8, grid / 8)."""
        most = self.architecture.max_voxels[0 if self.training else 1]
        with torch.autocast(points[0].device.type, enabled=False):
            bev = self.encoder(*voxelise([cloud.float() for cloud in points], self.architecture, most))
        return self.neck(self.backbone(bev))


class PillarBranch(nn.Module):
    """The small LiDAR branch: the mean of a pillar's points, then four convolutions of stride 2 in all.

    Four, because a token that sees boxes whole tells a query more than one that sees a few points of them.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture, self.channels = architecture, architecture.width
        self.point = nn.Linear(7, self.channels)
        self.layers = nn.Sequential(*(_conv(self.channels, self.channels, stride=s) for s in (2, 1, 1, 1)))

    def forward(self, points: Sequence[Tensor]) -> Tensor:
        """B clouds (N, 5) -> (B, C, grid / 2, grid / 2)."""
        a, cloud = self.architecture, torch.cat(list(points))
        nx, ny, _ = a.grid
        counts = torch.tensor([len(p) for p in points])
        sample = torch.arange(len(points)).repeat_interleave(counts).to(cloud.device)
        low, high = cloud.new_tensor(a.pc_range[:3]), cloud.new_tensor(a.pc_range[3:])
        place = (cloud[:, :3] - low) / cloud.new_tensor(a.voxel)
        cell = place.floor().long()
        inside = ((place >= 0).all(1) & (cell < cell.new_tensor(a.grid)).all(1)).unsqueeze(1)
        scaled = 2 * (cloud[:, :3] - low) / (high - low) - 1
        x = torch.cat([scaled, 2 * (place - cell)[:, :2] - 1, cloud[:, 3:] / cloud.new_tensor((255.0, 1.0))], 1)
        x = F.relu(self.point(x)) * inside
        key = (sample * ny + cell[:, 1].clamp(0, ny - 1)) * nx + cell[:, 0].clamp(0, nx - 1)
        total = x.new_zeros(len(points) * ny * nx, self.channels + 1)
        total = total.index_add(0, key, torch.cat([x, inside.to(x)], 1))
        mean = total[:, :-1] / total[:, -1:].clamp(min=1)
        return self.layers(mean.view(len(points), ny, nx, -1).permute(0, 3, 1, 2))


def branches(architecture: Architecture) -> tuple[ImageBranch | None, LidarBranch | PillarBranch | None]:
    """The image and the LiDAR branch of an architecture, ``None`` for a sensor that it does not use.

    GridMask goes with the large fusion models: the authors' camera configuration has none.
    """
    a, image = architecture, None
    if a.modality != "lidar":
        image = ImageBranch(a.image_backbone, a.width, a.modality == "fusion" and a.image_backbone != "small")
    if a.modality == "camera":
        return image, None
    return image, LidarBranch(a) if a.lidar_backbone == "sparse" else PillarBranch(a)
