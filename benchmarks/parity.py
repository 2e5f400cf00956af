"""Our networks against figures of the reference: every *_small.json of a folder.

    python -m benchmarks.parity tests/cil/golden

A file holds a configuration, names and shapes of all weights, inputs and the outputs that the reference gave for them
(tests/cil/golden/README.md). Weights and inputs are made from their names, with `fill_prefix` before the name of each
weight where the file has one. A row is printed for each file; the exit status is 1 where one is off by more than the
tolerance, or of no network of ours.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import benchmarks
from cil.nets.autoencoder import Autoencoder
from cil.nets.lvdm import LVDMUNet, Resampler

FILL = Path(__file__).parents[1] / "tests/cil/golden/fill.py"
TOLERANCE = 2e-5  # float32 on a CPU
LVDM = {
    *("in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions"),
    *("num_head_channels", "transformer_depth", "context_dim"),
}

Named = dict[str, Tensor]
Outputs = Iterator[tuple[str, Tensor, list[float]]]  # what, ours, the reference's


def lvdm_unet(config: dict[str, Any]) -> nn.Module:
    per_frame = None if config.get("use_image_attention") else 16
    settings = {name: value for name, value in config.items() if name in LVDM}
    return LVDMUNet(**settings, tokens_per_frame=per_frame, default_fps=config.get("default_fs", 16))


def lvdm_unet_outputs(net: nn.Module, figures: dict[str, Any], inputs: Named) -> Outputs:
    t = torch.tensor(figures["timesteps"])
    rate = "fs" if "fs_condition" in figures["config"] else "fps"
    for case in figures["cases"]:
        fps = case["kwargs"].get(rate)
        context = inputs[case["context"]]
        answer = net(inputs["input:x"].transpose(1, 2), t, context, None if fps is None else torch.tensor(fps))
        yield case["label"], answer.transpose(1, 2), case.get("output") or case["output_stats"]["first4"]


def projector(config: dict[str, Any]) -> nn.Module:
    queries = config["num_queries"] * config.get("video_length", 1)
    sizes = (config[name] for name in ("dim", "depth", "heads", "dim_head", "embedding_dim", "output_dim"))
    return Resampler(queries, *sizes)


def projector_outputs(net: nn.Module, figures: dict[str, Any], inputs: Named) -> Outputs:
    yield "tokens", net(inputs["input:clip_tokens"]), figures["output"]


def svd_unet(config: dict[str, Any]) -> nn.Module:
    from diffusers import UNetSpatioTemporalConditionModel

    net: nn.Module = UNetSpatioTemporalConditionModel(**config)
    return net


def svd_unet_outputs(net: nn.Module, figures: dict[str, Any], inputs: Named) -> Outputs:
    ids = torch.tensor(figures["added_time_ids"], dtype=torch.float32)
    t = torch.tensor(figures["timesteps"])
    yield "output", net(inputs["input:x"], t, inputs["input:clip"], ids).sample, figures["output"]


class LdmAutoencoder(nn.Module):
    """diffusers' VAE by ldm's names."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        sizes = config["ddconfig"]
        self.names = Autoencoder(sizes["ch"], tuple(sizes["ch_mult"]), sizes["num_res_blocks"], sizes["z_channels"])
        self.vae = self.names.build()

    def state_dict(self, *_: Any, **__: Any) -> dict[str, Tensor]:
        return self.names.to_ldm(self.vae.state_dict())

    def load_state_dict(self, state: Any, *_: Any, **__: Any) -> Any:
        return self.vae.load_state_dict(self.names.to_diffusers(state))


def autoencoder_outputs(net: LdmAutoencoder, figures: dict[str, Any], inputs: Named) -> Outputs:
    posterior = net.vae.encode(inputs["input:image"]).latent_dist
    yield "moments", posterior.parameters, figures["moments"]
    yield "sample", posterior.mean + posterior.std * inputs["input:posterior_noise"], figures["sample"]
    yield "decode", net.vae.decode(inputs["input:latent"]).sample, figures["decode"]


KINDS: dict[str, tuple[Callable[[dict[str, Any]], nn.Module], Callable[..., Outputs]]] = {
    "model_channels": (lvdm_unet, lvdm_unet_outputs),
    "num_queries": (projector, projector_outputs),
    "down_block_types": (svd_unet, svd_unet_outputs),
    "ddconfig": (LdmAutoencoder, autoencoder_outputs),
}


@torch.no_grad()
def compare(path: Path, fill: Callable[[str, list[int]], Any]) -> dict[str, object]:
    """One file's row."""
    figures = json.loads(path.read_text())
    kind = next((kind for kind in KINDS if kind in figures.get("config", {})), None)
    if kind is None:
        return _row(path, None, f"no network of ours: its configuration has none of {', '.join(KINDS)}")
    build, outputs = KINDS[kind]
    prefix = figures.get("fill_prefix", "")
    net = build(figures["config"])
    shapes = {name: list(tensor.shape) for name, tensor in net.state_dict().items()}
    if differing := sorted(
        name for name in shapes.keys() | figures["keys"].keys() if shapes.get(name) != figures["keys"].get(name)
    ):
        return _row(path, None, f"{len(differing)} names or shapes differ, the first is {differing[0]}")
    net.load_state_dict({name: torch.from_numpy(fill(prefix + name, shape)) for name, shape in shapes.items()})
    net.eval()
    inputs = {name: torch.from_numpy(fill(name, size)) for name, size in figures["inputs"].items()}
    worst, where = 0.0, ""
    for what, ours, theirs in outputs(net, figures, inputs):
        flat = ours.flatten()[: len(theirs)]
        deviation = float((flat - torch.tensor(theirs)).abs().max()) if torch.isfinite(flat).all() else float("inf")
        if deviation >= worst:
            worst, where = deviation, what
    return _row(path, worst, where)


def _row(path: Path, worst: float | None, where: str) -> dict[str, object]:
    return {"file": path.name, "largest deviation": worst, "where": where}


def run(arguments: list[str] | None = None) -> int:
    about = argparse.ArgumentParser(
        prog="python -m benchmarks.parity", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    about.add_argument("folder", type=Path, help="with *_small.json files")
    about.add_argument("--tolerance", type=float, default=TOLERANCE, help=f"absolute; default {TOLERANCE}")
    chosen = about.parse_args(arguments)
    spec = importlib.util.spec_from_file_location("fill", FILL)
    assert spec is not None
    assert spec.loader is not None
    fill = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fill)
    files = sorted(chosen.folder.glob("*_small.json"))
    if not files:
        print(f"benchmarks.parity: {chosen.folder} has no *_small.json", file=sys.stderr)
        return 2
    try:
        rows = [compare(path, fill.fill) for path in files]
    except (ValueError, KeyError, TypeError) as error:
        print(f"benchmarks.parity: {error}", file=sys.stderr)
        return 2
    failed = False
    for row in rows:
        worst = row["largest deviation"]
        row["met"] = isinstance(worst, float) and worst <= chosen.tolerance
        row["largest deviation"] = "" if worst is None else f"{worst:.1e}"
        failed |= not row["met"]
    print(benchmarks.table(rows))
    return int(failed)


if __name__ == "__main__":
    sys.exit(run())
