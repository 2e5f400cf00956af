"""RAFT, Teed and Deng 2020 (https://arxiv.org/abs/2003.12039): the large network of optical flow, as it is published.

    state, iterations = from_published(read("raft-things.pth"))     # or torchvision's raft_large_C_T_SKHT_V2-*.pth
    net = RAFT().eval()
    load_into(net, state)
    flow = net(pictures, iterations)        # float32 [N + 1, 3, H, W] in -1..1 -> [N, 2, H, W], each to its next one

H and W are multiples of 8. Modules have the names of Princeton's files; torchvision's are translated.
"""

from collections import OrderedDict
from collections.abc import Mapping

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from cil.checkpoints import State, check_names

HIDDEN = 128  # channels of the recurrent state, and of the context
FEATURES = 256
LEVELS, RADIUS = 4, 4  # of the pyramid, and how far around a pixel each level is looked at
SHRUNK = 8

# How often the flow is updated: in Princeton's demo, which VBench follows, and by torchvision's default.
PRINCETON, TORCHVISION = 20, 12


class Block(nn.Module):
    def __init__(self, inward: int, outward: int, stride: int, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inward, outward, 3, stride, padding=1)
        self.norm1 = norm(outward)
        self.conv2 = nn.Conv2d(outward, outward, 3, padding=1)
        self.norm2 = norm(outward)
        around = (nn.Conv2d(inward, outward, 1, stride), norm(outward)) if stride > 1 else ()
        self.downsample = nn.Sequential(*around)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        z: Tensor = self.downsample(x) + self.norm2(self.conv2(y)).relu()
        return z.relu()


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, FEATURES, H/8, W/8]"""

    def __init__(self, norm: type[nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3)
        self.norm1 = norm(64)
        self.layer1 = nn.Sequential(Block(64, 64, 1, norm), Block(64, 64, 1, norm))
        self.layer2 = nn.Sequential(Block(64, 96, 2, norm), Block(96, 96, 1, norm))
        self.layer3 = nn.Sequential(Block(96, 128, 2, norm), Block(128, 128, 1, norm))
        self.conv2 = nn.Conv2d(128, FEATURES, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        y: Tensor = self.conv2(self.layer3(self.layer2(self.layer1(x))))
        return y


class MotionEncoder(nn.Module):
    """Of the flow [B, 2, h, w] and of what correlates there."""

    def __init__(self) -> None:
        super().__init__()
        self.convc1 = nn.Conv2d(LEVELS * (2 * RADIUS + 1) ** 2, 256, 1)
        self.convc2 = nn.Conv2d(256, 192, 3, padding=1)
        self.convf1 = nn.Conv2d(2, 128, 7, padding=3)
        self.convf2 = nn.Conv2d(128, 64, 3, padding=1)
        self.conv = nn.Conv2d(192 + 64, HIDDEN - 2, 3, padding=1)

    def forward(self, flow: Tensor, correlation: Tensor) -> Tensor:
        c = self.convc2(self.convc1(correlation).relu()).relu()
        f = self.convf2(self.convf1(flow).relu()).relu()
        return torch.cat([self.conv(torch.cat([c, f], 1)).relu(), flow], 1)


class GRU(nn.Module):
    """Of two steps: one looks along rows, the other one along columns."""

    def __init__(self) -> None:
        super().__init__()
        for i, kernel in ((1, (1, 5)), (2, (5, 1))):
            for gate in "zrq":
                self.add_module(f"conv{gate}{i}", nn.Conv2d(3 * HIDDEN, HIDDEN, kernel, padding="same"))

    def forward(self, hidden: Tensor, x: Tensor) -> Tensor:
        for i in "12":
            z, r, q = (self.get_submodule(f"conv{gate}{i}") for gate in "zrq")
            both = torch.cat([hidden, x], 1)
            new = q(torch.cat([r(both).sigmoid() * hidden, x], 1)).tanh()
            hidden = torch.lerp(hidden, new, z(both).sigmoid())
        return hidden


class Update(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = MotionEncoder()
        self.gru = GRU()
        self.flow_head = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(HIDDEN, 256, 3, padding=1), relu=nn.ReLU(), conv2=nn.Conv2d(256, 2, 3, padding=1)
            )
        )
        self.mask = nn.Sequential(
            nn.Conv2d(HIDDEN, 256, 3, padding=1), nn.ReLU(), nn.Conv2d(256, 9 * SHRUNK * SHRUNK, 1)
        )


class RAFT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fnet = Encoder(nn.InstanceNorm2d)
        self.cnet = Encoder(nn.BatchNorm2d)
        self.update_block = Update()

    def forward(self, pictures: Tensor, iterations: int) -> Tensor:
        update = self.update_block
        features = self.fnet(pictures)
        hidden, context = self.cnet(pictures[:-1]).split(HIDDEN, 1)
        hidden, context = hidden.tanh(), context.relu()
        pyramid = correlations(features[:-1], features[1:])
        flow = torch.zeros_like(hidden[:, :2])
        for _ in range(iterations):
            motion = update.encoder(flow, looked_up(pyramid, flow))
            hidden = update.gru(hidden, torch.cat([context, motion], 1))
            flow = flow + update.flow_head(hidden)
        return upsampled(flow, update.mask(hidden) / 4)  # a fourth: as it was trained


def correlations(a: Tensor, b: Tensor) -> list[Tensor]:
    """Of each pixel of a with all of b, features [B, C, h, w]: LEVELS of [B, h * w, y, x], each of half the size."""
    all_pairs = torch.einsum("b c i, b c y x -> b i y x", a.flatten(2) / a.shape[1] ** 0.5, b)
    pyramid = [all_pairs]
    while len(pyramid) < LEVELS:
        pyramid.append(F.avg_pool2d(pyramid[-1], 2))
    return pyramid


def looked_up(pyramid: list[Tensor], flow: Tensor) -> Tensor:
    """What is correlated around where the flow leads, bilinear: [B, LEVELS * (2 RADIUS + 1)^2, h, w].

    In a level columns come before rows, as published: neighbours below each other have channels beside each other.
    """
    batch, _, h, w = flow.shape
    near = torch.arange(-RADIUS, RADIUS + 1, device=flow.device, dtype=flow.dtype)
    around = torch.stack(torch.meshgrid(near, near, indexing="ij"), -1)  # [x, y, 2]
    at = rearrange(flow + pixels(h, w, flow), "b two h w -> (b h w) 1 1 two")
    found = []
    for level, correlation in enumerate(pyramid):
        size = torch.tensor(correlation.shape[:1:-1], device=flow.device, dtype=flow.dtype)  # x, y
        grid = (2 * (at / 2**level + around) + 1) / size - 1
        volume = rearrange(correlation, "b i y x -> (b i) 1 y x")
        found.append(F.grid_sample(volume, grid, align_corners=False).view(batch, h, w, -1))
    return rearrange(torch.cat(found, -1), "b h w n -> b n h w").contiguous()


def pixels(h: int, w: int, like: Tensor) -> Tensor:
    """[2, h, w]: x and y of each pixel."""
    y, x = (torch.arange(side, device=like.device, dtype=like.dtype) for side in (h, w))
    return torch.stack(torch.meshgrid(x, y, indexing="xy"))


def upsampled(flow: Tensor, mask: Tensor) -> Tensor:
    """[B, 2, h, w] -> [B, 2, 8 h, 8 w]: each pixel a convex combination of the nine around it (appendix B)."""
    h, w = flow.shape[2:]
    weights = rearrange(mask, "b (n i j) h w -> b n i j h w", n=9, i=SHRUNK).softmax(1)
    nine = rearrange(F.unfold(SHRUNK * flow, 3, padding=1), "b (two n) (h w) -> b two n h w", n=9, h=h, w=w)
    return rearrange(torch.einsum("bnijhw, bcnhw -> bchiwj", weights, nine), "b c h i w j -> b c (h i) (w j)")


# -- names -------------------------------------------------------------------------------------------------------------

# torchvision's names of modules: of an encoder, of its blocks, and of what updates.
ENCODERS = {"fnet": "feature_encoder", "cnet": "context_encoder"}
ENDS = {"conv1": "convnormrelu.0", "norm1": "convnormrelu.1", "conv2": "conv"}
BLOCK = {f"{kind}{i}": f"convnormrelu{i}.{at}" for i in "12" for at, kind in enumerate(("conv", "norm"))}
UPDATE = {
    "encoder.convc1": "update_block.motion_encoder.convcorr1.0",
    "encoder.convc2": "update_block.motion_encoder.convcorr2.0",
    "encoder.convf1": "update_block.motion_encoder.convflow1.0",
    "encoder.convf2": "update_block.motion_encoder.convflow2.0",
    "encoder.conv": "update_block.motion_encoder.conv.0",
    **{f"gru.conv{gate}{i}": f"update_block.recurrent_block.convgru{i}.conv{gate}" for i in "12" for gate in "zrq"},
    "flow_head.conv1": "update_block.flow_head.conv1",
    "flow_head.conv2": "update_block.flow_head.conv2",
    "mask.0": "mask_predictor.convrelu.0",
    "mask.2": "mask_predictor.conv",
}


def in_torchvision(name: str) -> str:
    module, _, part = name.rpartition(".")
    root, _, inside = module.partition(".")
    if root == "update_block":
        return f"{UPDATE[inside]}.{part}"
    block, _, last = inside.rpartition(".")
    return ".".join(filter(None, (ENCODERS[root], block, (BLOCK if block else ENDS).get(last, last), part)))


def in_princeton(name: str) -> tuple[str, ...]:
    """A norm on the way around a block has two names there."""
    return (name, name.replace("downsample.1", "norm3")) if "downsample.1" in name else (name,)


def from_published(state: Mapping[str, Tensor]) -> tuple[State, int]:
    """By our names, from either layout; and how often its flow is updated."""
    with torch.device("meta"):
        ours = list(RAFT().state_dict())
    if any(name.startswith("feature_encoder.") for name in state):
        theirs = {in_torchvision(name): name for name in ours}
        check_names(state, theirs, "not torchvision's raft_large")
        return {theirs[name]: tensor for name, tensor in state.items()}, TORCHVISION
    if any(name.startswith("fnet.") for name in state):
        check_names(state, (name for each in ours for name in in_princeton(each)), "not Princeton's large RAFT")
        return {name: state[name] for name in ours}, PRINCETON
    raise ValueError("no RAFT: expected Princeton's raft-things.pth or torchvision's raft_large, or one of their kind")
