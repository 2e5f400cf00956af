"""Conditional image leakage: its two cures and what they need, in plain PyTorch.

Shapes are written with B batch, T frames, C channels, H height, W width (of latents, unless said).

    from cil import InitialNoise, TimeNoise, VP
"""

from cil.conditioning import CleanCondition, ConstantNoise, TimeNoise
from cil.draws import Draws
from cil.initial_noise import InitialNoise
from cil.moments import Moments
from cil.objectives import Objective
from cil.processes import VP
from cil.samplers import ddim, guided

__all__ = [
    "VP",
    "CleanCondition",
    "ConstantNoise",
    "Draws",
    "InitialNoise",
    "Moments",
    "Objective",
    "TimeNoise",
    "ddim",
    "guided",
]
