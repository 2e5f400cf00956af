"""A family encodes where it is told to stand: on a device in the place of a GPU, and on a GPU where there is one."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cil.families import NAMES, load
from cil.families.base import Clip

CLIPS = [Clip("a red ball", 8.0, 2, seed=5, frame=1)]
MADE_ON_CPU = {"randn", "stack", "lift_fresh"}  # what is drawn for a clip, on every device the same; and its rate
OPTIONS = [{}, {"latents": "mean_std", "clip_features": True}, {"latents": "sample", "precision": "bfloat16"}]
CASES = [(name, options) for name in NAMES for options in (OPTIONS if name != "toy" else [{}])]


def encoded(name: str, device: str, frames: Tensor, options: dict[str, object]) -> dict[str, Tensor]:
    return load(name, 4, 32, 48, "tiny", **options).to(device).encode(frames, CLIPS)


def frames() -> Tensor:
    coarse = torch.rand(1, 4, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse.flatten(0, 1), size=(32, 48), mode="bilinear")
    return (smooth * 255).to(torch.uint8).unflatten(0, (1, 4)).permute(0, 1, 3, 4, 2).contiguous()


class Standing(TorchDispatchMode):
    """PyTorch's meta device in the place of a GPU: it has no values, so whoever waits for one fails.

    What it lacks of a GPU is here: to refuse operands on two devices, and to be copied from, which gives zeros.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_cpu: set[str] = set()  # what made floats there
        self.brought: list[str] = []  # from the device, the kinds of what was

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket.__name__, kwargs or {}
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if name == "_to_copy" and given[0].is_meta and torch.device(kwargs.get("device") or "meta").type == "cpu":
            self.brought.append(str(given[0].dtype))
            return torch.zeros(given[0].shape, dtype=kwargs.get("dtype") or given[0].dtype)
        if name not in ("_to_copy", "copy_"):
            assert len({t.device for t in given if t.dim()}) <= 1, f"{name} of tensors on two devices"
        made = function(*args, **kwargs)
        if any(isinstance(t, Tensor) and not t.is_meta and t.is_floating_point() for t in tree_leaves(made)):
            self.on_cpu.add(name)
        return made


@pytest.mark.parametrize(("name", "options"), [case for case in CASES if case[0] != "toy"])
def test_where_a_family_stands_all_is_computed_and_only_what_is_cached_comes_back(name, options):
    wanted = encoded(name, "cpu", frames(), options)
    family, pictures = load(name, 4, 32, 48, "tiny", **options).to("meta"), frames()
    with Standing() as device:
        made = family.encode(pictures, CLIPS)
    assert {key: (t.device.type, t.dtype, t.shape) for key, t in made.items()} == {
        key: ("cpu", t.dtype, t.shape) for key, t in wanted.items()
    }
    assert device.brought == [str(t.dtype) for key, t in made.items() if key != "rate"]
    assert device.on_cpu <= MADE_ON_CPU


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(("name", "options"), CASES)
def test_a_gpu_gives_what_a_cpu_gives_within_the_rounding_of_its_precision(name, options):
    """Convolutions in float32 round their operands to TF32: 2^-11, as float16. bfloat16 to 2^-8. Some ten layers."""
    here, there = (encoded(name, device, frames(), options) for device in ("cpu", "cuda"))
    share = 0.2 if options.get("precision") == "bfloat16" else 0.03
    for key, wanted in here.items():
        off = (there[key].double() - wanted.double()).abs().max()
        assert off <= (1 if wanted.dtype == torch.uint8 else share * wanted.double().std() + 1e-3), key
