# SPDX-License-Identifier: Apache-2.0
"""The alerts in deploy/ fire where they should and nowhere else, as Prometheus' own promtool has it."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

RULES = Path(__file__).parents[2] / "deploy" / "prometheus" / "rules.yaml"

pytestmark = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is a part of Prometheus")

NEVER, ALWAYS = "0x120", "0+1000x120"
"""What a counter counts in two hours: a value each minute."""


def recall(below: int, redone: int) -> dict[str, str]:
    """A server of which so many of 1,000 heads a minute are below the floor, or attend again."""
    return {
        'minference_recall_heads_total{le="0.6"}': f"0+{below}x120",
        'minference_recall_heads_total{le="+Inf"}': ALWAYS,
        "minference_guard_heads_total": f"0+{redone}x120",
    }


def prompts(long: str, sparse: str, dense: str = ALWAYS) -> dict[str, str]:
    """A server of which so many prompts are long, and so many tokens ran sparse and dense."""
    return {
        "vllm:request_prefill_kv_computed_tokens_count": long,
        'vllm:request_prefill_kv_computed_tokens_bucket{le="20000.0"}': NEVER,
        'minference_prefill_tokens_total{path="sparse", reason="gate_open"}': sparse,
        'minference_prefill_tokens_total{path="dense", reason="below_min_seq_len"}': dense,
    }


CASES = {
    "MInferenceSparseFaults": {
        "healthy": ({"minference_faults_total": NEVER, "minference_broken_ranks": NEVER}, []),
        # One fault, ten minutes of alert.
        "fault": ({"minference_faults_total": "0x30 1x90", "minference_broken_ranks": NEVER}, [35]),
        # The first value that Prometheus sees is 1.
        "broken": ({"minference_faults_total": "1x120", "minference_broken_ranks": "1x120"}, [5, 35, 60, 100]),
    },
    "MInferenceNothingSparse": {
        "healthy": (prompts(ALWAYS, ALWAYS), []),
        "dense": (prompts(ALWAYS, NEVER), [35, 60, 100]),
        "short": (prompts(NEVER, NEVER), []),
        "idle": (prompts(NEVER, NEVER, NEVER), []),
        # Sparse until minute 30: the last sparse token is out of sight at 45, and it fires at 60.
        "stopped": (prompts(ALWAYS, "0+1000x30 30000x90"), [60, 100]),
    },
    "MInferenceRecallBelowFloor": {
        "healthy": (recall(10, 10), []),
        "low": (recall(100, 100), [35, 60, 100]),
        "unguarded": (recall(300, 0), [35, 60, 100]),
        "unmeasured": (dict.fromkeys(recall(0, 0), NEVER), []),
    },
    "MInferenceGuardActsOften": {
        "healthy": (recall(100, 100), []),
        "often": (recall(300, 300), [35, 60, 100]),
        "unmeasured": (dict.fromkeys(recall(0, 0), NEVER), []),
    },
}
"""By alert and server: its counters, and the minutes of MINUTES at which the alert fires."""

MINUTES = [5, 35, 60, 100]


@pytest.mark.parametrize("alert", CASES)
def test_an_alert_fires_where_it_should(alert: str, tmp_path: Path) -> None:
    series = [
        {"series": labelled(name, server), "values": values}
        for server, (counters, _) in CASES[alert].items()
        for name, values in counters.items()
    ]
    expected = [
        {
            "expr": f'count by (instance) (ALERTS{{alertname="{alert}", alertstate="firing"}})',
            "eval_time": f"{minute}m",
            "exp_samples": [
                {"labels": f'{{instance="{server}"}}', "value": 1}
                for server, (_, fires) in CASES[alert].items()
                if minute in fires
            ],
        }
        for minute in MINUTES
    ]
    test = {"interval": "1m", "input_series": series, "promql_expr_test": expected}
    file = tmp_path / "test.json"  # JSON is YAML
    file.write_text(json.dumps({"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": [test]}))
    run = subprocess.run(["promtool", "test", "rules", str(file)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def labelled(name: str, server: str) -> str:
    """A series of a server."""
    metric, _, labels = name.partition("{")
    return f'{metric}{{job="vllm", instance="{server}"{", " + labels if labels else "}"}'
