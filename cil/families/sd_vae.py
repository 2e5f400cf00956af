"""What families share whose latents are of Stable Diffusion's VAE, one frame at a time: their sizes, and the way there
and back.
"""

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cil.families.base import Family
from cil.recipes import recipe

FRAMES_A_CALL = 4  # of the VAE: calls of one shape, and memory that does not grow with the clip
FACTOR = 8  # pixels to a latent, in height and width


class SDVAEFamily(Family):
    """`weights`: what is published, a file or a folder; without it everything is random, which is for trying."""

    scaling_factor = 0.18215
    presets: Mapping[str, Any]
    frozen: Any  # with .vae, made when it is first asked for

    def __init__(
        self,
        frames: int,
        height: int,
        width: int,
        preset: str,
        weights: str | None = None,
        tokenizer: str | None = None,
    ) -> None:
        if preset not in self.presets:
            raise ValueError(f"preset={preset!r}: the family {self.name} has {', '.join(self.presets)}")
        self.sizes = self.presets[preset]
        multiple = FACTOR * 2 ** (self.levels - 1)
        if frames < 1 or min(height, width) < multiple or height % multiple or width % multiple:
            raise ValueError(f"{frames} x {height} x {width}: the family {self.name} takes multiples of {multiple}")
        self.frames, self.height, self.width, self.preset = frames, height, width, preset
        self.weights, self.vocabulary = weights, tokenizer
        told = recipe(self.name)
        self.process, self.prediction = told.process, told.prediction

    @property
    @abstractmethod
    def levels(self) -> int:
        """Of the UNet, each of half the height and width of the one before."""

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        return self.frames, 4, self.height // FACTOR, self.width // FACTOR

    @property
    def encoder_identity(self) -> str:
        return f"{self.name}-{self.preset}-{self.weights or 'random'}"

    def latents(self, frames: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3] -> fp16 [B, T, 4, h, w]: the posterior's mode, clip by clip."""
        vae = self.frozen.vae
        clips = []
        for pixels in frames.permute(0, 1, 4, 2, 3):
            chunks = torch.split(pixels.float() / 127.5 - 1, FRAMES_A_CALL)
            clips.append(torch.cat([vae.encode(chunk.to(vae.device)).latent_dist.mode() for chunk in chunks]).cpu())
        return (self.scaling_factor * torch.stack(clips)).half()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        clips = torch.stack([self.pixels(clip) for clip in latents.float() / self.scaling_factor])
        return ((clips.permute(0, 1, 3, 4, 2) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)

    def pixels(self, latents: Tensor) -> Tensor:
        """One clip's unscaled latents [T, 4, h, w] -> [T, 3, H, W] in -1..1, on the CPU."""
        vae = self.frozen.vae
        return torch.cat([vae.decode(part.to(vae.device)).sample.cpu() for part in torch.split(latents, FRAMES_A_CALL)])


def clip_tokenizer(folder: str | None) -> Any:
    """CLIP's, of its two files."""
    from transformers import CLIPTokenizer

    if folder is None:
        raise ValueError("tokenizer=None: a folder with CLIP's vocab.json and merges.txt")
    if not Path(folder).is_dir():
        raise ValueError(f"{folder}: no folder; expected one with CLIP's vocab.json and merges.txt")
    return CLIPTokenizer.from_pretrained(folder, local_files_only=True)


def byte_tokenizer() -> Any:
    """CLIP's without merges: every byte, inside a word and at its end, and the two marks."""
    from transformers import CLIPTokenizer

    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    symbols = [*map(chr, visible), *(chr(256 + i) for i in range(len(hidden)))]
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
