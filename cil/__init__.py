"""Conditional image leakage: its two cures and what they need, in plain PyTorch.

Shapes are written with B batch, T frames, C channels, H height, W width (of latents, unless said).

    from cil import InitialNoise, TimeNoise, VP
"""

from cil.conditioning import CDM, CleanCondition, ConstantNoise, Diagnosis, TimeNoise, diagnose
from cil.draws import Draws
from cil.initial_noise import InitialNoise
from cil.moments import Moments
from cil.objectives import Drops, Objective
from cil.processes import EDM, VP, Flow, Process
from cil.recipes import Recipe, recipe
from cil.samplers import frame_ramp, guided, sample

__all__ = [
    "CDM",
    "EDM",
    "VP",
    "CleanCondition",
    "ConstantNoise",
    "Diagnosis",
    "Draws",
    "Drops",
    "Flow",
    "InitialNoise",
    "Moments",
    "Objective",
    "Process",
    "Recipe",
    "TimeNoise",
    "diagnose",
    "frame_ramp",
    "guided",
    "recipe",
    "sample",
]
