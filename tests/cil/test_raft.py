"""RAFT: published names and shapes, figures of both published implementations, and its parts against loops.

How golden/raft_*.json were made: the key tables list what the networks of Princeton's RAFT (princeton-vl/RAFT, the
large model) and of torchvision 0.29.2's `raft_large` hold. raft_flow.json has their flows in float32 on a CPU, of
`drifting()` and with the weights of `filled(...)`, each by its own names: torchvision's after 12 updates, of pictures
in -1..1; Princeton's after 20, of pictures in 0..255 that lack 3 rows and 7 columns, padded as its InputPadder pads.
With the same weights both gave the same bits.
"""

import numpy as np
import pytest
import torch
from golden.fill import fill
from published import write_raft
from test_devices import Standing
from torch import Tensor

from cil.metrics.consistency import warp_error
from cil.metrics.motion import Flow
from cil.metrics.raft import Raft
from cil.nets.raft import LEVELS, RADIUS, RAFT, correlations, from_published, looked_up, upsampled

LAYOUTS = ("princeton", "torchvision")
ROUNDING = 1e-3  # pixels, of flows up to 50: measured 8e-6, and of nine faults that were tried at least 0.3
UPDATES = {"princeton": 20, "torchvision": 12}


def filled(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """Weights by golden/fill.py and their names, with variances above 0; the flow stays within a few pixels."""
    state = {}
    for name, shape in shapes.items():
        own = name.removeprefix("module.").replace("norm3", "downsample.1")  # two names of one norm
        x = torch.from_numpy(np.asarray(fill(own, shape)))
        if name.endswith("running_var"):
            x = x.square() + 0.5
        if "flow_head.conv2" in name:
            x = x / 4
        state[name] = torch.tensor(7) if name.endswith("num_batches_tracked") else x
    return state


def drifting() -> Tensor:
    """uint8 [3, 128, 160, 3]: a texture, coarse and fine, that moves."""
    coarse, fine = fill("input:raft coarse", (3, 16, 20)), fill("input:raft fine", (3, 128, 160))
    scene = 128 + 40 * coarse.repeat(8, 1).repeat(8, 2) + 10 * fine
    shown = [np.roll(scene, move, (1, 2)) for move in ((0, 0), (0, 3), (5, -4))]
    return torch.from_numpy(np.clip(np.stack(shown), 0, 255).round().astype(np.uint8)).permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def networks(golden, tmp_path_factory) -> dict[str, Raft]:
    """Read from files as published, of synthetic weights."""
    folder = tmp_path_factory.mktemp("raft")
    for layout in LAYOUTS:
        torch.save(filled(golden[f"raft_{layout}_full_keys"]), folder / f"{layout}.pth")
    return {layout: Raft.load(folder / f"{layout}.pth") for layout in LAYOUTS}


# -- what is published -------------------------------------------------------------------------------------------------


def test_of_both_layouts_every_weight_is_read_and_none_is_left_over(networks, golden):
    held = {layout: filled(golden[f"raft_{layout}_full_keys"]) for layout in LAYOUTS}
    for layout, raft in networks.items():
        assert raft.iterations == UPDATES[layout]
        ours = sorted((tuple(x.shape), float(x.double().sum())) for x in raft.net.state_dict().values())
        theirs = sorted((tuple(x.shape), float(x.double().sum())) for n, x in held[layout].items() if "norm3" not in n)
        assert ours == theirs
    assert sum(p.numel() for p in networks["princeton"].net.parameters()) == 5_257_536


def check(flow: list[np.ndarray], wanted: dict) -> None:
    for n, i, j, x, y in wanted["at"]:
        assert flow[n][i, j] == pytest.approx([x, y], abs=ROUNDING), (n, i, j)
    magnitudes = [np.sqrt(np.square(field.astype(np.float64)).sum(-1)).mean() for field in flow]
    assert np.mean(magnitudes) == pytest.approx(wanted["magnitude"], abs=ROUNDING)


def test_the_flow_is_torchvisions(networks, golden):
    flow = networks["torchvision"](drifting())
    assert [field.shape for field in flow.fields] == [(128, 160, 2)] * 2
    check(flow.fields, golden["raft_flow"]["torchvision"])
    assert flow.mean == pytest.approx(golden["raft_flow"]["torchvision"]["magnitude"], abs=ROUNDING)


def test_the_flow_of_frames_that_eight_does_not_divide_is_princetons_which_pads_and_cuts_them(networks, golden):
    flow = networks["princeton"](drifting()[:2, :-3, :-7])
    assert [field.shape for field in flow.fields] == [(125, 153, 2)]
    check(flow.fields, golden["raft_flow"]["princeton"])


def test_a_pair_has_the_same_flow_whatever_it_is_looked_at_together_with(networks, monkeypatch):
    together = networks["torchvision"](drifting()).fields
    monkeypatch.setattr("cil.metrics.raft.HELD", 1)
    calls: list[int] = []
    forward = RAFT.forward
    monkeypatch.setattr(RAFT, "forward", lambda net, x, n: calls.append(len(x)) or forward(net, x, n))
    for one, other in zip(networks["torchvision"](drifting()).fields, together, strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=ROUNDING)
    assert calls == [2, 2]  # pictures: a pair at a time


# -- its parts, in float64 ---------------------------------------------------------------------------------------------


def random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def bilinear(picture: np.ndarray, x: float, y: float) -> float:
    """Of what lies outside, zero."""
    height, width = picture.shape
    total = 0.0
    for j in (int(np.floor(y)), int(np.floor(y)) + 1):
        for i in (int(np.floor(x)), int(np.floor(x)) + 1):
            if 0 <= j < height and 0 <= i < width:
                total += picture[j, i] * (1 - abs(x - i)) * (1 - abs(y - j))
    return total


@pytest.mark.parametrize(("h", "w"), [(16, 18), (17, 23)])
def test_what_is_looked_up_is_the_correlation_with_pooled_features_around_where_the_flow_leads(h, w):
    """Pooled features, as the average of correlations is the correlation with an average."""
    a, b, flow = random(2, 12, h, w), random(2, 12, h, w).flip(0), 3 * random(2, 2, h, w)
    found = looked_up(correlations(a, b), flow)
    side = 2 * RADIUS + 1
    assert found.shape == (2, LEVELS * side**2, h, w)
    for n, y, x in ((0, 0, 0), (1, 5, 9), (0, h - 1, w - 1), (1, h - 2, 3)):
        pooled = b[n].numpy()
        for level in range(LEVELS):
            volume = np.einsum("c, c y x -> y x", a[n, :, y, x].numpy(), pooled) / np.sqrt(12)
            to_x, to_y = ((at + float(flow[n, i, y, x])) / 2**level for i, at in enumerate((x, y)))
            wanted = [
                bilinear(volume, to_x + dx, to_y + dy)
                for dx in range(-RADIUS, RADIUS + 1)
                for dy in range(-RADIUS, RADIUS + 1)
            ]
            got = found[n, level * side**2 : (level + 1) * side**2, y, x]
            np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-12)
            c, rows, columns = pooled.shape
            even = pooled[:, : rows // 2 * 2, : columns // 2 * 2]
            pooled = even.reshape(c, rows // 2, 2, columns // 2, 2).mean((2, 4))


def test_a_pixel_of_the_flow_is_a_convex_combination_of_the_nine_coarse_ones_around_it():
    flow, mask = random(2, 2, 3, 4), 3 * random(2, 9 * 64, 3, 4)
    found = upsampled(flow, mask)
    assert found.shape == (2, 2, 24, 32)
    for n, y, x in ((0, 0, 0), (1, 13, 17), (0, 23, 31), (1, 8, 7)):
        (row, i), (column, j) = divmod(y, 8), divmod(x, 8)
        weights = mask[n, :, row, column].reshape(9, 8, 8)[:, i, j].exp()
        wanted = torch.zeros(2, dtype=torch.float64)
        for k in range(9):
            r, c = row + k // 3 - 1, column + k % 3 - 1
            if 0 <= r < 3 and 0 <= c < 4:
                wanted += 8 * flow[n, :, r, c] * weights[k] / weights.sum()
        torch.testing.assert_close(found[n, :, y, x], wanted, rtol=0, atol=1e-12)


# -- as a flow of videos -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_update_adds_to_the_flow_in_pixels_of_the_frames(layout, tmp_path):
    """Of weights that always see the same: updates times eight pixels times a step, in the smallest frames."""
    raft = Raft.load(write_raft(tmp_path / "raft.pth", (0.03, -0.04), layout))
    flow = raft(torch.randint(256, (2, 121, 130, 3), dtype=torch.uint8))
    wanted = np.array([0.24, -0.32]) * UPDATES[layout]
    np.testing.assert_allclose(flow.fields[0], np.broadcast_to(wanted, (121, 130, 2)), rtol=1e-5)
    assert flow.mean == pytest.approx(0.4 * UPDATES[layout], rel=1e-5)


def test_a_warp_error_is_along_the_flow_there_and_back_that_it_is_given(tmp_path):
    """All of a still video seems to go somewhere: no flow leads back, so nothing can be followed."""
    raft = Raft.load(write_raft(tmp_path / "raft.pth", (0.05, 0.0)))
    frames = torch.randint(256, (1, 128, 128, 3), dtype=torch.uint8).repeat(2, 1, 1, 1)
    there = raft(frames)
    assert there.pictures[0].shape == (128, 128)
    assert warp_error(frames, flow=there, back=raft(frames.flip(0))).hidden == 1
    assert warp_error(frames) == (0, 0)
    assert warp_error(frames, flow=Flow(frames), back=there).hidden == 1


def test_where_it_stands_all_is_computed_and_only_the_flow_comes_back():
    raft = Raft(RAFT().eval(), 2).to("meta")
    with Standing() as device:
        flow = raft(torch.zeros(3, 136, 128, 3, dtype=torch.uint8))
    assert [field.shape for field in flow.fields] == [(136, 128, 2)] * 2
    assert device.brought == ["torch.float32"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_sees_the_flow_of_a_cpu(networks):
    """Convolutions round their operands to TF32, and updates add up: a hundredth of the flow."""
    here, there = networks["torchvision"](drifting()), networks["torchvision"].to("cuda")(drifting())
    networks["torchvision"].to("cpu")
    for one, other in zip(here.fields, there.fields, strict=True):
        assert np.abs(one - other).mean() < 0.01 * np.abs(one).mean()


@pytest.mark.parametrize("shape", [(1, 128, 128, 3), (3, 120, 256, 3), (3, 256, 120, 3)])
def test_videos_that_are_too_short_or_too_small_are_refused(shape):
    told = rf"frames \({', '.join(map(str, shape))}\): a motion score by RAFT needs 2 frames of 121x121 or more"
    with pytest.raises(ValueError, match=told):
        Raft(RAFT(), 1)(torch.zeros(shape, dtype=torch.uint8))


def test_the_identity_is_of_weights_and_updates_and_not_of_the_file(tmp_path):
    def identity(file: str, step: float, layout: str) -> str:
        return Raft.load(write_raft(tmp_path / file, (step, 0.0), layout)).identity

    first = identity("a.pth", 0.1, "torchvision")
    assert identity("b.pth", 0.1, "torchvision") == first
    assert identity("a.pth", 0.2, "torchvision") != first
    assert identity("a.pth", 0.1, "princeton") != first


def test_what_is_no_raft_is_named_for_what_it_is(tmp_path, golden):
    file = tmp_path / "raft.pth"
    with pytest.raises(ValueError, match=r"raft\.pth: no such file"):
        Raft.load(file)
    file.write_text("<!doctype html>")
    with pytest.raises(ValueError, match=r"raft\.pth: a web page"):
        Raft.load(file)
    torch.save({"visual.conv1.weight": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"raft\.pth: no RAFT: expected Princeton's raft-things\.pth or torchvision's"):
        Raft.load(file)
    for layout, told in (("princeton", "Princeton's large RAFT"), ("torchvision", "torchvision's raft_large")):
        state = torch.load(write_raft(file, (0, 0), layout))
        name = next(name for name in state if name.endswith("flow_head.conv1.weight"))
        others = {each: tensor for each, tensor in state.items() if each != name}
        torch.save(others, file)
        with pytest.raises(ValueError, match=rf"raft\.pth: not {told}: 1 missing: .*flow_head\.conv1\.weight$"):
            Raft.load(file)
        torch.save(others | {name: torch.zeros(128, 96, 3, 3)}, file)  # raft-small's
        with pytest.raises(ValueError, match=r"1 of another shape \(update_block\.flow_head\.conv1\.weight \[128, 96"):
            Raft.load(file)
        torch.save(state | {name: state[name].fill_(torch.nan)}, file)
        with pytest.raises(ValueError, match="holds NaN or inf"):
            _ = Raft.load(file).identity


def test_without_the_wrapper_of_parallel_training_princetons_weights_are_the_same(golden):
    state = filled(golden["raft_princeton_full_keys"])
    bare = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    found, updates = from_published(bare)
    assert updates == 20
    RAFT().load_state_dict(found, strict=True)
