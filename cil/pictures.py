"""Two pictures, as PNG files.

    python -m cil.pictures FOLDER                                # timenoise.png: the density of beta_s over t
    python -m cil.pictures FOLDER --noise initial_noise.safetensors --process dynamicrafter
                                                                 # and initial_noise.png: how far x_M is from the truth

Needs matplotlib (`pip install matplotlib`).
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from cil.conditioning import TimeNoise
from cil.initial_noise import InitialNoise
from cil.processes import EDM, VP, Process
from cil.recipes import CORRECTED

PROCESSES = {"vp": VP(), **{name: recipe.process for name, recipe in CORRECTED.items()}}
STARTS: dict[Literal["standard", "isotropic"], str] = {
    "standard": "without Analytic-Init: N(0, I), or as wide as sigma",
    "isotropic": "Analytic-Init",
}


def draw_timenoise(path: Path, exponents: Sequence[float], doses: Sequence[float]) -> None:
    """A panel for each a and beta_m: the density of beta_s at each t, each column scaled to its own largest value."""
    figure, panels = _figure(len(doses), len(exponents))
    u = torch.linspace(0, 1, 201)
    for row, beta_m in zip(panels, doses, strict=True):
        for panel, a in zip(row, exponents, strict=True):
            if beta_m == 0:
                raise ValueError("beta_m=0: there is no density to draw")
            noise, share = TimeNoise(beta_m, a), torch.linspace(0.0025, 0.9975, 200)
            density = noise.density(beta_m * share[:, None], u[None])
            panel.imshow(
                density / density.max(0, keepdim=True).values,
                origin="lower",
                extent=(0, 1, 0, beta_m),
                aspect="auto",
                cmap="Blues",
            )
            panel.plot(u, beta_m * torch.sigmoid(noise.center(u)), color="black", linewidth=1)
            panel.set(title=f"a = {a:g}, beta_m = {beta_m:g}", xlabel="t", ylabel="beta_s")
    figure.suptitle("TimeNoise: density of the noise level beta_s over time; line: median")
    figure.savefig(path, dpi=120)


def draw_initial_noise(path: Path, noise: InitialNoise, process: Process) -> None:
    """KL per dimension from the marginal to each start, over all M."""
    figure, panels = _figure(1, 1)
    if isinstance(process, EDM):
        values = torch.logspace(-1, math.log10(process.sigma_max), 60, dtype=torch.float64).tolist()
        values[-1] = process.sigma_max
    else:
        end = process.steps if isinstance(process, VP) else 1
        values = [end * i // 100 if end > 1 else i / 100 for i in range(40, 101)]
    panel = panels[0][0]
    for start, label in STARTS.items():
        kl = [noise.divergence(process, process.start(M), start) for M in values]
        panel.plot(values, [value or math.nan for value in kl], label=label)  # a log axis knows no 0
    panel.set(yscale="log", xlabel="M", ylabel="KL per dimension, nats", title="Distance of x_M from the true marginal")
    if isinstance(process, EDM):
        panel.set(xscale="log", xlabel="M (sigma)")
    panel.legend()
    panel.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _figure(rows: int, columns: int) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    size = (3.4 * columns, 2.8 * rows) if columns > 1 else (7, 4.5)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cil.pictures", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the PNG files are written")
    parser.add_argument("--a", type=float, nargs="+", default=[5.0, 1.0, 0.1], help="exponents of mu(t) = 2 t^a - 1")
    parser.add_argument("--beta-m", type=float, nargs="+", default=[25.0, 100.0], help="largest noise levels")
    parser.add_argument("--noise", type=Path, help="a file of initial noise that jobs.initial_noise has made")
    parser.add_argument("--process", choices=PROCESSES, default="vp", help="a family's process, or plain vp")
    chosen = parser.parse_args(arguments)
    try:
        chosen.folder.mkdir(parents=True, exist_ok=True)
        draw_timenoise(chosen.folder / "timenoise.png", chosen.a, chosen.beta_m)
        print(chosen.folder / "timenoise.png")
        if chosen.noise:
            draw_initial_noise(
                chosen.folder / "initial_noise.png", InitialNoise.load(chosen.noise), PROCESSES[chosen.process]
            )
            print(chosen.folder / "initial_noise.png")
    except (ValueError, OSError) as error:
        print(f"cil.pictures: {error}", file=sys.stderr)
        return 2
    except ImportError:
        print("cil.pictures: matplotlib is missing: pip install matplotlib", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
