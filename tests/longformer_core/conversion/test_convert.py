"""Converted models against the originals of the published library: same documents, same numbers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from longformer_core.checkpoints.pooling import Pooling, read_pooling
from longformer_core.config import LEDConfig, LongformerConfig
from longformer_core.conversion.convert import (
    Conversion,
    convert_directory,
    copy_global_projections,
    model_class,
    plan_conversion,
    repeat_positions,
    try_model,
)
from longformer_core.errors import CheckpointError, ConfigError, NonFiniteError
from longformer_core.layout import Layout
from longformer_core.models.led import LEDForConditionalGeneration
from longformer_core.models.longformer import LongformerModel

VOCAB, LENGTH = 60, 24
ENCODER: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "type_vocab_size": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    # With the default of 0.02 the attention is uniform and no comparison could see it.
    "initializer_range": 0.3,
}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": LENGTH,
    "dropout": 0.0,
    "init_std": 0.3,
}
HEADS = (
    "Model",
    "ForMaskedLM",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
)
# No row of these ids is padding for any family: BERT pads with 0, the others with 1.
IDS = torch.randint(4, VOCAB, (3, LENGTH), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity_error()


def save(folder: Path, name: str, **options: Any) -> Any:
    """A published class with random weights, biases and norms too, saved to the folder."""
    torch.manual_seed(7)
    published = getattr(transformers, name)
    config = published.config_class(**options)
    # The attention that materialises its mask, for fewer kinds of rounding.
    model = published._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and (tensor.dim() == 1 or "logits_bias" in name):
                tensor.add_(torch.randn_like(tensor) * 0.2)
    model.save_pretrained(folder)
    return model


def encoder(folder: Path, kind: str, head: str, **options: Any) -> Any:
    offset = 0 if kind == "Bert" else 2
    pad = 0 if kind == "Bert" else 1
    sizes = {"max_position_embeddings": LENGTH + offset, "pad_token_id": pad}
    return save(folder, f"{kind}{head}", **{**ENCODER, **sizes, **options})


def difference(ours: Tensor, oracle: Tensor) -> float:
    mine, theirs = ours.detach().double(), oracle.detach().double()
    return float((mine - theirs).norm() / theirs.norm().clamp(min=1e-30))


def answers(output: Any) -> dict[str, Tensor]:
    names = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")
    given = dict(output.items())
    return {name: given[name] for name in names if given.get(name) is not None}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", ["Bert", "Roberta", "XLMRoberta", "Camembert"])
def test_an_encoder_answers_as_the_original(tmp_path: Path, kind: str, head: str) -> None:
    published = encoder(tmp_path / "short", kind, head, layer_norm_eps=1e-9)
    plan = convert_directory(
        tmp_path / "short", tmp_path / "long", max_length=80, attention_window=2 * LENGTH
    )
    assert plan.target_class == f"Longformer{head}"
    assert (plan.old_length, plan.new_length) == (LENGTH, 80)
    ours = model_class(plan.target_class).from_pretrained(tmp_path / "long")
    inputs = {"input_ids": IDS[:2, :20], "token_type_ids": (IDS[:2, :20] > 30).long()}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["attention_mask"][1, 15:] = 0
    marks = torch.zeros_like(inputs["input_ids"])
    first = marks.clone()
    first[:, 0] = 1
    if head == "ForMultipleChoice":
        inputs, marks, first = {k: v[None] for k, v in inputs.items()}, marks[None], first[None]
    with torch.no_grad():
        expected = answers(published(**inputs))
        for mask in (marks, first, None if head in ("Model", "ForMaskedLM") else first):
            got = answers(ours(**inputs, global_attention_mask=mask))
            assert got.keys() == expected.keys()
            for name, oracle in expected.items():
                seen = inputs["attention_mask"].bool() if oracle.shape[:2] == (2, 20) else ...
                assert difference(got[name][seen], oracle[seen]) <= 1e-5, name


@pytest.mark.parametrize("kind", ["Bert", "Roberta"])
def test_the_published_longformer_reads_it(tmp_path: Path, kind: str) -> None:
    published = encoder(tmp_path / "short", kind, "ForMaskedLM")
    convert_directory(tmp_path / "short", tmp_path / "long", attention_window=2 * LENGTH)
    long, told = transformers.LongformerForMaskedLM.from_pretrained(
        tmp_path / "long", output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        got, expected = long.eval()(IDS).logits, published(IDS).logits
    assert difference(got, expected) <= 1e-5
    assert LongformerConfig.from_pretrained(tmp_path / "long").max_length == 4096


def test_positions_repeat_where_each_family_counts_them(tmp_path: Path) -> None:
    for kind, offset in (("Bert", 0), ("Roberta", 2)):
        published = encoder(tmp_path / kind, kind, "Model")
        convert_directory(tmp_path / kind, tmp_path / f"{kind}-long", max_length=60)
        old = published.embeddings.position_embeddings.weight[offset:]
        model = LongformerModel.from_pretrained(tmp_path / f"{kind}-long")
        new = model.embeddings.position_embeddings.weight[model.config.pad_token_id + 1 :]
        assert torch.equal(new, torch.cat([old, old, old])[:60])
    assert repeat_positions(torch.arange(3.0)[:, None], 2).flatten().tolist() == [0, 1]


def test_the_window_cuts_and_the_positions_go_on(tmp_path: Path) -> None:
    published = encoder(tmp_path / "short", "Roberta", "Model")
    plan = convert_directory(
        tmp_path / "short", tmp_path / "long", max_length=100, attention_window=8
    )
    ours = LongformerModel.from_pretrained(tmp_path / "long")
    with torch.no_grad():
        whole, cut = IDS[:, : plan.exact_length], IDS[:, : plan.exact_length + 1]
        assert difference(ours(whole)[0], published(whole)[0]) <= 1e-5
        assert difference(ours(cut)[0], published(cut)[0]) > 0.01
        got, expected = ours(IDS).last_hidden_state, published(IDS).last_hidden_state
        assert difference(got, expected) > 0.01
        assert ours(torch.cat([IDS] * 4, 1)).last_hidden_state.isfinite().all()


def logits(model: LEDForConditionalGeneration, marks: list[int], target: Tensor) -> Tensor:
    """Return the logits [B, steps, V] of forced target ids [B, steps]."""
    layout = Layout.from_lengths([LENGTH] * len(IDS), [marks] * len(IDS))
    source = model.source(model.encode(IDS.flatten(), layout), layout)
    cache = model.new_cache(len(IDS))
    steps = [
        model.decode_step(target[:, step], torch.full((len(IDS),), step), cache, source)
        for step in range(target.shape[1])
    ]
    return torch.stack(steps, 1)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "plain"])
def test_bart_answers_as_the_original(tmp_path: Path, tied: bool, scaled: bool) -> None:
    options = {"tie_word_embeddings": tied, "scale_embedding": scaled}
    published = save(tmp_path / "short", "BartForConditionalGeneration", **SEQ2SEQ, **options)
    plan = convert_directory(
        tmp_path / "short", tmp_path / "long", max_length=64, attention_window=2 * LENGTH
    )
    assert isinstance(plan.config, LEDConfig)
    assert plan.config.max_decoder_position_embeddings == LENGTH
    assert plan.config.tie_word_embeddings == (tied and not scaled)
    target = IDS[:, :LENGTH].flip(1)
    ours = LEDForConditionalGeneration.from_pretrained(tmp_path / "long")
    long, told = transformers.LEDForConditionalGeneration.from_pretrained(
        tmp_path / "long", output_loading_info=True
    )
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        expected = published(input_ids=IDS, decoder_input_ids=target).logits
        theirs = long.eval()(input_ids=IDS, decoder_input_ids=target).logits
        assert difference(theirs, expected) <= 1e-5
        for marks in ([], [0]):
            assert difference(logits(ours, marks, target), expected) <= 1e-5


def test_a_bare_bart_gains_the_tied_head(tmp_path: Path) -> None:
    published = save(tmp_path / "bare", "BartModel", **SEQ2SEQ)
    convert_directory(tmp_path / "bare", tmp_path / "long", attention_window=2 * LENGTH)
    ours = LEDForConditionalGeneration.from_pretrained(tmp_path / "long")
    assert ours.config.max_encoder_position_embeddings == 16384
    with torch.no_grad():
        states = published(input_ids=IDS, decoder_input_ids=IDS).last_hidden_state
        expected = states @ published.shared.weight.T
        assert difference(logits(ours, [0], IDS), expected) <= 1e-5


def test_longer_still(tmp_path: Path) -> None:
    encoder(tmp_path / "short", "Roberta", "ForMaskedLM")
    save(tmp_path / "bart", "BartForConditionalGeneration", **SEQ2SEQ)
    for short, name in (("short", "a"), ("bart", "b")):
        convert_directory(tmp_path / short, tmp_path / name, max_length=48, attention_window=8)
        before = load_file(tmp_path / name / "model.safetensors")
        plan = convert_directory(tmp_path / name, tmp_path / f"{name}2", max_length=100)
        assert (plan.old_length, plan.new_length) == (48, 100)
        assert plan.config.attention_window == 8
        after = load_file(tmp_path / f"{name}2" / "model.safetensors")
        assert before.keys() == after.keys()
        changed = [key for key in before if not before[key].equal(after[key])]
        assert [key.rpartition(".embed")[0] for key in changed] in (["longformer"], ["led.encoder"])
        rows = after[changed[0]][-100:]
        assert torch.equal(rows[48:96], rows[:48])
        try_model(tmp_path / f"{name}2")


def test_positions_that_padding_to_windows_costs_are_told(tmp_path: Path) -> None:
    save(tmp_path / "short", "BartForConditionalGeneration", **SEQ2SEQ)
    plan = plan_conversion(tmp_path / "short", max_length=100, attention_window=16)
    assert any("takes at most 96 tokens of these 100" in note for note in plan.notes)
    plan = plan_conversion(tmp_path / "short", max_length=96, attention_window=16)
    assert not any("takes at most" in note for note in plan.notes)


def test_a_long_model_takes_other_windows(tmp_path: Path) -> None:
    encoder(tmp_path / "short", "Roberta", "Model")
    convert_directory(tmp_path / "short", tmp_path / "a", max_length=48, attention_window=8)
    plan = convert_directory(tmp_path / "a", tmp_path / "b", attention_window=16)
    assert (plan.config.radii, plan.new_length, plan.notes) == ((8, 8), 48, ())
    # Beyond the old radius of 4 and the token itself, the original's windows cut and these do not.
    assert plan.exact_length == 5
    longer = plan_conversion(tmp_path / "a", max_length=64)
    assert (longer.exact_length, longer.config.radii) == (48, (4, 4))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("MBartForConditionalGeneration", SEQ2SEQ, "model_type 'mbart' .* before each sublayer"),
        ("BartForConditionalGeneration", SEQ2SEQ | {"normalize_before": True}, "normalize_before"),
        (
            "BartForConditionalGeneration",
            SEQ2SEQ | {"add_final_layer_norm": True},
            "add_final_layer_norm is True",
        ),
        (
            "BartForConditionalGeneration",
            SEQ2SEQ | {"normalize_embedding": False},
            "normalize_embedding is False; only True",
        ),
        ("BartForSequenceClassification", SEQ2SEQ, "architectures names BartForSequenceClass"),
        ("BertForMaskedLM", ENCODER | {"hidden_act": "relu"}, "hidden_act is 'relu'; only 'gelu'"),
        ("BertModel", ENCODER | {"hidden_act": "mish"}, "no activation function 'mish'"),
        ("RobertaModel", ENCODER | {"position_embedding_type": "relative_key"}, "relative_key"),
        ("RobertaForMaskedLM", ENCODER | {"is_decoder": True}, "is_decoder is True"),
        ("DistilBertModel", {"dim": 32, "n_layers": 1, "n_heads": 2}, "model_type is 'distilbert'"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any], words: str
) -> None:
    save(tmp_path / "short", name, **options)
    with pytest.raises(ConfigError, match=words):
        convert_directory(tmp_path / "short", tmp_path / "long")
    assert not (tmp_path / "long").exists()


def test_a_relu_bert_without_its_head(tmp_path: Path) -> None:
    published = encoder(tmp_path / "short", "Bert", "Model", hidden_act="relu")
    convert_directory(tmp_path / "short", tmp_path / "long", attention_window=2 * LENGTH)
    with torch.no_grad():
        got = LongformerModel.from_pretrained(tmp_path / "long")(IDS).last_hidden_state
    assert difference(got, published(IDS).last_hidden_state) <= 1e-5


def test_lengths_and_directories_are_checked(tmp_path: Path) -> None:
    encoder(tmp_path / "short", "Roberta", "Model")
    with pytest.raises(ConfigError, match=f"max_length 10 is less than the {LENGTH} tokens"):
        plan_conversion(tmp_path / "short", max_length=10)
    with pytest.raises(ConfigError, match="attention_window 7 is odd"):
        plan_conversion(tmp_path / "short", attention_window=7)
    convert_directory(tmp_path / "short", tmp_path / "long", max_length=32, attention_window=8)
    with pytest.raises(CheckpointError, match="exists and is not an empty directory"):
        convert_directory(tmp_path / "short", tmp_path / "long")
    with pytest.raises(ConfigError, match="a long model already; name a greater"):
        plan_conversion(tmp_path / "long")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    config["max_position_embeddings"] += 1
    (tmp_path / "short" / "config.json").write_text(json.dumps(config))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"26 rows of position embeddings .* tells of 27"):
        convert_directory(tmp_path / "short", tmp_path / "empty")
    assert not list((tmp_path / "empty").iterdir())
    assert not list(tmp_path.glob(".*"))


def test_left_out_weights_and_half_precision(tmp_path: Path) -> None:
    published = encoder(tmp_path / "short", "Bert", "ForPreTraining").to(torch.bfloat16)
    published.save_pretrained(tmp_path / "short")
    left_out = plan_conversion(tmp_path / "short", max_length=32).write(tmp_path / "long")
    assert left_out == [
        "cls.seq_relationship.bias",
        "cls.seq_relationship.weight",
        "longformer.pooler.dense.bias",
        "longformer.pooler.dense.weight",
    ]
    weights = load_file(tmp_path / "long" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "long" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_first_published_names(tmp_path: Path) -> None:
    published = encoder(tmp_path / "short", "Bert", "ForMaskedLM")
    file = tmp_path / "short" / "model.safetensors"
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    weights = load_file(file)
    for new, name in old.items():
        weights = {key.replace(new, name): tensor for key, tensor in weights.items()}
    weights["bert.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    save_file(weights, file)
    plan = plan_conversion(tmp_path / "short", max_length=32, attention_window=2 * LENGTH)
    assert plan.write(tmp_path / "long") == ["longformer.embeddings.position_ids"]
    ours = model_class("LongformerForMaskedLM").from_pretrained(tmp_path / "long")
    with torch.no_grad():
        assert difference(ours(IDS).logits, published(IDS).logits) <= 1e-5


def test_tokenizers_come_along(tmp_path: Path) -> None:
    encoder(tmp_path / "short", "Bert", "Model")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]
    (tmp_path / "short" / "vocab.txt").write_text("\n".join(words) + "\n")
    settings = {"do_lower_case": True, "model_max_length": 512}
    (tmp_path / "short" / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "short" / "1_Pooling").mkdir()
    (tmp_path / "short" / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling")]
    modules = [{"type": f"sentence_transformers.models.{k}", "path": path} for k, path in kinds]
    (tmp_path / "short" / "modules.json").write_text(json.dumps(modules))
    (tmp_path / "short" / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    plan = convert_directory(tmp_path / "short", tmp_path / "long", max_length=64)
    assert read_pooling(tmp_path / "long") == Pooling("cls", False, 64, False)
    assert isinstance(plan.config, LongformerConfig)
    assert plan.config.sep_token_id == 3
    assert any("WordPiece" in note for note in plan.notes)
    assert (tmp_path / "long" / "vocab.txt").read_text().startswith("[PAD]")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "long")
    assert tokenizer("a b", "c")["input_ids"] == [2, 5, 6, 3, 7, 3]
    assert tokenizer.model_max_length == 64


def test_generation_options_come_along(tmp_path: Path) -> None:
    save(tmp_path / "short", "BartForConditionalGeneration", **SEQ2SEQ)
    (tmp_path / "short" / "generation_config.json").write_text('{"num_beams": 5}')
    convert_directory(tmp_path / "short", tmp_path / "long")
    text = (tmp_path / "long" / "generation_config.json").read_text()
    assert json.loads(text) == {"num_beams": 5}


def test_global_projections_are_copied_again(tmp_path: Path) -> None:
    encoder(tmp_path / "short", "Roberta", "Model")
    convert_directory(tmp_path / "short", tmp_path / "long", max_length=32)
    model = LongformerModel.from_pretrained(tmp_path / "long")
    attention = model.encoder.layer[1].attention["self"]
    with torch.no_grad():
        attention.value.weight += 1
    assert copy_global_projections(model) == 2
    assert torch.equal(attention.value_global.weight, attention.value.weight)
    assert attention.value_global.weight is not attention.value.weight
    with pytest.raises(ConfigError, match="Linear has no global projections"):
        copy_global_projections(torch.nn.Linear(2, 2))


def test_numbers_that_are_not_finite_are_found(tmp_path: Path) -> None:
    encoder(tmp_path / "short", "Roberta", "Model")
    plan: Conversion = convert_directory(tmp_path / "short", tmp_path / "long", max_length=32)
    try_model(tmp_path / "long")
    weights = load_file(tmp_path / "long" / "model.safetensors")
    weights["pooler.dense.bias"][0] = float("nan")
    save_file(weights, tmp_path / "long" / "model.safetensors")
    with pytest.raises(NonFiniteError, match=r"pooler\.dense\.bias"):
        try_model(tmp_path / "long")
    assert plan.source_class == "RobertaModel"
