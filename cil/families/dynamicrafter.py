"""DynamiCrafter: the image enters as a latent concatenated to every frame, and as tokens of CLIP for each frame.

Conditioning noise is put on the image latent, scaled, once before it is repeated. CLIP's tokens stay clean: the
authors' code puts pure noise in their place in most steps (docs/reference.md, 6), which we do not follow.
"""

from cil.families.lvdm import LVDM, TINY, published


class DynamiCrafter(LVDM):
    name = "dynamicrafter"
    concatenated = True
    presets = {  # noqa: RUF012
        "tiny": TINY,
        "256": published(1.0, "stride"),
        "512": published(0.7),
        "1024": published(0.3),
    }


build = DynamiCrafter
