"""Published checkpoints: files and folders of weights, read without holding them twice, and written as they were.

    state = read("model.ckpt")                                   # or a .safetensors, or a diffusers folder
    with torch.device("meta"):
        unet = LVDMUNet()
    load_into(unet, select(state, "model.diffusion_model."))     # the file's own pages become the parameters

Nothing in a file is ever executed, and a file that is not one of weights is named for what it is.

Files are mapped into memory, and a page is read when it is first used. So a file must not be overwritten in place while
its weights are in use; to put another file in its place, as the writers here do, is safe.
"""

import hashlib
import json
import mmap
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

State = dict[str, Tensor]

# What stands for what in DynamiCrafter's files for 256x256.
FRAME_STRIDE: Mapping[str, str] = {"framestride_embed": "fps_embedding"}

DEEPSPEED = "_forward_module."
WRAPPERS = (DEEPSPEED, "module.", "_orig_mod.")

EXPECTED = "expected a .ckpt, .pt, .bin or .safetensors file of weights, or a diffusers folder"

TIED = 4  # how often at most the same values are weights of several names
MAKES_ROOM = b"bytearray\n"  # a pickle can ask for one of any size, and torch lets it
REFUSED_ROOM = "asks for memory by a bytearray, and nothing but tensors is ever loaded (nothing was executed)"

MARKS = (
    (rb"\s*(\xef\xbb\xbf)?\s*<(!doctype|html|head|\?xml)", "a web page, as a download leaves that was answered by one"),
    (rb"version https://git-lfs", "a git-lfs pointer: run `git lfs pull` where it is from"),
    (rb"\x93NUMPY", "a numpy file"),
    (rb"\x1f\x8b", "a gzip file: unpack it"),
    (rb"(7z\xbc\xaf|Rar!|\x28\xb5\x2f\xfd|\xfd7zXZ)", "an archive: unpack it"),
    (rb"\x89HDF", "an HDF5 file, as Keras writes"),
    (rb"GGUF", "a GGUF file"),
    (rb"\s*[{\[]", "a JSON file"),
    (rb"[\t\n\r -~]+\Z", "a text file"),
)


class _Unused:
    """Stands where a checkpoint holds something beside its weights that we do not need: does nothing."""

    def __init__(self, *_: object) -> None: ...

    def __setstate__(self, _: object) -> None: ...


# What training frameworks leave beside the weights.
HARMLESS = {
    **dict.fromkeys(("numpy.dtype", "numpy.ndarray"), _Unused),
    **{f"numpy.{core}.multiarray.{name}": _Unused for core in ("core", "_core") for name in ("scalar", "_reconstruct")},
    **{
        f"{lightning}.callbacks.{module}ModelCheckpoint": _Unused
        for lightning in ("pytorch_lightning", "lightning.pytorch")
        for module in ("model_checkpoint.", "")
    },
    "pytorch_lightning.utilities.parsing.AttributeDict": dict,
    "lightning_fabric.utilities.data.AttributeDict": dict,
}


class Mismatch(ValueError):
    """Weights that are not those of a network."""

    def __init__(
        self, text: str, missing: Sequence[str], left_over: Sequence[str], other_shape: Mapping[str, str]
    ) -> None:
        super().__init__(text)
        self.missing, self.left_over, self.other_shape = missing, left_over, other_shape


# -- reading ---------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> State:
    """Weights by name, whatever form they are kept in and whatever wrapper they were saved through."""
    return _weights(path, _content(Path(path)))


def read_ema(path: str | Path, parameters: Iterable[str] | None = None, or_raw: bool = False) -> State:
    """As `read`, with the averaged weights of an SVD-CIL file in the place of its raw ones.

    `or_raw`: the raw ones of any other file or folder. The file lists averages without names, in the order in which the
    network that was trained has its parameters: that of the raw weights beside them. `parameters` says which of those
    are parameters, if not all are.
    """
    content = _content(Path(path))
    state = _weights(path, content)
    ema = content.get("ema_state")
    if ema is None and or_raw:
        return state
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(shadow, list | tuple) or not all(isinstance(average, Tensor) for average in shadow):
        raise ValueError(f"{path}: no averaged weights; expected ema_state with shadow_params, as SVD-CIL's files have")
    which = state.keys() if parameters is None else set(parameters)
    names = [name for name in state if name in which]
    if len(names) != len(shadow):
        raise ValueError(f"{path}: {len(shadow)} averaged weights for {len(names)} parameters")
    averaged = dict(zip(names, (average.detach() for average in shadow), strict=True))
    for name, average in averaged.items():
        if average.shape != state[name].shape:
            shapes = f"{list(average.shape)} beside {list(state[name].shape)}"
            raise ValueError(f"{path}: averaged weights in another order than the raw ones ({name}: {shapes})")
    return state | averaged


def _content(path: Path) -> dict[Any, Any]:
    if path.is_dir():
        return _folder(path)
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: a pipe or a device; {EXPECTED}")
    with path.open("rb") as file:
        head = file.read(512)
    if head.startswith((b"PK\x03\x04", b"\x80")) and path.suffix == ".safetensors":  # torch goes by that
        raise ValueError(f"{path}: a .ckpt or .pt that is called .safetensors; rename it")
    if head[:4] == b"PK\x03\x04":
        try:
            check_zip(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}; {EXPECTED}") from None
        return _pickled(path, mapped=True)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 28:
        return _safetensors(path)
    if head[:1] == b"\x80":  # as torch wrote before 1.6
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(MAKES_ROOM) >= 0:
                raise ValueError(f"{path}: {REFUSED_ROOM}; {EXPECTED}")
        return _pickled(path, mapped=False)
    if head[257:262] == b"ustar":
        raise ValueError(f"{path}: a tar archive; {EXPECTED}")
    what = next((what for mark, what in MARKS if re.match(mark, head, re.IGNORECASE)), f"begins with {head[:8]!r}")
    raise ValueError(f"{path}: {what if head else 'empty'}; {EXPECTED}")


def check_zip(file: Path | BinaryIO) -> None:
    """Before torch reads it: that it is one of torch's, whose content lies in it as it is, and each byte once.

    Mapped weights are trusted to lie where the zip says. Others would be unpacked to whatever size the zip claims.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
            names = {member.filename.rpartition("/")[2] for member in members}
            if "constants.pkl" in names:
                raise ValueError("a TorchScript program, which is never run")
            if "data.pkl" not in names:
                npz = any(name.endswith(".npy") for name in names)
                raise ValueError("a numpy file (npz)" if npz else "a zip file, but not torch's")
            if any(member.compress_type != zipfile.ZIP_STORED for member in members):
                raise ValueError("zipped again, with compression; torch's own files have none")
            size = file.stat().st_size if isinstance(file, Path) else file.seek(0, os.SEEK_END)
            if (claimed := sum(member.file_size for member in members)) > size:
                raise ValueError(f"a zip of {size} bytes that claims {claimed}: its members overlap")
            pickles = [member for member in members if member.filename.endswith("data.pkl")]
            if any(MAKES_ROOM in archive.read(member) for member in pickles):
                raise ValueError(REFUSED_ROOM)
    except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError, RuntimeError, EOFError):
        raise ValueError("a damaged or truncated .ckpt or .pt (a zip without its end)") from None


def refuse_inflated(state: Mapping[str, Tensor]) -> None:
    """Views of few values can claim any number of them, which the first copy would make real."""
    held = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in state.values()}
    claimed = sum(tensor.nbytes for tensor in state.values())
    if claimed > TIED * sum(held.values()):
        largest = max(state, key=lambda name: state[name].nbytes)
        raise ValueError(f"{largest} and others claim {claimed} bytes and hold {sum(held.values())}: expanded views")


def _pickled(path: Path, mapped: bool) -> dict[Any, Any]:
    harmless = [(stand_in, name) for name, stand_in in HARMLESS.items()]
    try:
        with torch.serialization.safe_globals(harmless), warnings.catch_warnings():  # type: ignore[arg-type]
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path}: {_refusal(error)}; {EXPECTED}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: a .pt file of one {type(content).__name__}; {EXPECTED}")
    return content


def _refusal(error: Exception) -> str:
    """In our own words: torch's advise to load the file unsafely."""
    named = re.search(r"GLOBAL ([\w.]{1,80})", str(error)) if isinstance(error, pickle.UnpicklingError) else None
    if named:
        return f"holds {named[1]}, and nothing but tensors is ever loaded (nothing was executed)"
    if isinstance(error, pickle.UnpicklingError) and re.search("Can only|call reduce|persistent", str(error)):
        return "holds objects, and nothing but tensors is ever loaded (nothing was executed)"
    return "damaged, truncated, or a pickle that torch did not write"


def _safetensors(path: Path) -> State:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: a damaged or truncated safetensors file ({_line(error)})") from None


def _folder(path: Path) -> dict[Any, Any]:
    """safetensors before pickles, and full weights before variants such as `.fp16`."""
    for kind in ("safetensors", "bin"):
        if indexes := sorted(path.glob(f"*.{kind}.index.json")):
            return _sharded(_only(path, indexes))
        files = sorted(file for file in path.glob(f"*.{kind}") if file.name != "training_args.bin")
        if pieces := [file for file in files if re.search(r"-\d{5}-of-\d{5}", file.name)]:
            raise ValueError(f"{path}: pieces of weights ({_first(pieces)}) without the .index.json that joins them")
        if files:
            return _content(_only(path, files))
    parts = sorted(part.name for part in path.iterdir() if _holds_weights(part))
    if parts:
        raise ValueError(f"{path}: a whole pipeline; name one of its parts: {', '.join(parts)}")
    raise ValueError(f"{path}: a folder without weights; expected a *.safetensors or *.bin, or pieces and an index")


def _holds_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))


def _only(folder: Path, files: list[Path]) -> Path:
    full = [file for file in files if file.name.removesuffix(".index.json").count(".") == 1] or files
    if len(full) > 1:
        raise ValueError(f"{folder}: several files of weights ({_first(full)}); name one")
    return full[0]


def _sharded(index: Path) -> State:
    try:
        where = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(where.values()))
        strange = [shard for shard in shards if Path(shard).name != shard]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index}: damaged; expected weight_map, the file that holds each weight") from None
    if strange:
        raise ValueError(f"{index}: names files outside its folder ({_first(strange)})")
    if lacking := [shard for shard in shards if not (index.parent / shard).is_file()]:
        raise ValueError(f"{index.parent}: {len(lacking)} of {len(shards)} pieces are missing ({_first(lacking)})")
    state: State = {}
    for shard in shards:
        file = index.parent / shard
        piece = _weights(file, _content(file))
        if absent := [name for name, home in where.items() if home == shard and name not in piece]:
            raise ValueError(f"{file}: lacks {len(absent)} weights that {index.name} says it holds ({_first(absent)})")
        state |= piece
    return state


def _weights(path: str | Path, content: dict[Any, Any]) -> State:
    forms = (content[name] for name in ("state_dict", "module") if isinstance(content.get(name), dict))
    state = next(forms, content)
    strange = [name for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if strange or not state:
        like = looks_like({str(name): value for name, value in content.items() if isinstance(value, Tensor)})
        what = like or (f"holds {_first(content)}" if content else "holds nothing")
        lacks = f"; {strange[0]} is no tensor" if strange and state is not content else ""
        raise ValueError(f"{path}: {what}{lacks}; expected tensors by name, bare or in state_dict or in module")
    for name, tensor in state.items():
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_quantized:
            raise ValueError(f"{path}: {name} is quantized, sparse or without values; expected plain tensors")
    with naming(path):
        refuse_inflated(state)
    while wrapper := next((wrapper for wrapper in WRAPPERS if all(name.startswith(wrapper) for name in state)), None):
        state = {name.removeprefix(wrapper): tensor for name, tensor in state.items()}
    return {name: tensor.detach() for name, tensor in state.items()}


# -- weights by name -------------------------------------------------------------------------------------------------


def select(state: Mapping[str, Tensor], prefix: str) -> State:
    """The part whose names begin with `prefix`, without it. The tensors are the same ones."""
    part = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    if not part:
        raise ValueError(f"no weights named {prefix}*{_resemblance(state, None)}")
    return part


def renamed(state: Mapping[str, Tensor], names: Mapping[str, str]) -> State:
    """With these parts of names, between dots, replaced. The tensors are the same ones."""
    result = {".".join(names.get(part, part) for part in name.split(".")): tensor for name, tensor in state.items()}
    if len(result) < len(state):
        raise ValueError(f"names: {', '.join(names)} and {', '.join(names.values())} both stand in these weights")
    return result


def looks_like(state: Mapping[str, Tensor]) -> str | None:
    """The family that these weights seem to be of, or what else they seem to be."""
    keys = state.keys()

    def has(*parts: str) -> bool:
        return all(any(part in name for name in keys) for part in parts)

    def size(ending: str, dimensions: int) -> int | None:
        """Of dimension 1: channels into a convolution, or the number of tokens."""
        found = (t.shape[1] for name, t in state.items() if name.endswith(ending) and t.dim() == dimensions)
        return next(found, None)

    if {"Expectation_X0", "Expectation_x_0"} & keys or {"mean"} <= keys <= {"mean", "diagonal"}:
        return "initial noise"
    if has("lora_"):
        return "LoRA's additions to a network"
    if has("temopral_conv") or has("init_attn."):
        if not has("to_k_ip"):
            return "VideoCrafter's text-to-video model"
        return {8: "dynamicrafter", 4: "videocrafter1"}.get(size("input_blocks.0.0.weight", 4) or 0)
    if has("input_blocks.0.0.weight", ".time_stack."):
        return "svd in Stability AI's own names, where a diffusers folder is expected"
    if has("input_blocks.0.0.weight"):
        return "a Stable Diffusion model of images"
    if has("latents", "layers.0.0.to_kv."):
        projector = {256: "dynamicrafter", 16: "videocrafter1"}.get(size("latents", 3) or 0)
        return f"the projector of {projector}" if projector else "a projector"
    kinds: list[tuple[str, Callable[[], bool]]] = [
        ("i2vgenxl", lambda: has("image_latents_proj_in.")),
        ("the VAE of svd", lambda: has("decoder.time_conv_out.")),
        ("svd", lambda: has("temporal_res_block.", "add_embedding.")),
        ("a VAE in diffusers' names", lambda: has("encoder.down_blocks.0.", "decoder.up_blocks.0.")),
        ("a VAE in LDM's names", lambda: has("encoder.down.0.", "decoder.up.0.")),
        ("a diffusers model of another family", lambda: has("down_blocks.0.", "time_embedding.")),
        ("CLIP in transformers' names", lambda: has("text_model.encoder.") or has("vision_model.encoder.")),
        ("CLIP in OpenCLIP's names", lambda: has("transformer.resblocks.")),
    ]
    return next((kind for kind, fits in kinds if fits()), None)


def load_into(
    module: nn.Module | Mapping[str, nn.Module],
    state: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    wanted: str | None = None,
) -> None:
    """All weights of `state` into all of a network, or a Mismatch before anything is changed.

    Several networks, each under the prefix of its names, are filled from a whole file. One that was made on the meta
    device takes the tensors of `state` themselves, converted to `dtype` one by one if that is given; so do not fill two
    from one `state`, if either is to be trained. Into any other the values are copied. `wanted` is the family, for the
    message.
    """
    modules = {"": module} if isinstance(module, nn.Module) else module
    own = {prefix: part.state_dict() for prefix, part in modules.items()}
    compare({prefix + name: tensor for prefix, names in own.items() for name, tensor in names.items()}, state, wanted)
    for prefix, part in modules.items():
        if hollow := [name for name, buffer in part.named_buffers() if buffer.is_meta and name not in own[prefix]]:
            raise ValueError(f"{prefix}{hollow[0]} is on the meta device and in no file: make this buffer off it")
    for prefix, part in modules.items():
        tensors = {name: state[prefix + name] for name in own[prefix]}
        if not any(tensor.is_meta for tensor in own[prefix].values()):
            part.load_state_dict(tensors)
            continue
        if dtype is not None:
            tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        part.load_state_dict(tensors, assign=True)


def compare(own: Mapping[str, Tensor], state: Mapping[str, Tensor], wanted: str | None = None) -> None:
    """A Mismatch, unless `state` has the names, shapes and kinds of `own` and nothing else."""

    def kind(tensor: Tensor) -> str:
        return f"{list(tensor.shape)}" + ("" if tensor.is_floating_point() else f" {tensor.dtype}")

    missing = [name for name in own if name not in state]
    left_over = [name for name in state if name not in own]
    both = ((name, kind(state[name]), kind(tensor)) for name, tensor in own.items() if name in state)
    other_shape = {name: f"{found}, not {needed}" for name, found, needed in both if found != needed}
    if not (missing or left_over or other_shape):
        return
    shapes = [f"{name} {what}" for name, what in other_shape.items()]
    lists = (("missing", missing), ("left over", left_over), ("of another shape", shapes))
    told = ", ".join(f"{len(names)} {what} ({_first(names)})" for what, names in lists if names)
    head = f"not the weights of {wanted or 'this network'}: of {len(own)}, {told}"
    raise Mismatch(head + _resemblance(state, wanted), missing, left_over, other_shape)


def check_names(found: Iterable[str], wanted: Iterable[str], what: str) -> None:
    """All of `wanted` and nothing else, or a ValueError that says what is not as it should be."""
    found, wanted = set(found), set(wanted)
    faults = {"missing": sorted(wanted - found), "unknown": sorted(found - wanted)}
    if told := [f"{len(names)} {fault}: {_first(names)}" for fault, names in faults.items() if names]:
        raise ValueError(f"{what}: {'; '.join(told)}")


def digest(state: Mapping[str, Tensor]) -> str:
    """Of names, kinds, shapes and values, whatever file they are from. Values that are not finite are refused."""
    whole = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ValueError(f"{name} holds NaN or inf: a damaged file, or a training that failed")
        whole.update(repr((name, str(tensor.dtype), list(tensor.shape))).encode())
        whole.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return whole.hexdigest()[:16]


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """What is wrong with weights is said with the file that they are from."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _resemblance(state: Mapping[str, Tensor], wanted: str | None) -> str:
    like = looks_like(state)
    return f"; looks like {like}" if like and like != wanted else ""


def _first(names: Iterable[object]) -> str:
    shown = [str(name.name if isinstance(name, Path) else name) for name in names]
    return ", ".join(shown[:10]) + (", ..." if len(shown) > 10 else "")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


# -- writing ---------------------------------------------------------------------------------------------------------


def write_lvdm(
    path: str | Path, state: Mapping[str, Tensor], form: Literal["state_dict", "module"] = "state_dict"
) -> None:
    """As DynamiCrafter and VideoCrafter1 are published; `module`: as DeepSpeed leaves them in training."""
    if form not in ("state_dict", "module"):
        raise ValueError(f"form={form!r}: state_dict or module")
    prefix = DEEPSPEED if form == "module" else ""
    _write_pickled(Path(path), {form: {prefix + name: tensor for name, tensor in _plain(state).items()}})


def write_svd_cil(
    path: str | Path,
    state: Mapping[str, Tensor],
    ema: Mapping[str, Tensor] | None = None,
    *,
    step: int = 0,
    decay: float = 0.9999,
    wrapped: bool = False,
) -> None:
    """As the authors' SVD inference loads weights, with their averages if given; `wrapped`: as their training saves.

    The averages are listed in the order of `state`, which must be that of the network's parameters.
    """
    content: dict[str, Any] = {
        "global_step": step,
        "state_dict": {("module." if wrapped else "") + name: tensor for name, tensor in _plain(state).items()},
    }
    if ema is not None:
        if strangers := [name for name in ema if name not in state]:
            raise ValueError(f"ema: {len(strangers)} averages of no weight ({_first(strangers)})")
        averages = _plain(ema)
        content["ema_state"] = {  # of diffusers' EMAModel
            "decay": decay,
            "min_decay": 0.0,
            "optimization_step": step,
            "update_after_step": 0,
            "use_ema_warmup": False,
            "inv_gamma": 1.0,
            "power": 2 / 3,
            "shadow_params": [averages[name] for name in state if name in averages],
        }
    _write_pickled(Path(path), content)


def write_safetensors(path: str | Path, state: Mapping[str, Tensor]) -> None:
    alone = {}
    memory: set[int] = set()
    for name, tensor in _plain(state).items():
        alone[name] = tensor.clone() if tensor.data_ptr() in memory else tensor  # the format shares nothing
        memory.add(tensor.data_ptr())
    with _in_place_of(Path(path)) as unfinished:
        safetensors.torch.save_file(alone, unfinished, metadata={"format": "pt"})
        _to_disk(unfinished)


def write_diffusers(
    folder: str | Path,
    state: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    *,
    limit: int = 10 * 10**9,
    name: str = "diffusion_pytorch_model",
) -> None:
    """A folder that diffusers' `from_pretrained` takes, given the network's `config`: in pieces of `limit` bytes."""
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: there already; write to a new folder")
    pieces: list[list[str]] = [[]]
    size = 0
    for weight, tensor in state.items():
        if pieces[-1] and size + tensor.nbytes > limit:
            pieces.append([])
            size = 0
        pieces[-1].append(weight)
        size += tensor.nbytes
    with _in_place_of(folder) as unfinished:
        unfinished.mkdir()
        where: dict[str, str] = {}
        for i, weights in enumerate(pieces, 1):
            file = f"{name}-{i:05}-of-{len(pieces):05}.safetensors" if len(pieces) > 1 else f"{name}.safetensors"
            write_safetensors(unfinished / file, {weight: state[weight] for weight in weights})
            where |= dict.fromkeys(weights, file)
        if len(pieces) > 1:
            index = {"metadata": {"total_size": sum(t.nbytes for t in state.values())}, "weight_map": where}
            _write_json(unfinished / f"{name}.safetensors.index.json", index)
        if config is not None:
            _write_json(unfinished / "config.json", config)


def _plain(state: Mapping[str, Tensor]) -> State:
    """On the CPU, and without the rest of a storage, which a view would take along into the file."""
    if not state:
        raise ValueError("no weights to write")
    plain = {}
    for name, value in state.items():
        if not isinstance(value, Tensor) or value.is_meta:
            raise ValueError(f"{name} is {'without values' if isinstance(value, Tensor) else 'no tensor'}: not written")
        tensor = value.detach().cpu().contiguous()
        plain[name] = tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
    return plain


def _write_pickled(path: Path, content: dict[str, Any]) -> None:
    with _in_place_of(path) as unfinished:
        with unfinished.open("wb") as file:  # given a path, torch writes its name into the file
            torch.save(content, file)
        _to_disk(unfinished)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")


@contextmanager
def _in_place_of(path: Path) -> Iterator[Path]:
    """Where to write: it takes the place of `path` when it is whole, and is gone if it never is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    except BaseException:
        if unfinished.is_dir():
            shutil.rmtree(unfinished)
        else:
            unfinished.unlink(missing_ok=True)
        raise


def _to_disk(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
