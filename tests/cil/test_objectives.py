"""The training loss: what it is made of, and what the arms of a study share."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import cil
from cil import EDM, VP, CleanCondition, ConstantNoise, Draws, Drops, Flow, Objective, Recipe, TimeNoise
from cil.draws import stream_seed
from cil.families import Options, load
from cil.families.toy import Toy
from cil.objectives import Losses, edm_weight

KEYS = [(11, i) for i in range(6)]
ARMS = {"none": CleanCondition(), "constant": ConstantNoise(3.0), "timenoise": TimeNoise(20.0)}


class ToyOfV(Toy):
    """The family toy, were it trained on v with zero terminal SNR."""

    prediction = "v"

    def __init__(self) -> None:
        super().__init__("tiny", 4, 16, 16, Options())
        self.process = VP(zero_snr=True)


@pytest.fixture(scope="module")
def family() -> Toy:
    return load("toy", 4, 16, 16, "tiny")


@pytest.fixture(scope="module")
def batch(family) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(0)
    return {"latents": torch.randn(len(KEYS), *family.latent_shape, generator=random).half()}


def network(family: Toy) -> torch.nn.Module:
    """With a head that is not zero, so that its answer depends on all that it is given."""
    net = family.network(0)
    torch.nn.init.normal_(net.head.weight, std=0.1, generator=torch.Generator().manual_seed(1))
    return net


def seen_by(family: Toy, objective: Objective, batch: dict[str, Tensor], keys=KEYS):
    """The losses, and x_t [B, T, C, H, W], image [B, T, C, H, W] and time [B] as the network was given them."""
    net, inputs = network(family), []
    net.register_forward_pre_hook(lambda net, given: inputs.append(given))
    with torch.no_grad():
        losses = objective(family, net, batch, Draws(keys))
    ((x, u),) = inputs
    return losses, *x.chunk(2, dim=2), u


@torch.no_grad()
@pytest.mark.parametrize("kind", [load("toy", 4, 16, 16, "tiny"), ToyOfV()], ids=["x0", "v and zero_snr"])
def test_the_loss_equals_a_computation_by_hand(kind, batch):
    losses = Objective(TimeNoise(20.0, 5.0), drops=Drops(image=0.5))(kind, network(kind), batch, Draws(KEYS))
    table = kind.process.alphas_bar
    dropped = []
    for i, key in enumerate(KEYS):
        random = torch.Generator().manual_seed(stream_seed(*key))
        x0 = batch["latents"][i].double()
        t = torch.randint(1000, (), generator=random)
        eps = torch.randn(x0.shape, generator=random).double()
        dropped.append(bool(torch.rand((), generator=random) < 0.5))
        n = torch.randn((), generator=random)
        level = 20 / (1 + torch.exp(-(2 * (t / 1000) ** 5 - 1 + n)))
        image = (x0[0] + level * torch.randn(x0[0].shape, generator=random)) * (not dropped[-1])
        alpha, sigma = table[t] ** 0.5, (1 - table[t]) ** 0.5
        given = torch.cat([alpha * x0 + sigma * eps, image.expand_as(x0)], dim=1)
        answer = network(kind)(given[None].float(), t[None] / 1000)[0].detach().double()
        target = x0 if kind.prediction == "x0" else alpha * eps - sigma * x0
        want = (answer - target).square().mean() / max(sigma**2, 0.2)
        # The network runs in float32, with inputs up to 60 and answers around 1.
        assert float(losses.loss[i]) == pytest.approx(float(want), rel=1e-5)
        assert losses.t[i] == t
        assert float(losses.level[i]) == pytest.approx(float(level), rel=1e-6)
    assert len(set(dropped)) == 2  # both cases were among the keys


def test_the_loss_sends_a_gradient_to_the_network(family, batch):
    net = network(family)
    Objective(TimeNoise(20.0))(family, net, batch, Draws(KEYS)).loss.mean().backward()
    silent = [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert silent == []


def test_arms_of_a_study_share_t_noise_and_drop(family, batch):
    runs = {arm: seen_by(family, Objective(noise, drops=Drops(image=0.5)), batch) for arm, noise in ARMS.items()}
    losses, x_t, image, u = runs["none"]
    dropped = (image == 0).flatten(1).all(1)
    assert 0 < int(dropped.sum()) < len(KEYS)
    for arm in ("constant", "timenoise"):
        other, other_x_t, other_image, other_u = runs[arm]
        assert torch.equal(other.t, losses.t)
        assert torch.equal(other_x_t, x_t)
        assert torch.equal(other_u, u)
        assert torch.equal((other_image == 0).flatten(1).all(1), dropped)
        # ... and differ in the image.
        assert not torch.isclose(other_image, image)[~dropped].any(dim=(1, 2, 3, 4)).all()
    assert torch.equal(runs["none"][0].level, torch.zeros(len(KEYS)))
    assert torch.equal(runs["constant"][0].level, torch.full((len(KEYS),), 3.0))


def test_x_t_is_made_of_t_and_noise_that_are_functions_of_the_key_alone(family, batch):
    """From two batches of other latents, the same t and eps come out; another key gives others."""
    other = {"latents": batch["latents"].flip(0) + 1}

    def drawn(latents: dict[str, Tensor], keys) -> tuple[Tensor, Tensor]:
        losses, x_t, _, _ = seen_by(family, Objective(TimeNoise(20.0)), latents, keys)
        alpha, sigma = (f(losses.t).reshape(-1, 1, 1, 1, 1) for f in (family.process.alpha, family.process.sigma))
        return losses.t, (x_t.double() - alpha * latents["latents"].double()) / sigma

    t, eps = drawn(batch, KEYS)
    t_again, eps_again = drawn(other, KEYS)
    assert torch.equal(t, t_again)
    # x_t up to 4 in float32, divided by sigma of at least 0.03.
    torch.testing.assert_close(eps, eps_again, rtol=0, atol=3e-5)
    t_elsewhere, eps_elsewhere = drawn(batch, [(12, i) for i in range(len(KEYS))])
    assert not torch.equal(t, t_elsewhere)
    assert (eps - eps_elsewhere).abs().mean() > 0.5


@torch.no_grad()
def test_a_samples_loss_is_independent_of_the_batch_it_is_in(family, batch):
    objective, net = Objective(TimeNoise(20.0), drops=Drops(both=0.3)), network(family)
    together = objective(family, net, batch, Draws(KEYS))
    for i in (0, 4):
        alone = objective(family, net, {"latents": batch["latents"][i : i + 1]}, Draws(KEYS[i : i + 1]))
        assert torch.equal(alone.t[0], together.t[i])
        assert torch.equal(alone.level[0], together.level[i])
        # float32: other batch sizes sum in another order.
        assert float(alone.loss[0]) == pytest.approx(float(together.loss[i]), rel=1e-5)


def test_a_drop_of_one_zeroes_every_condition_and_of_none_leaves_it(family, batch):
    first = batch["latents"][:, :1].float().expand(-1, 4, -1, -1, -1)
    _, _, kept, _ = seen_by(family, Objective(drops=Drops()), batch)
    assert torch.equal(kept, first)
    for noise in ARMS.values():
        _, x_t, gone, _ = seen_by(family, Objective(noise, drops=Drops(both=1.0)), batch)
        assert torch.equal(gone, torch.zeros_like(gone))
        assert x_t.std() > 0.5


def test_the_share_dropped_is_the_share_asked_for():
    tiny = load("toy", 1, 8, 8, "tiny")
    n, keys = 2000, [(0, i) for i in range(2000)]
    _, _, image, _ = seen_by(
        tiny, Objective(drops=Drops(both=0.3)), {"latents": torch.ones(n, *tiny.latent_shape)}, keys
    )
    dropped = (image == 0).flatten(1).all(1).double().mean()
    assert float(dropped) == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / n) ** 0.5)


def test_every_t_of_the_schedule_is_drawn_alike():
    tiny = load("toy", 1, 8, 8, "tiny")
    keys = [(0, i) for i in range(2000)]
    t = Objective()(tiny, tiny.network(0), {"latents": torch.ones(2000, *tiny.latent_shape)}, Draws(keys)).t
    counts = torch.histc(t.double(), bins=10, min=0, max=1000)
    assert ((counts - 200).abs() < 5 * (2000 * 0.1 * 0.9) ** 0.5).all()
    assert t.min() < 10
    assert t.max() >= 990


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
@pytest.mark.parametrize("name", ["text", "image", "both"])
def test_a_share_outside_0_to_1_is_refused(name, share):
    with pytest.raises(ValueError, match=f"{name}={share}"):
        Drops(**{name: share})


def test_shares_of_more_than_all_samples_are_refused():
    assert Drops(text=0.3, image=0.3, both=0.4)
    with pytest.raises(ValueError, match=r"text=0.4 \+ image=0.3 \+ both=0.4: at most 1"):
        Drops(text=0.4, image=0.3, both=0.4)


def test_text_image_and_both_are_dropped_in_the_shares_asked_for_each_sample_for_itself():
    n = 4000
    dropped = Drops(text=0.1, image=0.2, both=0.3)(Draws([(3, i) for i in range(n)]))
    shares = {
        "text": dropped.text & ~dropped.image,
        "image": dropped.image & ~dropped.text,
        "both": dropped.text & dropped.image,
    }
    for name, want in (("text", 0.1), ("image", 0.2), ("both", 0.3)):
        # Five standard errors of a share of n samples.
        assert float(shares[name].double().mean()) == pytest.approx(want, abs=5 * (want * (1 - want) / n) ** 0.5)
    alone = Drops(text=0.1, image=0.2, both=0.3)(Draws([(3, 17)]))
    assert (bool(alone.text), bool(alone.image)) == (bool(dropped.text[17]), bool(dropped.image[17]))


# -- the recipes of the reference --------------------------------------------------------------------------------------


class Given(Draws):
    """Hands out the reference's named draws, in the order in which our objective asks for them."""

    def __init__(self, *values: Tensor) -> None:
        super().__init__([(i,) for i in range(len(values[0]))])
        self.values = list(values)

    def normal(self, *shape: int) -> Tensor:
        value = self.values.pop(0)
        assert value.shape[1:] == shape
        return value

    def integers(self, high: int) -> Tensor:
        return self.values.pop(0)


class StandIn(Toy):
    """The family of which a golden loss was made: `image` [B, 4, H, W] noised, and the network given as a function."""

    def __init__(self, recipe: Recipe, image: Callable[..., Tensor], frames: int | None) -> None:
        self.process, self.prediction, self.image, self.repeats = recipe.process, recipe.prediction, image, frames

    def condition(self, batch, noise, u, draws):
        if self.repeats is None:
            return {}, noise.levels(u)
        image, level = noise(self.image(batch), u, draws, frames=self.repeats)
        return {"image": image, "level": level}, level

    def denoise(self, net, x_t, t, condition):
        scaled, time = self.process.network_input(x_t, t)
        return net(scaled, time, condition)

    def drop(self, condition, dropped):
        return condition

    def loss_weight(self, t):
        return edm_weight(t) if isinstance(self.process, EDM) else torch.ones(len(t))


@pytest.fixture
def svd(golden, reference_input):
    """The stand-ins of loss_svd.json: 8x8 average pooling for the VAE, a weighted sum for the UNet."""
    latents, pixels, clip = (
        reference_input(name, *golden["loss_svd"]["inputs"][f"input:{name}"]) for name in ("latents", "pixels", "clip")
    )
    seen = {}

    def encode(batch: dict[str, Tensor]) -> Tensor:
        pooled = torch.nn.functional.avg_pool2d(batch["image"], 8)
        return torch.cat([pooled, pooled.mean(1, keepdim=True)], dim=1)

    def net(x: Tensor, time: Tensor, condition: dict[str, Tensor]) -> Tensor:
        seen.update(input=torch.cat([x, condition["image"]], dim=2), time=time, level=condition["level"])
        return 0.3 * x - 0.2 * condition["image"] + 0.1 * time.reshape(-1, 1, 1, 1, 1) + 0.05 * clip.mean()

    draws = {
        name: reference_input(name, *shape)
        for case in golden["loss_svd"]["cases"].values()
        for name, shape in [(key.removeprefix("input:"), s) for key, s in case["random_draws_in_order"]]
        if name != "draw_2"
    }
    return latents, pixels[:, 0], encode, net, draws, seen


def agrees(seen: dict[str, Tensor], losses: Losses, want: dict) -> None:
    given = seen["input"]
    for name, value in (("mean", given.mean()), ("std", given.std()), ("absmax", given.abs().max())):
        assert float(value) == pytest.approx(want["unet_input"][name], rel=1e-6)
    assert given.flatten()[:4].tolist() == pytest.approx(want["unet_input"]["first4"], rel=2e-6)
    assert seen["time"].tolist() == pytest.approx(want["c_noise"], rel=1e-6)
    assert losses.t.tolist() == pytest.approx(want["sigma"], rel=1e-6)
    # float32 sums of 1,152 squares in the reference.
    assert float(losses.loss.mean()) == pytest.approx(want["loss"], rel=1e-6)


def test_the_svd_loss_with_timenoise_equals_the_reference(svd, golden, reference_input):
    latents, image, encode, net, draws, seen = svd
    want = golden["loss_svd"]["cases"]["timenoise"]
    recipe = cil.recipe("svd", reference_compat=True)
    family = StandIn(recipe, encode, frames=3)
    given = Given(
        draws["draw_1"].flatten(), draws["draw_0"], reference_input("draw_2", 2), draws["draw_3"].reshape(2, 1, 1, 1)
    )
    losses = Objective(recipe.noise)(family, net, {"latents": latents, "image": image}, given)
    agrees(seen, losses, want)
    assert losses.level.tolist() == pytest.approx(want["added_time_ids"][2::3], rel=1e-6)


def test_the_svd_loss_of_naive_fine_tuning_equals_the_reference(svd, golden, reference_input):
    """SVD's own augmentation: noise of its own level on the pixels, before the VAE."""
    latents, image, encode, net, draws, seen = svd
    want = golden["loss_svd"]["cases"]["baseline"]
    recipe = cil.recipe("svd", reference_compat=True)
    augmented = torch.exp(-1.2 + 1.2 * draws["draw_3"].flatten())
    assert augmented.tolist() == pytest.approx(want["added_time_ids"][2::3], rel=1e-6)
    image = image + augmented.reshape(2, 1, 1, 1) * reference_input("draw_2", 2, 1, 3, 32, 48)[:, 0]
    given = Given(draws["draw_1"].flatten(), draws["draw_0"])
    family = StandIn(recipe, encode, frames=3)
    losses = Objective()(family, net, {"latents": latents, "image": image}, given)
    agrees(seen, losses, want)


def lvdm(golden, reference_input, name: str):
    """Inputs of a golden loss in our layout B T C H W, from the reference's B C T H W."""
    figures = golden[f"loss_{name}"]
    turned = {
        key: reference_input(key, 2, 4, 4, 8, 12).transpose(1, 2)
        for key in ("latents", "draw_0", *(["draw_2"] if name == "dynamicrafter" else []))
    }
    return figures, turned, torch.tensor(figures["t"])


def stand_in_unet(x: Tensor, time: Tensor, condition: dict[str, Tensor]) -> Tensor:
    image = condition.get("image", torch.zeros_like(x))
    return torch.tanh(x) + 0.01 * image + 0.001 * time.reshape(-1, 1, 1, 1, 1)


def test_the_dynamicrafter_loss_is_its_recipe_with_the_references_levels(golden, reference_input):
    """The UNet is a stand-in: the loss is computed here from the recipe's words, the levels are golden."""
    figures, turned, t = lvdm(golden, reference_input, "dynamicrafter")
    image = reference_input("image_latent", 2, 4, 1, 8, 12)[:, :, 0]
    recipe = cil.recipe("dynamicrafter", reference_compat=True)
    given = Given(t, turned["draw_0"], reference_input("draw_1", 2), turned["draw_2"])
    batch = {"latents": turned["latents"], "image": image}
    losses = Objective(recipe.noise)(StandIn(recipe, lambda b: b["image"], 4), stand_in_unet, batch, given)
    assert losses.level.tolist() == pytest.approx(figures["beta_s"], rel=1e-6)

    abar = torch.tensor([float(golden["schedules"]["dynamicrafter"]["alphas_cumprod_float64"]["980"]), 0.0]).double()
    abar[1] = VP(zero_snr=True).alphas_bar[312]  # not among the golden figures; 980 is
    abar = abar.reshape(2, 1, 1, 1, 1)
    x0 = turned["latents"].double() * torch.tensor([0.7, 1 - 0.3 * 312 / 399]).reshape(2, 1, 1, 1, 1)
    eps = turned["draw_0"].double()
    x_t, v = abar**0.5 * x0 + (1 - abar) ** 0.5 * eps, abar**0.5 * eps - (1 - abar) ** 0.5 * x0
    noisy = image[:, None].double() + torch.tensor(figures["beta_s"]).reshape(2, 1, 1, 1, 1) * turned["draw_2"]
    want = ((stand_in_unet(x_t, t.double(), {"image": noisy}) - v) ** 2).mean()
    assert float(losses.loss.mean()) == pytest.approx(float(want), rel=1e-5)  # float32


def test_the_videocrafter1_loss_is_its_recipe(golden, reference_input):
    _, turned, t = lvdm(golden, reference_input, "videocrafter1")
    recipe = cil.recipe("videocrafter1", reference_compat=True)
    batch = {"latents": turned["latents"]}
    losses = Objective()(StandIn(recipe, lambda b: b, None), stand_in_unet, batch, Given(t, turned["draw_0"]))
    abar = VP().alphas_bar[t].reshape(2, 1, 1, 1, 1)
    scale = torch.tensor([0.7, 1 - 0.3 * 312 / 399], dtype=torch.float64).reshape(2, 1, 1, 1, 1)
    eps = turned["draw_0"].double()
    x_t = abar**0.5 * scale * turned["latents"].double() + (1 - abar) ** 0.5 * eps
    want = ((stand_in_unet(x_t, t.double(), {}) - eps) ** 2).mean()
    assert float(losses.loss.mean()) == pytest.approx(float(want), rel=1e-5)  # float32


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_the_weight_on_the_error_of_v_is_edms_weight_on_the_error_of_x0(sigma_data):
    sigma = torch.tensor([0.002, 0.1, 1.0, 20.0, 700.0], dtype=torch.float64)
    x0, eps = torch.randn(2, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    process, answer = EDM(), torch.zeros(5, dtype=torch.float64)
    x_t = process.add_noise(x0, eps, sigma)
    of_v = edm_weight(sigma, sigma_data) * (answer - process.target("v", x0, eps, sigma)) ** 2
    karras = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    of_x0 = karras * (process.split("v", answer, x_t, sigma)[0] - x0) ** 2
    # x_0 at sigma 700 is a difference of numbers 700 times as large.
    torch.testing.assert_close(of_v, of_x0, rtol=1e-9, atol=0)
    with pytest.raises(ValueError, match="sigma_data="):
        edm_weight(sigma, 0.0)


@pytest.mark.parametrize("process", [EDM(), Flow()], ids=["EDM", "Flow"])
def test_the_objective_trains_on_any_process(process, batch):
    class Other(Toy):
        prediction = "v"

        def __init__(self) -> None:
            super().__init__("tiny", 4, 16, 16, Options())
            self.process = process

        def loss_weight(self, t: Tensor) -> Tensor:
            return torch.ones_like(t)

        def denoise(self, net, x_t, t, condition):
            x, _ = self.process.network_input(x_t, t)
            image = condition["image"][:, None].expand(-1, x.shape[1], -1, -1, -1)
            return net(torch.cat([x, image], dim=2), self.process.unit_time(t))

    family = Other()
    losses = Objective(TimeNoise(20.0))(family, network(family), batch, Draws(KEYS))
    assert torch.isfinite(losses.loss).all()
    x0, t = batch["latents"].double(), losses.t.double()
    for i, key in enumerate(KEYS):
        draws = Draws([key])
        drawn = process.draw_times(draws).double()
        assert torch.equal(drawn, t[i : i + 1])
        eps = draws.normal(*family.latent_shape).double()
        x_t = process.add_noise(x0[i : i + 1], eps, drawn)
        draws.uniform()
        image, _ = TimeNoise(20.0)(x0[i : i + 1, 0].float(), process.unit_time(drawn), draws)
        answer = family.denoise(network(family), x_t.float(), drawn, {"image": image}).double()
        want = (answer - process.target("v", x0[i : i + 1], eps, drawn)).square().mean().detach()
        assert float(losses.loss[i].detach()) == pytest.approx(float(want), rel=1e-5)  # float32 in the network
