"""Prompts are Jinja templates in the files `assets/prompts/<stage>/<name>.txt`.

The files of a user's folder with the same layout replace some or all of them. The hash of the templates is part of the
key of every request, so that a changed prompt makes new requests and an unchanged one does not.
"""

import functools
import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from bimedix_jax import files
from bimedix_jax.errors import BimedixError

_COMMENT = re.compile(r"\{#.*?#\}\n?", re.DOTALL)


@dataclass(frozen=True)
class Prompts:
    """The templates of one stage. `own`: the names that the user replaced."""

    stage: str
    templates: tuple[tuple[str, str], ...]
    own: tuple[str, ...] = ()

    @functools.cached_property
    def hash(self) -> str:
        """Their version in every request's key: 64 hexadecimal digits. Comments (`{# ... #}`) do not count."""
        templates = tuple((name, _COMMENT.sub("", text)) for name, text in self.templates)
        return hashlib.sha256(repr((self.stage, templates)).encode()).hexdigest()

    def render(self, name: str, **values: Any) -> str:
        """The template of that name, filled in.

        Raises:
            BimedixError: the template is not valid, or uses a value that it is not given.
        """
        import jinja2

        try:
            return self._compiled(name).render(**values).strip()
        except jinja2.TemplateError as error:
            known = ", ".join(sorted(values)) or "none"
            raise BimedixError(f"prompt {self.stage}/{name}.txt: {error}; it may use these values: {known}") from error

    def _compiled(self, name: str) -> Any:
        return _compile(dict(self.templates)[name])


@functools.cache
def _compile(text: str) -> Any:
    import jinja2
    import jinja2.sandbox

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(text)


def load_prompts(stage: str, folder: Path | None = None) -> Prompts:
    """The prompts of a stage; files in `folder/<stage>/` replace those of the package.

    Raises:
        BimedixError: there is no such folder, a file in it has the name of no prompt, or the package has no prompts.
    """
    shipped = resources.files("bimedix_jax") / "assets" / "prompts" / stage
    texts = {
        entry.name.removesuffix(".txt"): entry.read_text(encoding="utf-8")
        for entry in shipped.iterdir()
        if entry.name.endswith(".txt")
    }
    if not texts:
        raise BimedixError(f"the package ships no prompts of {stage}; install it again")
    own: dict[str, str] = {}
    if folder is not None:
        if not folder.is_dir():
            raise BimedixError(f"there is no folder {folder}; name one that holds {stage}/*.txt")
        own = {path.stem: files.read_text(path) for path in sorted((folder / stage).glob("*.txt"))}
        unknown = sorted(set(own) - set(texts))
        if unknown:
            raise BimedixError(
                f"{folder / stage} has {unknown[0]}.txt, and the prompts of {stage} are {', '.join(sorted(texts))}"
            )
    return Prompts(stage, tuple(sorted({**texts, **own}.items())), tuple(sorted(own)))


def fence(label: str, text: str) -> str:
    """`text` between marks that do not occur in it, so that no text can pretend to be outside its fence."""
    number = 0
    while (mark := hashlib.sha256(f"{number}:{text}".encode()).hexdigest()[:12]) in text:
        number += 1
    return f"<{label} {mark}>\n{text}\n</{label} {mark}>"
