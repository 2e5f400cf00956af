"""The networks of DynamiCrafter and VideoCrafter1: names, outputs, trajectories and losses of the reference."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from golden.fill import fill_state
from torch import Tensor, nn

from cil import Draws, InitialNoise, Objective, guided, recipe, sample
from cil.conditioning import CleanCondition
from cil.families.toy import Toy
from cil.nets.lvdm import LVDMUNet, Resampler

FAMILIES = ("dynamicrafter", "videocrafter1")
NETWORK = 2e-5  # float32 on a CPU; the reference itself is off its float64 run by 4e-6
UNET = {
    *("in_channels", "out_channels", "model_channels", "channel_mult", "num_res_blocks", "attention_resolutions"),
    *("num_head_channels", "transformer_depth", "context_dim"),
}


def shapes(net: nn.Module, prefix: str = "") -> dict[str, list[int]]:
    return {prefix + name: list(tensor.shape) for name, tensor in net.state_dict().items()}


def filled(net: nn.Module, keys: dict[str, list[int]]) -> nn.Module:
    net.load_state_dict({name: torch.from_numpy(value) for name, value in fill_state(keys).items()}, strict=True)
    return net.eval()


@pytest.fixture(scope="module")
def unet(golden) -> Callable[[str], LVDMUNet]:
    def build(family: str) -> LVDMUNet:
        figures = golden[f"{family}_unet_small"]
        per_frame = 16 if family == "dynamicrafter" else None
        settings = {name: value for name, value in figures["config"].items() if name in UNET}
        net = LVDMUNet(**settings, tokens_per_frame=per_frame, default_fps=figures["config"].get("default_fs", 16))
        return filled(net, figures["keys"])

    made = {family: build(family) for family in FAMILIES}
    return made.__getitem__


def resampler(figures: dict[str, Any]) -> Resampler:
    c = figures["config"]
    queries = c["num_queries"] * c.get("video_length", 1)
    sizes = c["dim"], c["depth"], c["heads"], c["dim_head"], c["embedding_dim"], c["output_dim"]
    return Resampler(queries, *sizes)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_those_of_the_published_unet_and_projector(family, golden):
    with torch.device("meta"):
        unet = LVDMUNet(in_channels=8 if family == "dynamicrafter" else 4)
        projector = Resampler(queries=256 if family == "dynamicrafter" else 16)
    assert shapes(unet, "model.diffusion_model.") == golden[f"{family}_unet_full_keys"]
    assert shapes(projector, "image_proj_model.") == golden[f"{family}_image_proj_full_keys"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("case", range(3))
@torch.no_grad()
def test_the_unet_answers_as_the_reference(family, case, unet, golden, reference_input):
    figures, net = golden[f"{family}_unet_small"], unet(family)
    wanted = figures["cases"][case]
    fps = wanted["kwargs"].get("fs", wanted["kwargs"].get("fps"))
    x, context = (
        reference_input(name.removeprefix("input:"), *figures["inputs"][name])
        for name in ("input:x", wanted["context"])
    )
    t = torch.tensor(figures["timesteps"])
    answer = net(x.transpose(1, 2), t, context, None if fps is None else torch.tensor(fps)).transpose(1, 2)
    assert list(answer.shape) == wanted["output_shape"]
    if "output" in wanted:
        np.testing.assert_allclose(answer.flatten(), wanted["output"], rtol=0, atol=NETWORK)
    else:
        stats = wanted["output_stats"]
        np.testing.assert_allclose(answer.flatten()[:4], stats["first4"], rtol=0, atol=NETWORK)
        assert float(answer.mean()) == pytest.approx(stats["mean"], abs=NETWORK)
        assert float(answer.std()) == pytest.approx(stats["std"], abs=NETWORK)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_the_projector_answers_as_the_reference(family, golden, reference_input):
    figures = golden[f"{family}_image_proj_small"]
    net = filled(resampler(figures), figures["keys"])
    assert shapes(net) == figures["keys"]
    answer = net(reference_input("clip_tokens", *figures["inputs"]["input:clip_tokens"]))
    assert list(answer.shape) == figures["output_shape"]
    np.testing.assert_allclose(answer.flatten(), figures["output"], rtol=0, atol=NETWORK)


class FreshNoise(Draws):
    """The noise that the reference drew in each step."""

    def __init__(self, steps: list[Tensor]) -> None:
        super().__init__([(0,)])
        self.steps = steps

    def normal(self, *shape: int) -> Tensor:
        return self.steps.pop(0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("eta", [0, 1])
@torch.no_grad()
def test_a_whole_trajectory_equals_the_references(family, eta, unet, golden, reference_input):
    figures, net = golden[f"{family}_ddim_trajectory"], unet(family)
    dynamicrafter = family == "dynamicrafter"
    r = recipe(family, reference_compat=True)
    turned = lambda name, *shape: reference_input(name, *shape).transpose(1, 2)  # noqa: E731 - B C T H W there
    shape = (1, 4, 4, 8, 12)
    noise = InitialNoise(0.3 * turned("traj_mean", *shape)[0].double(), figures["trCov_d"])
    mean, std = noise.at(r.process, r.process.start(figures["M"]), reference_compat=True)
    x = (mean + std * turned("traj_eps", *shape)).float()
    np.testing.assert_allclose(x.transpose(1, 2).flatten(), figures["x_T"], rtol=0, atol=1e-6)  # float32, up to 4

    # The reference's VideoCrafter1 takes its steps from the end, whatever M is.
    times = r.process.times(5, figures["M"]) if dynamicrafter else r.process.times(5, spacing="uniform")
    assert times.tolist() == figures["timesteps_in_order"]
    contexts = [
        reference_input(name, *figures["inputs"][f"input:{name}"]) for name in ("traj_context", "traj_uncond_context")
    ]
    image = turned("traj_image", 1, 4, 1, 8, 12).expand(-1, 4, -1, -1, -1)
    fps = torch.tensor(figures["fs" if dynamicrafter else "fps"])

    def denoise(context: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        concat = (lambda x: torch.cat([x, image], dim=2)) if dynamicrafter else (lambda x: x)
        return lambda x, t: net(concat(x), t, context, fps)

    both = guided(*map(denoise, contexts), figures["cfg"], figures["guidance_rescale"])
    fresh = FreshNoise([turned(f"traj_step_noise_{i}", *shape) for i in range(5)])
    video = sample(both, x, r.process, times, r.prediction, eta, fresh, reference_compat=family).transpose(1, 2)
    wanted = torch.tensor(figures["eta1"]["final"] if eta else figures["eta0_final"]).reshape(shape)
    if dynamicrafter:
        torch.testing.assert_close(video, wanted, rtol=0, atol=1e-4)  # golden/README.md: a change of x_T grows by 2
    else:
        # A change grows by 34, and values reach 54.
        assert float((video - wanted).norm() / wanted.norm()) < 1e-3


class Given(Draws):
    """The reference's named draws, in the order in which our objective asks for them."""

    def __init__(self, *values: Tensor) -> None:
        super().__init__([(0,), (1,)])
        self.values = list(values)

    def normal(self, *shape: int) -> Tensor:
        return self.values.pop(0)

    def integers(self, high: int) -> Tensor:
        return self.values.pop(0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_training_loss_equals_the_references(family, unet, golden, reference_input):
    figures, dynamicrafter = golden[f"loss_{family}"], family == "dynamicrafter"
    r = recipe(family, reference_compat=True)
    latents, eps = (reference_input(name, 2, 4, 4, 8, 12).transpose(1, 2) for name in ("latents", "draw_0"))
    context = reference_input("traj_context", *figures["inputs"]["input:traj_context"])
    fps = torch.tensor(figures["fs" if dynamicrafter else "fps"])

    class Described(Toy):
        """The family as far as a loss needs it."""

        process, prediction = r.process, r.prediction

        def __init__(self) -> None: ...

        def condition(self, batch, noise, u, draws):
            if not dynamicrafter:
                return {}, noise.levels(u)
            image, level = noise(batch["image"], u, draws, frames=4)
            return {"image": image}, level

        def drop(self, condition, dropped):
            return condition

        def denoise(self, net, x_t, t, condition):
            x = torch.cat([x_t, condition["image"]], dim=2) if dynamicrafter else x_t
            return net(x, t, context, fps)

        def loss_weight(self, t):
            return torch.ones(len(t))

    batch, given = {"latents": latents}, [torch.tensor(figures["t"]), eps]
    if dynamicrafter:
        batch["image"] = reference_input("image_latent", 2, 4, 1, 8, 12)[:, :, 0]
        given += [reference_input("draw_1", 2), reference_input("draw_2", 2, 4, 4, 8, 12).transpose(1, 2)]
    noise = r.noise if dynamicrafter else CleanCondition()
    with torch.no_grad():
        losses = Objective(noise)(Described(), unet(family), batch, Given(*given))
    wanted = figures["loss"] if dynamicrafter else figures["loss_with_fps_passed"]
    assert float(losses.loss.mean()) == pytest.approx(wanted, rel=1e-6)
    if dynamicrafter:
        assert losses.level.tolist() == pytest.approx(figures["beta_s"], rel=1e-6)


def test_recomputing_activations_changes_no_gradient(unet, golden, reference_input):
    figures, net = golden["videocrafter1_unet_small"], unet("videocrafter1")
    x = reference_input("x", *figures["inputs"]["input:x"]).transpose(1, 2)
    context = reference_input("context", *figures["inputs"]["input:context"])
    gradients = []
    for recompute in (False, True):
        net.zero_grad()
        net.train()
        net.gradient_checkpointing = recompute
        net(x, torch.tensor([999, 250]), context).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in net.named_parameters()})
    net.eval()
    net.gradient_checkpointing = False
    net.zero_grad()
    for name, gradient in gradients[0].items():
        assert torch.equal(gradients[1][name], gradient), name


def test_a_frames_image_tokens_reach_that_frame_by_attention_over_space_only():
    """With one residual level and no attention over frames left, tokens of frame 2 change nothing of frame 0."""
    torch.manual_seed(0)
    net = LVDMUNet(8, 4, 32, (1,), 1, (1,), 8, context_dim=16, tokens_per_frame=2).eval()
    for module in net.modules():
        if type(module).__name__ in ("TemporalConvs",) or getattr(module, "over_frames", False):
            module.forward = lambda x, *_: x
    x, context = torch.randn(1, 4, 8, 8, 8), torch.randn(1, 77 + 4 * 2, 16)
    other = context.clone()
    other[:, 77 + 2 * 2 : 77 + 3 * 2] += 1
    with torch.no_grad():
        change = (net(x, torch.tensor([5]), context) - net(x, torch.tensor([5]), other)).abs().amax((0, 2, 3, 4))
    assert change[2] > 1e-3
    assert change[[0, 1, 3]].max() == 0


@pytest.fixture
def tiny() -> tuple[LVDMUNet, tuple[Tensor, Tensor, Tensor]]:
    """A UNet with a way down and up, and what it is called with."""
    torch.manual_seed(0)
    net = LVDMUNet(8, 4, 32, (1, 1), 1, (2,), 8, context_dim=32, tokens_per_frame=2).eval()
    return net, (torch.randn(2, 4, 8, 8, 12), torch.tensor([5, 900]), torch.randn(2, 77 + 4 * 2, 32))


@torch.no_grad()
def test_the_unet_compiles_to_one_graph_that_answers_the_same(tiny):
    """`fullgraph` refuses a break. What a backend makes of the graph is the backend's."""
    net, inputs = tiny
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), net(*inputs), rtol=0, atol=NETWORK)


def test_the_unet_takes_channels_last_and_trains_in_it(tiny):
    net, inputs = tiny
    before = net(*inputs)
    before.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    shapes_before = shapes(net)
    net.to(memory_format=torch.channels_last)
    assert shapes(net) == shapes_before
    weight = net.input_blocks[1][0].temopral_conv.conv1[-1].weight
    assert weight.stride(1) == 1
    assert not weight.is_contiguous()
    net.zero_grad()
    after = net(*inputs)
    after.square().mean().backward()
    torch.testing.assert_close(after, before, rtol=0, atol=NETWORK)
    for name, p in net.named_parameters():
        told = f"{name}: {{}}".format
        torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=NETWORK, msg=told)
    net.to(memory_format=torch.contiguous_format)
    assert weight.is_contiguous()


@torch.no_grad()
def test_the_unet_runs_in_bfloat16_throughout(tiny):
    net, (x, t, context) = tiny
    wanted = net(x, t, context)
    found = net.to(torch.bfloat16)(x.bfloat16(), t, context.bfloat16())
    assert found.dtype == torch.bfloat16
    # 8 bits of mantissa: rounding weights and inputs alone makes .01 of it here.
    assert float((found.float() - wanted).norm() / wanted.norm()) < 3e-2
