"""Writes the data set of moving shapes: videos.csv in WebVid's format, and videos/page_dir/videoid.mp4."""

import csv
import io
from typing import Any

from pipelines import artifact, storage
from pipelines.artifact import Artifact, Manifest
from pipelines.config import Config, ShapesConfig
from pipelines.parts import Made, Part, chunks, make_parts
from pipelines.shapes import Shape
from pipelines.video import encode

KIND = "shapes"
COLUMNS = ("videoid", "contentUrl", "duration", "page_dir", "name")
VIDEOS_PER_PAGE = 100
DAMAGES = ("truncated", "empty", "text", "missing", "no_header", "one_frame")


def make_shapes(config: Config) -> Manifest:
    shapes = config.shapes
    identity = {
        "seed": config.seed,
        "shapes": shapes.model_dump(),
        "code": artifact.code("pipelines.shapes", "pipelines.make_shapes", "pipelines.video"),
    }
    data_set = Artifact(storage.join(config.out, "shapes"), KIND, identity)
    if data_set.finished:
        print(f"{KIND}: {data_set.uri} is finished; nothing to do")
        return data_set.manifest()
    data_set.begin(config.model_dump_json(indent=1))
    pages = list(chunks(list(range(shapes.videos + shapes.damaged)), VIDEOS_PER_PAGE))
    parts = [Part(data_set.path("parts", f"page-{i:05d}.csv"), page, len(page)) for i, page in enumerate(pages)]
    arguments = {"seed": config.seed, "shapes": shapes.model_dump(), "folder": data_set.path("videos")}
    make_parts(KIND, "videos", parts, PageMaker, arguments)
    rows = b"".join(storage.read(part.uri) for part in parts)
    storage.write(data_set.path("videos.csv"), ",".join(COLUMNS).encode() + b"\r\n" + rows)
    return data_set.finish({"videos": shapes.videos, "damaged": shapes.damaged})


class PageMaker:
    """Writes the videos of one page folder; the part is their lines of the csv."""

    def __init__(self, seed: int, shapes: dict[str, Any], folder: str) -> None:
        self.seed, self.shapes, self.folder = seed, ShapesConfig.model_validate(shapes), folder

    def __call__(self, plan: list[int]) -> Made:
        lines = io.StringIO(newline="")
        writer = csv.DictWriter(lines, COLUMNS)
        page = plan[0] // VIDEOS_PER_PAGE * VIDEOS_PER_PAGE
        page_dir = f"{page:06d}_{page + VIDEOS_PER_PAGE - 1:06d}"
        for index in plan:
            shape = shape_of(self.seed, self.shapes, index)
            data: bytes | None = encode(shape.render(), self.shapes.fps)
            if data and index >= self.shapes.videos:
                data = damage(data, DAMAGES[(index - self.shapes.videos) % len(DAMAGES)], shape, self.shapes.fps)
            if data is not None:
                storage.write(storage.join(self.folder, page_dir, f"{shape.videoid}.mp4"), data)
            seconds = round(self.shapes.frames / self.shapes.fps)
            duration = f"PT{seconds // 3600:02d}H{seconds // 60 % 60:02d}M{seconds % 60:02d}S"
            url = f"https://example.org/{shape.videoid}.mp4"
            writer.writerow(dict(zip(COLUMNS, (shape.videoid, url, duration, page_dir, shape.caption), strict=True)))
        return Made(lines.getvalue().encode())


def shape_of(seed: int, shapes: ShapesConfig, index: int) -> Shape:
    # Evenly spread, so that any run of videos has the same share of moving ones.
    moving = int((index + 1) * shapes.moving) > int(index * shapes.moving)
    return Shape(seed, index, shapes.frames, shapes.size, moving, shapes.min_speed, shapes.max_speed)


def damage(data: bytes, kind: str, shape: Shape, fps: int) -> bytes | None:
    """What happens to files on the way: None is a file that never arrived."""
    if kind == "one_frame":
        return encode(shape.render()[:1], fps)
    half = len(data) // 2
    return {
        "truncated": data[:half],
        "empty": b"",
        "text": b"<html>404 Not Found</html>\n" * 20,
        "missing": None,
        "no_header": bytes(half) + data[half:],
    }[kind]
