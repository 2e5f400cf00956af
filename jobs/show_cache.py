"""Print what a latent cache holds, with pictures of it; verify its bytes; find what no snapshot cites.

python -m jobs.show_cache out=outputs/try
python -m jobs.show_cache out=outputs/try show_cache.verify=true
"""

from pipelines.command import command
from pipelines.config import Config


def run(config: Config) -> None:
    from pipelines.card import show_cache

    show_cache(config)


if __name__ == "__main__":
    command("show_cache", __doc__, ("family", "cache", "show_cache"), run)
