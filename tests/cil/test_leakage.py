"""Leakage as a figure: the motion of one-step predictions, and the area between its curve and the truth."""

import numpy as np
import pytest
import scipy.integrate
import scipy.ndimage
import torch
from torch import Tensor, nn

from cil import Draws
from cil.families import load
from cil.metrics.leakage import leakage, one_step
from cil.metrics.motion import motion_score

TIMES = torch.tensor([99, 299, 499, 699, 899, 999])


@pytest.fixture(scope="module")
def family():
    return load("toy", frames=4, height=32, width=32)


@pytest.fixture(scope="module")
def batch(family) -> dict[str, Tensor]:
    """A texture that drifts by two pixels a frame."""
    texture = scipy.ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((32, 32)), 3, mode="wrap")
    grey = torch.from_numpy(np.clip(128 + 50 * texture / texture.std(), 0, 255).astype(np.uint8))
    clip = torch.stack([grey.roll(2 * k, 1) for k in range(4)])[..., None].repeat(1, 1, 1, 3)
    return family.encode(clip[None])


class Net(nn.Module):
    """Knows x_0 up to a time, and copies the image from there on."""

    def __init__(self, x0: Tensor, leaks_from: float) -> None:
        super().__init__()
        self.x0, self.leaks_from = x0.float(), leaks_from

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        image = x[:, :, 4:]
        self.seen = x[:, :, :4]
        return image if float(u) > self.leaks_from else self.x0


def test_a_network_that_knows_x_0_moves_as_the_truth_and_one_that_copies_the_image_not_at_all(family, batch):
    truth = motion_score(family.decode(batch["latents"])[0])
    knows = one_step(family, Net(batch["latents"], 1.0), batch, TIMES, (0, 7))
    assert knows.loss == [0.0] * 6
    assert knows.motion == [truth] * 6
    assert knows.truth == truth > 1
    copies = one_step(family, Net(batch["latents"], 0.0), batch, TIMES, (0, 7))
    assert copies.motion == [0.0] * 6
    x0 = batch["latents"].float()
    error = (x0[:, :1] - x0).square().mean()
    weights = [1 / max(float(family.process.sigma(t)) ** 2, 0.2) for t in TIMES]
    assert copies.loss == pytest.approx([w * float(error) for w in weights], rel=1e-5)


def test_leakage_at_large_times_is_the_share_of_times_at_which_it_leaks(family, batch):
    u = family.process.unit_time(TIMES)
    found = one_step(family, Net(batch["latents"], 0.75), batch, TIMES, (0, 7))
    assert [m > 0 for m in found.motion] == [True] * 4 + [False] * 2
    lack, excess = leakage(u, torch.tensor([found.motion]), torch.tensor([found.truth]))
    # All is lacking from .9 to 1, and from .7 to .9 half of it on average.
    assert (lack, excess) == (pytest.approx((0.1 + 0.1) / 0.9, rel=1e-6), 0)


def test_the_noise_is_a_function_of_the_key_and_the_time(family, batch):
    net = Net(batch["latents"], 1.0)
    one_step(family, net, batch, TIMES[-1:], (0, 7))
    eps = Draws([(0, 7, 0)]).normal(*batch["latents"].shape[1:])
    assert torch.equal(net.seen, family.process.add_noise(batch["latents"].float(), eps, TIMES[-1:]))
    first = net.seen
    for key, times in (((0, 8), TIMES[-1:]), ((0, 7), TIMES[[-1, -1]])):  # the second one's last is its k = 1
        one_step(family, net, batch, times, key)
        assert not torch.equal(net.seen, first)


def test_the_network_is_asked_without_a_gradient(family, batch):
    net = family.network(0)
    found = one_step(family, net, batch, TIMES[:2], (0, 7))
    assert all(parameter.grad is None for parameter in net.parameters())
    assert all(loss > 0 for loss in found.loss)


# -- the area ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("curve", "lack", "excess"),
    [
        ([2, 2, 2], 0, 0),
        ([0, 0, 0], 1, 0),
        ([1, 1, 1], 1 / 2, 0),
        ([4, 4, 4], 0, 1),
        ([2, 2, 0], 1 / 4, 0),  # times 0, .5, 1
        ([4, 0, 4], 1 / 4, 1 / 4),  # crosses in the middle of each segment
        ([3, 2, 0], 1 / 4, 1 / 8),
        ([2.5, 1, 2], 1 / 2 * (2 / 3 * 1 / 2 / 2) + 1 / 2 * 1 / 4, 1 / 2 * (1 / 3 * 1 / 4 / 2)),
    ],
)
def test_areas_below_and_above_the_truth_are_those_of_the_drawing(curve, lack, excess):
    found = leakage(torch.tensor([0, 0.5, 1]), torch.tensor([curve], dtype=torch.float64), torch.tensor([2.0]))
    assert found == (pytest.approx(lack, abs=1e-12), pytest.approx(excess, abs=1e-12))


def test_areas_at_uneven_times_are_scipys_of_a_fine_line():
    random = np.random.default_rng(0)
    times, curve = np.sort(random.random(10)), 2 * random.random(10)
    fine = np.union1d(np.linspace(times[0], times[-1], 200_001), times)
    lacking = 1 - np.interp(fine, times, curve) / 0.9
    found = leakage(torch.tensor(times), torch.tensor(curve)[None], torch.tensor([0.9]))
    want = [scipy.integrate.trapezoid(np.clip(s * lacking, 0, None), fine) / np.ptp(times) for s in (1, -1)]
    assert found == (pytest.approx(want[0], rel=1e-6), pytest.approx(want[1], rel=1e-6))


def test_the_area_is_of_the_means_over_clips():
    """A clip that moves more than it should makes up for one that moves less, and a still one divides by nothing."""
    times, truth = torch.tensor([0.0, 1.0]), torch.tensor([3.0, 1.0, 0.0])
    motion = torch.tensor([[3.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    assert leakage(times, motion, truth) == (pytest.approx(1 / 4), 0)
    assert leakage(times, motion[[0, 0, 2]], truth[[0, 0, 2]]).lack == pytest.approx(1 / 3)  # as a set drawn anew is


def test_what_has_no_area_is_refused():
    times, motion, truth = torch.tensor([0.1, 0.5]), torch.ones(3, 2), torch.ones(3)
    with pytest.raises(ValueError, match="the 3 true clips do not move"):
        leakage(times, motion, torch.zeros(3))
    for wrong in ((times.flip(0), motion, truth), (times, motion.T, truth), (times[:1], motion[:, :1], truth)):
        with pytest.raises(ValueError, match="expected at least two rising times"):
            leakage(*wrong)
