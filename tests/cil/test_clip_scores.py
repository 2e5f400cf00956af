"""Scores of a clip: a cut in it, its subject's share, its motion at a smaller size, and an aesthetic head."""

import dataclasses
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from published import aesthetic_by_hand, write_clip, write_head

from cil.metrics.aesthetics import AestheticHead, Aesthetics, middle_square
from cil.metrics.clips import LONGEST, clip_scores, scene_cut, subject_share
from cil.metrics.duplicates import picture_hash
from cil.metrics.motion import motion_score

HEIGHT, WIDTH, FRAMES = 160, 256, 12


def texture(seed: int, height: int = HEIGHT, width: int = WIDTH, slope: float = 1.3) -> np.ndarray:
    """float [H, W] around 128, that wraps: its spectrum falls as that of photographs does."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(np.random.default_rng(seed).normal(size=(height, width))) / frequency**slope
    noise = np.fft.irfft2(spectrum, (height, width))
    return 128 + 40 * noise / noise.std()


def clip(pictures: list[np.ndarray]) -> torch.Tensor:
    grey = np.stack(pictures).clip(0, 255).astype(np.uint8)
    return torch.from_numpy(grey[..., None].repeat(3, -1))


def pan(seed: int, speed: int) -> torch.Tensor:
    scene = texture(seed, width=4 * WIDTH)
    return clip([np.roll(scene, -k * speed, 1)[:, :WIDTH] for k in range(FRAMES)])


def disc(radius: float, x: float = WIDTH / 2, y: float = HEIGHT / 2, ground: np.ndarray | float = 90) -> np.ndarray:
    rows, columns = np.mgrid[:HEIGHT, :WIDTH]
    return np.where((columns - x) ** 2 + (rows - y) ** 2 < radius**2, 220, ground)


# -- cuts --------------------------------------------------------------------------------------------------------------

CUT = 0.3  # the threshold that scene_cut advises


@pytest.mark.parametrize("at", [1, 5, FRAMES - 1])
@pytest.mark.parametrize("speed", [0, 3, 25])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_cut_is_seen_wherever_it_lies_and_however_the_camera_moves(seed, speed, at):
    # Measured: 0.36 to 0.8.
    assert scene_cut(torch.cat([pan(seed, speed)[:at], pan(seed + 10, speed)[at:]])) > CUT


@pytest.mark.parametrize("size", [(32, 32), (320, 512), (512, 320)])
def test_a_cut_is_seen_at_any_size(size):
    a, b = (clip([texture(seed, *size)] * 4) for seed in (0, 1))
    assert scene_cut(torch.cat([a, b])) > CUT
    assert scene_cut(torch.cat([a, a])) == pytest.approx(0, abs=1e-6)


def test_a_cut_in_a_clip_of_two_frames_and_several_cuts_in_one_are_seen():
    scenes = [clip([texture(seed)] * 4) for seed in range(4)]
    assert scene_cut(torch.stack([scenes[0][0], scenes[1][0]])) > CUT
    assert scene_cut(torch.cat(scenes)) > CUT


def test_a_cut_to_black_is_one_and_of_little_contrast_too():
    a, b = texture(0), texture(1)
    assert scene_cut(clip([a] * 6 + [0 * a] * 6)) > CUT
    assert scene_cut(clip([128 + (x - 128) / 4 for x in [a] * 6 + [b] * 6])) > CUT


def test_a_cut_between_smooth_scenes_under_grain_is_seen():
    """Nothing of their detail can be followed: measured, 0.78 by what is coarse and 0.1 by what is fine."""
    random = np.random.default_rng(0)
    scenes = [texture(0, slope=3)] * 4 + [texture(1, slope=3)] * 4
    assert scene_cut(clip([scene + random.normal(0, 25, scene.shape) for scene in scenes])) > CUT


def flash() -> torch.Tensor:
    frames = pan(0, 3).int()
    frames[5] += 120
    return frames.clip(0, 255).byte()


def white() -> torch.Tensor:
    frames = pan(0, 3)
    frames[5] = 255
    return frames


def fading(slope: float) -> torch.Tensor:
    gain = (0.8 - slope * np.arange(FRAMES)).clip(0, 1)[:, None, None, None]
    return torch.from_numpy((pan(0, 3).numpy() * gain).astype(np.uint8))


def dissolve(steps: int) -> torch.Tensor:
    share = ((np.arange(FRAMES) - 3) / steps).clip(0, 1)
    return clip([(1 - s) * texture(0) + s * texture(1) for s in share])


NO_CUT = {
    "a pan of a tenth of the width a frame": lambda: pan(0, 25),
    "a pan of a quarter of the width a frame": lambda: pan(1, 64),
    "a still clip": lambda: pan(0, 0),
    "a disc that moves": lambda: clip([disc(24, 40 + 15 * k) for k in range(FRAMES)]),
    "a disc that moves over texture": lambda: clip([disc(24, 40 + 15 * k, ground=texture(0)) for k in range(FRAMES)]),
    "a flash": flash,
    "a white frame": white,
    "a lamp that is turned up": lambda: clip([0.4 * texture(0) + 10 * k for k in range(FRAMES)]),
    "a fade to black": lambda: fading(0.07),
    "a fade to black over five frames": lambda: fading(0.16),
    "a dissolve": lambda: dissolve(6),
    "noise": lambda: clip(list(np.random.default_rng(0).integers(0, 256, (FRAMES, HEIGHT, WIDTH)))),
    "grain": lambda: clip(
        [texture(0) + np.random.default_rng(k).normal(0, 25, (HEIGHT, WIDTH)) for k in range(FRAMES)]
    ),
    "grain in the dark": lambda: clip(list(np.random.default_rng(0).normal(12, 5, (FRAMES, HEIGHT, WIDTH)))),
    "black": lambda: clip([np.zeros((HEIGHT, WIDTH))] * FRAMES),
}


@pytest.mark.parametrize("name", NO_CUT)
def test_there_is_no_cut_in(name):
    # Measured: at most 0.08, but 0.2 where a quarter of the picture is new.
    assert scene_cut(NO_CUT[name]()) < (0.25 if "quarter" in name else 0.1)


# -- the subject -------------------------------------------------------------------------------------------------------

GROUNDS = {
    "flat": np.full((HEIGHT, WIDTH), 90.0),
    "sloping": np.broadcast_to(60 + 80 * np.arange(WIDTH) / WIDTH, (HEIGHT, WIDTH)),
    "uneven": 90 + 0.3 * (texture(7, slope=2.5) - 128),
}
RADII = (12, 16, 20, 24, 32, 40, 48)


@pytest.mark.parametrize("ground", GROUNDS)
@pytest.mark.parametrize(("x", "y"), [(128, 80), (90, 70)])
def test_the_share_of_a_disc_is_its_area(ground, x, y):
    found = [subject_share(clip([disc(radius, x, y, GROUNDS[ground])])) for radius in RADII]
    # An edge is salient on both its sides: measured, 0.01 to 0.03 too much.
    assert found == pytest.approx([np.pi * r**2 / HEIGHT / WIDTH for r in RADII], abs=0.035)
    assert found == sorted(found)


@pytest.mark.parametrize("ground", GROUNDS)
def test_a_picture_without_a_subject_has_next_to_none(ground):
    assert subject_share(clip([GROUNDS[ground]])) < 0.01


def test_a_picture_that_is_all_texture_has_next_to_no_subject():
    assert subject_share(clip([texture(0, slope=1)])) < 0.03


def test_the_share_is_a_mean_over_the_clip():
    alone = subject_share(clip([disc(32)]))
    assert alone > 0.05
    assert subject_share(clip([disc(32)] * 9)) == pytest.approx(alone)
    assert subject_share(clip([disc(32)] * 3 + [disc(0)] * 6)) == pytest.approx(alone / 3)


# -- motion at a smaller size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speed", [(4, 0), (0, -9), (12, 5), (25, 0)])
@pytest.mark.parametrize("size", [(320, 512), (400, 300)])
def test_motion_at_a_smaller_size_is_that_at_full_size(size, speed):
    scene = texture(3, size[0] + 200, size[1] + 200)
    frames = clip([np.roll(scene, (k * speed[1], k * speed[0]), (0, 1))[100:-100, 100:-100] for k in range(3)])
    assert motion_score(frames, LONGEST) == pytest.approx(motion_score(frames), rel=0.05)


def test_motion_of_frames_that_are_small_already_is_exactly_the_same():
    frames = pan(0, 3)[:3]
    assert motion_score(frames, WIDTH) == motion_score(frames)
    assert motion_score(frames, WIDTH - 1) != motion_score(frames)


def test_the_motion_score_is_the_mean_length_of_dis_flow_bit_by_bit():
    """As it was before it could be computed at a smaller size: what is cached stays comparable."""
    frames = pan(2, 2)[:2]
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    a, b = (cv2.cvtColor(frame.numpy(), cv2.COLOR_RGB2GRAY) for frame in frames)
    flow = dis.calc(a, b, np.zeros((HEIGHT, WIDTH, 2), np.float32))
    assert motion_score(frames) == float(np.linalg.norm(flow, axis=-1).mean())


def test_all_scores_of_a_clip_are_those_that_each_gives_alone():
    frames = torch.cat([pan(0, 6)[:5], pan(1, 6)[5:]])
    assert dataclasses.astuple(clip_scores(frames)) == (
        motion_score(frames, LONGEST),
        scene_cut(frames),
        subject_share(frames),
        picture_hash(frames[6]),
    )


# -- aesthetics --------------------------------------------------------------------------------------------------------

WIDTHS = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}  # as published


def mlp_weights() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    weights = {f"layers.{i}.weight": torch.randn(shape, generator=random) * 0.1 for i, shape in WIDTHS.items()}
    return weights | {f"layers.{i}.bias": torch.randn(out, generator=random) for i, (out, _) in WIDTHS.items()}


def test_the_published_mlp_is_its_layers_one_after_the_other_on_the_embeddings_direction(tmp_path):
    torch.save(mlp_weights(), tmp_path / "head.pth")
    layers = torch.nn.Sequential(*(torch.nn.Linear(i, o) for o, i in WIDTHS.values()))
    named = {
        f"{n}.{part}": mlp_weights()[f"layers.{i}.{part}"] for n, i in enumerate(WIDTHS) for part in ("weight", "bias")
    }
    layers.load_state_dict(named)
    embedding = 7 * torch.randn(4, 768, generator=torch.Generator().manual_seed(1))
    want = layers(embedding / embedding.norm(dim=-1, keepdim=True)).squeeze(-1)
    found = AestheticHead.load(tmp_path / "head.pth")(embedding)
    torch.testing.assert_close(found, want.detach())
    torch.testing.assert_close(AestheticHead.load(tmp_path / "head.pth")(embedding / 7), found)


def test_the_published_linear_head_is_a_product(tmp_path):
    weight = torch.arange(768.0)[None] / 768
    torch.save({"weight": weight, "bias": torch.tensor([5.0])}, tmp_path / "head.pth")
    embedding = torch.zeros(1, 768)
    embedding[0, 384] = 30
    assert AestheticHead.load(tmp_path / "head.pth")(embedding).tolist() == [5.5]


def test_embeddings_of_another_clip_are_refused():
    with pytest.raises(ValueError, match="embeddings of 1024: this head is for a CLIP of 768"):
        AestheticHead(mlp_weights())(torch.zeros(1, 1024))


@pytest.mark.parametrize("change", [{"layers.3.weight": torch.zeros(1)}, {"layers.7.bias": None}])
def test_other_weights_are_no_head(change):
    weights = {name: value for name, value in (mlp_weights() | change).items() if value is not None}
    with pytest.raises(ValueError, match="no aesthetic head"):
        AestheticHead(weights)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("aesthetics")
    return {"head": write_head(folder / "head.pth"), "clip": write_clip(folder / "clip")}


@pytest.mark.parametrize("size", [(28, 28), (40, 64), (64, 40), (160, 256), (31, 97), (16, 16)])
def test_the_aesthetic_score_is_transformers_clip_and_a_product_on_the_frame_in_the_middle(files, size):
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, *size, 3), np.uint8))
    aesthetics = Aesthetics.load(**files)
    # The same pixels, of which one library divides by 255 and the other multiplies with its inverse.
    assert aesthetics(frames) == pytest.approx(aesthetic_by_hand(frames[2], **files), abs=1e-5)
    assert aesthetics(frames) != pytest.approx(aesthetic_by_hand(frames[1], **files), abs=1e-3)
    assert aesthetics(frames[2:3]) == aesthetics(frames)


def test_a_frame_of_clips_size_is_seen_as_it_is_and_another_to_the_middle():
    frame = torch.arange(28 * 28 * 3).reshape(28, 28, 3).to(torch.uint8)
    assert torch.equal(middle_square(frame, 28), frame)
    wide = torch.cat([torch.zeros(28, 10, 3, dtype=torch.uint8), frame, torch.zeros(28, 11, 3, dtype=torch.uint8)], 1)
    assert torch.equal(middle_square(wide, 28), frame)


def test_the_image_tower_alone_is_enough_and_files_are_known_by_what_they_hold(files, tmp_path):
    from transformers import CLIPVisionModelWithProjection

    aesthetics = Aesthetics.load(**files)
    CLIPVisionModelWithProjection.from_pretrained(files["clip"]).save_pretrained(tmp_path / "tower")
    alone = Aesthetics.load(shutil.copy(files["head"], tmp_path / "copy.pth"), tmp_path / "tower")
    assert alone.identity == aesthetics.identity
    others = (
        Aesthetics.load(write_head(tmp_path / "other.pth", seed=1), files["clip"]),
        Aesthetics.load(files["head"], write_clip(tmp_path / "other", seed=1)),
    )
    assert len({each.identity for each in (aesthetics, *others)}) == 3


def test_a_head_for_another_clip_and_a_folder_that_is_none_are_refused(files, tmp_path):
    with pytest.raises(ValueError, match=r"/clip: embeddings of 24: this head is for a CLIP of 768"):
        Aesthetics.load(write_head(tmp_path / "768.pth", 768), files["clip"])
    with pytest.raises(ValueError, match=r"clip/model.safetensors: no aesthetic head"):
        Aesthetics.load(files["clip"] / "model.safetensors", files["clip"])
    with pytest.raises(ValueError, match=r"head.pth: no config.json in it; expected a folder"):
        Aesthetics.load(files["head"], files["head"])
    damaged = Path(shutil.copytree(files["clip"], tmp_path / "damaged"))
    config = (damaged / "config.json").read_text()
    (damaged / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ValueError, match=r"/damaged: not the weights of CLIP's image tower: of \d+, 16 missing"):
        Aesthetics.load(files["head"], damaged)
    (damaged / "config.json").write_text(config[:50])
    with pytest.raises(ValueError, match=r"/damaged/config.json: damaged .*JSON"):
        Aesthetics.load(files["head"], damaged)
