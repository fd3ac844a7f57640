"""Groups of tokens by language and kind, and what the routers did in each, from the sums that a step returns.

Everything here is NumPy on the host: a step returns sums over its tokens, and the next step runs while they become the
numbers of a line.
"""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bimedix_jax.models.router_sums import RouterSums

if TYPE_CHECKING:
    from bimedix_jax.data.loader import Group

MOST_LANGUAGES, MOST_KINDS = 6, 6
"""At most so many languages have numbers of their own, and so many kinds of a language, those with most targets."""
OTHER = "other"
"""The kinds of a language that have no group of their own."""


@dataclasses.dataclass(frozen=True)
class Groups:
    """The groups whose loss and load are reported. Tokens of no group count in the totals only.

    Attributes:
      pairs: (language, kind) of each; the kind "" stands for the other kinds of the language.
    """

    pairs: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of_data(cls, counted: "Sequence[Group]", asked: Sequence[str] = ()) -> "Groups":
        """The groups of packed rows, from the counts in their index: of the languages asked for, or of all."""
        targets: dict[str, dict[str, int]] = {}
        for group in counted:
            if group.language and (not asked or group.language in asked):
                own = targets.setdefault(group.language, {})
                own[group.kind] = own.get(group.kind, 0) + group.learned_tokens
        pairs: list[tuple[str, str]] = []
        languages = most({name: sum(own.values()) for name, own in targets.items()}, MOST_LANGUAGES)
        for language in [name for name in (asked or languages) if name in targets]:
            kinds = most({kind: count for kind, count in targets[language].items() if kind}, MOST_KINDS)
            pairs += [(language, kind) for kind in kinds]
            if set(targets[language]) != set(kinds):
                pairs.append((language, ""))
        return cls(tuple(pairs))

    @property
    def languages(self) -> list[str]:
        return list(dict.fromkeys(language for language, _ in self.pairs))

    def of(self, language: str) -> list[int]:
        """The indices of a language's groups."""
        return [place for place, (own, _) in enumerate(self.pairs) if own == language]


NO_GROUPS = Groups()


def most(counts: dict[str, int], number: int) -> list[str]:
    """The names of the largest counts, sorted by name."""
    return sorted(sorted(counts, key=lambda name: (-counts[name], name))[:number])


def router_metrics(sums: Any, losses_XC: np.ndarray | None, groups: Groups) -> dict[str, Any]:
    """The numbers of a line: of each layer over all tokens, by language, and by language and kind.

    Args:
      sums: RouterSums as NumPy arrays, by layer and group, with one more group for all other tokens.
      losses_XC: (summed NLL, number of targets) of each group; None without groups.
    """
    found: dict[str, Any] = describe_routers(pooled(sums, range(sums.tokens_LX.shape[1])))
    if losses_XC is None:
        return found
    found["by_language"] = {
        language: losses(losses_XC[own]) | tokens(sums, own) | describe_routers(pooled(sums, own), short=True)
        for language in groups.languages
        for own in [groups.of(language)]
    }
    found["by_group"] = {
        f"{language}/{kind or OTHER}": losses(losses_XC[[place]])
        | tokens(sums, [place])
        | {"load": shares(sums.chosen_LXE[:, place])}
        for place, (language, kind) in enumerate(groups.pairs)
    }
    return found


def losses(own_XC: np.ndarray) -> dict[str, float]:
    nll, targets = (float(x) for x in own_XC.astype(np.float64).sum(axis=0))
    return {"nll": nll / max(targets, 1.0), "supervised_tokens": targets}


def tokens(sums: Any, own: Sequence[int]) -> dict[str, float]:
    return {"tokens": float(sums.tokens_LX[0, own].sum())}


def pooled(sums: Any, own: Sequence[int]) -> Any:
    """The sums of these groups together, without the axis of groups."""
    picked = [*own]
    names = [field.name for field in dataclasses.fields(RouterSums)]
    return RouterSums(**{name: getattr(sums, name)[:, picked].sum(axis=1) for name in names})


def shares(chosen_LE: np.ndarray) -> np.ndarray:
    """Share of each expert in the choices of its layer, 0 without any."""
    return chosen_LE / np.maximum(chosen_LE.sum(axis=-1, keepdims=True), 1.0)


def describe_routers(pool: Any, short: bool = False) -> dict[str, np.ndarray]:
    """Load and means over tokens of each layer. `short` names them as `by_language` does, without `router_`."""
    tokens_L, experts = np.maximum(pool.tokens_LX, 1.0), pool.chosen_LXE.shape[-1]
    load_LE = shares(pool.chosen_LXE)
    logs_LE = np.log(np.where(load_LE > 0, load_LE, 1.0))
    prefix = "" if short else "router_"
    return {
        "load": load_LE,
        "load_entropy": -np.sum(load_LE * logs_LE, axis=-1) / np.log(np.float32(max(experts, 2))),
        "load_max_share": load_LE.max(axis=-1),
        "load_max_over_mean": load_LE.max(axis=-1) * experts,
        "dead_experts": np.sum(pool.chosen_LXE == 0, axis=-1) * (pool.tokens_LX > 0),
        f"{prefix}entropy": pool.entropy_LX / tokens_L,
        f"{prefix}margin": pool.margin_LX / tokens_L,
        f"{prefix}top_margin": pool.top_margin_LX / tokens_L,
        f"{prefix}z": pool.z_LX / tokens_L,
    }
