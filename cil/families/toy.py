"""toy: the smallest honest image-to-video model, which a CPU trains in minutes.

Latents are the four lowest coefficients of a 4x4 block DCT of the brightness: a fixed stand-in for a VAE that keeps
most of the variance of smooth pictures. The image enters as a latent concatenated to every frame, as in DynamiCrafter
and SVD.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from cil.checkpoints import load_into, read, write_safetensors
from cil.conditioning import ConditioningNoise, TimeNoise
from cil.draws import Draws
from cil.families.base import Clip, Condition, Family, Options, Preset, image_latent, precision_of
from cil.nets.toy import ToyNet
from cil.processes import VP, Prediction

FILE = "toy.safetensors"
BLOCK = 4
FREQUENCIES = ((0, 0), (0, 1), (1, 0), (1, 1))


class Toy(Family):
    name = "toy"
    modules = ("cil.nets.toy",)
    prediction: Prediction = "x0"
    scaling_factor = 1.0
    multiple = 2 * BLOCK
    temporal = r"^fine_(in|out)_attention\."
    timenoise = TimeNoise(1.0, 5.0)
    lacks = ("weights", "tokenizer", "latents", "clip_features", "token_noise", "precision")
    presets = {  # noqa: RUF012
        "tiny": Preset((8, 16), 8, 32, 32),  # channels of the two levels
        "small": Preset((28, 56), 8, 32, 32),
    }

    def __init__(
        self, preset: str, frames: int | None, height: int | None, width: int | None, options: Options
    ) -> None:
        super().__init__(preset, frames, height, width, options)
        self._check_size()
        self.process = VP().shifted(options.shift)
        i = torch.arange(BLOCK, dtype=torch.float64)
        wave = torch.cos(torch.pi * (i + 0.5) * i[:2, None] / BLOCK) * (2 / BLOCK) ** 0.5
        wave[0] /= 2**0.5
        # orthonormal [4, BLOCK, BLOCK]
        self.basis = torch.stack([torch.outer(wave[v], wave[h]) for v, h in FREQUENCIES]).float()

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return self.frames, len(FREQUENCIES), self.height // BLOCK, self.width // BLOCK

    @property
    def encoder_identity(self) -> str:
        return f"toy-dct{BLOCK}-scale{self.scaling_factor}"

    def encode_frames(self, frames: Tensor, clips: Sequence[Clip]) -> dict[str, Tensor]:
        grey = frames.float().mean(-1) / 127.5 - 1
        blocks = rearrange(grey, "b t (h p) (w q) -> b t h w p q", p=BLOCK, q=BLOCK)
        latents = torch.einsum("b t h w p q, c p q -> b t c h w", blocks, self.basis.to(frames.device))
        return {"latents": (self.scaling_factor * latents).half()}

    def decode(self, latents: Tensor) -> Tensor:
        scaled = latents.float() / self.scaling_factor
        blocks = torch.einsum("b t c h w, c p q -> b t h w p q", scaled, self.basis.to(latents.device))
        grey = rearrange(blocks, "b t h w p q -> b t (h p) (w q)")
        pixels = ((grey + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return repeat(pixels, "b t h w -> b t h w c", c=3)

    def network(self, seed: int, state: Mapping[str, Tensor] | None = None) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            net = ToyNet(len(FREQUENCIES), *self.networks)
        if state is not None:
            load_into(net, state, wanted=self.name)
        return net

    def condition(
        self, batch: Mapping[str, Tensor], noise: ConditioningNoise, u: Tensor, draws: Draws | None
    ) -> tuple[Condition, Tensor]:
        image, level = noise(image_latent(batch), u, draws)
        return {"image": image}, level

    def denoise(self, net: nn.Module, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        image = repeat(condition["image"], "b c h w -> b t c h w", t=x_t.shape[1])
        x = torch.cat([x_t, image], dim=2).to(precision_of(net))
        answer: Tensor = net(x, self.process.unit_time(t))
        return answer.float()

    def loss_weight(self, t: Tensor) -> Tensor:
        """1 / max(sigma^2, 0.2): x0-errors at small t are small, and would not be learned."""
        return (1 / (self.process.sigma(t) ** 2).clamp_min(0.2)).float()

    def export(self, state: Mapping[str, Tensor], folder: Path) -> list[str]:
        write_safetensors(folder / FILE, state)
        return [FILE]

    def restore(self, path: Path, averaged: bool = True) -> dict[str, Tensor]:
        return read(path / FILE if path.is_dir() else path)


build = Toy
