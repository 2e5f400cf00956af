"""infra/metrics: a dashboard that asks for what we and Ray tell, and a Prometheus that looks where Ray tells it."""

import ast
import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from pipelines.metrics import METRICS

FOLDER = Path(__file__).parents[2] / "infra/metrics"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
ENDINGS = {"Gauge": ("",), "Counter": ("_total",), "Histogram": ("_bucket", "_sum", "_count")}
BESIDE = {"instance", "job", "le"}  # Prometheus's own labels, and a bucket's


def selectors(expression: str) -> list[promql_parser.VectorSelector]:
    found: list[promql_parser.VectorSelector] = []

    def look(inner: Any) -> None:
        if isinstance(inner, promql_parser.VectorSelector):
            found.append(inner)

    promql_parser.walk(promql_parser.parse(expression), look)
    return found


@pytest.fixture(scope="module")
def told() -> dict[str, set[str]]:
    """The names of what stands at a metrics port, each with its labels: ours, and those of Ray's nodes."""
    ours = {f"ray_{m.name}{ending}": {m.label} for m in METRICS for ending in ENDINGS[m.kind]}
    source = Path(find_spec("ray.dashboard.modules.reporter.reporter_agent").origin).read_text()
    (declared,) = (
        node.value
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "METRICS_GAUGES"
    )
    return ours | {f"ray_{ast.literal_eval(key)}": set[str]() for key in declared.keys}


def unknown(expression: str, told: dict[str, set[str]]) -> list[str]:
    """The names in it that nobody tells, and the labels that they do not have."""
    found = selectors(expression)
    names = [each.name for each in found if each.name not in told]
    labels = [
        f"{each.name}{{{matcher.name}}}"
        for each in found
        if each.name in told
        for matcher in each.matchers.matchers
        if matcher.name not in told[each.name] | BESIDE
    ]
    return names + labels


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_a_panel_asks_for_what_is_told(panel, told):
    for target in panel["targets"]:
        assert selectors(target["expr"])
        assert not unknown(target["expr"], told)


@pytest.mark.parametrize(
    "expression",
    ["ray_cil_los", "sum(rate(ray_cil_clips[10m]))", 'ray_cil_loss{rwo="naive"}', "rate(ray_node_gpu_used[10m])"],
)
def test_a_misspelt_name_is_found(expression, told):
    assert unknown(expression, told)


def test_a_broken_expression_is_found():
    with pytest.raises(ValueError, match="paren"):
        selectors("sum(rate(ray_cil_clips_total[10m])")


def test_the_page_names_what_is_told(told):
    page = (FOLDER.parents[1] / "docs/clusters.md").read_text()
    for name in re.findall(r"`(ray_\w+)`", page):
        assert [each for each in told if each in (name, f"{name}_bucket")], name


def test_every_metric_of_ours_has_a_panel():
    asked = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    assert not [metric.name for metric in METRICS if f"ray_{metric.name}" not in asked]


def test_panels_say_where_from_and_stand_beside_each_other():
    """Grafana draws panels that overlap, and those of a data source that is not there, without a word."""
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not taken & cells
        assert max(x for x, _ in cells) < 24
        taken |= cells
    (variable,) = DASHBOARD["templating"]["list"]
    assert (variable["name"], variable["query"]) == ("datasource", "prometheus")
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${datasource}"}


def test_prometheus_reads_the_list_of_nodes_that_ray_writes(monkeypatch):
    from ray._common.utils import get_default_ray_temp_dir
    from ray._private.ray_constants import PROMETHEUS_SERVICE_DISCOVERY_FILE

    for moved in ("RAY_TMPDIR", "TMPDIR"):
        monkeypatch.delenv(moved, raising=False)
    (job,) = yaml.safe_load((FOLDER / "prometheus.yml").read_text())["scrape_configs"]
    (files,) = (each["files"] for each in job["file_sd_configs"])
    assert files == [f"{get_default_ray_temp_dir()}/{PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


def test_prometheus_in_a_cluster_looks_at_ray_s_pods_alone():
    (job,) = yaml.safe_load((FOLDER / "kubernetes.yml").read_text())["scrape_configs"]
    assert job["kubernetes_sd_configs"] == [{"role": "pod", "namespaces": {"names": ["cil"]}}]
    keep = {each["source_labels"][0] for each in job["relabel_configs"] if each.get("action") == "keep"}
    assert "__meta_kubernetes_pod_label_ray_io_cluster" in keep
