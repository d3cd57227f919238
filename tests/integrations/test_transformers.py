import pytest
import torch

import fastkernels

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module", autouse=True)
def _registered():
    fastkernels.register_with_transformers()


def pair(config, device, plainly="sdpa"):
    """The same random model with the attention of transformers and with fastkernels."""
    torch.manual_seed(0)
    config._attn_implementation = plainly
    plain = transformers.AutoModelForCausalLM.from_config(config).to(device).eval()
    config._attn_implementation = "fastkernels"
    ours = transformers.AutoModelForCausalLM.from_config(config).to(device).eval()
    ours.load_state_dict(plain.state_dict())
    assert ours.config._attn_implementation == "fastkernels"
    return plain, ours


SIZES = {
    "vocab_size": 101,
    "hidden_size": 256,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.fixture(scope="module")
def llama():
    return transformers.LlamaConfig(**SIZES)


def generate(model, ids, mask=None):
    mask = torch.ones_like(ids) if mask is None else mask
    return model.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False)


def test_generate_as_sdpa_does(llama, device):
    plain, ours = pair(llama, device)
    ids = torch.randint(1, 101, (2, 17), device=device)
    assert torch.equal(generate(ours, ids), generate(plain, ids))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(llama, device, side):
    plain, ours = pair(llama, device)
    ids = torch.randint(1, 101, (3, 17), device=device)
    mask = torch.ones_like(ids)
    for row, padded in enumerate((0, 5, 12)):
        mask[row, slice(0, padded) if side == "left" else slice(17 - padded, 17)] = 0
    with torch.no_grad():
        expected = plain(ids, attention_mask=mask).logits[mask.bool()]
        logits = ours(ids, attention_mask=mask).logits[mask.bool()]
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()
    if side == "left":
        assert torch.equal(generate(ours, ids, mask), generate(plain, ids, mask))


def test_sliding_window(device):
    plain, ours = pair(transformers.MistralConfig(**SIZES, sliding_window=8), device)
    ids = torch.randint(1, 101, (2, 30), device=device)
    assert torch.equal(generate(ours, ids), generate(plain, ids))


def test_soft_cap(device):
    config = transformers.Gemma2Config(**SIZES, sliding_window=8, attn_logit_softcapping=5.0)
    plain, ours = pair(config, device, plainly="eager")
    ids = torch.randint(1, 101, (2, 30), device=device)
    with torch.no_grad():
        expected, logits = plain(ids).logits, ours(ids).logits
    assert (logits - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_refuses_what_it_does_not_take(llama):
    _, ours = pair(llama, "cpu")
    ids = torch.randint(1, 101, (1, 6))
    with pytest.raises(NotImplementedError, match="does not take training: call the model under"):
        ours(ids)
    with torch.no_grad():
        with pytest.raises(NotImplementedError, match="does not take masks of four dimensions"):
            ours(ids, attention_mask=torch.zeros(1, 1, 6, 6))
        with pytest.raises(NotImplementedError, match="does not take custom masks or packed sequences"):
            ours(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]), use_cache=False)
        with pytest.raises(NotImplementedError, match="does not take static caches"):
            ours.generate(ids, max_new_tokens=3, cache_implementation="static", disable_compile=True)
        ours.train()
        ours.config.attention_dropout = 0.5
        for layer in ours.model.layers:
            layer.self_attn.attention_dropout = 0.5
        with pytest.raises(NotImplementedError, match="does not take dropout"):
            ours(ids)
