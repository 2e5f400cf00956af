import ranks, json
from pathlib import Path
from pipelines.make_shapes import make_shapes
from pipelines.cache import build_cache
from pipelines.initial_noise import make_initial_noise
from pipelines.generate import generate
from pipelines.score import score
from pipelines.compare import compare
from pipelines import storage


def test_road_on_s3(endpoint, smallest, here, tmp_path, monkeypatch):
    for module in ("make_shapes", "leakage", "score"):
        monkeypatch.setattr(f"pipelines.{module}.make_parts", here.make_parts)
    local = smallest(tmp_path)
    make_shapes(local)
    rows = json.dumps({"base": {"weights": None, "seeds": [0], "samples": 32, "warmup": 0, "where": {}}})
    config = smallest(
        "s3://webvid/out",
        f"catalog.csv={tmp_path}/shapes/videos.csv",
        f"catalog.videos={tmp_path}/shapes/videos",
        f"tracking.uri=sqlite:///{tmp_path}/mlflow.db",
        f"finetune.rows={rows}",
        "compare.claims=[]",
        "generate.rows={base: {weights: base}, ai: {weights: base, M: 700, start: analytic}}",
        "finetune.workers=1",
    )
    build_cache(config)
    make_initial_noise(config)
    print(ranks.train(1, [(config.model_dump(), "zero-1")]))
    generate(config)
    score(config)
    compare(config)
    names = storage.files_below("s3://webvid/out")
    print([n for n in names if "parts" not in n])
