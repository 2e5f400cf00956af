"""The training loss: what it is made of, and what the arms of a study share."""

import pytest
import torch
from torch import Tensor

from cil import VP, CleanCondition, ConstantNoise, Draws, Objective, TimeNoise
from cil.draws import stream_seed
from cil.families import load
from cil.families.toy import Toy

KEYS = [(11, i) for i in range(6)]
ARMS = {"none": CleanCondition(), "constant": ConstantNoise(3.0), "timenoise": TimeNoise(20.0)}


class ToyOfV(Toy):
    """The family toy, were it trained on v with zero terminal SNR."""

    prediction = "v"

    def __init__(self) -> None:
        super().__init__(4, 16, 16, "tiny")
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
    losses = Objective(TimeNoise(20.0, 5.0), drop=0.5)(kind, network(kind), batch, Draws(KEYS))
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
    runs = {arm: seen_by(family, Objective(noise, drop=0.5), batch) for arm, noise in ARMS.items()}
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
    objective, net = Objective(TimeNoise(20.0), drop=0.3), network(family)
    together = objective(family, net, batch, Draws(KEYS))
    for i in (0, 4):
        alone = objective(family, net, {"latents": batch["latents"][i : i + 1]}, Draws(KEYS[i : i + 1]))
        assert torch.equal(alone.t[0], together.t[i])
        assert torch.equal(alone.level[0], together.level[i])
        # float32: other batch sizes sum in another order.
        assert float(alone.loss[0]) == pytest.approx(float(together.loss[i]), rel=1e-5)


def test_a_drop_of_one_zeroes_every_condition_and_of_none_leaves_it(family, batch):
    first = batch["latents"][:, :1].float().expand(-1, 4, -1, -1, -1)
    _, _, kept, _ = seen_by(family, Objective(drop=0.0), batch)
    assert torch.equal(kept, first)
    for noise in ARMS.values():
        _, x_t, gone, _ = seen_by(family, Objective(noise, drop=1.0), batch)
        assert torch.equal(gone, torch.zeros_like(gone))
        assert x_t.std() > 0.5


def test_the_share_dropped_is_the_share_asked_for():
    tiny = load("toy", 1, 8, 8, "tiny")
    n, keys = 2000, [(0, i) for i in range(2000)]
    _, _, image, _ = seen_by(tiny, Objective(drop=0.3), {"latents": torch.ones(n, *tiny.latent_shape)}, keys)
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


@pytest.mark.parametrize("drop", [-0.1, 1.1, float("nan")])
def test_a_share_outside_0_to_1_is_refused(drop):
    with pytest.raises(ValueError, match="drop="):
        Objective(drop=drop)
