"""Alerts and dashboard name only metrics, labels and label values that the router has."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from prometheus_client.metrics import MetricWrapperBase

from router.metrics import _BLOCK_STATES, Metrics
from tests.unit.deploy.manifests import DEPLOY, read

_MONITORING = DEPLOY / "components" / "monitoring"
_DASHBOARD = json.loads((_MONITORING / "dashboard.json").read_text())
_SUFFIXES = {"counter": ["_total"], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
_AGGREGATED = re.compile(r"\b(?:by|without|group_left|on)\s*\(([^)]*)\)")
_VALUES = {"state": set(_BLOCK_STATES), "role": {"prefill", "decode"}}


def _series() -> dict[str, set[str]]:
    """Labels of every series that /metrics can have, by its name."""
    metrics = Metrics()
    wrappers = [metric for metric in vars(metrics).values() if isinstance(metric, MetricWrapperBase)]
    labels = {metric._name: metric._labelnames for metric in wrappers}
    labels |= {family.name: family._labelnames for family in metrics.transfers.collect()}
    return {
        family.name + suffix: set(labels[family.name]) | ({"le"} if suffix == "_bucket" else set())
        for family in metrics.registry.collect()
        for suffix in _SUFFIXES[family.type]
    }


def _alerts() -> list[dict[str, Any]]:
    [rule] = read(_MONITORING / "alerts.yaml")
    return [alert for entry in rule["spec"]["groups"] for alert in entry["rules"]]


_QUERIES = [alert["expr"] for alert in _alerts()] + [
    target["expr"] for panel in _DASHBOARD["panels"] for target in panel["targets"]
]


@pytest.mark.parametrize("query", _QUERIES)
def test_queries_name_what_exists(query: str) -> None:
    series = _series()
    used = re.findall(r"baton_\w+", query)
    assert used
    assert set(used) <= set(series)
    known = set.union(*(series[name] for name in used))
    for name, selector in re.findall(r"(baton_\w+)\{([^}]*)\}", query):
        for label, value in re.findall(r'(\w+)\s*[=!]~?\s*"([^"]*)"', selector):
            assert label in series[name]
            assert set(value.split("|")) <= _VALUES.get(label, set(value.split("|")))
    for names in _AGGREGATED.findall(query):
        assert {name.strip() for name in names.split(",") if name.strip()} <= known
    assert query.count("(") == query.count(")")


def test_the_list_of_series_is_not_empty_or_wrong() -> None:
    series = _series()
    assert series["baton_requests_total"] == {"path", "finish_reason"}
    assert series["baton_time_to_first_token_seconds_bucket"] == {"path", "le"}
    assert series["baton_kv_blocks"] == {"worker", "state"}
    assert series["baton_transfer_exposed_seconds_bucket"] == {"worker", "le"}
    assert "baton_requests" not in series


def test_alerts_say_what_to_do_with_labels_that_their_query_keeps() -> None:
    for alert in _alerts():
        assert {"summary", "description"} <= alert["annotations"].keys()
        kept = {name.strip() for names in _AGGREGATED.findall(alert["expr"]) for name in names.split(",")}
        for text in alert["annotations"].values():
            assert set(re.findall(r"\$labels\.(\w+)", text)) <= kept


def test_legends_name_labels_that_the_query_keeps() -> None:
    series = _series()
    for panel in _DASHBOARD["panels"]:
        for target in panel["targets"]:
            wanted = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            by = _AGGREGATED.findall(target["expr"])
            kept = {name.strip() for names in by for name in names.split(",")}
            own = set.union(*(series[name] for name in re.findall(r"baton_\w+", target["expr"])))
            assert wanted <= (kept if by else own)


def test_panels_do_not_overlap_and_use_the_chosen_data_source() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in _DASHBOARD["panels"]:
        grid = panel["gridPos"]
        cells = {
            (x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])
        }
        assert not cells & taken
        assert grid["x"] + grid["w"] <= 24
        taken |= cells
        assert panel["datasource"]["uid"] == "${datasource}"
    assert len({panel["id"] for panel in _DASHBOARD["panels"]}) == len(_DASHBOARD["panels"])


def test_the_scraped_port_is_the_routers() -> None:
    [monitor] = read(_MONITORING / "podmonitor.yaml")
    assert monitor["spec"]["selector"]["matchLabels"] == {"ray.io/cluster": "baton", "ray.io/group": "router"}
    [endpoint] = monitor["spec"]["podMetricsEndpoints"]
    assert (endpoint["port"], endpoint["path"]) == ("http", "/metrics")
