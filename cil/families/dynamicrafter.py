"""DynamiCrafter: the image enters as a latent concatenated to every frame, and as tokens of CLIP for each frame.

Conditioning noise is put on the image latent, scaled, once before it is repeated. CLIP's tokens stay clean: the
authors' code puts pure noise in their place in most steps (docs/reference.md, 6), which we do not follow.
"""

from cil.families.lvdm import LVDM, published, tiny
from cil.processes import VP


class DynamiCrafter(LVDM):
    name = "dynamicrafter"
    concatenated = True
    presets = {  # noqa: RUF012
        "tiny": tiny(VP(zero_snr=True, rescale=0.7), "v"),
        "256": published(256, 256, VP(), "eps", "stride", learned_image_scale=True),
        "512": published(320, 512, VP(zero_snr=True, rescale=0.7), "v"),
        "1024": published(576, 1024, VP(zero_snr=True, rescale=0.3), "v"),
    }


build = DynamiCrafter
