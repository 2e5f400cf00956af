"""VideoCrafter1: the image enters as tokens of CLIP only, the same for all frames.

Conditioning noise is put on the tokens as the projector makes them, which is inside the network: the projector is
trained. The authors never gave it to their optimiser. Weights are published for 320x512.
"""

from cil.families.lvdm import LVDM, published, tiny
from cil.processes import VP


class VideoCrafter1(LVDM):
    name = "videocrafter1"
    concatenated = False
    lacks = ("token_noise",)  # it is on them anyway
    presets = {  # noqa: RUF012
        "tiny": tiny(VP(rescale=0.7), "eps"),
        "256": published(256, 256, VP(rescale=0.7), "eps"),
        "512": published(320, 512, VP(rescale=0.7), "eps"),
        "1024": published(576, 1024, VP(rescale=0.7), "eps"),
    }


build = VideoCrafter1
