"""Checkpoints from folders: dtypes, digests, end-of-text tokens, contexts, vocabularies, and errors that name the option."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from outrider.decoding.prefill import prefill
from outrider.errors import ModelError, OptionError, PairError
from outrider.models import check_pair, load_model, model_name, wrap
from outrider.models.attention import register


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_module, byte_tokenizer):
    """A checkpoint on disk with a tokenizer."""
    path = tmp_path_factory.mktemp("checkpoints") / "tiny"
    make_module("llama", vocab_size=257, eos_token_id=256).save_pretrained(path)
    byte_tokenizer.save_pretrained(path)
    return path


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtypes(dtype, folder):
    model = load_model(str(folder), dtype=dtype)
    wanted = getattr(torch, dtype)
    assert (model.spec.dtype, model.spec.device.type, model.spec.name) == (wanted, "cpu", "tiny")
    assert {weights.dtype for weights in model.module.parameters()} == {wanted}
    assert model.new_cache(1, 4).keys(0).dtype == wanted
    assert not model.module.training


@pytest.mark.parametrize("dtype", ["float64", "int8", "bf16", ""])
def test_unknown_dtype(dtype, folder):
    with pytest.raises(OptionError, match=f"dtype: got '{dtype}'; allowed: float32, bfloat16, float16"):
        load_model(str(folder), dtype=dtype)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "tpu", "", "meta", *([] if torch.cuda.is_available() else ["cuda"])])
def test_unknown_device(device, folder):
    with pytest.raises(OptionError, match=f"device: got '{device}'; allowed: cpu"):
        load_model(str(folder), device=device)


def damaged(folder, tmp_path, name, content):
    """A copy of the checkpoint with one file replaced (None: removed)."""
    copy = tmp_path / "damaged"
    copy.mkdir()
    for file in folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    (copy / name).unlink() if content is None else (copy / name).write_bytes(content)
    return str(copy)


@pytest.mark.parametrize(
    "name, content",
    [
        pytest.param("config.json", None, id="no config"),
        pytest.param("config.json", b"{", id="config is not JSON"),
        pytest.param("config.json", b'{"model_type": "unheard-of"}', id="unknown model type"),
        pytest.param("model.safetensors", None, id="no weights"),
        pytest.param("model.safetensors", b"broken", id="broken weights"),
    ],
)
def test_broken_checkpoints_are_named(name, content, folder, tmp_path):
    with pytest.raises(ModelError, match=r"target '.*damaged'"):
        load_model(damaged(folder, tmp_path, name, content), role="target")


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"draft '.*nothing-here'"):
        load_model(str(tmp_path / "nothing-here"), role="draft")


def test_name_of_a_model(tmp_path):
    (tmp_path / "a-model").mkdir()
    assert model_name(f"{tmp_path}/a-model/") == "a-model"
    assert model_name("organisation/model") == "organisation/model"


def test_end_of_text_tokens(folder, make_module, make_model):
    assert load_model(str(folder)).spec.eos_tokens == (256,)
    assert make_model("llama").spec.eos_tokens == ()
    module = make_module("llama")
    module.generation_config.eos_token_id = [5, 9]
    assert wrap(module, None, name="x").spec.eos_tokens == (5, 9)


def test_without_a_tokenizer(family, make_module, tmp_path):
    """transformers makes up an empty tokenizer for some families; texts must not be read with it."""
    make_module(family).save_pretrained(tmp_path / "bare")
    assert load_model(str(tmp_path / "bare")).tokenizer is None


def test_digest_is_of_the_architecture(folder, make_module, make_model, family):
    digest = make_model(family, 0).spec.digest
    assert digest == make_model(family, 1).spec.digest, "independent of the weights"
    assert digest == make_model(family, dtype="bfloat16").spec.digest, "and of the dtype"
    changes = [{"num_hidden_layers": 2, "layer_types": None}, {"intermediate_size": 64}, {"vocab_size": 98}]
    changed = {make_model(family, **change).spec.digest for change in changes}
    assert len(changed | {digest}) == 4


def test_digest_is_stable():
    """Alignment files hold it: it must not change with a version of transformers, nor of Outrider."""
    import transformers

    register()
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    module = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="outrider").eval()
    assert wrap(module, None, name="x").spec.digest == "6b3f12d55296edf1"


def test_context(make_model):
    assert make_model("llama").spec.context == 512
    assert make_model("llama", max_position_embeddings=77).spec.context == 77


def test_longrope_is_used_up_to_its_original_length(make_model, random_prompts, independent):
    """Past it transformers changes all frequencies at once, also for keys that a cache already holds."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 5.0, 6.0, 7.0],
        "original_max_position_embeddings": 32,
    }
    model = make_model("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    assert model.spec.context == 32
    tokens = torch.tensor(random_prompts([32]))
    with torch.inference_mode():
        wanted = independent(model)(input_ids=tokens).logits[:, 20:]
    cache = model.new_cache(1, 40)
    prefill(model, cache, tokens[:, :20], 7)
    past_the_end = torch.cat([tokens[:, 20:], torch.zeros(1, 4, dtype=torch.int64)], dim=1)
    torch.testing.assert_close(model.forward(past_the_end, cache).logits[:, :12], wanted, rtol=1e-4, atol=2e-4)


def renamed(tokenizer, token, name):
    """A copy of a tokenizer in which one token has another name."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    content = json.loads(tokenizer.backend_tokenizer.to_str())
    old = next(symbol for symbol, index in content["model"]["vocab"].items() if index == token)
    content["model"]["vocab"][name] = content["model"]["vocab"].pop(old)
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), eos_token="<end>"), old


def test_different_vocabularies_name_the_first_differing_token(make_model, byte_tokenizer):
    other, old = renamed(byte_tokenizer, 70, "other")
    other, _ = renamed(other, 90, "later")
    target = make_model("llama", vocab_size=257, tokenizer=byte_tokenizer)
    draft = make_model("qwen3", vocab_size=257, tokenizer=other)
    with pytest.raises(PairError, match=f"draft: token 70 is 'other' in draft 'tiny-qwen3' but '{old}' in target 'tiny-llama'"):
        check_pair(target, draft)


def test_a_longer_vocabulary_names_the_first_token_too_many(make_model, byte_tokenizer):
    longer = copy.deepcopy(byte_tokenizer)
    longer.add_tokens(["extra"])
    target = make_model("llama", vocab_size=260, tokenizer=byte_tokenizer)
    draft = make_model("qwen3", vocab_size=260, tokenizer=longer)
    with pytest.raises(PairError, match=r"draft: token 257 is 'extra' in draft 'tiny-qwen3' but None in target 'tiny-llama'"):
        check_pair(target, draft)


def test_equal_vocabularies_with_other_padding_fit(make_model, byte_tokenizer):
    check_pair(
        make_model("llama", vocab_size=260, tokenizer=byte_tokenizer),
        make_model("qwen3", vocab_size=257, tokenizer=byte_tokenizer),
    )
    check_pair(make_model("llama"), make_model("qwen3"))


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "a/b/c"])
def test_a_path_that_does_not_exist_is_not_looked_up_on_the_hub(path):
    with pytest.raises(ModelError, match=f"target '{path}': no such folder; allowed: a folder that exists, or a hub id"):
        load_model(path, role="target")
