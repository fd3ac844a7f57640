"""A model for lm-evaluation-harness: `simple_evaluate(model=HarnessModel(model, tokenizer), tasks=[...])`.

Requests mean what they mean to the harness's Hugging Face back end: the same token ids, the same truncation on the
left, and log p of a continuation and whether it is greedy. They run in another way: see inference/continuations.py.
Importing this file needs the extra `eval`; importing bimedix_jax does not.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from bimedix_jax.checkpoint.identity import base_identity
from bimedix_jax.data.encoding import ROLES
from bimedix_jax.data.records import Turn
from bimedix_jax.data.tokenizer import Tokenizer
from bimedix_jax.errors import BimedixError
from bimedix_jax.evals.request_store import RequestStore, key_of
from bimedix_jax.files import peek_json
from bimedix_jax.inference.continuations import Continuations, Group, Scored
from bimedix_jax.inference.generate import Sampling, decode
from bimedix_jax.inference.padding import bucket
from bimedix_jax.inference.planning import AnyPlan, Source, language_of, of_prompts, of_sequences
from bimedix_jax.models.mixtral import Mixtral

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Options of sampling that a task may set."""
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}

Encoded = tuple[Any, Sequence[int], Sequence[int]]
"""(the texts, tokens of the context, tokens of the continuation)."""


class HarnessModel(TemplateLM):
    """A Mixtral of ours, on one device or sharded over a mesh, with or without adapters.

    Args:
      plan: what the routers are told to do, with B and T of 1, or rules.
      batch_tokens: tokens run at a time; it affects speed, memory and rounding only.
      max_length: longest context with its continuation, by default the model's context; longer ones lose their
        beginning, as in the harness.
      add_bos: whether a text begins with the BOS token; by default as transformers does with this tokenizer.
      store: keeps answers on disk, so that a killed evaluation continues.
    """

    def __init__(
        self,
        model: Mixtral,
        tokenizer: Tokenizer,
        plan: AnyPlan = None,
        batch_tokens: int = 4096,
        max_length: int | None = None,
        add_bos: bool | None = None,
        store: RequestStore | None = None,
    ):
        super().__init__()
        self.model, self.words, self.plan, self.batch_tokens = model, tokenizer, plan, batch_tokens
        context = model.config.max_position_embeddings
        self.max_length = min(max_length or context, context)
        self.add_bos = adds_bos(tokenizer) if add_bos is None else add_bos
        self.store = store or RequestStore()
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        return self.words.eos_id

    @property
    def prefix_token_id(self) -> int:
        return self.eot_token_id if self.words.bos_id is None else self.words.bos_id

    @property
    def tokenizer_name(self) -> str:
        return f"{self.words.fingerprint}-{self.words.template.name}"

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say."""
        return 256

    def get_model_info(self) -> dict[str, Any]:
        """What identifies the model in the harness's results."""
        return {
            "model_dtype": self.model.dtype,
            "model_sha": base_identity(self.model)["weights"],
            "tokenizer": self.words.fingerprint,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids. By default with BOS where the tokenizer adds it and the text does not begin with it."""
        bos = self.words.special.get("bos")
        adds = self.add_bos if add_special_tokens is None else add_special_tokens and self.add_bos
        if add_special_tokens is None and bos is not None and string.startswith(bos):
            adds = False
        return self.words.encode(string, add_bos=adds)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template that `apply_chat_template` applies, as Jinja."""
        return self.words.template.jinja if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as text. Without `add_generation_prompt` the last message is unfinished."""
        turns = [Turn(speaker=SPEAKERS[one["role"]], value=one["content"]) for one in chat_history]  # pyright: ignore[reportArgumentType]
        special = (self.words.special.get("bos", ""), self.words.special.get("eos", ""))
        spans = self.words.template.render(turns, *special, add_generation_prompt)
        while not add_generation_prompt and spans and spans[-1].markup:
            spans.pop()
        return "".join(span.text for span in spans)

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        contexts: dict[tuple[int, ...], dict[tuple[int, ...], str]] = {}
        asked = []
        for _, context, continuation in requests:
            if not continuation or len(continuation) > self.max_length:
                raise self._unfit(len(continuation))
            self.truncated += len(context) + len(continuation) > self.max_length + 1
            kept, target = tuple(context)[-(self.max_length + 1 - len(continuation)) :], tuple(continuation)
            key = key_of("loglikelihood", kept, target)
            contexts.setdefault(kept, {})[target] = key
            asked.append(key)
        groups = [Group(context, tuple(found)) for context, found in contexts.items()]
        keys = [list(found.values()) for found in contexts.values()]
        for scores in self._run(groups, keys, disable_tqdm):
            self.store.add({keys[index][number]: list(value) for (index, number), value in scores.items()})
        answers = [self.store.known[key] for key in asked]
        for request, answer in zip(requests, answers, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], tuple(answer))
        return [(float(logprob), bool(greedy)) for logprob, greedy in answers]

    def _unfit(self, size: int) -> BimedixError:
        """The error for a continuation of `size` tokens that is empty or too long."""
        if not size:
            return BimedixError("a continuation has no tokens; give each option of the task a text")
        context = self.model.config.max_position_embeddings
        if size > context:
            remedy = "remove its question from the task, or name a model with a longer context"
            return BimedixError(f"a continuation has {size} tokens, but the model takes at most {context}; {remedy}")
        return BimedixError(
            f"a continuation has {size} tokens, but --max-length is {self.max_length}; give {size} or more, at most "
            f"{context}"
        )

    def _run(self, groups: list[Group], keys: list[list[str]], quiet: bool) -> Iterator[dict[tuple[int, int], Scored]]:
        sources = [
            Source(
                found[0],
                language_of(self.words.decode(group.context)),
                roles=np.full(len(group.context), ROLES.index("prompt"), np.uint8),
                where="the requests of the harness",
            )
            for group, found in zip(groups, keys, strict=True)
        ]
        plan = of_sequences(self.plan, self.model.config, lambda: sources)
        scorer = Continuations(self.model, groups, plan, self.batch_tokens)
        with tqdm(total=len(groups), desc="contexts", unit="context", delay=2, disable=True if quiet else None) as bar:
            for batch in scorer.batches:
                wanted = [keys[row.group][number] for row, *_ in batch.rows for number in row.chosen]
                if self.store.has(wanted):
                    self.store.reused += len(wanted)
                else:
                    yield scorer.score(batch)
                bar.update(len(batch.rows))

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """log p of whole texts; texts longer than the context are scored in windows that do not overlap."""
        windows: list[Encoded] = []
        counts = []
        for (text,) in [request.args for request in requests]:
            found = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            parts = [(None, *make_disjoint_window(window)) for window in found]
            windows += parts
            counts.append(len(parts))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to a stop sequence, the end token or the task's limit."""
        arguments: list[tuple[str, Any]] = [request.args for request in requests]  # pyright: ignore[reportAssignmentType]
        asked = [(context, json.dumps(options, sort_keys=True)) for context, options in arguments]
        by_options: dict[str, dict[str, list[int]]] = {}
        for context, options in asked:
            by_options.setdefault(options, {})[context] = self.tok_encode(context)
        with tqdm(total=len(asked), desc="answers", unit="answer", delay=2, disable=disable_tqdm or None) as bar:
            for options, contexts in by_options.items():
                how = Generation.of(json.loads(options), self)
                prompts = {context: ids[-how.room :] for context, ids in contexts.items()}
                for batch, rows in how.batches(prompts, self.batch_tokens):
                    keys = [key_of("generate_until", context, options) for context in batch]
                    if self.store.has(keys):
                        self.store.reused += len(keys)
                    else:
                        filled = [*batch, *batch[:1] * (rows - len(batch))]  # fewer rows would be another program
                        answers = self._answers([prompts[context] for context in filled], how)[: len(batch)]
                        self.store.add(dict(zip(keys, answers, strict=True)))
                    bar.update(len(batch))
        answers = [self.store.known[key_of("generate_until", *one)] for one in asked]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _answers(self, prompts: list[list[int]], how: "Generation") -> list[str]:
        plan = of_prompts(self.plan, self.model, len(prompts))
        answers: list[list[int]] = [[] for _ in prompts]
        running = set(range(len(prompts)))
        for tokens, _ in decode(self.model, self.rows(prompts), how.most, how.sampling, 0, plan):
            for row in sorted(running):
                if tokens[row] in self.words.stop_ids:
                    running.remove(row)
                    continue
                answers[row].append(tokens[row])
                text = self.words.decode(answers[row], skip_special=True) if how.until else ""
                if any(stop in text for stop in how.until):
                    running.remove(row)
            if not running:
                break
        return [how.cut(self.words.decode(answer, skip_special=True)) for answer in answers]

    @staticmethod
    def rows(prompts: list[list[int]]) -> list[Any]:
        """Prompts as `decode` takes them."""
        return [np.asarray(ids, np.int32) for ids in prompts]


@dataclasses.dataclass(frozen=True)
class Generation:
    """How the answers of one task are generated.

    Attributes:
      until: texts that end an answer; they are not a part of it.
      most: new tokens at most.
      room: tokens of a prompt at most.
    """

    until: list[str]
    most: int
    room: int
    sampling: Sampling

    @classmethod
    def of(cls, options: dict[str, Any], lm: HarnessModel) -> "Generation":
        """From a task's `generation_kwargs`.

        Raises:
          BimedixError: an option that is not implemented, or no room for a prompt.
        """
        how: dict[str, Any] = dict(normalize_gen_kwargs(options, lm.max_gen_toks))
        until, most, samples = how.pop("until"), int(how.pop("max_gen_toks")), how.pop("do_sample", False)
        unknown = sorted(set(how) - set(SAMPLING))
        if unknown:
            raise BimedixError(f"a task asks for {', '.join(unknown)}, which is not implemented; leave it out")
        if most >= lm.max_length:
            raise BimedixError(f"a task asks for {most} new tokens of a context of {lm.max_length}; ask for fewer")
        how["temperature"] = float(how.get("temperature") or 0.0) if samples else 0.0
        return cls([stop for stop in until if stop], most, lm.max_length - most, Sampling.of(**how))

    def batches(self, prompts: dict[str, list[int]], batch_tokens: int) -> Iterator[tuple[list[str], int]]:
        """(contexts of similar length, rows to fill up to), longest first. There is one number of rows for each length;
        a single batch has a power of two."""
        waiting = sorted(prompts, key=lambda context: (-len(prompts[context]), context))
        few = 1 << (len(waiting) - 1).bit_length()
        while waiting:
            rows = min(max(batch_tokens // (bucket(len(prompts[waiting[0]])) + self.most), 1), few)
            yield waiting[:rows], rows
            waiting = waiting[rows:]

    def cut(self, text: str) -> str:
        """The text before the first stop sequence."""
        for stop in self.until:
            text = text.split(stop)[0]
        return text


def adds_bos(tokenizer: Tokenizer) -> bool:
    """Whether transformers puts BOS before a text: as tokenizer_config.json says, else as tokenizer.json does; a
    SentencePiece model alone means that it does."""
    if tokenizer.bos_id is None:
        return False
    asked = peek_json(tokenizer.folder / "tokenizer_config.json").get("add_bos_token")
    if isinstance(asked, bool):
        return asked
    whole = tokenizer.folder / "tokenizer.json"
    return f'"{tokenizer.special["bos"]}"' in json.dumps(peek_json(whole).get("post_processor")) or not whole.exists()
