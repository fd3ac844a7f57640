"""The queue: what is finished never runs again, what changed does, a crash is a row, and no run outlives its sweep."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bimedix_jax import cli
from bimedix_jax.errors import BimedixError
from bimedix_jax.sweeps.folder import read_incidents
from bimedix_jax.sweeps.queue import shares
from bimedix_jax.sweeps.upload import run_folders

REPORT = ("report.md", "report.csv", "report.html")


def sweep(study: Path, out: Path, *words: str, capsys: Any = None) -> tuple[int, dict[str, Any]]:
    """(exit code, JSON document) of `bimedix sweep`."""
    code = cli.main(["sweep", str(study), "--size", "smoke", "--out", str(out), "--json", *words])
    return code, json.loads(capsys.readouterr().out)


def starts(out: Path) -> dict[str, int]:
    """Number of starts of each run, as the runs themselves count them."""
    return {path.parent.name[:-11]: len(path.read_text().splitlines()) for path in out.glob("*/runs/*/starts")}


def report(out: Path) -> dict[str, bytes]:
    return {name: (out / name).read_bytes() for name in REPORT}


def test_what_is_finished_never_runs_again(study, stub, tmp_path, capsys):
    out = tmp_path / "out"
    code, done = sweep(study, out, capsys=capsys)
    assert code == 0
    assert [(row["arm"], row["seed"]) for row in done["rows"]] == [
        (arm, seed) for arm in ("base", "low", "high") for seed in (0, 1)
    ]
    assert {row["state"] for row in done["rows"]} == {"finished"}
    assert done["rows"][0]["nats_per_token/ar"] == pytest.approx(done["rows"][0]["nats_per_token/en"] + 0.1)
    assert done["primary"]["difference"] == pytest.approx(-0.2, abs=0.02)
    assert done["primary"]["p"] == 0.5
    assert "6 seeds are the least that reach 0.05" in done["primary"]["note"]
    before = report(out)
    code, again = sweep(study, out, capsys=capsys)
    assert again["rows"] == done["rows"]
    assert set(starts(out).values()) == {1}
    assert report(out) == before


def test_a_changed_arm_runs_anew_and_the_others_do_not(study, stub, tmp_path, capsys):
    out = tmp_path / "out"
    sweep(study, out, capsys=capsys)
    study.write_text(study.read_text().replace('"low": 2', '"low": 8'))
    _, done = sweep(study, out, capsys=capsys)
    assert len(done["rows"]) == 6
    folders = list((out / "arms-smoke/runs").iterdir())
    assert len(folders) == 8, "the runs of the old arm are kept"
    assert len(run_folders(out)) == 6, "and `bimedix track upload` leaves them out, as the report does"
    assert {len((folder / "starts").read_text().splitlines()) for folder in folders} == {1}


def test_more_seeds_and_other_arms_add_to_the_table(study, stub, tmp_path, capsys):
    out = tmp_path / "out"
    _, first = sweep(study, out, "--arms", "base", "low", "--seeds", "6", capsys=capsys)
    assert len(first["rows"]) == 12
    assert first["primary"]["p"] == 2 / 2**6
    assert first["primary"]["note"] is None
    _, one = sweep(study, out, "--only", "high", "--seed", "4", capsys=capsys)
    assert len(one["rows"]) == 13
    assert set(starts(out).values()) == {1}


def test_a_declaration_that_changes_after_runs_have_begun_is_reported(study, stub, tmp_path, capsys):
    """Otherwise the contrast could be chosen when its results are known."""
    out, text = tmp_path / "out", study.read_text()
    study.write_text(text.replace('"low", "base", -1', '"high", "base", 1'))
    assert sweep(study, out, "--dry-run", capsys=capsys)[0] == 0
    study.write_text(text)
    _, first = sweep(study, out, capsys=capsys)
    assert (first["primary"]["declared_beforehand"], first["primary"]["changes"]) == (True, [])
    study.write_text(text.replace('"low", "base", -1', '"high", "base", 1').replace("seeds=2", "seeds=3"))
    for _ in range(2):
        assert cli.main(["sweep", str(study), "--size", "smoke", "--out", str(out), "--seeds", "2", "--json"]) == 0
        captured = capsys.readouterr()
        assert "declared another contrast or other seeds before 6 runs had begun" in " ".join(captured.err.split())
        primary = json.loads(captured.out)["primary"]
        assert not primary["declared_beforehand"]
        assert primary["changes"] == [
            "The contrast was changed after 6 runs had begun; before, it was nats_per_token of low minus base, "
            "expected lower",
            "The declared seeds were changed after 6 runs had begun, from 0, 1 to 0, 1, 2",
        ]
    page = (out / "report.md").read_text()
    assert "**Primary contrast**, not declared beforehand, so exploratory: nats_per_token of high minus base" in page
    assert "2 of 3 declared seeds are finished." in page


def test_seeds_that_were_not_declared_are_named(study, stub, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["sweep", str(study), "--size", "smoke", "--out", str(out), "--seeds", "3"]) == 0
    captured = capsys.readouterr()
    assert "seeds that the study does not declare: 2" in " ".join((captured.out + captured.err).split())
    assert "Seeds that were not declared: 2." in (out / "report.md").read_text()


def test_a_contrast_on_records_that_no_run_has_is_refused(study, tmp_path, capsys):
    study.write_text(study.read_text().replace('heldout="sample"', "heldout=None"))
    code, found = sweep(study, tmp_path / "out", "--dry-run", capsys=capsys)
    assert code == 1
    assert "PRIMARY is about nats_per_token of held-out records, and size smoke has none" in found["error"]
    assert sweep(study, tmp_path / "out", "--dry-run", "--heldout", "sample", capsys=capsys)[0] == 0


def test_another_study_of_the_same_name_is_refused(study, stub, tmp_path, capsys):
    out = tmp_path / "out"
    _, done = sweep(study, out, capsys=capsys)
    other = tmp_path / "elsewhere" / study.name
    other.parent.mkdir()
    other.write_text(study.read_text())
    assert sweep(other, out, capsys=capsys)[1]["rows"] == done["rows"], "the same study, moved"
    changed = tmp_path / "changed" / study.name
    changed.parent.mkdir()
    changed.write_text(study.read_text().replace('"lora.rank": rank', '"lora.rank": rank + 4'))
    code, found = sweep(changed, out, "--slurm", capsys=capsys)
    assert code == 1
    assert "has the runs of another study" in found["error"]
    assert len(sweep(other, out, capsys=capsys)[1]["rows"]) == 6


def test_a_renamed_arm_keeps_its_finished_runs(study, stub, tmp_path, capsys):
    out = tmp_path / "out"
    sweep(study, out, capsys=capsys)
    study.write_text(study.read_text().replace('"high"', '"tall"'))
    _, done = sweep(study, out, capsys=capsys)
    assert {row["state"] for row in done["rows"]} == {"finished"}
    assert len(list((out / "arms-smoke/runs").iterdir())) == 6


def test_damaged_files_of_a_run_are_named(study, stub, tmp_path, capsys):
    out = tmp_path / "out"
    sweep(study, out, capsys=capsys)
    one, two = sorted((out / "arms-smoke/runs").iterdir())[:2]
    (one / "evaluation.json").write_text('{"identity": ')
    assert cli.main(["sweep", "report", str(out), "--json"]) == 0
    (row,) = [row for row in json.loads(capsys.readouterr().out)["studies"][0]["rows"] if row["state"] != "finished"]
    assert "evaluation.json is damaged; run the sweep again" in row["reason"]
    metrics = two / "training/metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    for damaged, message in (
        (["{nothing\n", *lines[1:]], "line 1, is not the JSON of a step"),
        ([*lines[:1], *lines[2:]], "line 2: step 3 follows step 1"),
    ):
        metrics.write_text("".join(damaged))
        assert cli.main(["sweep", "report", str(out)]) == 1
        error = "".join(capsys.readouterr().err.split())
        assert "".join(str(metrics).split()) in error
        assert "".join(message.split()) in error


def test_a_crash_is_a_row_with_its_reason_and_is_retried_on_request(study, stub, tmp_path, capsys):
    out = tmp_path / "out"
    stub(low_0="crash", high_1="killed")
    code, failed = sweep(study, out, capsys=capsys)
    assert code == 1
    assert "2 of 6 runs crashed" in failed["error"]
    rows = {f"{row['arm']}-{row['seed']}": row for row in failed["rows"]}
    assert rows["low-0"]["reason"] == "the disk is full; free some space"
    assert rows["high-1"]["reason"] == "killed by SIGKILL (out of memory?)"
    assert sum(row["state"] == "finished" for row in rows.values()) == 4
    assert "the disk is full" in (out / "report.md").read_text()
    stub()
    code, _ = sweep(study, out, capsys=capsys)
    assert code == 1
    assert starts(out)["low-seed0"] == 1
    code, done = sweep(study, out, "--retry", capsys=capsys)
    assert code == 0
    once = ("base-seed0", "base-seed1", "low-seed1", "high-seed0")
    assert starts(out) == {"low-seed0": 2, "high-seed1": 2, **dict.fromkeys(once, 1)}
    undisturbed = tmp_path / "undisturbed"
    sweep(study, undisturbed, capsys=capsys)
    assert report(undisturbed) == report(out)
    events = [line["event"] for line in read_incidents(out / "arms-smoke")]
    assert (events.count("crash"), events.count("finish")) == (2, 6)
    assert done["primary"]["seeds"] == 2


def test_a_run_that_another_process_has_is_left_to_it(study, stub, tmp_path, capsys):
    stub(low_0="busy")
    code, done = sweep(study, tmp_path / "out", capsys=capsys)
    assert code == 0
    assert [row["state"] for row in done["rows"]].count("elsewhere") == 1


def processes_of(folder: Path) -> set[int]:
    """The processes whose command line names the folder."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.add(int(path.parent.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def start_waiting(study: Path, out: Path, log: Path) -> subprocess.Popen[bytes]:
    """A sweep in a process of its own, once two of its runs, which wait, have started."""
    code = f"""
import sys
from bimedix_jax import cli
from bimedix_jax.sweeps import sweep
sweep.WORKER = (sys.executable, {str(study.with_name("stub.py"))!r})
sys.argv = ["bimedix", "sweep", {str(study)!r}, "--size", "smoke", "--out", {str(out)!r}, "--jobs", "2"]
sys.exit(cli.main())
"""
    before = sum(starts(out).values())
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-c", code], stderr=file)
    deadline = time.monotonic() + 120
    while sum(starts(out).values()) < before + 2:
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return process


def gone(folder: Path) -> bool:
    deadline = time.monotonic() + 20
    while processes_of(folder):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.whole_process
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="divides two cores")
def test_no_run_outlives_its_sweep(study, stub, tmp_path, capsys):
    """SIGKILL leaves none, and SIGTERM lets the runs save. Both divide the cores, and the next sweep goes on."""
    out = tmp_path / "out"
    stub(base_0="wait", base_1="wait")
    process = start_waiting(study, out, tmp_path / "log")
    cores = [path.read_text().split(" ", 1)[1] for path in out.glob("*/runs/*/starts")]
    assert len(set(cores)) == 2, "each run has cores of its own"
    process.kill()
    process.wait()
    assert gone(out)
    process = start_waiting(study, out, tmp_path / "log")
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 130
    assert "the same command continues the sweep" in (tmp_path / "log").read_text()
    assert gone(out)
    stub()
    code, done = sweep(study, out, capsys=capsys)
    assert code == 0
    assert {row["state"] for row in done["rows"]} == {"finished"}


def test_shares_divide_the_machine():
    assert shares(1, {}, 8, [0, 1])[0].cores is None
    two = shares(2, {}, 4, [0, 1, 2, 3])
    assert [share.variables["CUDA_VISIBLE_DEVICES"] for share in two] == ["0,1", "2,3"]
    assert [share.cores for share in two] == [{0, 1}, {2, 3}]
    assert shares(2, {"CUDA_VISIBLE_DEVICES": "5,7"}, 8, [0, 1])[1].variables == {"CUDA_VISIBLE_DEVICES": "7"}
    assert not shares(2, {"JAX_PLATFORMS": "cpu"}, 8, [0, 1])[0].variables
    with pytest.raises(BimedixError, match="2 cores to divide"):
        shares(3, {}, 0, [0, 1])
    with pytest.raises(BimedixError, match="2 GPUs to divide"):
        shares(4, {}, 2, [0, 1, 2, 3])


def test_a_dry_run_makes_nothing(study, stub, tmp_path, capsys):
    out = tmp_path / "out"
    code, planned = sweep(study, out, "--dry-run", capsys=capsys)
    assert code == 0
    assert len(planned["rows"]) == 6
    assert planned["rows"][0]["experiment"]["steps"] == 4
    assert not out.exists()
    assert cli.main(["sweep", "run", str(study), "--size", "lab", "--dry-run"]) == 0
    assert "18 runs; at most 40 minutes each on 2 cores, 12.0 hours in all" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arms", "lowest"], "no arm lowest; the arms are base, low, high"),
        (["--only", "low", "--arms", "low"], "exclude each other"),
        (["--seed", "1", "--seeds", "2"], "exclude each other"),
        (["--seeds", "0"], "give at least 1"),
        (["--jobs", "0"], "give at least 1"),
    ],
)
def test_wrong_options_are_one_sentence(study, stub, tmp_path, capsys, words, message):
    code, failed = sweep(study, tmp_path / "out", *words, capsys=capsys)
    assert code == 1
    assert message in failed["error"]


def test_tasks_of_an_array_are_the_runs(study, stub, tmp_path, capsys):
    """The script calls `bimedix sweep run` with the arm and seed of its number, which then runs that one."""
    out = tmp_path / "out"
    code, written = sweep(study, out, "--slurm", "--wandb-sweep", capsys=capsys)
    assert (code, "pass --wandb online" in written["error"]) == (1, True)
    assert not list(out.rglob("array.sbatch"))
    code, written = sweep(study, out, "--slurm", "--wandb-sweep", "--wandb", "offline", capsys=capsys)
    assert code == 0
    assert written["runs"] == 6
    assert not starts(out)
    script = Path(written["slurm"])
    text = script.read_text().replace(f"{sys.executable} -m bimedix_jax", "echo")
    assert "#SBATCH --array=0-5" in text
    for number, (arm, seed) in ((0, ("base", "0")), (3, ("low", "1"))):
        env = {**os.environ, "SLURM_ARRAY_TASK_ID": str(number)}
        done = subprocess.run(["bash", "-c", text], env=env, capture_output=True, text=True, check=True)
        words = done.stdout.split()
        assert words[-4:] == ["--only", arm, "--seed", seed]
        assert words[:3] == ["sweep", "run", str(study)]
    assert cli.main(words) == 0
    assert starts(out) == {"low-seed1": 1}
    assert "no task of a SLURM array" in subprocess.run(["bash", script], capture_output=True, text=True).stderr
    grid = json.loads(Path(written["wandb_sweep"]).read_text())
    assert grid["parameters"] == {"only": {"values": ["base", "low", "high"]}, "seed": {"values": [0, 1]}}
    agent = [word for word in grid["command"][3:] if word != "${args}"] + ["--only=low", "--seed=1"]
    assert cli.main(agent) == 0
    assert starts(out) == {"low-seed1": 1}
    experiments = list((out / "arms-smoke/experiments").iterdir())
    assert len(experiments) == 6


def test_several_studies_share_a_report(study, stub, tmp_path, capsys):
    out = tmp_path / "out"
    sweep(study, out, "--seeds", "6", capsys=capsys)
    other = study.with_name("others.py")
    other.write_text(study.read_text().replace('"low", "base", -1', '"high", "base", 1'))
    sweep(other, out, "--seeds", "6", capsys=capsys)
    assert cli.main(["sweep", "report", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    primaries = {one["study"]: one["primary"] for one in found["studies"]}
    assert primaries["arms"]["p"] == primaries["others"]["p"] == 2 / 2**6
    assert primaries["arms"]["p_holm"] == primaries["others"]["p_holm"] == 4 / 2**6
    page = (out / "report.html").read_text()
    assert page.count("data:image/png") == 4
    named = re.findall(r"^!\[.+\]\((.+)\)$", (out / "report.md").read_text(), re.MULTILINE)
    assert named == [f"{name}-smoke-{kind}.png" for name in ("arms", "others") for kind in ("effects", "curves")]
    assert all((out / name).read_bytes().startswith(b"\x89PNG") for name in named)
    assert not re.search("https?://", page)
    assert cli.main(["sweep", "report", str(tmp_path)]) == 1
    assert "not the folder of a sweep" in capsys.readouterr().err
