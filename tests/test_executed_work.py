"""What a schedule executes: by hand at N = 197, and the committed table against the tile table."""

import collections
import json

import bench_ista
import executed_products
import executed_work
import torch
from bench_mssa import SHAPES
from harness import RESULTS
from tile_work import attention_executed, flash_executed, row_blocks_executed

CPU = torch.device("cpu")


def test_whole_heads_by_hand():
    """Three blocks of 64, a rest of 5 in 16: diagonals, the rest as keys, its own rows; three pairs of blocks."""
    once, pairs, rows = 3 * 64 * 64 + 3 * 64 * 16, 3 * 64 * 64, 16 * 256
    found = attention_executed(2, 197, 64, CPU, torch.bfloat16)
    assert found["forward"].flops == 2 * 2 * 64 * (2 * (once + rows) + 3 * pairs)
    assert found["forward"].exps == 2 * (once + pairs + rows)
    assert found["backward"].flops == 2 * 2 * 64 * (5 * (once + rows) + 7 * pairs)
    assert found["backward"].exps == 2 * (once + pairs + 2 * rows)


def test_a_long_rest_by_hand():
    """Three blocks of 64, a rest of 34: as keys 64 forward, by 32, and 48 backward, by 16; as rows 64."""
    found = attention_executed(1, 226, 64, CPU, torch.bfloat16)
    pairs, rows = 3 * 64 * 64, 64 * 256
    assert found["forward"].exps == 3 * 64 * (64 + 64) + pairs + rows
    assert found["backward"].exps == 3 * 64 * (64 + 48) + pairs + 2 * rows


def test_other_schedules_by_hand():
    rows = row_blocks_executed(1, 785, 64, CPU, torch.bfloat16)
    assert rows["forward"].flops == 4 * 896 * 832 * 64
    assert rows["backward"].exps == 1.5 * 896 * 832
    assert attention_executed(1, 785, 64, CPU, torch.bfloat16) == rows
    assert flash_executed(1, 785, 64)["backward"].flops == 10 * 896 * 896 * 64


def test_the_committed_table_is_of_these_kernels():
    committed = json.loads((RESULTS / "executed.json").read_text())["rows"]
    assert committed == executed_work.rows()
    assert {row["shape"] for row in committed} == set(SHAPES)


def test_products_by_hand():
    """One tile of 128×256, 256 deep; autocast's fp32 tokens are read once, and the operand in bf16."""
    kernels = executed_products.schedules(bench_ista.Shape(128, 256), 4)[executed_products.PREPARED]["forward"]
    normalize, product = kernels
    elements = 128 * 256
    assert normalize.moved_bytes == (4 + 2) * elements
    assert product.flops == 2 * 128 * 256 * 256
    assert product.l2_bytes == 256 * (128 + 256) * 2
    assert product.moved_bytes == (2 + 4 + 4 + 1) * elements


def test_the_committed_table_of_products_is_of_this_tile_table():
    committed = json.loads((RESULTS / "executed_products.json").read_text())["rows"]
    assert committed == executed_products.rows()
    bounds = collections.Counter()
    for row in committed:
        bounds[row["shape"], row["tokens"], row["schedule"]] += row["bound µs"]
    for (*case, schedule), bound in bounds.items():
        if schedule == executed_products.PREPARED:
            assert bound < bounds[(*case, executed_products.IN_THE_PRODUCT)]  # forward + backward: why it was taken
