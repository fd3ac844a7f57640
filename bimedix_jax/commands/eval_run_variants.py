"""The part of `bimedix eval run` that scores questions in other orders and wordings."""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bimedix_jax.data.records import Record
    from bimedix_jax.data.tokenizer import Tokenizer
    from bimedix_jax.evals.journal import Part
    from bimedix_jax.evals.multiple_choice import Prediction
    from bimedix_jax.models.mixtral import Mixtral


@dataclasses.dataclass(frozen=True)
class Forms:
    """The number of other orders, whether there are other wordings, and the seed of the orders."""

    orders: int
    wordings: bool
    seed: int


def score(
    model: "Mixtral",
    tokenizer: "Tokenizer",
    sets: "dict[str, list[Record]]",
    predictions: "dict[str, list[Prediction]]",
    forms: Forms,
    options: tuple[Any, ...],
    saved: "Callable[[str], Part]",
) -> "tuple[dict[str, Any], dict[str, list[Prediction]]]":
    """How far the answers to each set depend on the form, and the predictions by the name of the variant.

    Args:
      predictions: of the original questions, by set.
      options: max_length, batch_tokens and plan of `multiple_choice`.
    """
    from bimedix_jax.evals.multiple_choice import multiple_choice
    from bimedix_jax.evals.variants import sensitivity

    def of_variant(name: str, records: "list[Record]") -> "list[Prediction]":
        return multiple_choice(model, tokenizer, records, *options, saved=saved(name)).predictions

    result: dict[str, Any] = {}
    more: dict[str, list[Prediction]] = {}
    for name, records in sets.items():
        of_set = (name, records, predictions[name], of_variant)
        result[name], found = sensitivity(*of_set, forms.orders, forms.wordings, forms.seed)
        more |= found
    return result, more
