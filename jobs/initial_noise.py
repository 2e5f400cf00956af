"""Merge the moments of a latent cache into the initial noise of Analytic-Init: E[X0] and tr(Cov)/d.

python -m jobs.initial_noise out=outputs/try
"""

from pipelines.command import command
from pipelines.config import Config


def run(config: Config) -> None:
    from pipelines.initial_noise import make_initial_noise

    print(make_initial_noise(config).uri)


if __name__ == "__main__":
    command("initial_noise", __doc__, ("family", "cache", "initial_noise"), run)
