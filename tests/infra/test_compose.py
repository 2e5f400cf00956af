"""infra/compose.yaml, read by Docker Compose itself."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

INFRA = Path(__file__).parents[2] / "infra"
COMPOSE = Path(sys.executable).with_name("docker-compose")
VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "POSTGRES_PASSWORD", "GRAFANA_PASSWORD")


def read(values: dict[str, str]) -> subprocess.CompletedProcess:
    known = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    command = [COMPOSE, "--env-file", "/dev/null", "-f", INFRA / "compose.yaml", "--profile", "*"]
    return subprocess.run(
        [*command, "config", "--format", "json"], env=known | values, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    done = read({name: f"what {name} is" for name in VARIABLES})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["services"]


@pytest.mark.parametrize("name", VARIABLES)
def test_nothing_starts_without_a_password(name):
    done = read({other: "x" for other in VARIABLES if other != name})
    assert done.returncode != 0
    assert f"required variable {name} is missing" in done.stderr


def test_nothing_is_reached_from_another_machine(services):
    for service in services.values():
        assert all(port["host_ip"] == "127.0.0.1" for port in service.get("ports", ()))
    on_the_machine_s_own_network = {name for name, each in services.items() if each.get("network_mode") == "host"}
    assert on_the_machine_s_own_network == {"prometheus", "grafana"}
    assert "--web.listen-address=127.0.0.1:9090" in services["prometheus"]["command"]
    assert services["grafana"]["environment"]["GF_SERVER_HTTP_ADDR"] == "127.0.0.1"


def test_images_are_pinned_and_gain_no_rights(services):
    for service in services.values():
        assert "build" in service or re.search(r":(v?\d|RELEASE\.\d)", service["image"])
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_every_file_that_is_mounted_is_there(services):
    mounted = [mount for each in services.values() for mount in each.get("volumes", ()) if mount["type"] == "bind"]
    for mount in mounted:
        assert mount["read_only"]
        assert mount["source"] == "/tmp/ray" or Path(mount["source"]).is_file()
