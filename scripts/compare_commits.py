"""Compares a benchmark of this work tree with one of an earlier commit, alternately: after, before, after, before, ...

    python scripts/compare_commits.py 4e3f1a1 --pairs 5 -- bench decode --base bfloat16

The commit is checked out into a temporary folder. Both sides use this Python environment, and each `bimedix` command
runs in a new process. For each row of the result, the script prints the median `ours_tokens_per_s` of both sides, and
the median ratio of the pairs, after over before.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bimedix_jax.errors import BimedixError, positive, run_script

ROOT = Path(__file__).resolve().parents[1]


@contextlib.contextmanager
def checked_out(commit: str) -> Iterator[Path]:
    """A temporary folder with the files of a commit."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "before"
        added = git("worktree", "add", "--detach", str(place), commit)
        if added.returncode:
            raise BimedixError(f"git has no commit {commit} ({added.stderr.strip()}); name one of this repository.")
        try:
            yield place
        finally:
            git("worktree", "remove", "--force", str(place))


def git(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)


def tokens_per_second(tree: Path, command: list[str]) -> dict[str, float]:
    """Runs the benchmark once. Returns the tokens per second of each row."""
    done = subprocess.run(
        [sys.executable, "-m", "bimedix_jax", *command, "--json"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise BimedixError(f"the command failed in {tree}: {done.stderr.strip().splitlines()[-1]}")
    return {row["name"]: row["ours_tokens_per_s"] for row in json.loads(done.stdout)["rows"]}


def compare(commit: str, command: list[str], pairs: int) -> list[dict[str, float | str]]:
    """Compares each row of the benchmark, with `pairs` runs of each side."""
    with checked_out(commit) as before:
        runs = [(tokens_per_second(ROOT, command), tokens_per_second(before, command)) for _ in range(pairs)]
    return [
        {
            "name": name,
            "after": statistics.median(after[name] for after, _ in runs),
            "before": statistics.median(earlier[name] for _, earlier in runs),
            "ratio": statistics.median(after[name] / earlier[name] for after, earlier in runs),
            "lowest": min(after[name] / earlier[name] for after, earlier in runs),
            "highest": max(after[name] / earlier[name] for after, earlier in runs),
        }
        for name in runs[0][0]
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="the earlier commit")
    parser.add_argument("--pairs", type=positive, default=5, help="runs of each side")
    parser.add_argument("command", nargs="+", help="a benchmark of bimedix with its options, after --")
    options = parser.parse_args()
    rows = compare(options.commit, options.command, options.pairs)
    print(json.dumps({"commit": options.commit, "command": options.command, "pairs": options.pairs, "rows": rows}))


if __name__ == "__main__":
    run_script(main)
