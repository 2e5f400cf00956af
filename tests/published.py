"""Published weights of every family as they are found on disk, of its tiny size for 4 x 32 x 48, with random values."""

from pathlib import Path

from cil import families
from cil.checkpoints import write_diffusers


def write_published(name: str, folder: Path, seed: int = 3) -> Path:
    """What `family.weights` names: a `.ckpt`, or a diffusers folder."""
    family = families.load(name, 4, 32, 48)
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
