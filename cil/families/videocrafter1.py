"""VideoCrafter1: the image enters as tokens of CLIP only, the same for all frames.

Conditioning noise is put on the tokens as the projector makes them, which is inside the network: the projector is
trained. The authors never gave it to their optimiser.
"""

from cil.families.lvdm import LVDM, TINY, published


class VideoCrafter1(LVDM):
    name = "videocrafter1"
    concatenated = False
    presets = {"tiny": TINY, "512": published(0.7)}  # noqa: RUF012


build = VideoCrafter1
