"""WordPiece and Unigram directories are read as transformers reads them; bulk calls of them all."""

import functools
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import longformer_core
from longformer_core.errors import TokenizerError
from longformer_core.tokenization import bulk
from longformer_core.tokenization.tokenizer import LongformerTokenizer, load_tokenizer
from tests.helpers import corpus_texts, tokenizer_directory

BERT_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ROBERTA_SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
TEXTS = [
    "Hello, world! It's Unaffable; don't… e.g. 3.14",
    "naïve Café ÀÉÎ ﬁne — “quotes” ™",
    "e\u0301a\u0308 combining n\u0303 Å",
    "👩‍👩‍👧‍👦🏳️‍🌈 🤷🏽 emoji 😀end",
    "日本語のテキスト 中文 한국어",
    "one\r\ntwo\r\n\r\n\tthree \u00a0 four\u3000five",
    "\x00\x01 control \x7f\ufeff bom \u200b zero",
    "שלום עולם, مرحبا İstanbul ß ǅ",
    " a [SEP] b [MASK]c </s> <mask> d",
    "x" * 150,
    "",
    " \n",
]


def sources() -> list[str]:
    return [*(text[:30_000] for text in corpus_texts(4)), *TEXTS * 3]


@functools.cache
def word_pieces() -> str:
    """Train a WordPiece vocabulary on real texts; return it as the lines of vocab.txt."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=3000, special_tokens=BERT_SPECIAL, show_progress=False
    )
    backend.train_from_iterator(sources(), trainer)
    # Words of upper case and accents, which only some settings leave as they are.
    words = sorted(backend.get_vocab(), key=backend.get_vocab().__getitem__)
    return "\n".join([*words, "Hello", "Café", "naïve", "É", "Å"]) + "\n"


def wordpiece_directory(path: Path, **stored: Any) -> Path:
    """Write vocab.txt and settings, as the first published BERTs have them."""
    path.mkdir(exist_ok=True)
    (path / "vocab.txt").write_text(word_pieces(), encoding="utf-8")
    (path / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "BertTokenizer", **stored}), encoding="utf-8"
    )
    (path / "config.json").write_text('{"model_type": "longformer"}', encoding="utf-8")
    return path


def unigram_directory(path: Path) -> Path:
    """Write what transformers saves of an XLM-R tokenizer: tokenizer.json and settings."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=1500, special_tokens=ROBERTA_SPECIAL, unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(sources(), trainer)
    pieces = json.loads(backend.to_str())["model"]["vocab"]
    # Scores of few digits: the library reads others one unit in the last place away from what
    # Python reads, and between equally likely cuts that unit decides.
    vocab = [(piece, round(score * 64) / 64) for piece, score in pieces]
    made = transformers.XLMRobertaTokenizer(vocab=vocab)
    made.save_pretrained(path)
    (path / "config.json").write_text('{"model_type": "longformer"}', encoding="utf-8")
    return path


def saved(directory: Path, path: Path) -> Path:
    """Save a directory again as transformers does, with a tokenizer.json."""
    AutoTokenizer.from_pretrained(directory).save_pretrained(path)
    assert (path / "tokenizer.json").exists()
    (path / "config.json").write_text('{"model_type": "longformer"}', encoding="utf-8")
    return path


MAKERS: dict[str, Callable[[Path], Path]] = {
    "vocab.txt": wordpiece_directory,
    "vocab.txt, cased": lambda path: wordpiece_directory(path, do_lower_case=False),
    "vocab.txt, accents": lambda path: wordpiece_directory(path, strip_accents=False),
    "vocab.txt, no words of Chinese": lambda path: wordpiece_directory(
        path, tokenize_chinese_chars=False, clean_up_tokenization_spaces=True
    ),
    "tokenizer.json": lambda path: saved(wordpiece_directory(path), path / "again"),
    "tokenizer.json, cased": lambda path: saved(
        wordpiece_directory(path, do_lower_case=False), path / "again"
    ),
    "unigram": unigram_directory,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return MAKERS[request.param](tmp_path_factory.mktemp("directory"))


@pytest.fixture(scope="module")
def ours(directory: Path) -> LongformerTokenizer:
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def oracle(directory: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(directory)


def equal(
    ours: LongformerTokenizer, oracle: PreTrainedTokenizerBase, *texts: Any, **options: Any
) -> None:
    got = ours(*texts, return_offsets_mapping=True, **options)
    expected = oracle(*texts, return_offsets_mapping=True, **options)
    assert got.data == expected.data
    for row in range(len(got.encodings)):
        assert got.word_ids(row) == expected.word_ids(row)
        assert got.sequence_ids(row) == expected.sequence_ids(row)
        assert got.tokens(row) == expected.tokens(row)


def test_calls_give_what_transformers_gives(
    ours: LongformerTokenizer, oracle: PreTrainedTokenizerBase
) -> None:
    texts = [*TEXTS, *(text[:20_000] for text in corpus_texts(3))]
    equal(ours, oracle, texts)
    equal(ours, oracle, texts, texts[::-1])
    equal(ours, oracle, TEXTS[0], TEXTS[1], padding="max_length", max_length=64)
    equal(
        ours,
        oracle,
        ["what is it ?"] * 2,
        texts[-2:],
        truncation="only_second",
        max_length=60,
        stride=10,
        return_overflowing_tokens=True,
    )
    equal(ours, oracle, [text.split() for text in texts], is_split_into_words=True)
    ids = ours(texts)["input_ids"]
    assert len({tuple(row) for row in ids}) >= len(texts) - 1  # blank texts are alike
    for skip in (False, True):
        for row in ids:
            assert ours.decode(row, skip_special_tokens=skip) == oracle.decode(
                row, skip_special_tokens=skip
            )


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_is_encoded_as_by_transformers(
    ours: LongformerTokenizer, oracle: PreTrainedTokenizerBase, text: str
) -> None:
    equal(ours, oracle, text)


def test_roles_and_sizes(ours: LongformerTokenizer, oracle: PreTrainedTokenizerBase) -> None:
    for role in ("cls", "sep", "pad", "unk", "mask"):
        assert getattr(ours, f"{role}_token_id") == getattr(oracle, f"{role}_token_id")
    assert (ours.bos_token, ours.eos_token) == (ours.cls_token, ours.sep_token)
    assert set(ours.all_special_ids) == set(oracle.all_special_ids)
    assert len(ours) == len(oracle)
    assert list(ours.model_input_names) == list(oracle.model_input_names)
    for pair in (False, True):
        assert ours.num_special_tokens_to_add(pair) == oracle.num_special_tokens_to_add(pair)


def test_what_is_saved_is_read_by_both(
    ours: LongformerTokenizer, oracle: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    ours.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "longformer"}', encoding="utf-8")
    again, published = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    expected = oracle(TEXTS, TEXTS[::-1])
    for read in (again, published, pickle.loads(pickle.dumps(ours))):
        got = read(TEXTS, TEXTS[::-1])
        for name, column in expected.items():
            assert got[name] == column
    assert published.mask_token == again.mask_token == ours.mask_token
    if (tmp_path / "vocab.txt").exists():
        (tmp_path / "tokenizer.json").unlink()
        assert load_tokenizer(tmp_path)(TEXTS).data == ours(TEXTS).data


ROBERTA = "roberta"


@pytest.fixture(scope="module", params=["vocab.txt", "unigram", ROBERTA])
def any_tokenizer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> LongformerTokenizer:
    if request.param == ROBERTA:
        return load_tokenizer(tokenizer_directory())
    return load_tokenizer(MAKERS[request.param](tmp_path_factory.mktemp("any")))


ROWS = [None, *TEXTS, None, *(text[:3000] for text in corpus_texts(3))]


@pytest.mark.parametrize("kind", [list, pa.string(), pa.large_string(), "chunked"])
def test_offsets_of_whole_texts(
    any_tokenizer: LongformerTokenizer, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A few hundred bytes a time, so that rows fall into several batches and some exceed one.
    monkeypatch.setattr(bulk, "_BATCH_BYTES", 300)
    array = pa.array(ROWS, pa.large_string() if kind in (list, "chunked") else kind)
    texts: Any = ROWS if kind is list else array
    if kind == "chunked":
        texts = pa.chunked_array([array[:5], array[5:5], array[5:]])
    encoded = any_tokenizer.encode_with_offsets(texts)
    assert len(encoded) == len(ROWS)
    for text, found in zip(ROWS, encoded, strict=True):
        if text is None:
            assert found is None
            continue
        expected = any_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        assert found.ids.tolist() == expected["input_ids"]
        spans = list(zip(found.starts.tolist(), found.ends.tolist(), strict=True))
        assert spans == expected["offset_mapping"]
        assert {array.dtype for array in found} == {np.dtype("int32")}
        whole = any_tokenizer.encode(text)
        assert any_tokenizer.build(found.ids).ids.tolist() == whole
    ids = any_tokenizer.encode_arrow(array).to_pylist()
    assert ids == [None if text is None else any_tokenizer.encode(text) for text in ROWS]


def test_offsets_are_of_the_text_as_it_was_given(any_tokenizer: LongformerTokenizer) -> None:
    text = "😀\r\ne\u0301 world 👩‍👧 中文 end"
    (found,) = any_tokenizer.encode_with_offsets([text])
    pieces = [text[s:e] for s, e in zip(found.starts, found.ends, strict=True)]
    words = any_tokenizer(text, add_special_tokens=False).word_ids()
    begin = text.index("world")
    ends = zip(words, found.starts, found.ends, strict=True)
    world = {word for word, s, e in ends if begin <= s < e <= begin + len("world")}
    spans = [(found.starts[i], found.ends[i]) for i in range(len(pieces)) if words[i] in world]
    assert text[min(spans)[0] : max(spans)[1]] == "world"
    assert pieces[-1].endswith("d")
    assert found.ends[-1] == len(text)


@pytest.mark.parametrize("kind", [list, pa.list_(pa.string()), pa.large_list(pa.large_string())])
def test_words_keep_their_numbers(any_tokenizer: LongformerTokenizer, kind: Any) -> None:
    rows = [None if text is None else text.split() for text in ROWS]
    rows.append(["", "a", "\u200d", "b", "naïve"])
    encoded = any_tokenizer.encode_words(rows if kind is list else pa.array(rows, kind))
    is_byte_level = any_tokenizer.tokenize(" a")[0].startswith("Ġ")
    prefix = {"add_prefix_space": True} if is_byte_level else {}
    for row, found in zip(rows, encoded, strict=True):
        if row is None:
            assert found is None
            continue
        expected = any_tokenizer(
            [row], is_split_into_words=True, add_special_tokens=False, **prefix
        )
        assert found.ids.tolist() == expected["input_ids"][0]
        assert found.words.tolist() == expected.word_ids(0)


def test_special_tokens_are_built_around_ids(any_tokenizer: LongformerTokenizer) -> None:
    a, b = (any_tokenizer.encode(text, add_special_tokens=False) for text in TEXTS[:2])
    for texts in ((a,), (a, b), (a, []), ([], b), ([], []), (np.array(a), np.array(b))):
        built = any_tokenizer.build(*texts)
        assert built.ids.dtype == built.token_type_ids.dtype == np.int32
        assert len(built.starts) == len(texts)
        for start, ids in zip(built.starts, texts, strict=True):
            assert built.ids[start : start + len(ids)].tolist() == list(ids)
        assert len(built.ids) == sum(map(len, texts)) + any_tokenizer.num_special_tokens_to_add(
            len(texts) == 2
        )
        lists = [list(map(int, ids)) for ids in texts]
        mask = any_tokenizer.get_special_tokens_mask(*lists)
        assert sum(mask) == any_tokenizer.num_special_tokens_to_add(len(texts) == 2)
        assert any_tokenizer.build_inputs_with_special_tokens(*lists) == built.ids.tolist()
    whole = any_tokenizer(TEXTS[0], TEXTS[1], return_token_type_ids=True)
    built = any_tokenizer.build(a, b)
    assert built.ids.tolist() == whole["input_ids"]
    assert built.token_type_ids.tolist() == whole["token_type_ids"]
    assert any_tokenizer.create_token_type_ids_from_sequences(a, b) == whole["token_type_ids"]


def test_no_texts_give_nothing(any_tokenizer: LongformerTokenizer) -> None:
    assert any_tokenizer.encode_with_offsets([]) == []
    assert any_tokenizer.encode_words(pa.array([], pa.list_(pa.string()))) == []
    assert any_tokenizer.encode_with_offsets(pa.nulls(2, pa.string())) == [None, None]


def test_what_is_no_text_is_refused(any_tokenizer: LongformerTokenizer) -> None:
    with pytest.raises(TokenizerError, match="not int64"):
        any_tokenizer.encode_with_offsets(pa.array([1]))
    with pytest.raises(TokenizerError, match="list<string>, not string"):
        any_tokenizer.encode_words(pa.array(["a"]))
    with pytest.raises(TokenizerError, match=r"row 1 holds list where|neither"):
        any_tokenizer.encode_with_offsets(["a", ["b"]])  # type: ignore[list-item]
    with pytest.raises(TokenizerError, match="surrogate"):
        any_tokenizer.encode_with_offsets(["a\ud800"])
    with pytest.raises(TokenizerError, match="int where a string"):
        any_tokenizer.encode_words([["a", 3]])  # type: ignore[list-item]


def test_settings_of_another_algorithm_are_refused(tmp_path: Path) -> None:
    words = wordpiece_directory(tmp_path / "words")
    for name in ("add_prefix_space", "trim_offsets"):
        with pytest.raises(TokenizerError, match=f"{name} has no effect.*do_lower_case"):
            load_tokenizer(words, **{name: True})
    with pytest.raises(TokenizerError, match=r"add_prefix_space is a rule of byte-level BPE"):
        load_tokenizer(words)("a", add_prefix_space=True)
    with pytest.raises(TokenizerError, match="do_lower_case has no effect"):
        load_tokenizer(tokenizer_directory(), do_lower_case=True)
    with pytest.raises(TokenizerError, match=r"rules is none: they are those of its tokenizer\.js"):
        load_tokenizer(unigram_directory(tmp_path / "pieces"), add_prefix_space=False)
    cased = load_tokenizer(words, do_lower_case=False)
    assert cased.encode("Hello") != load_tokenizer(words).encode("Hello")


def test_roles_can_be_given_to_other_tokens(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(wordpiece_directory(tmp_path))
    assert tokenizer.add_special_tokens({"sep_token": "[end]"}) == 1
    assert tokenizer.encode("a", "b")[-1] == tokenizer.sep_token_id == len(tokenizer) - 1
    pieces = load_tokenizer(unigram_directory(tmp_path / "pieces"))
    with pytest.raises(TokenizerError, match="post_processor"):
        pieces.sep_token = "<mask>"


def test_sentencepiece_alone_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sentencepiece.bpe.model").write_bytes(b"\x0a\x0e")
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json.* AutoTokenizer and save it"):
        load_tokenizer(tmp_path)


def test_a_prefix_space_in_the_settings_of_unigram_is_its_own(tmp_path: Path) -> None:
    made = transformers.XLMRobertaTokenizer(
        vocab=[
            *((token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")),
            ("▁hello", -1.0),
            ("▁world", -1.0),
            ("▁", -2.0),
            ("<mask>", 0.0),
        ]
    )
    made.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert stored["add_prefix_space"]
    expected = made("hello world <mask>")["input_ids"]
    assert load_tokenizer(tmp_path).encode("hello world <mask>") == expected


def test_it_is_published_by_the_package() -> None:
    assert longformer_core.load_tokenizer is load_tokenizer


def test_a_long_text_is_told_of_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = load_tokenizer(wordpiece_directory(tmp_path, model_max_length=4))
    with caplog.at_level(logging.WARNING):
        assert len(tokenizer.encode("a b c d e f g")) == 9
        tokenizer.encode_with_offsets(["a b c d e f g"])
    assert len(caplog.records) == 1
