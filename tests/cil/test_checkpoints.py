"""Published checkpoints: every form read and written bit by bit, nothing executed, nothing held twice."""

import io
import json
import math
import os
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from cil import InitialNoise
from cil.checkpoints import (
    FRAME_STRIDE,
    HARMLESS,
    Mismatch,
    load_into,
    looks_like,
    read,
    read_ema,
    renamed,
    select,
    write_diffusers,
    write_lvdm,
    write_safetensors,
    write_svd_cil,
)
from cil.nets.lvdm import LVDMUNet, Resampler

ROOT = Path(__file__).parents[2]
PREFIX = "model.diffusion_model."


class Net(nn.Module):
    """Parameters of two types and a buffer, with names as a family has."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Conv2d(3, 4, 3)
        self.fps_embedding = nn.Linear(4, 5, dtype=torch.float16)
        self.register_buffer("betas", torch.rand(7, dtype=torch.float64))
        self.register_buffer("steps", torch.tensor(3))


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: tensor.clone() for name, tensor in Net().state_dict().items()}


@pytest.fixture
def empty() -> Net:
    with torch.device("meta"):
        return Net()


def assert_same(found, wanted, order=True):
    assert list(found) == list(wanted) if order else set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def refusal(path, call=read) -> str:
    with pytest.raises(ValueError, match="expected") as caught:
        call(path)
    text = str(caught.value)
    assert "\n" not in text
    assert "weights_only" not in text
    assert text.startswith(str(path))
    return text


# -- forms -----------------------------------------------------------------------------------------------------------

FORMS = {
    "bare": lambda state: state,
    "state_dict": lambda state: {"state_dict": state},
    "state_dict of a wrapped network": lambda state: {"state_dict": {"module." + n: t for n, t in state.items()}},
    "DeepSpeed": lambda state: {"module": {"_forward_module." + n: t for n, t in state.items()}},
    "DeepSpeed's engine": lambda state: {"module": state, "optimizer": None, "global_steps": 3},
    "wrapped twice": lambda state: {"module": {"_forward_module.module." + n: t for n, t in state.items()}},
    "compiled": lambda state: {"_orig_mod." + n: t for n, t in state.items()},
    "parameters": lambda state: {n: nn.Parameter(t, requires_grad=t.is_floating_point()) for n, t in state.items()},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("form", FORMS)
def test_every_pickled_form_gives_the_same_weights(form, legacy, state, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save(FORMS[form](state), path, _use_new_zipfile_serialization=not legacy)
    found = read(path)
    assert_same(found, state)
    assert all(type(tensor) is torch.Tensor and not tensor.requires_grad for tensor in found.values())


def test_what_lightning_leaves_beside_the_weights_is_harmless(state, tmp_path):
    scores = {"f64": np.float64(0.3), "f32": np.float32(1), "int": np.int64(3), "bool": np.bool_(True)}
    callback = {"monitor": "loss", "best_model_score": torch.tensor(0.1), "array": np.ones(3), **scores}
    beside = {"epoch": 3, "global_step": 10, "pytorch-lightning_version": "1.9.3", "lr_schedulers": [{"a": (1, None)}]}
    torch.save({**beside, "state_dict": state, "callbacks": {"ModelCheckpoint": callback}}, tmp_path / "model.ckpt")
    assert_same(read(tmp_path / "model.ckpt"), state)


@pytest.mark.parametrize("name", HARMLESS)
def test_an_object_known_to_be_harmless_is_passed_over_and_not_made(name, tmp_path):
    """As old files of Lightning, whose callbacks are filed under their class."""
    module, _, attribute = name.rpartition(".")
    data = pickled({"state_dict": {}, "callbacks": Named(module, attribute)})
    with zipfile.ZipFile(tmp_path / "x.ckpt", "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
    assert "holds state_dict, callbacks" in refusal(tmp_path / "x.ckpt")  # because it has no weights: it was unpickled


class Named:
    """Pickled as module.attribute(), whatever is installed."""

    def __init__(self, module: str, attribute: str) -> None:
        self.module, self.attribute = module, attribute


def pickled(content: dict) -> bytes:
    class Pickler(pickle._Pickler):
        def save(self, obj, save_persistent_id=True):
            if isinstance(obj, Named):
                self.write(f"c{obj.module}\n{obj.attribute}\n".encode() + b")R")
            else:
                super().save(obj, save_persistent_id)

    file = io.BytesIO()
    Pickler(file, protocol=2).dump(content)
    return file.getvalue()


def test_a_safetensors_file_is_read(state, tmp_path):
    safetensors.torch.save_file(state, tmp_path / "x.safetensors")
    assert_same(read(tmp_path / "x.safetensors"), state, order=False)


def test_a_file_is_known_by_its_content_and_not_by_its_name(state, tmp_path):
    safetensors.torch.save_file(state, tmp_path / "x.ckpt")
    assert_same(read(tmp_path / "x.ckpt"), state, order=False)
    torch.save(state, tmp_path / "x.json")
    assert_same(read(tmp_path / "x.json"), state)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_does_not_pass_for_safetensors(legacy, state, tmp_path):
    torch.save(state, tmp_path / "x.safetensors", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"a \.ckpt or \.pt that is called \.safetensors; rename it"):
        read(tmp_path / "x.safetensors")


def test_a_folder_prefers_safetensors_to_pickles_and_full_weights_to_variants(state, tmp_path):
    other = {"other": torch.ones(1)}
    torch.save(state, tmp_path / "diffusion_pytorch_model.bin")
    torch.save("never read", tmp_path / "training_args.bin")
    assert_same(read(tmp_path), state)
    safetensors.torch.save_file(other, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    assert_same(read(tmp_path), other)
    safetensors.torch.save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    assert_same(read(tmp_path), state, order=False)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_folder_in_pieces_is_joined(kind, state, tmp_path):
    halves = [dict(list(state.items())[:2]), dict(list(state.items())[2:])]
    where = {}
    for i, half in enumerate(halves, 1):
        name = f"diffusion_pytorch_model-{i:05}-of-00002.{kind}"
        (safetensors.torch.save_file if kind == "safetensors" else torch.save)(half, tmp_path / name)
        where |= dict.fromkeys(half, name)
    index = tmp_path / f"diffusion_pytorch_model.{kind}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_same(read(tmp_path), state, order=False)

    index.write_text(json.dumps({"weight_map": {**where, "absent": where["betas"]}}))
    with pytest.raises(ValueError, match=r"lacks 1 weights that .*index.json says it holds \(absent\)"):
        read(tmp_path)
    index.write_text(json.dumps({"weight_map": {**where, "betas": "../secret.bin"}}))
    with pytest.raises(ValueError, match="outside its folder"):
        read(tmp_path)
    for damaged in ("{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": 3}'):
        index.write_text(damaged)
        with pytest.raises(ValueError, match="damaged; expected weight_map"):
            read(tmp_path)
    index.write_text(json.dumps({"weight_map": where}))
    (tmp_path / where["betas"]).unlink()
    with pytest.raises(ValueError, match="1 of 2 pieces are missing"):
        read(tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match=r"without the \.index\.json"):
        read(tmp_path)


def test_a_folder_that_leaves_a_choice_says_which(state, tmp_path):
    assert "a folder without weights" in refusal(tmp_path)
    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        safetensors.torch.save_file(state, tmp_path / part / "model.safetensors")
    with pytest.raises(ValueError, match="a whole pipeline; name one of its parts: unet, vae"):
        read(tmp_path)
    for name in ("a", "b"):
        safetensors.torch.save_file(state, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"several files of weights \(a.safetensors, b.safetensors\)"):
        read(tmp_path)


# -- averages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
def test_raw_and_averaged_weights_of_an_svd_cil_file_are_found_by_name(wrapped, tmp_path):
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))  # shapes tell nothing of the order
    raw = net.state_dict()
    averages = {name: tensor + 1 for name, tensor in raw.items()}
    reversed_averages = dict(reversed(averages.items()))
    write_svd_cil(tmp_path / "x.ckpt", raw, reversed_averages, step=20000, wrapped=wrapped)
    assert_same(read(tmp_path / "x.ckpt"), raw)
    assert_same(read_ema(tmp_path / "x.ckpt"), averages)
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert list(content["state_dict"]) == [("module." if wrapped else "") + name for name in raw]


def test_buffers_have_no_average(state, tmp_path):
    averages = {name: state[name] * 2 for name, _ in Net().named_parameters()}
    write_svd_cil(tmp_path / "x.ckpt", state, averages)
    assert_same(read_ema(tmp_path / "x.ckpt", averages), state | averages)
    with pytest.raises(ValueError, match="4 averaged weights for 6 parameters"):
        read_ema(tmp_path / "x.ckpt")


def test_averages_that_are_not_there_or_in_another_order_are_refused(state, tmp_path):
    torch.save({"state_dict": state}, tmp_path / "none.ckpt")
    assert "no averaged weights" in refusal(tmp_path / "none.ckpt", read_ema)
    shadow = list(reversed(state.values()))
    torch.save({"state_dict": state, "ema_state": {"shadow_params": shadow}}, tmp_path / "turned.ckpt")
    with pytest.raises(ValueError, match="in another order than the raw ones"):
        read_ema(tmp_path / "turned.ckpt")
    with pytest.raises(ValueError, match="ema: 1 averages of no weight"):
        write_svd_cil(tmp_path / "y.ckpt", state, {"strange": torch.ones(1)})


# -- what is no checkpoint -------------------------------------------------------------------------------------------

PAGE = b"\n<!DOCTYPE html><html><head><title>404</title></head></html>"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 10429021000\n"
BAD = {
    "empty": (b"", "empty"),
    "page": (PAGE, "a web page"),
    "page with a mark": (b"\xef\xbb\xbf<HTML>", "a web page"),
    "error": (b'{"error": "Access to model is restricted"}', "a JSON file"),
    "pointer": (POINTER, "a git-lfs pointer"),
    "text": (b"weights will follow\n", "a text file"),
    "one byte": (b"\x80", "damaged"),
    "numbers": (bytes(range(200, 256)), "begins with b'"),
    "tar": (b"\0" * 257 + b"ustar" + b"\0" * 250, "a tar archive"),
    "gzip": (b"\x1f\x8b\x08\x00", "a gzip file"),
    "hdf5": (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    "plain pickle": (pickle.dumps({"a": [1]}, protocol=4), "damaged, truncated, or a pickle that torch did not write"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_checkpoint_is_named_for_what_it_is(case, tmp_path):
    data, what = BAD[case]
    path = tmp_path / "model.ckpt"
    path.write_bytes(data)
    assert refusal(path).removeprefix(f"{path}: ").startswith(what)


def test_numpy_files_and_other_zips_are_named_for_what_they_are(state, tmp_path):
    np.save(tmp_path / "a.npy", np.ones(3))
    assert "a numpy file" in refusal(tmp_path / "a.npy")
    np.savez(tmp_path / "a.npz", a=np.ones(3))
    assert "a numpy file (npz)" in refusal(tmp_path / "a.npz")
    with zipfile.ZipFile(tmp_path / "a.docx", "w") as archive:
        archive.writestr("word.xml", "")
    assert "a zip file, but not torch's" in refusal(tmp_path / "a.docx")


def test_a_program_is_not_run(tmp_path):
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "x.pt")
    assert "a TorchScript program, which is never run" in refusal(tmp_path / "x.pt")


@pytest.mark.parametrize("left", [0.02, 0.5, 0.99])
@pytest.mark.parametrize("legacy", [False, True])
def test_a_truncated_pickle_is_refused(left, legacy, state, tmp_path):
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(ValueError, match="damaged"):
        read(path)


@pytest.mark.parametrize("left", [0.1, 0.5, 0.99])
def test_a_truncated_safetensors_file_is_refused(left, state, tmp_path):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(left * len(whole))])
    with pytest.raises(ValueError, match="a damaged or truncated safetensors file") as caught:
        read(path)
    assert "\n" not in str(caught.value)


def repacked(source: Path, target: Path, compression: int = zipfile.ZIP_STORED, pickle_of=lambda data: data) -> None:
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", compression) as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, pickle_of(data) if name.endswith("data.pkl") else data)


def test_compressed_weights_are_not_mistaken_for_weights(state, tmp_path):
    """Mapped, they would be read as they lie in the file."""
    torch.save(state, tmp_path / "a.ckpt")
    repacked(tmp_path / "a.ckpt", tmp_path / "b.ckpt", zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="zipped again, with compression"):
        read(tmp_path / "b.ckpt")


def test_a_tensor_said_to_be_larger_than_the_file_is_refused(tmp_path):
    torch.save({"a": torch.ones(70000)}, tmp_path / "a.ckpt")
    larger = lambda data: data.replace((70000).to_bytes(4, "little"), (70000000).to_bytes(4, "little"))  # noqa: E731
    repacked(tmp_path / "a.ckpt", tmp_path / "b.ckpt", pickle_of=larger)
    assert "damaged" in refusal(tmp_path / "b.ckpt")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({}, "holds nothing"),
        ({"state_dict": {}}, "holds state_dict"),
        ({"epoch": 3, "model": {"a": torch.ones(1)}}, "holds epoch, model"),
        ({"state_dict": {"a": torch.ones(1), "b": 3}, "epoch": 3}, "b is no tensor"),
        ({f"key {i}": i for i in range(30)}, "key 9, ..."),
        ({1: torch.ones(1)}, "holds 1"),
        ([torch.ones(1)], "one list"),
        (torch.ones(1), "one Tensor"),
        ({"a": torch.eye(3).to_sparse()}, "a is quantized, sparse or without values"),
        ({"Expectation_X0": torch.ones(1, 4, 2, 3, 3), "Tr_Cov_d": 0.5}, "initial noise"),
    ],
)
def test_a_pt_file_of_something_else_is_named_for_what_it_holds(content, what, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    assert what in refusal(tmp_path / "x.pt")


BOMB = """
import os, sys, pickle, torch, zipfile
class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {sys.argv[1]}/exploded",)
content = {"state_dict": {"a": torch.ones(1)}, "callbacks": Bomb()}
for legacy in (False, True):
    torch.save(content, f"{sys.argv[1]}/legacy-{legacy}.ckpt", _use_new_zipfile_serialization=not legacy)
for protocol in (2, 4, 5):
    with open(f"{sys.argv[1]}/plain-{protocol}.ckpt", "wb") as file:
        pickle.dump({"a": Bomb()}, file, protocol=protocol)
"""


def test_a_pickle_bomb_is_refused_by_name_and_nothing_is_executed(tmp_path):
    subprocess.run([sys.executable, "-c", BOMB, str(tmp_path)], check=True)
    paths = sorted(map(str, tmp_path.glob("*.ckpt")))
    assert len(paths) == 5
    program = (
        "import sys\nfrom cil.checkpoints import read\n"
        "for path in sys.argv[1:]:\n    try:\n        read(path)\n"
        "    except ValueError as error:\n        print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not (tmp_path / "exploded").exists()
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == paths
    for line in lines[:2]:
        assert "holds posix.system, and nothing but tensors is ever loaded (nothing was executed)" in line
    assert "weights_only" not in run.stdout


def test_what_is_let_pass_here_is_not_let_pass_elsewhere(state, tmp_path):
    torch.save({"state_dict": state, "score": np.float64(1)}, tmp_path / "x.ckpt")
    read(tmp_path / "x.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "x.ckpt", weights_only=True)


def test_a_file_that_is_not_there_is_reported_as_such(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.ckpt"):
        read(tmp_path / "absent.ckpt")


# -- parts and names -------------------------------------------------------------------------------------------------


def test_a_part_is_the_same_tensors(state):
    part = select({PREFIX + name: tensor for name, tensor in state.items()} | {"betas": torch.ones(2)}, PREFIX)
    assert list(part) == list(state)
    assert all(part[name] is tensor for name, tensor in state.items())


def test_a_part_that_is_not_there_says_what_is(golden):
    with pytest.raises(ValueError, match=r"no weights named image_proj_model.\*; looks like svd"):
        select(meta(golden["svd_unet_full_keys"]), "image_proj_model.")


def test_the_names_of_256x256_files_are_turned_to_ours_and_back(state):
    published = {name.replace("fps_embedding", "framestride_embed"): tensor for name, tensor in state.items()}
    assert published.keys() != state.keys()
    assert_same(renamed(published, FRAME_STRIDE), state)
    assert_same(renamed(state, {ours: theirs for theirs, ours in FRAME_STRIDE.items()}), published)
    with pytest.raises(ValueError, match="both stand in these weights"):
        renamed(state | published, FRAME_STRIDE)


def meta(keys: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {name: torch.empty(shape, device="meta") for name, shape in keys.items()}


@pytest.mark.parametrize(
    ("keys", "family"),
    [
        ("dynamicrafter_checkpoint", "dynamicrafter"),
        ("videocrafter1_checkpoint", "videocrafter1"),
        ("dynamicrafter_unet", "dynamicrafter"),
        ("videocrafter1_unet", "videocrafter1"),
        ("dynamicrafter_image_proj", "the projector of dynamicrafter"),
        ("videocrafter1_image_proj", "the projector of videocrafter1"),
        ("lvdm_autoencoder", "a VAE in LDM's names"),
        ("svd_unet", "svd"),
    ],
)
def test_published_weights_look_like_their_family(keys, family, golden):
    state = meta(golden[f"{keys}_full_keys"])
    assert looks_like(state) == family
    for prefix in (PREFIX, "image_proj_model.", "first_stage_model."):
        if all(name.startswith(prefix) for name in state):
            assert looks_like(select(state, prefix)) == family


@pytest.mark.parametrize(
    ("names", "family"),
    [
        (["model.diffusion_model.input_blocks.1.0.in_layers.0.weight"], None),
        (["conv_in.weight", "image_latents_proj_in.0.weight", "down_blocks.0.a", "time_embedding.b"], "i2vgenxl"),
        (["decoder.time_conv_out.weight", "encoder.down_blocks.0.a", "decoder.up_blocks.0.b"], "the VAE of svd"),
        (["encoder.down_blocks.0.resnets.0.a", "decoder.up_blocks.0.b"], "a VAE in diffusers' names"),
        (["down_blocks.0.resnets.0.a", "time_embedding.b"], "a diffusers model of another family"),
        (["vision_model.encoder.layers.0.a"], "CLIP in transformers' names"),
        (["visual.transformer.resblocks.0.a"], "CLIP in OpenCLIP's names"),
        (["unet.down_blocks.0.lora_A.weight"], "LoRA's additions to a network"),
        (["model.diffusion_model.input_blocks.0.0.weight"], "a Stable Diffusion model of images"),
        (["a.input_blocks.0.0.weight", "a.input_blocks.1.0.time_stack.b"], "svd in Stability AI's own names"),
        (["a.input_blocks.0.0.weight", "a.init_attn.0.b"], "VideoCrafter's text-to-video model"),
        (["Expectation_x_0", "trCov_d"], "initial noise"),
        (["something"], None),
        ([], None),
    ],
)
def test_other_weights_look_like_what_they_are(names, family):
    found = looks_like({name: torch.empty(1, device="meta") for name in names})
    assert found == family or (family is not None and str(found).startswith(family))


def test_a_file_of_initial_noise_looks_like_one(tmp_path):
    noise = InitialNoise(torch.zeros(2, 4, 3, 3), 0.5)
    for layout in (None, "lvdm", "svd"):
        noise.save(tmp_path / "noise", layout)
        assert looks_like(read(tmp_path / "noise")) == "initial noise"


# -- into a network --------------------------------------------------------------------------------------------------


def test_a_network_on_the_meta_device_takes_the_tensors_themselves(empty, state):
    empty.proj_in.requires_grad_(False)
    load_into(empty, state)
    assert_same(empty.state_dict(), state)
    assert all(empty.state_dict()[name].data_ptr() == tensor.data_ptr() for name, tensor in state.items())
    assert empty.fps_embedding.weight.requires_grad
    assert not empty.proj_in.weight.requires_grad
    assert not any(tensor.requires_grad for tensor in state.values())


def test_a_type_is_given_to_floating_tensors_only(empty, state):
    load_into(empty, state, dtype=torch.bfloat16)
    assert {tensor.dtype for name, tensor in empty.state_dict().items() if name != "steps"} == {torch.bfloat16}
    assert empty.steps.dtype == torch.int64


def test_any_other_network_is_given_copies_and_keeps_its_type(state):
    net = Net().double()
    load_into(net, state)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, state[name].to(tensor.dtype))
        assert tensor.data_ptr() != state[name].data_ptr()
    assert net.fps_embedding.weight.dtype == torch.float64


def test_training_a_mapped_network_leaves_its_file_as_it_was(empty, state, tmp_path):
    for path, write in ((tmp_path / "x.ckpt", write_lvdm), (tmp_path / "x.safetensors", write_safetensors)):
        write(path, state)
        before = path.read_bytes()
        with torch.device("meta"):
            net = Net()
        load_into(net, read(path))
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(1)
        assert path.read_bytes() == before
        assert_same(read(path), state, order=False)


def test_several_networks_are_filled_from_a_whole_file_and_nothing_is_left_over():
    unet, projector = LVDMUNet(8, 4, 32, (1,), 1, (1,), 8, context_dim=16), Resampler(16, 32, 1, 2, 8, 20, 16)
    whole = {PREFIX + name: tensor for name, tensor in unet.state_dict().items()}
    whole |= {"image_proj_model." + name: tensor for name, tensor in projector.state_dict().items()}
    with torch.device("meta"):
        parts = {PREFIX: LVDMUNet(8, 4, 32, (1,), 1, (1,), 8, context_dim=16)}
        parts["image_proj_model."] = Resampler(16, 32, 1, 2, 8, 20, 16)
    load_into(parts, whole)
    assert_same(parts[PREFIX].state_dict(), unet.state_dict())
    assert_same(parts["image_proj_model."].state_dict(), projector.state_dict())
    with pytest.raises(Mismatch, match=r"1 left over \(betas\); looks like dynamicrafter"):
        load_into(parts, whole | {"betas": torch.ones(1000)}, wanted="videocrafter1")


def test_a_mismatch_counts_and_lists_before_anything_is_changed(state):
    net = Net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    wrong = {name: tensor for name, tensor in state.items() if "bias" not in name}
    wrong |= {f"extra.{i}": torch.ones(1) for i in range(12)}
    wrong |= {"betas": torch.ones(8), "steps": torch.tensor(3.0)}
    with pytest.raises(Mismatch) as caught:
        load_into(net, wrong, wanted="toy")
    extras = ", ".join(f"extra.{i}" for i in range(10))
    assert str(caught.value) == (
        "not the weights of toy: of 6, 2 missing (proj_in.bias, fps_embedding.bias), "
        f"12 left over ({extras}, ...), 2 of another shape (betas [8], not [7], steps [], not [] torch.int64)"
    )
    assert len(caught.value.left_over) == 12
    assert set(caught.value.other_shape) == {"betas", "steps"}
    assert_same(net.state_dict(), before)


def test_a_mismatch_names_the_family_that_the_weights_look_like(golden):
    with torch.device("meta"):
        unet = LVDMUNet(in_channels=8)
    other = select(meta(golden["videocrafter1_unet_full_keys"]), PREFIX)
    told = r"not the weights of dynamicrafter: of 1516, 1 of another shape \(input_blocks.0.0.weight \[320, 4, 3, 3\], "
    with pytest.raises(Mismatch, match=told + r"not \[320, 8, 3, 3\]\); looks like videocrafter1$"):
        load_into(unet, other, wanted="dynamicrafter")
    assert all(parameter.is_meta for parameter in unet.parameters())
    with pytest.raises(Mismatch, match=r"1428 left over \(.*, \.\.\.\); looks like svd$"):
        load_into(unet, meta(golden["svd_unet_full_keys"]), wanted="dynamicrafter")


def test_a_buffer_that_no_file_holds_is_asked_for():
    with torch.device("meta"):
        net = nn.Linear(2, 2)
        net.register_buffer("positions", torch.arange(2), persistent=False)
    with pytest.raises(ValueError, match="positions is on the meta device and in no file"):
        load_into(net, nn.Linear(2, 2).state_dict())
    assert net.weight.is_meta


# -- writing ---------------------------------------------------------------------------------------------------------

WRITERS = {
    "state_dict": write_lvdm,
    "module": lambda path, state: write_lvdm(path, state, form="module"),
    "svd-cil": lambda path, state: write_svd_cil(path, state, state, wrapped=True),
    "safetensors": write_safetensors,
}


@pytest.mark.parametrize("form", WRITERS)
def test_what_is_written_is_read_bit_by_bit_and_has_the_same_bytes_each_time(form, state, tmp_path):
    state["proj_in.weight"][0, 0, 0] = torch.tensor([float("nan"), float("inf"), -0.0])
    paths = [tmp_path / "a" / "first.ckpt", tmp_path / "second name.ckpt"]
    for path in paths:
        WRITERS[form](path, state)
    found = read(paths[0])
    assert set(found) == set(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].numpy().tobytes() == tensor.numpy().tobytes()
    WRITERS[form](tmp_path / "third.ckpt", {name: found[name] for name in state})
    assert paths[0].read_bytes() == paths[1].read_bytes() == (tmp_path / "third.ckpt").read_bytes()


def test_the_published_layouts_are_as_their_loaders_take_them(state, tmp_path):
    write_lvdm(tmp_path / "plain.ckpt", state)
    write_lvdm(tmp_path / "deepspeed.ckpt", state, form="module")
    plain, deepspeed = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("plain", "deepspeed"))
    assert list(plain) == ["state_dict"]
    assert list(deepspeed) == ["module"]
    assert_same(plain["state_dict"], state)
    assert_same({name[16:]: tensor for name, tensor in deepspeed["module"].items()}, state)
    with pytest.raises(ValueError, match="state_dict or module"):
        write_lvdm(tmp_path / "x.ckpt", state, form="other")


def test_a_view_a_transposed_and_a_shared_tensor_are_written_whole_and_alone(tmp_path):
    large = torch.rand(1000, 1000)
    state = {"view": large[:2, :3], "turned": large[:5, :7].T, "last": torch.rand(2, 3, 4, 4), "grad": torch.ones(2)}
    state["last"] = state["last"].to(memory_format=torch.channels_last)
    state["grad"] = nn.Parameter(state["grad"])
    state["same"] = state["grad"]
    for write in (write_lvdm, write_safetensors):
        write(tmp_path / "x", state)
        assert (tmp_path / "x").stat().st_size < 5000
        assert_same(read(tmp_path / "x"), state, order=False)
        assert all(tensor.is_contiguous() for tensor in read(tmp_path / "x").values())


def test_a_file_can_take_the_place_of_the_one_that_its_weights_are_mapped_from(state, tmp_path):
    write_lvdm(tmp_path / "x.ckpt", state)
    mapped = read(tmp_path / "x.ckpt")
    write_lvdm(tmp_path / "x.ckpt", {name: tensor * 2 for name, tensor in mapped.items()})
    assert_same(mapped, state)
    assert_same(read(tmp_path / "x.ckpt"), {name: tensor * 2 for name, tensor in state.items()})


@pytest.mark.parametrize("write", [write_lvdm, write_safetensors, write_diffusers])
def test_an_unfinished_file_is_never_seen(write, state, tmp_path, monkeypatch):
    if write is not write_diffusers:
        write(tmp_path / "x", {"old": torch.ones(1)})

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path / "x", state)
    if write is not write_diffusers:
        assert list(read(tmp_path / "x")) == ["old"]
    assert [path.name for path in tmp_path.iterdir()] == ([] if write is write_diffusers else ["x"])


def test_a_finished_file_can_be_read_by_others(state, tmp_path):
    write_lvdm(tmp_path / "x.ckpt", state)
    (tmp_path / "plain").touch()
    assert (tmp_path / "x.ckpt").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(
    ("bad", "told"), [({}, "no weights to write"), ({"a": 3}, "a is no tensor"), ({"a": None}, "a is no tensor")]
)
def test_what_are_no_weights_is_not_written(bad, told, tmp_path):
    with pytest.raises(ValueError, match=told):
        write_lvdm(tmp_path / "x.ckpt", bad)
    assert list(tmp_path.iterdir()) == []


def test_weights_without_values_are_not_written(empty, tmp_path):
    with pytest.raises(ValueError, match="betas is without values"):
        write_safetensors(tmp_path / "x", empty.state_dict())


def test_a_diffusers_folder_is_in_pieces_only_if_it_must(state, tmp_path):
    write_diffusers(tmp_path / "one", state, {"_class_name": "Net"})
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    assert json.loads((tmp_path / "one" / "config.json").read_text()) == {"_class_name": "Net"}
    limit = sum(tensor.nbytes for tensor in state.values()) - 1
    write_diffusers(tmp_path / "more", state, limit=limit)
    names = sorted(path.name for path in (tmp_path / "more").iterdir())
    assert names[0] == "diffusion_pytorch_model-00001-of-00002.safetensors"
    assert names[-1] == "diffusion_pytorch_model.safetensors.index.json"
    index = json.loads((tmp_path / "more" / names[-1]).read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in state.values())
    assert set(index["weight_map"]) == set(state)
    for folder in ("one", "more"):
        assert_same(read(tmp_path / folder), state, order=False)
    with pytest.raises(ValueError, match="there already; write to a new folder"):
        write_diffusers(tmp_path / "one", state)


def test_diffusers_loads_what_we_write(tmp_path):
    """The UNet from a folder in pieces, and the averages by its EMAModel."""
    from diffusers import UNetSpatioTemporalConditionModel
    from diffusers.training_utils import EMAModel

    config = {
        "block_out_channels": (32, 64),
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24,
        "layers_per_block": 1,
        "cross_attention_dim": 8,
        "num_attention_heads": (1, 2),
        "num_frames": 2,
    }
    unet = UNetSpatioTemporalConditionModel(**config)
    state = unet.state_dict()
    assert looks_like(state) == "svd"
    size = sum(tensor.nbytes for tensor in state.values())
    write_diffusers(tmp_path / "unet", state, json.loads(unet.to_json_string()), limit=math.ceil(size / 3))
    loaded = UNetSpatioTemporalConditionModel.from_pretrained(tmp_path / "unet")
    assert_same(loaded.state_dict(), state)

    averages = {name: parameter.detach() + 1 for name, parameter in unet.named_parameters()}
    write_svd_cil(tmp_path / "x.ckpt", state, averages, step=7)
    theirs = EMAModel(unet.parameters())
    content = torch.load(tmp_path / "x.ckpt", weights_only=True)
    assert content["ema_state"].keys() == theirs.state_dict().keys()
    theirs.load_state_dict(content["ema_state"])
    theirs.copy_to(unet.parameters())
    assert_same(unet.state_dict(), averages)


# -- memory ----------------------------------------------------------------------------------------------------------

PEAK = """
import sys, torch
from torch import nn
from cil.checkpoints import load_into, read
def kilobytes(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
with torch.device("meta"):
    net = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(12)))
before = kilobytes("VmRSS")
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
load_into(net, read(sys.argv[1]))
sum(float(parameter.detach().sum()) for parameter in net.parameters())  # every page is used
print((kilobytes("VmHWM") - before) * 1024)
"""


@pytest.mark.parametrize("write", [write_lvdm, write_safetensors])
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read from Linux's /proc")
def test_weights_are_never_held_twice(write, tmp_path):
    """200 MB in a fresh process: at most 1.15 times the file, with every weight used."""
    net = nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(12)))
    write(tmp_path / "x", net.state_dict())
    size = (tmp_path / "x").stat().st_size
    run = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "x")], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert 0.9 < int(run.stdout) / size < 1.15
