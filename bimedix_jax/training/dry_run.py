"""What a dry run checks of an experiment, without JAX: the rules of its interventions."""

from bimedix_jax.checkpoint.architecture import known_config
from bimedix_jax.experiment import Experiment
from bimedix_jax.routing.rules import check_rules, training_rules


def check_interventions(experiment: Experiment) -> None:
    """Reads the rules that the experiment names, and checks them against the model as far as its sizes are known.

    Raises:
      BimedixError: the file is not a list of rules, or a rule is not available in training or does not fit the model.
    """
    if experiment.intervene is None:
        return
    rules = training_rules(experiment.intervene)
    model = experiment.model
    config = model.random if model.path is None else known_config(model.path)
    if config is not None:
        check_rules(rules, config)
