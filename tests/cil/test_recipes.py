"""What TimeNoise is in each family, as the reference has it and as we advise it."""

import pytest
import torch

from cil import EDM, VP, Drops, TimeNoise, diagnose, recipe
from cil.recipes import FRAMES, matched_beta_m

FAMILIES = ["svd", "dynamicrafter", "videocrafter1", "i2vgenxl"]
OF_THE_REFERENCE = FAMILIES[:3]

# The table "Recipes as the reference configures them" of the golden figures: (a, beta_m, mu_max), form, drops.
TABLE = {
    "svd": (EDM(P_mean=-1.2, P_std=1.2, time_map="sigma"), "v", (5, 15, 1), "scalar", Drops(both=0.1)),
    "dynamicrafter": (VP(zero_snr=True, rescale=0.7), "v", (5, 100, 1), "per_frame", Drops(0.05, 0.05, 0.05)),
    "videocrafter1": (VP(rescale=0.7), "eps", (5, 100, 4), "elementwise", Drops(0.2, 0.2, 0.2)),
}


def seen_by_a_network(noise: TimeNoise, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What is left of the noise [B, N] in the mean over the frames, and its level."""
    y, u = torch.zeros(64, 1024), torch.linspace(0.3, 1, 64)
    noisy, level = noise(y, u, torch.Generator().manual_seed(1), frames=frames)
    return noisy.double().mean(1), level.double()


@pytest.mark.parametrize(("beta_m", "frames", "matched"), [(100.0, 16, 25.0), (60.0, 9, 20.0), (8.0, 1, 8.0)])
def test_the_matched_dose_leaves_the_signal_to_noise_of_noise_drawn_for_each_frame(beta_m, frames, matched):
    of_frames = TimeNoise(beta_m, form="per_frame")
    assert matched_beta_m(of_frames, frames) == pytest.approx(matched, rel=1e-15)
    theirs, their_level = seen_by_a_network(of_frames, frames)
    ours, our_level = seen_by_a_network(TimeNoise(matched_beta_m(of_frames, frames)), frames)
    # Levels come first from the same stream: they differ by the dose only, to float32.
    torch.testing.assert_close(our_level * frames**0.5, their_level, rtol=1e-6, atol=0)
    ratio = (ours.square().mean(1) / theirs.square().mean(1)).log()
    # The log of a mean square of 1024 normals has a deviation of sqrt(2 / 1024); two of them, 64 samples, five of it.
    assert float(ratio.mean()) == pytest.approx(0, abs=5 * (2 * 2 / 1024 / 64) ** 0.5)


@pytest.mark.parametrize("form", ["elementwise", "scalar"])
def test_noise_drawn_once_keeps_its_dose(form):
    assert matched_beta_m(TimeNoise(15.0, form=form)) == 15


def test_the_dose_is_matched_for_16_frames_unless_told_otherwise():
    assert FRAMES == 16
    assert matched_beta_m(TimeNoise(100.0, form="per_frame")) == 25


@pytest.mark.parametrize("family", OF_THE_REFERENCE)
def test_recipes_of_the_reference_are_as_it_configures_them(family):
    found, (process, prediction, (a, beta_m, mu_max), form, drops) = (
        recipe(family, reference_compat=True),
        TABLE[family],
    )
    assert found.process == process
    assert found.prediction == prediction
    assert found.noise == TimeNoise(beta_m, a, mu_max, form)
    assert found.drops == drops


@pytest.mark.parametrize("family", FAMILIES)
def test_corrected_recipes_draw_noise_for_each_element_around_the_papers_center(family):
    found = recipe(family)
    assert found.noise.form == "elementwise"
    assert found.noise.mu_max == 1
    assert found.noise.a == 5
    assert found.noised


@pytest.mark.parametrize(
    ("family", "beta_m"), [("svd", 15), ("dynamicrafter", 25), ("videocrafter1", 100), ("i2vgenxl", 25)]
)
def test_corrected_recipes_have_the_matched_dose(family, beta_m):
    assert recipe(family).noise.beta_m == beta_m


@pytest.mark.parametrize("family", OF_THE_REFERENCE)
def test_recipes_are_corrected_unless_the_references_are_asked_for(family):
    assert recipe(family) == recipe(family, reference_compat=False)
    assert recipe(family) != recipe(family, reference_compat=True)


@pytest.mark.parametrize("family", OF_THE_REFERENCE)
def test_a_corrected_recipe_keeps_the_prediction_that_published_weights_have(family):
    corrected, reference = recipe(family), recipe(family, reference_compat=True)
    assert corrected.prediction == reference.prediction
    assert corrected.noised == reference.noised
    if family != "svd":
        assert corrected.process == reference.process


def test_the_corrected_svd_recipe_sees_time_in_log_sigma_and_draws_large_sigma():
    process = recipe("svd").process
    assert process.time_map == "log_sigma"
    drawn, theirs = process.training_times(), recipe("svd", reference_compat=True).process.training_times()
    assert float((drawn > 20).double().mean()) > 0.05
    assert float((theirs > 20).double().mean()) < 0.001


@pytest.mark.parametrize("family", FAMILIES)
def test_time_tells_in_every_corrected_recipe(family):
    found = recipe(family)
    diagnosis = diagnose(found.noise, found.process.unit_time(found.process.training_times()))
    assert not diagnosis.constant
    # With mu even over [-1, 1] it would be a quarter.
    assert diagnosis.time_share > 0.005


@pytest.mark.parametrize("family", FAMILIES)
def test_corrected_recipes_leave_most_samples_whole(family):
    drops = recipe(family).drops
    assert drops.text + drops.image + drops.both <= 0.15 + 1e-9
    assert drops.both > 0  # guidance needs it


def test_the_noise_is_put_where_the_family_takes_its_image():
    assert {family: recipe(family).noised for family in FAMILIES} == {
        "svd": "image latents, not scaled",
        "dynamicrafter": "image latents, scaled",
        "videocrafter1": "projected CLIP tokens",
        "i2vgenxl": "frame-0 latent, scaled",
    }


def test_a_dose_for_no_frames_is_refused():
    with pytest.raises(ValueError, match="frames=0"):
        matched_beta_m(TimeNoise(100), 0)


@pytest.mark.parametrize("compat", [False, True])
def test_an_unknown_family_is_refused_and_the_known_ones_are_named(compat):
    with pytest.raises(ValueError, match=r"family='pia': .*svd, dynamicrafter, videocrafter1"):
        recipe("pia", reference_compat=compat)


def test_there_is_no_recipe_of_the_reference_for_a_family_it_does_not_train():
    assert recipe("i2vgenxl").process == VP(betas="squared_cosine", zero_snr=True)
    with pytest.raises(ValueError, match=r"family='i2vgenxl': there are recipes of the reference for svd"):
        recipe("i2vgenxl", reference_compat=True)
