"""The one typed configuration tree: a YAML file, then dotted overrides (`cache.stride=2`), checked before any start."""

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from pipelines.errors import UserError
from pipelines.explain import explain
from pipelines.secrets import tells_secret


def absolute(uri: str) -> str:
    """Workers run in other folders, and a submitted job in Ray's own copy of the working directory."""
    if "://" in uri and not uri.startswith("s3://"):
        raise ValueError("a local path or s3://; what is elsewhere is to be downloaded first")
    if "://" in uri or os.path.isabs(uri):
        return uri
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:
        raise ValueError("in a submitted job it must be an absolute path or s3://, or it is lost with the job")
    return os.path.abspath(uri)


LARGEST = 100_000  # values of a configuration
PUBLISHED = "published"  # stands for the weights that family.weights names
TAKEN = ("real", "reference", PUBLISHED)

Uri = Annotated[str, AfterValidator(absolute), WithJsonSchema({"type": "string", "format": "place"})]


def _absolute_each(value: Any) -> Any:
    """One URI or a list of them, checked here so that an error names the key and not a place in a union."""
    if isinstance(value, str):
        return absolute(value)
    if not isinstance(value, list | tuple) or not value or not all(isinstance(uri, str) for uri in value):
        raise ValueError("a path, an s3:// address, or a list of them")
    return tuple(absolute(uri) for uri in value)


def _share(value: Any) -> Any:
    found = re.fullmatch(r"([1-9]\d{0,17})/([1-9]\d{0,17})", value) if isinstance(value, str) else None
    if not found or int(found[1]) > int(found[2]):
        raise ValueError("a share of the videos, for example 1/64")
    return value


def _once(values: list[int]) -> list[int]:
    if len(set(values)) < len(values):
        raise ValueError("each once")
    return values


Uris = Annotated[
    str | tuple[str, ...],
    BeforeValidator(_absolute_each),
    WithJsonSchema({"type": "string", "format": "place, or list of them"}),
]
RowOrUri = Annotated[
    str,
    AfterValidator(lambda name: absolute(name) if "/" in name else name),
    WithJsonSchema({"type": "string", "format": "row or place"}),
]


def inside(region: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    top, left, bottom, right = region
    if not (0 <= top < bottom <= 1 and 0 <= left < right <= 1):
        raise ValueError("[top, left, bottom, right], each 0..1, top above bottom and left before right")
    return region


Region = Annotated[tuple[float, float, float, float], AfterValidator(inside)]


Value = bool | int | float | str | None


def _swept(value: Any, within: str = "") -> dict[str, list[Value]]:
    """Dotted keys, each with values that can be a part of a name. On the command line dots make sections."""
    if not isinstance(value, dict):
        raise ValueError("keys with lists of values, for example {M: [700, 900]}")
    found: dict[str, list[Value]] = {}
    for key, values in value.items():
        if isinstance(values, dict):
            found |= _swept(values, f"{within}{key}.")
            continue
        if not isinstance(values, list) or not values or not all(isinstance(each, Value) for each in values):
            raise ValueError("each key with a list of numbers, words, true, false or null")
        if not all(re.fullmatch(r"[\w.+-]+", each) for each in values if isinstance(each, str)):
            raise ValueError("its words become a part of a row's name: letters, digits and _ . + -")
        found[f"{within}{key}"] = values
    return found


Sweep = Annotated[dict[str, list[Value]], BeforeValidator(_swept)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class FamilyConfig(Section):
    """The model, and the size of its clips."""

    name: Literal["toy", "dynamicrafter", "videocrafter1", "svd", "i2vgenxl"] = Field(
        "toy", description="which family of models"
    )
    preset: Annotated[str, BeforeValidator(str)] = Field(
        "small", description="its size: toy has tiny and small, the others tiny and those of docs/families.md"
    )
    frames: int | None = Field(None, description="frames of a clip; default: the preset's", ge=1, le=1024)
    height: int | None = Field(None, description="pixels; default: the preset's", ge=1, le=4096)
    width: int | None = Field(None, description="pixels; default: the preset's", ge=1, le=4096)
    weights: Uri | None = Field(None, description="what is published: a file, or a diffusers folder; none: random")
    tokenizer: Uri | None = Field(
        None, description="folder with CLIP's vocab.json and merges.txt; dynamicrafter and videocrafter1 need it"
    )
    latents: Literal["mode", "sample", "mean_std"] = Field(
        "mode", description="of the VAE's posterior; mean_std: both are cached, and every training step samples"
    )
    clip_features: bool = Field(False, description="cache CLIP's features, not the image that each step makes them of")
    token_noise: bool = Field(False, description="dynamicrafter: conditioning noise on the projected CLIP tokens too")
    precision: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the frozen networks")
    shift: PositiveFloat = Field(
        1.0, description="of the noise schedule, in training and sampling: sigma / alpha times this"
    )


class ShapesConfig(Section):
    """The data set of moving shapes that jobs.make_shapes writes."""

    videos: PositiveInt = Field(3600, description="how many videos")
    moving: float = Field(0.15, description="share of them that move", ge=0, le=1)
    frames: PositiveInt = Field(24, description="frames of a video")
    size: PositiveInt = Field(32, description="height and width in pixels, even", multiple_of=2)
    fps: PositiveInt = Field(8, description="frames a second")
    min_speed: NonNegativeFloat = Field(0.5, description="slowest disc that moves, pixels a frame")
    max_speed: NonNegativeFloat = Field(2.5, description="fastest disc, pixels a frame")
    damaged: int = Field(6, description="how many further files are damaged on purpose", ge=0)


class CatalogConfig(Section):
    """The videos to encode, from one place or several; by default those of jobs.make_shapes."""

    csv: Uris | None = Field(
        None,
        description="WebVid csv: videoid,contentUrl,duration,page_dir,name; files, or patterns such as /data/*.csv",
    )
    videos: Uris | None = Field(
        None, description="folder or s3:// prefix of the csv's page_dir/videoid.mp4 or videoid.mp4; or several"
    )
    tars: Uris | None = Field(
        None,
        description="shards of .mp4 .txt .json (video2dataset, webdataset); files, or patterns such as /data/*.tar",
    )
    folder: Uris | None = Field(
        None, description="folder or s3:// prefix of videos, captions in a .txt beside each or none; or several"
    )
    subset: Annotated[str, BeforeValidator(_share)] | None = Field(
        None, description="only this share of the videos, e.g. 1/64, chosen by videoid: more videos do not change it"
    )
    limit: PositiveInt | None = Field(None, description="only the first so many, by videoid")


class AestheticConfig(Section):
    """A published head by which the cache has an aesthetic score of every clip: both, or none."""

    head: Uri | None = Field(
        None, description="LAION's: sac+logos+ava1-l14-linearMSE.pth, or sa_0_4_vit_l_14_linear.pth"
    )
    clip: Uri | None = Field(None, description="its CLIP: a folder such as openai/clip-vit-large-patch14")


class CacheConfig(Section):
    """Which clips are taken, and how they become parts of the latent cache."""

    stride: PositiveInt | tuple[PositiveInt, PositiveInt] = Field(
        1, description="source frames from one frame of a clip to the next; [least, most]: drawn for each clip"
    )
    fps: PositiveFloat | None = Field(None, description="instead of stride: frames a second that a clip shall have")
    views_per_video: PositiveInt = Field(2, description="clips taken from one video")
    flip: float = Field(0.0, description="share of the clips that are mirrored", ge=0, le=1)
    condition: Literal["first", "random"] = Field(
        "first", description="which frame of a training clip is the conditional image"
    )
    crop: Region | None = Field(
        None, description="what is kept of the picture: [top, left, bottom, right] as shares of it"
    )
    watermark: list[Region] = Field(
        [], description="regions of the clip, as shares of it, which the initial noise does not look at"
    )
    validation: float = Field(0.05, description="share of the videos held out for validation", ge=0, le=1)
    test: float = Field(0.3, description="share of the videos held out for generating and scoring", ge=0, le=1)
    aesthetic: AestheticConfig = AestheticConfig()
    decoder: Literal["pyav", "decord"] = Field("pyav", description="pyav skips frames that nothing needs: faster")
    decode_seconds: PositiveFloat = Field(
        60, description="a video that takes longer to decode, and twice as long when tried again, is rejected"
    )
    videos_per_part: PositiveInt = Field(
        300, description="videos in one file of the cache; of 600 clips, their moments are below 2 % of it"
    )
    decoders: PositiveInt = Field(1, description="processes that decode for one encoding worker")
    gpus: float = Field(
        0, description="share of a GPU that one encoding worker has; 0: it encodes on a CPU", ge=0, le=1
    )
    snapshot: str | None = Field(None, description="which snapshot later jobs use; default: the latest")
    accept_transient: bool = Field(False, description="finish although some videos failed for passing reasons (I/O)")
    dry_run: bool = Field(False, description="only say what would be done, its size, and how long a sample takes")


Score = Literal["motion", "cut", "subject", "aesthetic"]


def _ordered(ends: tuple[float | None, float | None]) -> tuple[float | None, float | None]:
    least, most = ends
    if least is not None and most is not None and least > most:
        raise ValueError("[least, most], or null where there is no such end")
    return ends


Where = dict[Score, Annotated[tuple[float | None, float | None], AfterValidator(_ordered)]]


class InitialNoiseConfig(Section):
    """jobs.initial_noise: which training clips it is made of."""

    where: Where = Field({}, description="only clips with scores in a range: {motion: [0.1, null]}")
    name: str = Field(
        "initial_noise",
        description="its folder under `out`, one for each filter or snapshot: initial_noise-moving",
        pattern=r"^initial_noise[\w.+-]*$",
    )


class ShowCacheConfig(Section):
    """jobs.show_cache: what it does beside printing the card."""

    verify: bool = Field(False, description="read all parts, and compare their bytes with those that were made")
    sweep: bool = Field(False, description="remove files of parts that no snapshot cites")


class ConditioningConfig(Section):
    """What is done to the conditional image in training."""

    kind: Literal["none", "timenoise", "constant", "cdm"] = Field("none", description="none is naive fine-tuning")
    beta_m: NonNegativeFloat | None = Field(
        None, description="timenoise: largest noise level; default: the family's (docs/families.md)"
    )
    a: PositiveFloat | None = Field(
        None, description="timenoise: mu(t) = 2 t^a - 1, lower means more noise at middle t; default: the family's"
    )
    level: NonNegativeFloat | None = Field(
        None,
        description="constant: the level, cdm: the largest one; default: so that its mean is that of timenoise",
    )

    def filled(self, timenoise: Any) -> "ConditioningConfig":
        """With a family's beta_m and a where none are asked for."""
        own = {name: getattr(timenoise, name) for name in ("beta_m", "a") if getattr(self, name) is None}
        return self.model_copy(update=own)


class DropConfig(Section):
    """Shares of samples trained without a part of their condition, for guidance."""

    text: float = Field(0.0, description="without the text only", ge=0, le=1)
    image: float = Field(0.0, description="without the image only", ge=0, le=1)
    both: float = Field(0.0, description="without both", ge=0, le=1)

    @property
    def any(self) -> bool:
        return self.text + self.image + self.both > 0


class RowConfig(Section):
    """One row of a study: the training settings, which are what its MLflow run has as parameters."""

    weights: RowOrUri | None = Field(
        None,
        description="start from a row of the study (where that has several seeds, from these in turn) or from weights "
        "at a URI; none: family.weights, or pre-train",
    )
    seeds: list[NonNegativeInt] = Field([0], description="one training for each", min_length=1)
    samples: PositiveInt = Field(640, description="clips seen in the whole training")
    batch: PositiveInt = Field(16, description="clips of one optimiser step, over all workers")
    train: Literal["full", "unet", "temporal", "lora"] = Field(
        "full", description="all weights, all but an image projector's, the temporal layers', or LoRA adapters"
    )
    rank: PositiveInt = Field(16, description="lora: the adapters' rank")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="of the trained network; the optimiser keeps float32 weights beside it"
    )
    lr: PositiveFloat = Field(5e-4, description="peak learning rate of AdamW")
    weight_decay: NonNegativeFloat = Field(1e-2, description="AdamW's")
    warmup: int = Field(80, description="clips over which the learning rate rises", ge=0)
    schedule: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how it falls to 0 after that, or does not"
    )
    clip_norm: PositiveFloat = Field(1.0, description="gradients are clipped to this norm")
    ema: float = Field(0.95, description="decay a step of the averaged weights", ge=0, lt=1)
    where: Where = Field({}, description="train only on clips with scores in a range: {motion: [0.1, null]}")
    balance: Score | None = Field(None, description="a score of which clips of every size are seen equally often")
    unmarked: bool = Field(False, description="leave cache.watermark out of the loss")
    drop: DropConfig = DropConfig()
    conditioning: ConditioningConfig = ConditioningConfig()


class ValidationConfig(Section):
    """What is looked at of held-out clips while a row is trained."""

    clips: PositiveInt = Field(32, description="whose loss and one-step predictions are measured at fixed t")
    samples: int = Field(4, description="clips that are sampled, from the same noise each time", ge=0)
    steps: PositiveInt = Field(12, description="of that sampling")


class FinetuneConfig(Section):
    """jobs.finetune: how the rows of the study are trained."""

    workers: PositiveInt = Field(2, description="Ray Train workers")
    gpu: bool | None = Field(None, description="one GPU a worker, NCCL, or CPUs, gloo; default: as the cluster has")
    deepspeed: str = Field(
        "auto", description="ZeRO: a profile of infra/deepspeed (zero-1, zero-3-offload ...) or a .json file"
    )
    micro_batch: PositiveInt | None = Field(
        None, description="clips that a worker holds at once, of its share of a batch; default: all"
    )
    recompute: bool = Field(False, description="activations anew in the backward pass: less memory, more time")
    checkpoint_every: PositiveInt = Field(1600, description="clips from one checkpoint to the next")
    keep: PositiveInt = Field(2, description="checkpoints kept, the newest ones; beside them the best one")
    validate_every: PositiveInt | None = Field(None, description="clips from one look at held-out clips to the next")
    validation: ValidationConfig = ValidationConfig()
    on_nan: Literal["stop", "skip"] = Field(
        "stop", description="NaN or inf: stop, or go back to the last checkpoint and leave that batch out"
    )
    log_every: PositiveInt = Field(80, description="clips from one point of the curves to the next")
    max_failures: int = Field(3, description="how often Ray Train may restart the workers", ge=0)
    only: list[str] | None = Field(
        None, description="train these of the rows, for example one a cluster; default: all, in turn", min_length=1
    )
    row: RowConfig = Field(RowConfig(), description="what all rows share")
    rows: dict[str, dict[str, Any]] = Field(
        {"base": {}},
        description="the rows, each with what it has of its own; with `sweep: {conditioning.beta_m: [0.5, 1], "
        "conditioning.a: [1, 5]}` one is four: NAME_beta_m=0.5_a=1 ...",
    )


class ExportConfig(Section):
    """jobs.export: which checkpoint becomes weights."""

    row: str = Field("base", description="of finetune.rows, with its seed where it has several: naive-11")
    checkpoint: Literal["last", "best"] | NonNegativeInt = Field("last", description="or the number of its clips seen")


class SamplingConfig(Section):
    """How a row is sampled."""

    steps: PositiveInt = Field(12, description="of DDIM, for svd of Euler's method")
    M: PositiveFloat | None = Field(
        None, description="where sampling starts: a step 1..1000, for svd a sigma; default: the end of the process"
    )
    start: Literal["gaussian", "analytic", "diagonal"] = Field(
        "gaussian",
        description="x_M from N(0, I), or from Analytic-Init: with the paper's one variance, or each element's own",
    )
    guidance: PositiveFloat = Field(1.0, description="classifier-free guidance scale; 1: none")
    fps: PositiveFloat | None = Field(
        None,
        description="frames a second that the network is told and the video has; default: the clip's or the image's",
    )
    motion: int | None = Field(None, description="motion bucket id, which only svd is told; default: 20", ge=0)
    ema: bool = Field(True, description="the averaged weights, where there are also raw ones")
    seeds: Annotated[list[NonNegativeInt], AfterValidator(_once)] = Field(
        [0], description="of the noise: a video of each image for each", min_length=1
    )


class SweepConfig(Section):
    sweep: Sweep = Field(
        {}, description="a row of each combination: {M: [700, 900], start: [gaussian, analytic]}: NAME_M=700_start=..."
    )


class GenerateRowConfig(SamplingConfig, SweepConfig):
    """One row of the comparison: weights x M x start. What it does not say of sampling is what `generate` says."""

    weights: RowOrUri = Field(
        "base",
        description="a row of finetune.rows (a set for each seed, and for each member of its sweep), a URI of weights, "
        "or published (the family's)",
    )


class GenerateConfig(SamplingConfig):
    """jobs.generate: videos from images, or from the first frames of held-out clips."""

    images: Uri | None = Field(
        None,
        description="a folder of images (captions in a .txt beside each or in test_prompts.txt, or none), or a .csv or "
        ".parquet with a column image, and maybe id, prompt, fps, seed; default: first frames of held-out clips",
    )
    clips: PositiveInt = Field(128, description="held-out clips that every row starts from")
    reference: PositiveInt = Field(1024, description="real clips that the Frechet distance is measured to")
    where: Where = Field({}, description="take only clips with scores in a range: {motion: [0.1, null]}")
    initial_noise: Uri | None = Field(
        None,
        description="Analytic-Init's file, as the authors publish theirs or one of ours; default: initial_noise.name's",
    )
    clips_per_part: PositiveInt = Field(32, description="clips sampled at once")
    gpus: float = Field(0, description="share of a GPU that one worker has; 0: it samples on a CPU", ge=0, le=1)
    rows: dict[str, GenerateRowConfig] = Field(
        {}, description="the rows of the comparison; default: finetune.rows as they are"
    )

    @model_validator(mode="before")
    @classmethod
    def _shared(cls, given: Any) -> Any:
        """Rows know what is theirs wherever a configuration is read again."""
        if not isinstance(given, dict) or not isinstance(given.get("rows"), dict):
            return given
        shared = {name: given[name] for name in SamplingConfig.model_fields if name in given}
        rows = {arm: shared | own if isinstance(own, dict) else own for arm, own in given["rows"].items()}
        return given | {"rows": rows}


class ScoreConfig(Section):
    """jobs.score: what is measured on videos, the study's and others."""

    videos: dict[str, Uri] = Field(
        {}, description="further sets, made elsewhere: {ours: /data/ours}, each a folder or s3:// prefix of .mp4"
    )
    reference: Uri | None = Field(
        None, description="folder of .mp4 that distances are measured to; default: the study's reference set"
    )
    real: Uri | None = Field(
        None,
        description="folder with a video's true clip (.mp4), its conditional image or both, under the video's name; "
        "default: the study's true clips, or its generate.images",
    )
    protocol: Literal["whole", "paper"] = Field(
        "whole", description="what is seen: all of all videos, or 16 frames at 3 fps of 2,048 (of 10,000 for is)"
    )
    measures: list[Literal["alignment", "consistency", "spectra"]] = Field(
        ["alignment", "consistency", "spectra"], description="what is measured beside motion, features and leakage"
    )
    fvd: Uri | None = Field(None, description="TorchScript I3D of FVD, such as i3d_torchscript.pt; none: no fvd")
    inception: Uri | None = Field(None, description="TorchScript C3D or I3D that classifies videos; none: no is")
    clip: Uri | None = Field(None, description="folder of a CLIP, as transformers keeps it; none: no clip_similarity")
    raft: Uri | None = Field(
        None, description="RAFT's weights, such as raft-things.pth: the optical flow is by it; none: by OpenCV's DIS"
    )
    bootstrap: NonNegativeInt = Field(
        200,
        description="how often sets are drawn anew for the intervals of fvd and is, 20 times at least; 0: no intervals",
    )
    decode_seconds: PositiveFloat = Field(
        60, description="a video that takes longer to decode, and twice as long when tried again, is rejected"
    )
    memory: PositiveFloat = Field(
        0.5,
        description="GB that the frames seen of one video may take, at 3 bytes a pixel; a worker takes 12 times that",
    )
    leakage: NonNegativeInt = Field(
        16, description="held-out clips of which each row's one-step predictions are looked at; 0: no leakage"
    )
    gpus: float = Field(
        0, description="share of a GPU that one scoring worker has; 0: its networks are on a CPU", ge=0, le=1
    )
    static_below: PositiveFloat = Field(
        0.4, description="a slower video (pixels a frame, by the feature net, or by its motion score) is static"
    )
    feature_steps: PositiveInt = Field(600, description="training steps of the feature net, where captions tell speeds")


class ClaimConfig(Section):
    """Something the page puts to the test: `row` against `against`, seed by seed."""

    says: str = Field(description="the claim in words, as it stands on the page")
    row: str = Field(description="a row of the comparison")
    against: str = Field(description="the row that it is compared with, or real")
    metric: Literal[
        "motion",
        "motion_error",
        "motion_off",
        "speed",
        "static_share",
        "dynamic_degree",
        "first_frame_error",
        "psnr",
        "ssim",
        "clip_similarity",
        "warp_error",
        "spectrum_space",
        "spectrum_time",
        "leakage",
        "frechet",
        "fvd",
        "is",
    ] = Field(description="of the table's metrics (docs/evaluation.md)")
    expected: Literal["higher", "lower"] = Field(description="what the claim says of row's figure")


class CompareConfig(Section):
    """jobs.compare: the table, the plots and the page. Of the configuration's rows, or of runs by themselves."""

    experiment: str | None = Field(
        None, description="compare the evaluate runs of this MLflow experiment, whatever configuration made them"
    )
    filter: str | None = Field(
        None,
        description="those of them that match, in MLflow's words: params.`row.M` = '700.0'; default: all",
    )
    runs: list[str] = Field([], description="instead of these two: evaluate runs by their ids, of any experiments")
    claims: list[ClaimConfig] = Field([], description="what the page puts to the test, written before it is measured")
    clips: PositiveInt = Field(6, description="conditional images shown side by side")
    note: str = Field("", description="stands on the page: which settings were chosen, and how")

    @property
    def of_runs(self) -> bool:
        """Whether runs are compared by themselves, not the configuration's rows."""
        return bool(self.experiment or self.filter or self.runs)


class DoctorConfig(Section):
    """jobs.doctor: how it looks at the cluster."""

    seconds: PositiveFloat = Field(60, description="after which a check that has not answered has failed")
    as_json: bool = Field(False, description="a list of {state, check, found, do} instead of lines")


class TrackingConfig(Section):
    """MLflow."""

    uri: str | None = Field(None, description="tracking server; default: a SQLite store beside the artifacts")
    experiment: str = Field("shapes", description="the study's name")


Row = TypeVar("Row", RowConfig, GenerateRowConfig)


class Config(Section):
    seed: NonNegativeInt = Field(0, description="of the data, the views and the splits")
    out: Uri = Field("outputs/shapes", description="folder or s3:// prefix under which every artifact stands")
    family: FamilyConfig = FamilyConfig()
    shapes: ShapesConfig = ShapesConfig()
    catalog: CatalogConfig = CatalogConfig()
    cache: CacheConfig = CacheConfig()
    show_cache: ShowCacheConfig = ShowCacheConfig()
    initial_noise: InitialNoiseConfig = InitialNoiseConfig()
    finetune: FinetuneConfig = FinetuneConfig()
    export: ExportConfig = ExportConfig()
    generate: GenerateConfig = GenerateConfig()
    score: ScoreConfig = ScoreConfig()
    compare: CompareConfig = CompareConfig()
    tracking: TrackingConfig = TrackingConfig()
    doctor: DoctorConfig = DoctorConfig()

    def training_rows(self) -> dict[str, "TrainingRow"]:
        """In the order in which they are trained, each seed a row of its own."""
        rows: dict[str, TrainingRow] = {}
        for arm, members in self._trained().items():
            for suffix, settings in members.items():
                begun_with = [name for name, row in rows.items() if row.arm == settings.weights]
                for i, seed in enumerate(settings.seeds):
                    start = begun_with[i % len(begun_with)] if begun_with else settings.weights
                    row = TrainingRow(arm, arm + suffix, seed, settings.model_copy(update={"weights": start}))
                    _add(rows, _row_name(row.arm, seed, settings.seeds), row)
        return rows

    def _trained(self) -> dict[str, dict[str, RowConfig]]:
        """Of each row its members, by what their names have more: one that has nothing, where there is no sweep."""
        members: dict[str, dict[str, RowConfig]] = {}
        for arm, own in self.finetune.rows.items():
            place, own = f"finetune.rows.{arm}", dict(own)
            given = {"sweep": own.pop("sweep")} if "sweep" in own else {}
            try:
                sweep = SweepConfig.model_validate(given).sweep
            except ValidationError as error:
                raise UserError(f"{place}.{explain(error, given, SweepConfig)}") from None
            members[arm] = {}
            for suffix, values in _members(place, sweep).items():
                for key, value in values.items():
                    own = _replace(own, key.split("."), value)
                described = _with_own(self.finetune.row.model_dump(), own)
                members[arm][suffix] = _valid(RowConfig, described, place, sweep)
        return members

    def arms(self) -> dict[str, GenerateRowConfig]:
        """The rows of the comparison by the names of the configuration, those of a sweep each for itself."""
        shared = self.generate.model_dump(include=set(SamplingConfig.model_fields))
        rows = self.generate.rows or {arm: GenerateRowConfig(weights=arm, **shared) for arm in self.finetune.rows}
        trained = self._trained()
        arms: dict[str, GenerateRowConfig] = {}
        for arm, row in rows.items():
            place, plain = f"generate.rows.{arm}", row.model_dump(exclude={"sweep"})
            for suffix, values in _members(place, row.sweep).items():
                settings = _valid(GenerateRowConfig, plain | values, place, row.sweep)
                for of_weights in trained.get(settings.weights, {"": None}):
                    weights = settings.weights + of_weights
                    _add(arms, arm + of_weights + suffix, settings.model_copy(update={"weights": weights}))
        return arms

    def evaluation_rows(self) -> dict[str, "EvaluationRow"]:
        """One for each seed of the weights."""
        trained = self.training_rows()
        rows: dict[str, EvaluationRow] = {}
        for arm, settings in self.arms().items():
            sources = {name: row.seed for name, row in trained.items() if row.arm == settings.weights}
            if settings.weights == PUBLISHED and not self.family.weights:
                raise UserError(f"generate.rows.{arm}.weights={PUBLISHED}: family.weights names none")
            if not sources and settings.weights != PUBLISHED and "/" not in settings.weights:
                allowed = ", ".join([*dict.fromkeys(row.arm for row in trained.values()), PUBLISHED])
                raise UserError(
                    f"generate.rows.{arm}.weights={settings.weights}: one of {allowed}, or a URI (with a /)"
                )
            for name, seed in (sources or {settings.weights: 0}).items():
                _add(rows, _row_name(arm, seed, list(sources.values())), EvaluationRow(arm, seed, name, settings))
        return rows


@dataclass(frozen=True)
class TrainingRow:
    key: str  # in finetune.rows
    arm: str  # shared by its seeds: the key, and of a sweep what its member has more
    seed: int
    settings: RowConfig

    def shaping(self, timenoise: Any) -> dict[str, Any]:
        """What shapes the weights, but for the weights it starts from. `timenoise`: the family's."""
        noise = self.settings.conditioning.filled(timenoise).model_dump()
        return self.settings.model_dump(exclude={"weights", "seeds"}) | {"seed": self.seed, "conditioning": noise}


@dataclass(frozen=True)
class EvaluationRow:
    arm: str
    seed: int
    weights: str  # a training row, its seed included, or a URI
    settings: GenerateRowConfig


def _add(rows: dict[str, Any], name: str, row: Any) -> None:
    if name in rows:
        raise UserError(f"two rows are called {name}: rename one, and name each seed once")
    rows[name] = row


def _members(place: str, sweep: Sweep) -> dict[str, dict[str, Any]]:
    """Every combination of a sweep's values, by what the name of its row has more."""
    members: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*sweep.values()):
        named = [f"_{key.rpartition('.')[2]}={_written(value)}" for key, value in zip(sweep, values, strict=True)]
        if (suffix := "".join(named)) in members:
            raise UserError(f"{place}.sweep: {suffix[1:]} stands in it twice")
        members[suffix] = dict(zip(sweep, values, strict=True))
    return members


def _written(value: Value) -> str:
    """As in YAML, and numbers in their shortest form."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return short if float(short := f"{value:g}") == value else repr(value)
    return str(value)


def _valid(kind: type[Row], described: dict[str, Any], place: str, sweep: Sweep) -> Row:
    try:
        return kind.model_validate(described)
    except ValidationError as error:
        said = explain(error, described, kind)
        raise UserError(f"{place}.{'sweep.' if said.startswith(tuple(sweep)) else ''}{said}") from None


def _row_name(arm: str, seed: int, seeds: list[int]) -> str:
    return arm if len(seeds) < 2 else f"{arm}-{seed}"


LARGEST = 2**20  # bytes of a configuration


def load(file: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """The configuration that a file and the command line describe, or a one-line `UserError`."""
    tree: dict[str, Any] = {}
    if file is not None:
        try:
            with open(file, "rb") as opened:
                text = opened.read(LARGEST + 1)
            if len(text) > LARGEST:
                told = f"holds more than {LARGEST // 2**20} MiB; name a YAML file such as jobs/configs/demo.yaml"
                raise UserError(f"--config {file}: {told}")
            tree = _yaml(text.decode()) or {}
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--config {file}: cannot be read ({error})") from None
        except ValueError as error:
            raise UserError(f"--config {file}: not YAML ({error})") from None
        if not isinstance(tree, dict):
            raise UserError(f"--config {file}: holds a {type(tree).__name__}; wanted are sections such as `cache:`")
    for override in overrides:
        keys, value = _parse(override)
        tree = _replace(tree, keys, value)
    _refuse_secrets(tree)
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(explain(error, tree, Config)) from None
    _check(config)
    return config


LEAST_DRAWS = 20  # of a bootstrap: its outermost ones are the ends of an interval


def _check(config: Config) -> None:
    """What the types alone cannot say."""
    rows = config.training_rows()
    for wanted in config.finetune.only or ():
        if wanted not in rows and not any(wanted in (row.arm, row.key) for row in rows.values()):
            raise UserError(f"finetune.only: {wanted!r} is no row; there are {', '.join(config.finetune.rows)}")
    for arm in [*config.finetune.rows, *config.generate.rows, *config.score.videos]:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.+-]*", arm) or arm in TAKEN:
            taken = ", ".join(TAKEN)
            raise UserError(
                f"{arm!r} is no name for a row: letters of English, digits and, not first, _ . + - ; {taken} are taken"
            )
    if 0 < config.score.bootstrap < LEAST_DRAWS:
        told = f"an interval wants {LEAST_DRAWS} draws or more; 0: no intervals"
        raise UserError(f"score.bootstrap={config.score.bootstrap}: {told}")
    for name, trained in rows.items():
        row = trained.settings
        if row.batch % config.finetune.workers:
            raise UserError(
                f"finetune.rows.{name}.batch={row.batch} does not divide by finetune.workers={config.finetune.workers}"
            )
        share, micro = row.batch // config.finetune.workers, config.finetune.micro_batch
        if micro and share % micro:
            raise UserError(
                f"finetune.micro_batch={micro}: a worker's share of {name}'s batch, {share}, has to divide by it"
            )
        drop = row.drop
        if drop.text + drop.image + drop.both > 1:
            raise UserError(f"finetune.rows.{name}.drop: {drop.text} + {drop.image} + {drop.both} is above 1")
        for key in ("samples", "warmup"):
            if getattr(row, key) % row.batch:
                raise UserError(f"finetune.rows.{name}.{key}={getattr(row, key)}: a multiple of batch={row.batch}")
        if config.finetune.log_every % row.batch:
            raise UserError(f"finetune.log_every={config.finetune.log_every}: a multiple of {name}'s batch={row.batch}")
        before = list(rows)[: list(rows).index(name)]
        if row.weights == PUBLISHED and not config.family.weights:
            raise UserError(f"finetune.rows.{name}.weights={PUBLISHED}: family.weights names none")
        if row.weights and row.weights not in [*before, PUBLISHED] and "/" not in row.weights:
            named = ", ".join(before) or "none"
            raise UserError(
                f"finetune.rows.{name}.weights={row.weights}: a row before it ({named}) or a URI (with a /)"
            )
    stride = list(config.cache.stride) if isinstance(config.cache.stride, tuple) else config.cache.stride
    if config.cache.fps is not None and stride != 1:
        raise UserError(f"cache.fps={config.cache.fps} and cache.stride={stride}: one of the two")
    if isinstance(stride, list) and stride[0] > stride[1]:
        raise UserError(f"cache.stride={stride}: [least, most]")
    head, clip = config.cache.aesthetic.head, config.cache.aesthetic.clip
    if bool(head) != bool(clip):
        given, lacking = (f"head={head}", "clip") if head else (f"clip={clip}", "head")
        raise UserError(f"cache.aesthetic.{given}: without cache.aesthetic.{lacking}; name both, or none")
    if config.cache.validation + config.cache.test >= 1:
        raise UserError("cache.validation + cache.test: below 1, or nothing is left to train on")
    for key in ("checkpoint_every", "validate_every"):
        every = getattr(config.finetune, key)
        if every is not None and every % config.finetune.log_every:
            wanted = f"a multiple of finetune.log_every={config.finetune.log_every}"
            raise UserError(f"finetune.{key}={every}: {wanted}")
    if (config.finetune.validate_every or 0) % config.finetune.checkpoint_every:
        wanted = f"a multiple of checkpoint_every={config.finetune.checkpoint_every}, or none is known to be the best"
        raise UserError(f"finetune.validate_every={config.finetune.validate_every}: {wanted}")
    if config.shapes.min_speed > config.shapes.max_speed:
        raise UserError(f"shapes.min_speed={config.shapes.min_speed}: at most max_speed={config.shapes.max_speed}")
    for generated in config.evaluation_rows().values():
        if (
            generated.settings.guidance != 1
            and generated.weights in rows
            and not rows[generated.weights].settings.drop.any
        ):
            raise UserError(f"generate.rows.{generated.arm}.guidance: {generated.weights} was trained without drop")
    if twice := {*config.evaluation_rows(), *config.arms()} & config.score.videos.keys():
        raise UserError(f"score.videos.{min(twice)}: a row of the study is called {min(twice)} too; rename one")
    if config.compare.runs and (config.compare.experiment or config.compare.filter):
        raise UserError("compare.runs: instead of compare.experiment and compare.filter, not beside them")
    known = ["real", *config.arms(), *config.score.videos]
    for claim in config.compare.claims:
        if claim.row == claim.against:
            raise UserError(f"compare.claims: {claim.says!r} is about {claim.row!r} against itself")
    for claim in [] if config.compare.of_runs else config.compare.claims:
        for named in (claim.row, claim.against):
            if named not in known:
                raise UserError(f"compare.claims: {named!r} is not a row; allowed are {', '.join(known)}")


def _parse(override: str) -> tuple[list[str], Any]:
    key, equals, text = override.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(f"{override!r}: overrides are written key=value, for example cache.stride=2")
    try:
        return key.split("."), _yaml(text)
    except ValueError:
        raise UserError(f"{override!r}: the value is not YAML") from None


def _yaml(text: str) -> Any:
    """Plain values. Whatever else it is, and aliases that make much more of it than it is long, are a ValueError."""
    try:
        tree = yaml.safe_load(text)
        size = _size(tree, {})
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:  # the second one is of dates and numbers that are none
        raise ValueError(" ".join(str(error).split())) from None
    if size > max(LARGEST, len(text)):
        raise ValueError(f"its aliases make {size} values of {len(text)} letters")
    return tree


def _size(tree: Any, known: dict[int, int]) -> int:
    """How many values it has when aliases are followed, without following any twice."""
    if not isinstance(tree, dict | list):
        return 1
    if id(tree) not in known:
        inner = tree.values() if isinstance(tree, dict) else tree
        known[id(tree)] = 1 + sum(_size(value, known) for value in inner)
    return known[id(tree)]


def _refuse_secrets(tree: Any, place: str = "") -> None:
    """A configuration stands beside every artifact, and in MLflow."""
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            _refuse_secrets(value, f"{place}.{key}" if place else str(key))
    elif isinstance(tree, str) and tells_secret(tree):
        stead = "S3's keys in AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or name a profile in AWS_PROFILE"
        if place.startswith("tracking"):
            stead = (
                "it in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, a token in MLFLOW_TRACKING_TOKEN, the "
                "password of a PostgreSQL in PGPASSWORD"
            )
        raise UserError(f"{place} holds a password: give {stead}")


def _replace(tree: Any, keys: list[str], value: Any) -> Any:
    """The tree with `value` at this place, whatever was there."""
    if not keys:
        return value
    inner = tree if isinstance(tree, dict) else {}
    return inner | {keys[0]: _replace(inner.get(keys[0]), keys[1:], value)}


def _with_own(shared: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """What the row of a study has of its own, in place of what it shares: of a section key by key, of a value whole."""
    sections = {
        name: shared[name] | value
        for name, value in own.items()
        if name in RowConfig.model_fields
        if isinstance(value, dict) and isinstance(RowConfig.model_fields[name].default, Section)
    }
    return shared | own | sections
