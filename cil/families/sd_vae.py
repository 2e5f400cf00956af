"""What families share whose latents are of Stable Diffusion's VAE, one frame at a time: their sizes, and the way there
and back.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from cil.checkpoints import State, compare, digest, load_into, naming
from cil.draws import Draws
from cil.families.base import Clip, Family, Options
from cil.nets.openclip import clip_pixels, stretched
from cil.recipes import recipe

FRAMES_A_CALL = 4  # of the VAE: every call has this shape, and memory does not grow with the clip
FACTOR = 8  # pixels to a latent, in height and width

T = TypeVar("T")


class SDVAEFamily(Family):
    """Frozen: the VAE, CLIP's image tower, and a text tower where there is text."""

    scaling_factor = 0.18215

    def __init__(
        self, preset: str, frames: int | None, height: int | None, width: int | None, options: Options
    ) -> None:
        super().__init__(preset, frames, height, width, options)
        self.multiple = FACTOR * 2 ** (self.levels - 1)
        self._check_size()
        told = recipe(self.name)
        self.process, self.prediction, self.timenoise = told.process.shifted(options.shift), told.prediction, told.noise

    @property
    @abstractmethod
    def levels(self) -> int:
        """Of the UNet, each of half the height and width of the one before."""

    @property
    @abstractmethod
    def image_size(self) -> int:
        """Of what the image tower sees, in pixels."""

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return self.frames, 4, self.height // FACTOR, self.width // FACTOR

    # -- frozen --------------------------------------------------------------------------------------------------------

    @abstractmethod
    def _frozen(self) -> dict[str, Any]:
        """`vae`, `image` and perhaps `text`: the published models, or random ones."""

    @cached_property
    def frozen(self) -> Mapping[str, Any]:
        models = self._frozen()
        for name, model in models.items():
            model.requires_grad_(False).eval()
            if model.dtype != self._precision(name):
                nn.Module.to(model, self._precision(name))  # diffusers' own warns of what does not concern us
        return models

    def _precision(self, model: str) -> torch.dtype:
        kind: torch.dtype = getattr(torch, self.options.precision)
        return kind

    @cached_property
    def encoder_identity(self) -> str:
        """Of what the frozen models hold, wherever their files lie."""
        told = f"{self.name}-{self.preset}-{self.options.precision}"
        if self.options.weights is None:
            return f"{told}-random"
        held = {f"{model}.{name}": t for model, part in self.frozen.items() for name, t in part.state_dict().items()}
        return f"{told}-{digest(held)}"

    def to(self, device: torch.device | str) -> Self:
        for model in self.frozen.values():
            nn.Module.to(model, device)
        return self

    @torch.no_grad()
    def encode_frames(self, frames: Tensor, clips: Sequence[Clip]) -> dict[str, Tensor]:
        """Latents, the clip's speed, and the image: as CLIP's tower sees it, or what the tower says of it."""
        frames = frames.to(self.frozen["vae"].device, non_blocking=True)
        image = self.as_clip_sees(torch.stack([each[clip.frame] for each, clip in zip(frames, clips, strict=True)]))
        seen = {"clip": self._clip(image).half()} if self.options.clip_features else {"image": image}
        made = {name: tensor.cpu() for name, tensor in (self._latents(frames, clips) | seen).items()}
        return made | self.rates(clips)

    def rates(self, clips: Sequence[Clip]) -> dict[str, Tensor]:
        return {"rate": torch.tensor([self._rate(clip) for clip in clips])}

    def as_clip_sees(self, frames: Tensor) -> Tensor:
        """uint8 [B, H, W, 3] -> uint8 [B, size, size, 3]."""
        return stretched(frames, self.image_size)

    def _look(self, tower: Any, pixels: Tensor) -> Tensor:
        """What the network is told of CLIP's answer to pixels [B, 3, size, size]."""
        embedding: Tensor = tower(pixel_values=pixels).image_embeds
        return embedding

    @abstractmethod
    def _rate(self, clip: Clip) -> float:
        """What the network is told of a clip's speed."""

    def clip(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Float32, cached or made in this step."""
        if "clip" in batch:
            return batch["clip"].float()
        with torch.no_grad():
            return self._clip(batch["image"]).float()

    def _clip(self, image: Tensor) -> Tensor:
        tower = self.frozen["image"].to(image.device)
        return self._look(tower, clip_pixels(image, self.image_size).to(tower.dtype))

    def _latents(self, frames: Tensor, clips: Sequence[Clip]) -> dict[str, Tensor]:
        """uint8 [B, T, H, W, 3] -> fp16 [B, T, 4, h, w], clip by clip."""
        vae = self.frozen["vae"]
        means, stds = [], []
        for clip in frames.permute(0, 1, 4, 2, 3):
            chunks = [chunk.float() / 127.5 - 1 for chunk in _chunks(clip)]
            posteriors = [vae.encode(chunk.to(vae.dtype)).latent_dist for chunk in chunks]
            means.append(torch.cat([posterior.mean for posterior in posteriors])[: len(clip)].float())
            stds.append(torch.cat([posterior.std for posterior in posteriors])[: len(clip)].float())
        mean, std = (self.scaling_factor * torch.stack(parts) for parts in (means, stds))
        if self.options.latents == "mean_std":
            return {"latents": mean.half(), "latents_std": std.half()}
        if self.options.latents == "sample":
            mean = mean + std * Draws([(clip.seed,) for clip in clips]).normal(*mean.shape[1:]).to(mean)
        return {"latents": mean.half()}

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        clips = torch.stack([self._pixels(self.frozen["vae"], clip) for clip in latents.float() / self.scaling_factor])
        return ((clips.permute(0, 1, 3, 4, 2) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def _pixels(self, vae: Any, latents: Tensor) -> Tensor:
        """One clip's unscaled latents [T, 4, h, w] -> [T, 3, H, W] in -1..1, on the CPU."""
        parts = (part.to(vae.device, vae.dtype) for part in _chunks(latents))
        return torch.cat([vae.decode(part).sample.float().cpu() for part in parts])[: len(latents)]

    # -- the network ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def _fresh(self) -> nn.Module:
        """With random weights."""

    def network(self, seed: int, state: Mapping[str, Tensor] | None = None) -> nn.Module:
        """In float32, which training needs."""
        if state is None and self.options.weights is None:
            return seeded(seed, self._fresh)
        with torch.device("meta"):
            net = self._fresh()
        if state is None:
            state = self.restore(Path(str(self.options.weights)))
        load_into(net, state, dtype=torch.float32, wanted=self.name)
        return net

    def _checked(self, path: Path, state: State) -> State:
        """What was read from `path`, if it is the network's."""
        with torch.device("meta"):
            net = self._fresh()
        with naming(path):
            compare(net.state_dict(), state, self.name)
        return state


def _chunks(clip: Tensor) -> Sequence[Tensor]:
    """Of FRAMES_A_CALL frames each: the last frame is repeated until the last chunk is full."""
    lacking = -len(clip) % FRAMES_A_CALL
    return torch.split(torch.cat([clip, clip[-1:].expand(lacking, *clip.shape[1:])]), FRAMES_A_CALL)


def seeded(seed: int, make: Callable[[], T]) -> T:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
