"""Regions that do not count, a watermark's: in the moments, in the initial noise, in the loss."""

import pytest
import torch
from torch import Tensor

from cil import InitialNoise, Moments, Objective
from cil.draws import Draws
from cil.families import load
from cil.moments import outside

HEIGHT, WIDTH = 4, 6


def latents(n: int, seed: int = 0) -> Tensor:
    """[n, T, C, H, W], whose spread is another at each place; within the region far from all others."""
    x = 3 + torch.randn(n, 2, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = x * torch.linspace(0.5, 2, 2 * 3 * HEIGHT * WIDTH, dtype=torch.float64).reshape(2, 3, HEIGHT, WIDTH)
    return torch.where(COUNTED, x, 1000 * x)


COUNTED = outside([(0.5, 0.0, 1.0, 0.5)], HEIGHT, WIDTH)  # all but the lower left quarter


def picture(counted: Tensor) -> list[str]:
    return ["".join(".#"[int(cell)] for cell in row) for row in counted]


# -- cells -------------------------------------------------------------------------------------------------------------


def test_every_cell_that_a_region_touches_is_out():
    assert picture(outside([(0.25, 0.5, 0.5, 1.0)], 4, 6)) == ["######", "###...", "######", "######"]
    assert picture(outside([(0.26, 0.45, 0.51, 0.51)], 4, 6)) == ["######", "##..##", "##..##", "######"]
    assert picture(outside([(0.0, 0.0, 0.01, 0.01), (0.99, 0.99, 1.0, 1.0)], 4, 6)) == [
        ".#####",
        "######",
        "######",
        "#####.",
    ]


def test_without_a_region_all_count_and_of_the_whole_picture_nothing():
    assert outside([], 4, 6).all()
    assert outside([], 4, 6).shape == (4, 6)
    assert outside([], 4, 6).dtype == torch.bool
    assert not outside([(0, 0, 1, 1)], 4, 6).any()
    assert not outside([(0, 0, 1, 0.5), (0, 0.5, 1, 1)], 4, 6).any()


@pytest.mark.parametrize("cells", [10, 20, 40, 64, 72, 100])
def test_a_region_that_ends_on_a_cells_edge_leaves_the_next_cell_alone(cells):
    """0.07 * 100 is 7.000000000000001, and 0.29 * 100 28.999999999999996."""
    for begin in range(cells):
        counted = outside([(begin / cells, 0, (begin + 1) / cells, 1)], cells, 1)
        assert (~counted).flatten().nonzero().flatten().tolist() == [begin]
    hundredths = outside([(0.29, 0.07, 0.57, 0.58)], 100, 100)
    assert (~hundredths).sum(0).max() == 28
    assert (~hundredths).sum(1).max() == 51


# -- moments -----------------------------------------------------------------------------------------------------------


def test_moments_without_a_region_equal_a_computation_by_hand():
    x = latents(7)
    ours = Moments.of(x).without(COUNTED)
    mean, variance = x.mean(0), x.var(0, correction=0)
    assert ours.count == 7
    for t in range(2):
        for c in range(3):
            seen = [(h, w) for h in range(HEIGHT) for w in range(WIDTH) if h < 2 or w >= 3]
            others = [sum(float(y[t, c, h, w]) for h, w in seen) / len(seen) for y in (mean, variance)]
            for h in range(HEIGHT):
                for w in range(WIDTH):
                    wanted = (mean[t, c, h, w], variance[t, c, h, w]) if (h, w) in seen else others
                    assert float(ours.mean[t, c, h, w]) == pytest.approx(float(wanted[0]), rel=1e-13)
                    assert float(ours.variance[t, c, h, w]) == pytest.approx(float(wanted[1]), rel=1e-12)
    assert ours.trace_cov_per_dim == pytest.approx(float(variance[..., COUNTED].mean()), rel=1e-12)


def test_moments_without_a_region_leave_the_others_as_they_were_to_the_bit():
    before = Moments.of(latents(7))
    copy = Moments.from_bytes(before.to_bytes())
    ours = before.without(COUNTED)
    for name in ("mean", "rest", "m2"):
        assert torch.equal(getattr(ours, name)[..., COUNTED], getattr(copy, name)[..., COUNTED])
        assert torch.equal(getattr(before, name), getattr(copy, name))
    assert torch.equal(before.without(torch.ones_like(COUNTED)).m2, copy.m2)


def test_nothing_is_left_is_refused():
    with pytest.raises(ValueError, match="nothing is left"):
        Moments.of(latents(3)).without(torch.zeros_like(COUNTED))


# -- initial noise -----------------------------------------------------------------------------------------------------


def of_counted_alone(*groups: Tensor) -> InitialNoise:
    """Of latents whose cells that do not count are not there at all: [T, C, 1, cells]."""
    return InitialNoise.from_moments(*(Moments.of(x[..., COUNTED][:, :, :, None]) for x in groups))


@pytest.mark.parametrize("sizes", [[9], [4, 5], [2, 3, 1, 3]])
def test_initial_noise_is_that_of_the_cells_that_count(sizes):
    groups = latents(9).split(sizes)
    found = InitialNoise.from_moments(*map(Moments.of, groups), counted=COUNTED)
    wanted = of_counted_alone(*groups)
    assert found.count == 9
    assert found.variance == pytest.approx(wanted.variance, rel=1e-12)
    torch.testing.assert_close(found.mean[..., COUNTED], wanted.mean[:, :, 0], rtol=1e-13, atol=0)
    torch.testing.assert_close(found.diagonal[..., COUNTED], wanted.diagonal[:, :, 0], rtol=1e-12, atol=0)
    for name in ("mean", "diagonal"):
        inside, beside = getattr(found, name)[..., ~COUNTED], getattr(wanted, name).mean((2, 3))
        torch.testing.assert_close(inside, beside[..., None].expand_as(inside), rtol=1e-12, atol=0)


@pytest.mark.parametrize("sizes", [[9], [4, 5], [2, 3, 1, 3]])
def test_standard_errors_are_those_of_the_cells_that_count(sizes):
    groups = latents(9).split(sizes)
    found = InitialNoise.from_moments(*map(Moments.of, groups), counted=COUNTED)
    wanted = of_counted_alone(*groups)
    assert found.mean_error == pytest.approx(wanted.mean_error, rel=1e-9)
    if len(sizes) > 1:
        assert found.variance_error == pytest.approx(wanted.variance_error, rel=1e-9)


def test_what_lies_in_the_region_changes_no_figure_and_what_lies_beside_it_does():
    def figures(x: Tensor):
        noise = InitialNoise.from_moments(*map(Moments.of, x.split(3)), counted=COUNTED)
        return noise.mean.tolist(), noise.variance, noise.mean_error, noise.variance_error

    x = latents(9)
    assert figures(x) == figures(torch.where(COUNTED, x, latents(9, seed=1)))
    other = figures(torch.where(COUNTED, latents(9, seed=1), x))
    assert all(a != b for a, b in zip(figures(x), other, strict=True))


def test_the_order_of_groups_and_an_empty_one_change_nothing():
    groups = [Moments.of(x) for x in latents(9).split([2, 3, 1, 3])]
    one = InitialNoise.from_moments(*groups, counted=COUNTED)
    other = InitialNoise.from_moments(Moments.zeros((2, 3, HEIGHT, WIDTH)), *reversed(groups), counted=COUNTED)
    torch.testing.assert_close(one.mean, other.mean, rtol=1e-13, atol=0)
    for name in ("variance", "mean_error", "variance_error"):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-10)


def test_where_all_cells_count_it_is_as_if_nothing_had_been_said():
    groups = [Moments.of(x) for x in latents(9).split(3)]
    said, unsaid = (InitialNoise.from_moments(*groups, counted=c) for c in (torch.ones_like(COUNTED), None))
    assert torch.equal(said.mean, unsaid.mean)
    for name in ("variance", "mean_error", "variance_error"):
        assert getattr(said, name) == pytest.approx(getattr(unsaid, name), rel=1e-13)


# -- the loss ----------------------------------------------------------------------------------------------------------


class Answer(torch.nn.Module):
    """Answers the same whatever it is given: an element each."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(2)
        self.answer = torch.nn.Parameter(torch.randn(shape, generator=random))

    def forward(self, x: Tensor, u: Tensor) -> Tensor:
        return self.answer.expand(len(x), *self.answer.shape)


@pytest.fixture(scope="module")
def family():
    return load("toy", 2, 16, 24, "tiny")


@pytest.fixture(scope="module")
def batch(family):
    random = torch.Generator().manual_seed(0)
    return {"latents": torch.randn(3, *family.latent_shape, generator=random).half()}


def draws() -> Draws:
    return Draws([(5, i) for i in range(3)])


def test_the_loss_is_the_mean_over_the_cells_that_count_and_sends_no_gradient_inside(family, batch):
    net = Answer(family.latent_shape)
    losses = Objective(counted=COUNTED)(family, net, batch, draws())
    error = (net.answer.detach() - batch["latents"].float())[..., COUNTED] ** 2  # toy answers x_0
    wanted = family.loss_weight(losses.t) * error.flatten(1).mean(1)
    torch.testing.assert_close(losses.loss.detach(), wanted)
    losses.loss.sum().backward()
    assert (net.answer.grad[..., ~COUNTED] == 0).all()
    assert (net.answer.grad[..., COUNTED] != 0).all()


def test_the_loss_with_all_cells_is_the_loss(family, batch):
    net = Answer(family.latent_shape)
    said, unsaid = (Objective(counted=c)(family, net, batch, draws()).loss for c in (torch.ones(4, 6), None))
    torch.testing.assert_close(said, unsaid)


def test_a_loss_over_no_cells_is_refused():
    with pytest.raises(ValueError, match="counted: nothing is left"):
        Objective(counted=torch.zeros(4, 6))
