"""docs/mathematics.md: quoted code equals the source, and claims hold."""

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "mathematics.md").read_text()
QUOTES = re.findall(r"^\[(\S+)\]\(\.\./\1\) <!-- from \1 -->\n```python\n(.*?)```", PAGE, re.S | re.M)
CHECKS = re.findall(r"```python run\n(.*?)```", PAGE, re.S)


def _is_quoted_from(quoted: str, source: str) -> bool:
    """Return True if the source has the quoted lines in sequence, at any indentation; `…` skips lines."""
    patterns = []
    for part in re.split(r"^\s*…\s*\n", quoted, flags=re.M):
        lines = textwrap.dedent(part).splitlines()
        patterns.append("".join("\n" if not line else rf"(?P=indent){re.escape(line)}\n" for line in lines))
    first = patterns[0].replace("(?P=indent)", r"(?P<indent>[ ]*)", 1)
    return re.search("^" + "(?:.*\n)*?".join([first, *patterns[1:]]), source, re.M) is not None


@pytest.mark.parametrize(("path", "quoted"), QUOTES, ids=[f"{i}-{path}" for i, (path, _) in enumerate(QUOTES)])
def test_quoted_code_equals_the_file(path, quoted):
    assert _is_quoted_from(quoted, (ROOT / path).read_text()), f"{path} has other lines now: update\n{quoted}"


def test_every_block_is_a_quotation_or_runs():
    opened = re.findall(r"^```(.*)$", PAGE, re.M)[::2]
    assert opened.count("python run") == len(CHECKS) > 0
    assert opened.count("python") == len(QUOTES) > 0
    assert len(opened) == len(CHECKS) + len(QUOTES)


@pytest.mark.parametrize("code", CHECKS, ids=range(len(CHECKS)))
def test_the_claims_hold(code):
    assert "assert " in code
    exec(compile(code, "mathematics.md", "exec"), {})
