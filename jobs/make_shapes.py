"""Write a data set of small moving shapes in WebVid's format, some files damaged on purpose.

python -m jobs.make_shapes out=outputs/try shapes.videos=200
"""

from pipelines.command import command
from pipelines.config import Config


def run(config: Config) -> None:
    from pipelines.make_shapes import make_shapes

    print(make_shapes(config).uri)


if __name__ == "__main__":
    command("make_shapes", __doc__, ("shapes",), run)
