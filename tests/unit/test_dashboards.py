# SPDX-License-Identifier: Apache-2.0
"""The dashboards and alerts in deploy/ ask for metrics that exist, and the two dashboards show the same."""

import json
from pathlib import Path
from typing import Any

import pytest

from minference_vllm.config import MInferenceConfig
from minference_vllm.plan import gate
from minference_vllm.reason import Reason
from minference_vllm.recall import RECALL_EDGES
from tests.conftest import import_or_skip
from tests.unit.exported import PREFIX, exported, groupings, selectors

yaml = import_or_skip("yaml")
import_or_skip("promql_parser")

DEPLOY = Path(__file__).parents[2] / "deploy"
GRAFANA = json.loads((DEPLOY / "grafana" / "minference.json").read_text())
PERSES = yaml.safe_load((DEPLOY / "perses" / "minference.yaml").read_text())
RULES = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())
ALERTS = {rule["alert"]: rule for group in RULES["groups"] for rule in group["rules"]}
OF_A_TARGET = {"job", "instance"}
"""What Prometheus adds to every series."""


def grafana_panels() -> dict[str, list[tuple[str, str]]]:
    """Queries and legends by title."""
    return {
        panel["title"]: [(target["expr"], target.get("legendFormat", "")) for target in panel["targets"]]
        for panel in GRAFANA["panels"]
        if panel["type"] != "row"
    }


def perses_panels() -> dict[str, list[tuple[str, str]]]:
    panels = {}
    for panel in PERSES["spec"]["panels"].values():
        specs = [query["spec"]["plugin"]["spec"] for query in panel["spec"]["queries"]]
        panels[panel["spec"]["display"]["name"]] = [(spec["query"], spec.get("seriesNameFormat", "")) for spec in specs]
    return panels


def queries() -> list[Any]:
    panels = [(title, query) for title, of_panel in grafana_panels().items() for query, _ in of_panel]
    alerts = [(name, rule["expr"]) for name, rule in ALERTS.items()]
    return [pytest.param(query, id=name) for name, query in panels + alerts]


@pytest.mark.parametrize("query", queries())
def test_a_query_asks_for_what_is_exported(query: str, tmp_path: Path) -> None:
    labels_of = {name: labels | OF_A_TARGET for name, (_, labels) in exported(tmp_path).items()}
    asked = list(selectors(query))
    assert asked
    for name, matched in asked:
        if name.startswith(PREFIX):
            assert set(matched) | groupings(query) <= labels_of[name]
        else:
            assert is_vllms(name)


def is_vllms(name: str) -> bool:
    """Whether a metric is in the source of vLLM; what Prometheus adds to the name of a histogram's series is not."""
    package = Path(import_or_skip("vllm").__file__).parent
    family = name.removesuffix("_bucket").removesuffix("_count")
    return f'"{family}"' in (package / "v1" / "metrics" / "loggers.py").read_text()


@pytest.mark.parametrize("query", queries())
def test_values_that_a_query_asks_for_occur(query: str) -> None:
    edges = {*map(str, RECALL_EDGES), "+Inf"}
    for name, matched in selectors(query):
        if name.startswith(PREFIX):
            assert matched.get("path", "sparse") in ("sparse", "dense")
            assert matched.get("reason", Reason.GATE_OPEN) in list(Reason)
            assert matched.get("le", "+Inf") in edges


def test_both_dashboards_show_the_same() -> None:
    assert grafana_panels() == perses_panels()
    assert {panel["title"]: panel["description"] for panel in GRAFANA["panels"] if panel["type"] != "row"} == {
        panel["spec"]["display"]["name"]: panel["spec"]["display"]["description"]
        for panel in PERSES["spec"]["panels"].values()
    }


def test_both_dashboards_draw_the_same() -> None:
    kinds = {"stat": "StatChart", "table": "Table", "timeseries": "TimeSeriesChart"}
    assert {panel["title"]: kinds[panel["type"]] for panel in GRAFANA["panels"] if panel["type"] != "row"} == {
        panel["spec"]["display"]["name"]: panel["spec"]["plugin"]["kind"] for panel in PERSES["spec"]["panels"].values()
    }


def test_every_panel_is_placed_once() -> None:
    items = [item for grid in PERSES["spec"]["layouts"] for item in grid["spec"]["items"]]
    placed = [item["content"]["$ref"].removeprefix("#/spec/panels/") for item in items]
    assert sorted(placed) == sorted(PERSES["spec"]["panels"])
    cells = [
        (panel["gridPos"]["x"] + x, panel["gridPos"]["y"] + y)
        for panel in GRAFANA["panels"]
        for x in range(panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24


def test_grafanas_panels_take_the_data_source_that_is_chosen() -> None:
    assert GRAFANA["schemaVersion"] >= 38, "Grafana 10"
    variables = {variable["name"]: variable["type"] for variable in GRAFANA["templating"]["list"]}
    assert variables == {"datasource": "datasource", "job": "query", "instance": "query"}
    for panel in GRAFANA["panels"]:
        for part in (panel, *panel.get("targets", ())):
            assert panel["type"] == "row" or part["datasource"]["uid"] == "${datasource}"


def test_every_metric_is_shown(tmp_path: Path) -> None:
    shown = {name for of_panel in grafana_panels().values() for query, _ in of_panel for name, _ in selectors(query)}
    derived = {"minference_density"}  # the ratio of the pair counters, which any window has
    assert set(exported(tmp_path)) - derived <= shown


def test_alerts_are_for_people() -> None:
    assert set(ALERTS) == {
        "MInferenceSparseFaults",
        "MInferenceNothingSparse",
        "MInferenceRecallBelowFloor",
        "MInferenceGuardActsOften",
    }
    for rule in ALERTS.values():
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_the_alerts_know_the_default_settings() -> None:
    config = MInferenceConfig()
    edges = [matched["le"] for _, matched in selectors(ALERTS["MInferenceRecallBelowFloor"]["expr"])]
    assert edges == [str(config.recall_floor), "+Inf"] or edges == ["+Inf", str(config.recall_floor)]
    [long] = [
        float(matched["le"]) for _, matched in selectors(ALERTS["MInferenceNothingSparse"]["expr"]) if "le" in matched
    ]
    assert gate(config.min_chunk, int(long), config) is Reason.GATE_OPEN
