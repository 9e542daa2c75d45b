"""The ways of cutting text into tokens that published encoders use, and what each of them fixes.

A `tokenizer.json` says it all. An algorithm says the rest: the special tokens by default, which
settings of `tokenizer_config.json` replace rules of the file, and the rules of a vocabulary that
came without any.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from longformer_core.errors import TokenizerError

# A token and its id.
Special = tuple[str, int]

_ROBERTA_ROLES = {
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "sep_token": "</s>",
    "pad_token": "<pad>",
    "cls_token": "<s>",
    "mask_token": "<mask>",
}


class Algorithm:
    """What the tokenizers of one algorithm share; the base knows nothing but `tokenizer.json`."""

    # The special token of each role, unless the settings name another.
    roles: ClassVar[Mapping[str, str]] = _ROBERTA_ROLES
    # A role and the one whose token it takes when the settings name only the latter's.
    twins: ClassVar[Mapping[str, str]] = {"cls_token": "bos_token", "sep_token": "eos_token"}
    # The settings that are rules of words here.
    rules: ClassVar[tuple[str, ...]] = ()
    # The post-processors that `frame` may replace: they say the same for other tokens.
    framed_by: ClassVar[tuple[type, ...]] = ()
    model_input_names: ClassVar[tuple[str, ...]] = ("input_ids", "attention_mask")
    # The class of transformers that reads what is saved; None: that of the model.
    published_name: ClassVar[str | None] = "PreTrainedTokenizerFast"
    # Whether cleaning up decoded texts is left to the settings of a directory.
    cleans_up: ClassVar[bool] = True
    # Whether the vocabulary also comes without tokenizer.json, in files that hold no rules.
    comes_bare: ClassVar[bool] = False

    def lay_out(self, backend: Tokenizer, settings: Mapping[str, Any]) -> None:
        """Put the rules of words into a backend; settings that are absent keep what it has."""

    def frame(
        self, _backend: Tokenizer, _settings: Mapping[str, Any], _cls: Special, _sep: Special
    ) -> None:
        """Let a backend put these special tokens around texts and pairs."""
        raise TokenizerError(
            "cls_token and sep_token are part of tokenizer.json's own post_processor here; change "
            "them there"
        )

    def stored_rules(self, _backend: Tokenizer) -> dict[str, Any]:
        """Return the rules as settings, which a reader would otherwise replace by its defaults."""
        return {}


class ByteLevelBPE(Algorithm):
    """RoBERTa, BART, Longformer, LED: `<s> A </s>`, `<s> A </s></s> B </s>`."""

    rules = ("add_prefix_space", "trim_offsets")
    framed_by = (processors.RobertaProcessing,)
    published_name = None
    # Punctuation with a space before it is what the text held.
    cleans_up = False
    comes_bare = True

    def lay_out(self, backend: Tokenizer, settings: Mapping[str, Any]) -> None:
        had = getattr(backend.pre_tokenizer, "add_prefix_space", False)
        add_prefix_space = bool(settings.get("add_prefix_space", had))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
        backend.decoder = decoders.ByteLevel()

    def frame(
        self, backend: Tokenizer, settings: Mapping[str, Any], cls: Special, sep: Special
    ) -> None:
        backend.post_processor = processors.RobertaProcessing(
            sep,
            cls,
            trim_offsets=bool(settings.get("trim_offsets", True)),
            add_prefix_space=backend.pre_tokenizer.add_prefix_space,
        )

    def stored_rules(self, backend: Tokenizer) -> dict[str, Any]:
        return {"add_prefix_space": bool(backend.pre_tokenizer.add_prefix_space)}


class WordPiece(Algorithm):
    """BERT: `[CLS] A [SEP]`, `[CLS] A [SEP] B [SEP]`, where B and what follows have type 1."""

    roles: ClassVar[Mapping[str, str]] = {
        "bos_token": "[CLS]",
        "eos_token": "[SEP]",
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    }
    # BERT has no tokens of beginning and end; a Longformer made of one names these.
    twins: ClassVar[Mapping[str, str]] = {"bos_token": "cls_token", "eos_token": "sep_token"}
    rules = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
    framed_by = (processors.BertProcessing, processors.TemplateProcessing)
    model_input_names = ("input_ids", "token_type_ids", "attention_mask")
    published_name = "BertTokenizer"
    comes_bare = True

    def lay_out(self, backend: Tokenizer, settings: Mapping[str, Any]) -> None:
        known = {**self.stored_rules(backend), **settings}
        backend.normalizer = normalizers.BertNormalizer(
            clean_text=getattr(backend.normalizer, "clean_text", True),
            handle_chinese_chars=bool(known.get("tokenize_chinese_chars", True)),
            strip_accents=known.get("strip_accents"),
            lowercase=bool(known.get("do_lower_case", True)),
        )
        if backend.pre_tokenizer is None:
            backend.model.unk_token = settings["unk_token"]
            backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
            backend.decoder = decoders.WordPiece(prefix="##")

    def frame(
        self, backend: Tokenizer, _settings: Mapping[str, Any], cls: Special, sep: Special
    ) -> None:
        # Ids stand for the tokens, whose spelling may hold what a template reads otherwise.
        backend.post_processor = processors.BertProcessing(sep, cls)

    def stored_rules(self, backend: Tokenizer) -> dict[str, Any]:
        rules = backend.normalizer
        if not isinstance(rules, normalizers.BertNormalizer):
            return {}
        return {
            "do_lower_case": rules.lowercase,
            "strip_accents": rules.strip_accents,
            "tokenize_chinese_chars": rules.handle_chinese_chars,
        }


def algorithm_of(backend: Tokenizer) -> Algorithm:
    """Return the algorithm of a backend, by its model and by what it takes for a word.

    Unigram (XLM-R, CamemBERT) and BPE of other kinds are as their tokenizer.json says.
    """
    words = backend.pre_tokenizer
    if isinstance(backend.model, models.BPE) and (
        words is None or isinstance(words, pre_tokenizers.ByteLevel)
    ):
        return ByteLevelBPE()
    return WordPiece() if isinstance(backend.model, models.WordPiece) else Algorithm()
