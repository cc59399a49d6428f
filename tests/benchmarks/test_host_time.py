"""Host time of a launch: the command runs without a GPU and measures the kernels' own path, not eager's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_it_measures_what_launches_cost() -> None:
    command = [sys.executable, "-m", "benchmarks.kernels.host_time", "--calls", "2", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout)["rows"]
    assert list(rows) == ["ours, a layer", "ours, a group of 3", "plain ops, a layer", "plain ops, 3 layers"]
    assert all(row["us"] > 0 for row in rows.values())
    # y, u and what lies between the launches; dx, dR and the same: of a layer, and of three, in as many launches
    assert rows["ours, a layer"]["allocations"] == 6
    assert rows["ours, a group of 3"]["allocations"] == 12
