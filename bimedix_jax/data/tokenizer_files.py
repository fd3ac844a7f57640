"""The JSON files that describe a checkpoint's tokenizer, checked as they are read.

Only the keys that determine token ids, special tokens or the chat template are declared. Other libraries write these
files with many more keys, which are ignored.
"""

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from bimedix_jax.errors import BimedixError
from bimedix_jax.files import read_json, read_text

ROLES = ("bos", "eos", "pad", "unk")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Keys of special tokens, in the order in which transformers adds them to a vocabulary that lacks them."""

REBUILT = frozenset(
    (
        "Albert Barthez Bartpho Bert BertGeneration BertJapanese Bertweet BigBird BioGpt Blenderbot "
        "BlenderbotSmall ByT5 CLIP CTRL Camembert Canine Clvp CodeGen CodeLlama Cohere ConvBert Cpm CpmAnt "
        "DPRContextEncoder DPRQuestionEncoder DPRReader Deberta DebertaV2 Dia DistilBert Esm Esmc FNet FSMT "
        "FastSpeech2Conformer Flaubert Funnel GPTNeoX GPTNeoXJapanese GPTSw3 Gemma Herbert Lasr LayoutLMv2 "
        "LayoutLMv3 LayoutXLM Luke M2M100 MBart MBart50 MLuke MPNet Marian MarkupLM Mgpstr MyT5 Nllb Nougat "
        "OpenAIGPT PLBart Parakeet Pegasus Perceiver Phobert Pop2Piano ProphetNet Qwen3_5 Reformer RemBert RoCBert "
        "RoFormer Roberta SeamlessM4T Siglip Siglip2 Speech2Text SpeechT5 Splinter T5 Tapas Tipsv2 Udop VideoPrism "
        "Vits Wav2Vec2CTC Wav2Vec2PhonemeCTC Whisper XGLM XLM XLMRoberta XLNet "
    ).split()
)
"""Classes of transformers, without `Tokenizer`, that do not read tokenizer.json as it is and are not implemented."""

LARGEST_ID = 2**31 - 1
TokenId = Annotated[int, Field(le=LARGEST_ID)]
StrictId = Annotated[int, Field(ge=0, le=LARGEST_ID, strict=True)]
Text = Annotated[str, Field(min_length=1)]


class AddedTokenFields(BaseModel):
    """A token that is written as an object."""

    content: Text
    lstrip: StrictBool = False
    rstrip: StrictBool = False
    single_word: StrictBool = False
    normalized: StrictBool | None = None  # by default the opposite of `special`
    special: StrictBool = False


class NamedTemplate(BaseModel):
    """One of several chat templates."""

    name: str
    template: str


Token = Text | AddedTokenFields


class SpecialTokens(BaseModel):
    """special_tokens_map.json. Keys such as `image_token` name special tokens too; they are in `model_extra`."""

    model_config = ConfigDict(extra="allow")

    bos_token: Token | None = None
    eos_token: Token | None = None
    pad_token: Token | None = None
    unk_token: Token | None = None
    sep_token: Token | None = None
    cls_token: Token | None = None
    mask_token: Token | None = None
    additional_special_tokens: list[Token] | None = None
    extra_special_tokens: list[Token] | dict[str, Token] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_tokens_by_other_names(cls, value: Any) -> Any:
        """Drops keys of other libraries, and null for a list."""
        if not isinstance(value, dict):
            return value
        known = cls.model_fields
        return {key: item for key, item in value.items() if key in known or (_names_token(key, item))}

    def named(self) -> dict[str, Token]:
        """Key -> token, in the order in which transformers adds them; keys without a token are left out."""
        found = {key: getattr(self, key) for key in NAMED if getattr(self, key) is not None}
        more = {
            key: item if isinstance(item, str) else AddedTokenFields(**item)
            for key, item in (self.model_extra or {}).items()
        }
        own = self.extra_special_tokens
        return {**found, **more, **(own if isinstance(own, dict) else {})}

    def text(self, role: str) -> str | None:
        """The token of a role (bos, eos, pad, unk); None if the file does not name one."""
        value = getattr(self, f"{role}_token")
        return value.content if isinstance(value, AddedTokenFields) else value


def _names_token(key: str, value: Any) -> bool:
    """Whether a key that is not declared names a special token, as `image_token` does."""
    if not key.endswith("_token"):
        return False
    content = value.get("content") if isinstance(value, dict) and value.get("__type") == "AddedToken" else value
    return isinstance(content, str) and bool(content)


class TokenizerConfig(SpecialTokens):
    """tokenizer_config.json."""

    tokenizer_class: str | None = None
    legacy: StrictBool | None = None
    add_prefix_space: StrictBool | None = None
    split_special_tokens: StrictBool = False
    fast_tokenizer_files: list[str] | None = None
    fix_mistral_regex: StrictBool | None = None
    added_tokens_decoder: dict[TokenId, AddedTokenFields] | None = None
    chat_template: str | dict[str, str] | list[NamedTemplate] | None = None

    def templates(self) -> dict[str, str]:
        """Chat templates by name; a single one is called `default`."""
        value = self.chat_template
        if isinstance(value, list):
            return {entry.name: entry.template for entry in value}
        return {"default": value} if isinstance(value, str) else value or {}


class TokenIds(BaseModel):
    """generation_config.json, and the part of config.json with the ids of special tokens."""

    model_config = ConfigDict(strict=True)  # True is not the token 1

    bos_token_id: TokenId | list[TokenId] | None = None
    eos_token_id: TokenId | list[TokenId] | None = None
    pad_token_id: TokenId | list[TokenId] | None = None
    unk_token_id: TokenId | list[TokenId] | None = None

    def ids(self, role: str) -> list[int]:
        """The ids of a role (bos, eos, pad, unk); empty if the file does not give one, or gives -1."""
        value = getattr(self, f"{role}_token_id")
        return [number for number in ([value] if isinstance(value, int) else value or []) if number >= 0]


Schema = TypeVar("Schema", bound=BaseModel)
REMEDY = "correct it, or fetch the file again"


def read_if_present(path: Path, schema: type[Schema]) -> Schema:
    """The file as `schema`; the schema's defaults if there is no such file.

    Raises:
        BimedixError: it is not JSON, or a key has another type; the message names both.
    """
    return read_json(path, schema, REMEDY) if path.is_file() else schema()


def read_added_tokens(path: Path) -> dict[str, int]:
    """added_tokens.json, which transformers wrote before 4.34: text -> id. Empty if there is no such file.

    Raises:
        BimedixError: it is not such a file, or gives two tokens one id.
    """
    found = read_json(path, dict[Text, StrictId], REMEDY) if path.is_file() else {}
    texts: dict[int, str] = {}
    for text, number in found.items():
        if texts.setdefault(number, text) != text:
            raise BimedixError(f"{path} gives {texts[number]!r} and {text!r} the same id {number}; {REMEDY}.")
    return found


def chat_templates(folder: Path) -> dict[str, str]:
    """Chat templates of a checkpoint by name: chat_template.jinja is `default`, and precedes tokenizer_config.json.

    Raises:
        BimedixError: a file cannot be read.
    """
    path = folder / "chat_template.jinja"
    if not path.is_file():
        return read_if_present(folder / "tokenizer_config.json", TokenizerConfig).templates()
    return {"default": read_text(path)}
