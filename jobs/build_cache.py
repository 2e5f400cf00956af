"""Decode the videos of a catalog, encode them by the family, and keep the latents in a cache.

    python -m jobs.build_cache out=outputs/try catalog.csv=webvid.csv catalog.videos=s3://bucket/videos

--dry-run says how much that is first. Run again: does nothing, or finishes what a killed run left.
"""

from pipelines.command import command
from pipelines.config import Config


def run(config: Config) -> None:
    from pipelines.cache import build_cache
    from pipelines.estimate import estimate

    if config.cache.dry_run:
        print(estimate(config))
    else:
        print(build_cache(config).manifest.uri)


if __name__ == "__main__":
    command("build_cache", __doc__, ("family", "catalog", "cache"), run, flags={"--dry-run": ["cache.dry_run=true"]})
