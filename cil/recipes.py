"""What TimeNoise is in each family: the form of the noise, its dose and the time map belong together.

`recipe(family)` is what we advise: the paper's noise, drawn once for each element of the one conditional image, in a
dose that matches the reference's where its form was another one (docs/timenoise.md has the derivation). It is untested
at scale. `recipe(family, reference_compat=True)` is what the authors' code does, to compare with their weights.
"""

import math
from dataclasses import dataclass, replace

from cil.conditioning import TimeNoise
from cil.objectives import Drops
from cil.processes import EDM, VP, Prediction, Process

FRAMES = 16


@dataclass(frozen=True)
class Recipe:
    process: Process
    prediction: Prediction
    noise: TimeNoise
    noised: str  # what the noise is put on
    drops: Drops


def matched_beta_m(noise: TimeNoise, frames: int = FRAMES) -> float:
    """The beta_m at which elementwise noise leaves the signal-to-noise that `noise` leaves after averaging over frames.

    Noise that is drawn anew for each of T repeats of an image has 1/T of its variance left in their mean; noise that
    is drawn once, elementwise or as one number, has all of it.
    """
    if frames < 1:
        raise ValueError(f"frames={frames}: at least 1")
    return noise.beta_m / math.sqrt(frames) if noise.form == "per_frame" else noise.beta_m


REFERENCE = {
    "svd": Recipe(
        EDM(P_mean=-1.2, P_std=1.2, time_map="sigma"),
        "v",
        TimeNoise(15, form="scalar"),
        "image latents, not scaled",
        Drops(both=0.1),
    ),
    "dynamicrafter": Recipe(
        VP(zero_snr=True, rescale=0.7),
        "v",
        TimeNoise(100, form="per_frame"),
        "image latents, scaled",
        Drops(text=0.05, image=0.05, both=0.05),
    ),
    "videocrafter1": Recipe(
        VP(rescale=0.7),
        "eps",
        TimeNoise(100, mu_max=4),
        "projected CLIP tokens",
        Drops(text=0.2, image=0.2, both=0.2),
    ),
}


def _corrected(reference: Recipe) -> Recipe:
    return replace(reference, noise=TimeNoise(matched_beta_m(reference.noise), reference.noise.a))


CORRECTED = {
    # Large sigma, where leakage is, is hardly ever drawn at the reference's P_mean, and sigma / 700 knows no time.
    "svd": replace(_corrected(REFERENCE["svd"]), process=EDM(P_mean=0.7, P_std=1.6, time_map="log_sigma")),
    "dynamicrafter": _corrected(REFERENCE["dynamicrafter"]),
    # Shares of 0.2, a default that was never set, leave only 40 % of the samples whole.
    "videocrafter1": replace(_corrected(REFERENCE["videocrafter1"]), drops=Drops(text=0.05, image=0.05, both=0.05)),
    # The authors have no training code for it. Its image latent stands in one frame: DynamiCrafter's matched dose.
    "i2vgenxl": Recipe(
        VP(betas="squared_cosine", zero_snr=True),
        "v",
        TimeNoise(matched_beta_m(REFERENCE["dynamicrafter"].noise)),
        "frame-0 latent, scaled",
        Drops(text=0.05, image=0.05, both=0.05),
    ),
}


def recipe(family: str, reference_compat: bool = False) -> Recipe:
    """By the family's name."""
    recipes = REFERENCE if reference_compat else CORRECTED
    if family not in recipes:
        kind = "recipes of the reference" if reference_compat else "recipes"
        raise ValueError(f"family={family!r}: there are {kind} for {', '.join(recipes)}")
    return recipes[family]
