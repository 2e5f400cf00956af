"""Decode the videos of a catalog, encode them by the family, and keep the latents in a cache.

    python -m jobs.build_cache out=outputs/try catalog.csv=webvid.csv catalog.videos=s3://bucket/videos

Run again: does nothing, or finishes what a killed run left.
"""

from pipelines.command import command
from pipelines.config import Config


def run(config: Config) -> None:
    from pipelines.cache import build_cache

    print(build_cache(config).uri)


if __name__ == "__main__":
    command("build_cache", __doc__, ("family", "catalog", "cache"), run)
