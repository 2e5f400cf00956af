"""The TorchScript networks of FVD and of the Inception Score: small ones that are called as the published ones are."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cil.metrics.detectors import FVD, INCEPTION_SCORE, Detector, Protocol

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


class I3D(nn.Module):
    """Features: the means of three colours in -1..1 after the resize, and the size and the length that it has seen."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        x = x.float()
        if rescale:
            x = 2 * x / 255 - 1
        if resize:
            x = F.interpolate(x, size=[x.shape[2], 224, 224], mode="trilinear", align_corners=False)
        told = torch.tensor([float(x.shape[2]), float(x.shape[3])]).expand(x.shape[0], 2)
        features = torch.cat([x.mean(dim=[2, 3, 4]), told], 1)
        return features if return_features else torch.softmax(features, 1)


class C3D(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.uint8
        return torch.softmax(x.float().mean(dim=[2, 3, 4]) / 64, 1)


class Other(nn.Module):
    """Gives whatever it is told to."""

    def __init__(self, answer: Tensor) -> None:
        super().__init__()
        self.register_buffer("answer", answer)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        return self.answer


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv3d(3, 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(self.layer(x.float()).mean(dim=[2, 3, 4]), 1)


class Two(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def saved(module: nn.Module, path: Path) -> Path:
    torch.jit.script(module).save(path)
    return path


def frames(n: int = 2, t: int = 4, height: int = 16, width: int = 20) -> Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, t, height, width, 3), generator=random).to(torch.uint8)


def test_the_papers_protocol_stands_where_it_can_be_read():
    assert Protocol(videos=2048, frames=16, fps=3.0) == FVD
    assert Protocol(videos=10_000, frames=16, fps=3.0) == INCEPTION_SCORE


def test_of_a_longer_video_the_frames_nearest_to_the_rate_are_seen_from_its_beginning():
    assert FVD.indices(300, 30) == list(range(0, 151, 10))
    assert FVD.indices(46, 8.6) == [0, 3, 6, 9, 11, 14, 17, 20, 23, 26, 29, 32, 34, 37, 40, 43]
    found = FVD.indices(400, 23.976)
    assert max(abs(i / 23.976 - k / 3) for k, i in enumerate(found)) <= 0.5 / 23.976 + 1e-9
    assert FVD.indices(17, 3) == list(range(16))
    assert Protocol(2, 4, 5.0).indices(31, 30) == [0, 6, 12, 18]


def test_a_video_of_just_so_many_frames_is_seen_whole_at_whatever_rate_it_plays():
    for fps in (8, 30, 1, 0):
        assert FVD.indices(16, fps) == list(range(16))


@pytest.mark.parametrize(
    ("count", "fps", "says"),
    [
        (150, 30, r"150 frames at 30 fps; 16 at 3 fps take the first 151 of a video"),
        (15, 30, "15 frames at 30 fps; 16 at 3 fps"),
        (100, 2, "2 fps, and 16 frames at 3 fps are wanted"),
        (100, 0, "its frame rate is unknown"),
    ],
)
def test_a_video_that_is_too_short_or_too_slow_is_refused(count, fps, says):
    with pytest.raises(ValueError, match=says):
        FVD.indices(count, fps)


def test_i3ds_features_are_asked_for_with_all_three_keywords(tmp_path):
    path = saved(I3D(), tmp_path / "i3d_torchscript.pt")
    x = frames(n=3)
    found = Detector.features(path)(x)
    assert found.dtype == torch.float32
    assert found[:, 3:].tolist() == [[4, 224]] * 3
    # Resized from 16x20 by the network, which weighs the pixels at the border a little more.
    torch.testing.assert_close(found[:, :3], 2 * x.float().mean(dim=(1, 2, 3)) / 255 - 1, rtol=0, atol=5e-3)


def test_classes_are_asked_of_the_i3d_as_probabilities_and_of_the_c3d_without_a_keyword(tmp_path):
    x = frames()
    i3d = saved(I3D(), tmp_path / "i3d.pt")
    torch.testing.assert_close(Detector.classes(i3d)(x), Detector.features(i3d)(x).softmax(1))
    found = Detector.classes(saved(C3D(), tmp_path / "c3d.pt"))(x)
    torch.testing.assert_close(found, (x.float().mean(dim=(1, 2, 3)) / 64).softmax(1))


def test_a_video_has_the_same_features_alone_again_and_among_others(tmp_path):
    detector = Detector.classes(saved(Convolution(), tmp_path / "c3d.pt")).to("cpu")
    x = frames(n=5, t=6)
    first = detector(x[2:3])
    assert all(torch.equal(detector(x[2:3]), first) for _ in range(4))
    torch.testing.assert_close(detector(x)[2:3], first)
    assert not first.requires_grad


def test_a_file_is_known_by_what_it_holds(tmp_path):
    one = saved(C3D(), tmp_path / "one.pt")
    shutil.copy(one, tmp_path / "copy.pt")
    other = saved(I3D(), tmp_path / "other.pt")
    a, b, c = (Detector.classes(path).identity for path in (one, tmp_path / "copy.pt", other))
    assert a == b
    assert a != c
    assert len(a) == 16


NAN = torch.tensor([[0.5, float("nan")], [0.5, 0.5]])


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (torch.zeros(2, 400, 2, 2), r"gives \[2, 400, 2, 2\]; expected \[2, D\]"),
        (torch.zeros(3, 400), r"gives \[3, 400\]; expected \[2, D\]"),
        (torch.zeros(400), r"gives \[400\]; expected \[2, D\]"),
        (NAN, "gives NaN or inf"),
    ],
)
def test_an_output_of_another_shape_is_one_line_that_names_the_file(tmp_path, answer, said):
    path = saved(Other(answer), tmp_path / "net.pt")
    for detector in (Detector.features(path), Detector.classes(path)):
        with pytest.raises(ValueError, match=rf"net.pt, of videos \[2, 3, 4, 16, 20\]: {said}") as told:
            detector(frames())
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("answer", [[[3.0, -2.0], [1.0, 0.0]], [[0.6, 0.6], [0.5, 0.5]]])
def test_a_classifier_without_a_softmax_is_refused_and_features_may_be_anything(tmp_path, answer):
    path = saved(Other(torch.tensor(answer)), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"gives no probabilities \(rows sum to 1"):
        Detector.classes(path)(frames())
    assert Detector.features(path)(frames()).tolist() == torch.tensor(answer).tolist()


def test_several_outputs_and_a_network_that_fails_are_one_line_too(tmp_path):
    with pytest.raises(ValueError, match=r"gives tuple; expected \[2, D\]$"):
        Detector.classes(saved(Two(), tmp_path / "two.pt"))(frames())
    short = Detector.classes(saved(Convolution(), tmp_path / "c3d.pt"))
    with pytest.raises(ValueError, match=r"c3d.pt, of videos \[2, 3, 4, 16, 20\]: .*Kernel size can't be") as told:
        short(frames(t=4))
    assert "\n" not in str(told.value)


class Raises(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.size(2) > 4:
            raise RuntimeError("CUDA out of memory")
        assert x.size(2) > 4, "four frames are too few"
        return x


def test_what_a_network_itself_refuses_is_one_line_but_a_gpu_without_memory_is_not_the_videos_fault(tmp_path):
    detector = Detector.classes(saved(Raises(), tmp_path / "net.pt"))
    with pytest.raises(ValueError, match=r"net.pt, of videos .*four frames are too few$"):
        detector(frames())
    with pytest.raises((RuntimeError, torch.jit.Error), match="out of memory"):
        detector(frames(t=5))


def test_files_that_are_no_such_network_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"c3d.pt: its forward has no rescale, resize, return_features; expected the"):
        Detector.features(saved(C3D(), tmp_path / "c3d.pt"))
    with pytest.raises(ValueError, match=r"nowhere.pt: no such file; expected a TorchScript network"):
        Detector.features(tmp_path / "nowhere.pt")
    (tmp_path / "page.pt").write_text("<!doctype html>")
    torch.save({"weight": torch.zeros(2)}, tmp_path / "state.pt")
    whole = (tmp_path / "c3d.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    for name in ("page.pt", "state.pt", "half.pt"):
        with pytest.raises(ValueError, match=rf"{name}: no TorchScript network \(") as told:
            Detector.classes(tmp_path / name)
        assert "\n" not in str(told.value)


@pytest.mark.parametrize("wrong", [frames().float(), frames()[0], frames().permute(0, 4, 1, 2, 3)])
def test_frames_of_another_layout_are_refused(tmp_path, wrong):
    detector = Detector.classes(saved(C3D(), tmp_path / "c3d.pt"))
    with pytest.raises(ValueError, match=r"uint8 \[B, T, H, W, 3\]"):
        detector(wrong)
