"""The process of one run of a sweep. `queue.py` starts it; nobody needs to call it.

    python -m bimedix_jax.sweeps.worker run FOLDER          # trains and evaluates what FOLDER/arm.json says
    python -m bimedix_jax.sweeps.worker command WORDS...    # a command of `bimedix` that ends with the sweep

Exit codes are those of `bimedix`, and BUSY if another process holds the folder.
"""

import contextlib
import dataclasses
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from bimedix_jax import cli, files, startup
from bimedix_jax.errors import BimedixError, problem_of
from bimedix_jax.experiment import Experiment, from_dict, read
from bimedix_jax.process import folders, signals
from bimedix_jax.sweeps.folder import ARM, CONFIG, EVALUATION, TRAINING, is_finished, write_json
from bimedix_jax.sweeps.queue import BUSY


def tether() -> None:
    """Ends this process and its group when the process that started it has ended, which closes standard input."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os.killpg(os.getpgid(0), signal.SIGKILL)

    if os.getpgid(0) == os.getpid():  # not when called by hand, where the group is the shell's
        threading.Thread(target=wait, name="tether", daemon=True).start()


def run_arm(folder: Path) -> None:
    """Trains and evaluates, from wherever an earlier start ended. evaluation.json is written last."""
    from bimedix_jax.evals.heldout import heldout_records
    from bimedix_jax.process.terminal import Screen
    from bimedix_jax.sweeps import evaluation
    from bimedix_jax.sweeps.upload import rebuild
    from bimedix_jax.training.loop import train
    from bimedix_jax.training.metrics_file import read_metrics

    spec = files.read_json(folder / ARM, dict[str, Any], "run `bimedix sweep` again, which writes it")
    experiment, training = from_dict(spec["experiment"]), folder / TRAINING
    records = None if spec["heldout"] is None else heldout_records(spec["heldout"], spec["limit"])
    if records is not None and experiment.model.path is None:
        raise BimedixError("a random model has no tokenizer to evaluate with; set heldout=None in SIZES.")
    resume = (training / CONFIG).is_file()
    if resume:
        follow_moves(experiment, training / CONFIG)
    result = train(experiment, training, resume=resume, console=Screen(stderr=True))
    tokens = sum(int(line["tokens"]) for line in read_metrics(training))
    found = {name: spec[name] for name in ("study", "size", "arm", "seed", "identity")}
    found |= {"steps": result.steps, **evaluation.cost(result.model, experiment, tokens)}
    if records is not None:
        found |= evaluation.evaluate(result.model, str(experiment.model.path), records)
    write_json(folder / EVALUATION, found)
    if experiment.tracking.mode != "disabled":
        rebuild(training, experiment.tracking.mode)


def follow_moves(experiment: Experiment, config: Path) -> None:
    """Updates the places of base and data in the config.json of a run, as where the sweep's folder was moved.

    The run's identity has the hashes of their content, so they are the same files.
    """
    began = read(config)
    now = dataclasses.replace(experiment, steps=experiment.steps or began.steps)
    if now != began:
        files.write_text(config, now.to_json())


def guarded(folder: Path) -> int:
    """Exit code of `run_arm`; an exception becomes one sentence, after its traceback if it is unexpected."""
    try:
        if not is_finished(folder):
            run_arm(folder)
        return cli.DONE
    except KeyboardInterrupt as stop:
        print(signals.sentence(*stop.args), file=sys.stderr)
        return cli.INTERRUPTED
    except BimedixError as error:
        problem = str(error)
    except Exception as error:  # noqa: BLE001 (the sweep reports it and goes on with the other runs)
        traceback.print_exc()
        problem = problem_of(error) or f"unexpected {type(error).__name__}: {error}"
    print(f"error: {' '.join(problem.split())}", file=sys.stderr)
    return cli.FAILED


def main(words: list[str]) -> int:
    if words[0] != "command":
        startup.reuse_memory()  # before the first thread
    tether()
    if words[0] == "command":
        sys.argv = ["bimedix", *words[1:]]
        return cli.main()
    signals.catch_signals()
    startup.prepare()
    startup.log_as_sentences()
    folder = Path(words[1])
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(folders.one_writer(folder, "runs this arm"))
        except BimedixError as error:
            print(f"error: {error}", file=sys.stderr)
            return BUSY
        code = guarded(folder)
    signals.command_ended()
    if code == cli.INTERRUPTED:
        signals.leave(code)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
