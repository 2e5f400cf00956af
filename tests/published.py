"""Published weights as they are found on disk, of tiny networks, with random values."""

import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from cil import families
from cil.checkpoints import write_diffusers
from cil.families.sd_vae import seeded
from pipelines.config import Config


def write_published(name: str, folder: Path, seed: int = 3, frames: int = 4) -> Path:
    """What `family.weights` names, for clips of 32 x 48: a `.ckpt`, or a diffusers folder."""
    family = families.load(name, frames, 32, 48)
    net = family.network(seed)
    if name in ("dynamicrafter", "videocrafter1"):
        (file,) = family.export(net.state_dict(), folder)
        return folder / file
    if name == "svd":
        parts = {"unet": net, "vae": family.frozen["vae"], "image_encoder": family.frozen["image"]}
        for part, model in parts.items():
            write_diffusers(folder / part, model.state_dict())
        return folder
    parts = {"unet": net, "vae": family.frozen["vae"]}
    parts |= {"text_encoder": family.frozen["text"], "image_encoder": family.frozen["image"]}
    for part, model in parts.items():
        model.save_pretrained(folder / part)
    return folder


def write_clip(folder: Path, width: int = 24, seed: int = 0) -> Path:
    """A CLIP of both towers for pictures of 28 x 28, as transformers keeps openai/clip-vit-large-patch14."""
    from transformers import CLIPConfig, CLIPModel

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    image = sizes | {"image_size": 28, "patch_size": 14, "projection_dim": width}
    text = sizes | {"vocab_size": 514, "bos_token_id": 512, "eos_token_id": 513, "projection_dim": width}
    config = CLIPConfig(text_config=text, vision_config=image, projection_dim=width)
    seeded(seed, lambda: CLIPModel(config)).save_pretrained(folder)
    return folder


def write_head(file: Path, width: int = 24, seed: int = 0) -> Path:
    """A linear aesthetic head, as sa_0_4_vit_l_14_linear.pth."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, width, generator=random)
    torch.save({"weight": weight, "bias": torch.tensor([5.0])}, file)
    return file


def aesthetic_by_hand(frame: torch.Tensor, head: Path, clip: Path) -> float:
    """Of uint8 [H, W, 3]: transformers' own preprocessing with PIL, its model, and a product."""
    from transformers import CLIPVisionModelWithProjection
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    see = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pixels = see(Image.fromarray(frame.numpy()), return_tensors="pt").pixel_values
    with torch.no_grad():
        (embedding,) = CLIPVisionModelWithProjection.from_pretrained(clip)(pixel_values=pixels).image_embeds
    held = torch.load(head, weights_only=True)
    return float(embedding / embedding.norm() @ held["weight"][0] + held["bias"][0])


class I3D(nn.Module):
    """Features: means and deviations of three colours over time."""

    def __init__(self, wide: bool = True) -> None:
        super().__init__()
        self.wide = wide

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        x = x.float() / 64
        found = torch.cat(
            [x.mean(dim=[2, 3, 4]), x.std(dim=[3, 4]).mean(dim=2), x.diff(dim=2).abs().mean([2, 3, 4])], 1
        )
        if not return_features:
            return torch.softmax(found, 1)
        return found if self.wide else found[:, :, None]


class Lengthy(nn.Module):
    """As many features, or classes, as a video has frames."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        return torch.softmax(x.float().mean(dim=[1, 3, 4]), 1)


class C3D(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x.float().mean(dim=[2, 3, 4]), 1)


def saved(module: nn.Module, path: Path) -> str:
    torch.jit.script(module).save(path)
    return str(path)


def write_raft(file: Path, step: tuple[float, float], layout: str = "torchvision") -> Path:
    """Weights of RAFT that see one flow wherever they look: an update adds `step` (x, y), of eight pixels each."""
    shapes = json.loads((Path(__file__).parent / f"cil/golden/raft_{layout}_full_keys.json").read_text())
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    for name, tensor in state.items():
        if name.endswith("running_var"):
            tensor += 1
        if name.endswith("num_batches_tracked"):
            state[name] = tensor.long()
        if name.endswith("flow_head.conv2.bias"):
            tensor += torch.tensor(step)
        if name.endswith(("mask.2.bias", "mask_predictor.conv.bias")):
            tensor[4 * 64 : 5 * 64] = 200  # all is what the pixel in the middle says, of nine
    torch.save(state, file)
    return file


def told_of(weights: Path, config: Config) -> list[Path]:
    """The manifests of a study whose identity names a place of weights."""
    found = {path: json.loads(path.read_text()) for path in Path(config.out).rglob("manifest.json")}
    # A checkpoint's has its configuration too, for people.
    held = {
        path: told.get("identity", {k: v for k, v in told.items() if k != "config"}) for path, told in found.items()
    }
    return [path for path, told in held.items() if str(weights) in json.dumps(told)]
