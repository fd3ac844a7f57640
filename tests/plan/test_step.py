"""Compiled steps: memory on each device, what fits, and the output of the command."""

import json

import jax
import pytest

from bimedix_jax import cli
from bimedix_jax.errors import BimedixError
from bimedix_jax.experiment import override
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.plan import hlo, saved, step
from bimedix_jax.presets import smoke

CPUS = jax.devices()[:2]


def architecture(experiment) -> MixtralConfig:
    assert experiment.model.random is not None
    return experiment.model.random


def test_memory_of_each_device_and_of_the_activations():
    """Each of two devices stores half of what is sharded, and keeps the layers' inputs of one row."""
    experiment = override(smoke(), {"batch.rows": 2, "batch.accumulation": 1})
    config = architecture(experiment)
    one, two = (step.training_step(config, experiment, CPUS[:count]) for count in (1, 2))
    for part in ("base", "adapters", "optimiser"):
        assert 0.5 * one.argument_bytes[part] <= two.argument_bytes[part] < 0.62 * one.argument_bytes[part]
    assert one.argument_bytes["optimiser"] == pytest.approx(2 * one.argument_bytes["adapters"], abs=16)
    assert one.peak_bytes is not None
    assert two.peak_bytes is not None
    assert sum(one.argument_bytes.values()) < one.peak_bytes
    kept = [saved.saved_bytes(hlo.parse(done.text), config.num_layers) for done in (one, two)]
    inputs = config.num_layers * 64 * config.hidden_size * 4
    assert inputs <= kept[1] < 1.6 * inputs
    assert kept[0] == pytest.approx(2 * kept[1], rel=0.01)


def test_moments_in_bfloat16_halve_the_optimiser_state():
    experiment = override(smoke(), {"optimiser.state_dtype": "bfloat16"})
    (state, _, _), _ = step.training_arguments(architecture(experiment), experiment, CPUS[:1])
    assert step.local_bytes(state.optimiser) == pytest.approx(step.local_bytes(state.params), abs=16)


def test_sums_by_language_need_a_group_for_each_token():
    """The planner's batch is that of a run: the step can be traced with it."""
    experiment = override(smoke(), {"router.languages": ["en", "ar"]})
    arguments, train_step = step.training_arguments(architecture(experiment), experiment, CPUS[:1])
    assert "group_BT" in arguments[2]
    assert jax.eval_shape(train_step, *arguments)[1]["group_losses"].shape == (3, 2), "two languages, and all others"


def test_rows_that_the_devices_do_not_divide_raise():
    experiment = override(smoke(), {"batch.rows": 3})
    with pytest.raises(
        BimedixError, match=r"3 rows of a micro-batch cannot be divided among 2 devices; set batch\.rows"
    ):
        step.training_arguments(architecture(experiment), experiment, CPUS)


def test_a_compiler_out_of_memory_reports_the_needed_size():
    class Lowered:
        def compile(self, compiler_options):
            assert compiler_options is None, "only GPUs have compiler options"
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm."
            )

    class Step:
        def lower(self):
            return Lowered()

    done = step.compile_for(CPUS[0], {}, Step())
    assert not done.compiles
    assert done.peak_bytes == int(20.5 * 2**30)


SMALL = {
    "batch.rows": 1,
    "batch.accumulation": 1,
    "model.random.hidden_size": 128,
    "model.random.intermediate_size": 128,
    "model.random.num_layers": 2,
    "model.dtype": "bfloat16",
    "lora.targets": ["q", "w1", "router"],  # one of each kind: every target has kernels to compile
}


def test_the_command_prints_all_fields(capsys, tmp_path):
    (tmp_path / "small.json").write_text(override(smoke(), SMALL).to_json())
    words = ["plan", str(tmp_path / "small.json"), "--devices", "a100-80gb:1", "--json"]
    assert cli.main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["fits"] is True
    assert plan["changed"] == []
    assert sum(plan["parts"].values()) == plan["peak_bytes_per_device"]
    assert set(plan["parts"]) == {"base", "adapters", "optimiser", "batch", "activations", "temporaries"}
    named = sum(plan["useful_parts"].values()) + sum(plan["excess_flops"].values())
    assert named == pytest.approx(plan["flops"])
    assert plan["flops"] > plan["useful_flops"] > 0
    assert plan["hours"] == pytest.approx(632e6 * 2 / plan["tokens_per_s"] / 3600)
    assert plan["step_seconds"] >= plan["roofline"]["compute_seconds"]
    assert sum(plan["device_seconds_by_part"].values()) == pytest.approx(plan["device_seconds"])
    for name in ("prefill", "decode"):
        assert plan[name]["prompt_tokens"] == 255  # not 512: the context has 256
        assert plan[name]["fits"]
        assert plan[name]["flops"] >= 0.9 * plan[name]["useful_flops"] > 0


def test_invalid_arguments_raise(capsys):
    assert cli.main(["plan", "--devices", "b200:8"]) == 1
    assert "b200:8 is no target" in capsys.readouterr().err
    assert cli.main(["plan", "nothing", "--devices", "v5e:8"]) == 1
    assert "neither a preset" in capsys.readouterr().err
    assert cli.main(["plan", "--devices", "v5e:3"]) == 1
    assert "no slice of 3 v5e chips; name one of 1, 4, 8, 16" in capsys.readouterr().err
    assert cli.main(["plan", "--devices", "a100-80gb:8", "--prompt-tokens", "40000"]) == 1
    assert (
        "--prompt-tokens 40000 does not fit this model's context of 32768; give 1 to 32767" in capsys.readouterr().err
    )
    assert cli.main(["plan", "--devices", "a100-80gb:8", "--set", "data.sequence_length=65536"]) == 1
    assert "lower data.sequence_length" in capsys.readouterr().err
