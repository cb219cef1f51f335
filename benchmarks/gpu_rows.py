"""A pytest plugin (`-p gpu_rows`): a row for each test, at once, in the file that GPU_CHECK_ROWS names."""

import json
import os

import pytest


@pytest.hookimpl
def pytest_runtest_logreport(report):
    """Called for each phase of each test; with pytest-xdist in the process that hands the tests out."""
    path = os.environ.get("GPU_CHECK_ROWS")
    if path is None or "PYTEST_XDIST_WORKER" in os.environ or (report.when != "call" and report.passed):
        return
    status = {"passed": "ok", "failed": "red", "skipped": "n/a"}[report.outcome]
    reason = None if report.passed else str(report.longrepr)[-1500:]
    row = {"item": report.nodeid, "status": status, "reason": reason, "seconds": round(report.duration, 2)}
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")
