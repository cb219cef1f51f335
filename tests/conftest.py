"""What every test file shares: GPU skipping that can be forbidden, one seed, and small models."""

import pytest
import torch

from crate_fast.settings import require_gpu


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or require_gpu():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU here"))


def pytest_terminal_summary(terminalreporter):
    gpu = [r for r in terminalreporter.stats.get("passed", []) if "gpu" in r.keywords]
    terminalreporter.write_line(f"GPU tests run: {len(gpu)}")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
