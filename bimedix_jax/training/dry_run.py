"""What a dry run checks of an experiment, without JAX: the rules of its interventions."""

from pathlib import Path

from bimedix_jax import files
from bimedix_jax.experiment import Experiment, ModelSource, parse
from bimedix_jax.models.config import MixtralConfig
from bimedix_jax.routing.rules import check_rules, training_rules


def check_interventions(experiment: Experiment) -> None:
    """Reads the rules that the experiment names, and checks them against the model as far as its sizes are known.

    Raises:
      BimedixError: the file is not a list of rules, or a rule is not available in training or does not fit the model.
    """
    if experiment.intervene is None:
        return
    rules = training_rules(experiment.intervene)
    config = known_config(experiment.model)
    if config is not None:
        check_rules(rules, config)


def known_config(model: ModelSource) -> MixtralConfig | None:
    """The architecture of a model that is initialised at random or in a local folder; None for any other."""
    if model.path is None:
        return model.random
    folder = Path(model.path).expanduser()
    native = files.peek_json(folder / "bimedix.json").get("config")
    if native is not None:
        return parse(MixtralConfig, native, f"config in {folder}")
    if files.peek_json(folder / "config.json").get("model_type") != "mixtral":
        return None
    from bimedix_jax.checkpoint.hf_config import read_config

    return read_config(folder)
