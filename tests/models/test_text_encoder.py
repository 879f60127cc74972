"""Text encoders from local folders."""

import json
import sys

import pytest
import torch
from torch import nn

from osp_fast.errors import UserError
from osp_fast.models.quantize import Int8Linear
from osp_fast.models.text_encoder import TextEncoder, encoder_layers, find_folder, text_encoder_on_meta


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A T5, an mT5 and a UMT5, random and small, as transformers saves them, with a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        MT5Config,
        MT5EncoderModel,
        PreTrainedTokenizerFast,
        T5Config,
        T5EncoderModel,
        UMT5Config,
        UMT5EncoderModel,
    )

    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "circle", "moves"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    root = tmp_path_factory.mktemp("encoders")
    sizes = dict(vocab_size=7, d_model=16, d_kv=4, d_ff=32, num_layers=2, num_heads=4)
    torch.manual_seed(0)
    for name, config, model in (
        ("t5", T5Config(**sizes), T5EncoderModel),
        ("mt5", MT5Config(**sizes), MT5EncoderModel),
        ("umt5", UMT5Config(**sizes), UMT5EncoderModel),
    ):
        model(config).save_pretrained(root / name)
        wrapped = PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        )
        wrapped.save_pretrained(root / name)
    return root


@pytest.mark.parametrize("name, multilingual", [("t5", False), ("mt5", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_and_mask(folders, name, multilingual, dtype):
    encoder = TextEncoder.from_pretrained(folders / name, dtype, max_length=6)
    states, mask = encoder(["a red circle", ""])
    assert states.shape == (2, 6, 16) and states.dtype == dtype and states.isfinite().all()
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]]
    assert encoder.is_multilingual == multilingual and encoder.width == 16
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


@pytest.mark.parametrize("name", ["t5", "mt5", "umt5"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_those_of_transformers(folders, name, dtype):
    """Bit for bit, though its vocabulary is used beside it."""
    from transformers import AutoTokenizer, MT5EncoderModel, T5EncoderModel, UMT5EncoderModel

    network_class = {"t5": T5EncoderModel, "mt5": MT5EncoderModel, "umt5": UMT5EncoderModel}[name]
    texts = ["a red circle moves", "a nameless circle", ""]
    tokens = AutoTokenizer.from_pretrained(folders / name)(
        texts, max_length=8, padding="max_length", return_tensors="pt"
    )
    network = network_class.from_pretrained(folders / name, dtype=dtype).eval()
    with torch.no_grad():
        expected = network(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).last_hidden_state
    states, _ = TextEncoder.from_pretrained(folders / name, dtype, max_length=8)(texts)
    assert torch.equal(states, expected)


def test_the_vocabulary_stays_where_it_is(folders):
    encoder = TextEncoder.from_pretrained(folders / "mt5", torch.bfloat16, max_length=8)
    assert len(encoder.blocks) == 2 and not any(
        "embed_tokens" in name or "shared" in name for name in encoder.state_dict()
    )
    vocabulary = encoder._vocabulary
    tokens = torch.tensor([[3, 4, 4, 0]])
    embedded = vocabulary.embed(tokens, torch.device("cpu"))
    assert embedded.shape == (1, 4, 16) and torch.equal(embedded[0, 1], embedded[0, 2])
    encoder.to("meta")
    assert all(parameter.is_meta for parameter in encoder.parameters())
    assert vocabulary.embed(tokens, torch.device("meta")).is_meta
    assert torch.equal(vocabulary.embed(tokens, torch.device("cpu")), embedded)


@pytest.mark.parametrize("name", ["t5", "mt5", "umt5"])
def test_without_weights(folders, name):
    network = text_encoder_on_meta(folders / name, torch.bfloat16)
    real = TextEncoder.from_pretrained(folders / name, torch.bfloat16).encoder
    described = [
        {key: (tensor.shape, tensor.dtype) for key, tensor in each.state_dict().items()} for each in (network, real)
    ]
    assert described[0] == described[1]
    assert all(parameter.is_meta and not parameter.requires_grad for parameter in network.parameters())
    assert len(encoder_layers(network)) == 2


def test_the_released_encoder_without_weights_and_folder():
    network = text_encoder_on_meta(None, torch.bfloat16)
    numbers = sum(parameter.numel() for parameter in network.parameters())
    assert numbers + 250112 * 4096 == 5_655_173_120  # with the vocabulary, as google/mt5-xxl's encoder has it
    assert len(encoder_layers(network)) == 24


def test_eight_bit(folders, monkeypatch):
    plain = TextEncoder.from_pretrained(folders / "mt5", max_length=8)
    small = TextEncoder.from_pretrained(folders / "mt5", max_length=8, eight_bit=True)
    kinds = [type(module) for module in small.modules()]
    assert kinds.count(Int8Linear) == 2 * 7 and nn.Linear not in kinds
    (exact, _), (states, _) = plain(["a red circle"]), small(["a red circle"])
    assert 0 < (states - exact).norm() < 0.05 * exact.norm()
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match="^--text_8bit .*pip install torchao"):
        TextEncoder.from_pretrained("nowhere", eight_bit=True)


def test_padding_does_not_change_the_states(folders):
    short = TextEncoder.from_pretrained(folders / "t5", max_length=4)(["a red circle"])[0]
    long = TextEncoder.from_pretrained(folders / "t5", max_length=12)(["a red circle"])[0]
    assert torch.allclose(short, long[:, :4], atol=1e-6)


def test_long_captions_are_cut(folders):
    _, mask = TextEncoder.from_pretrained(folders / "t5", max_length=3)(["a red circle moves a red circle"])
    assert mask.tolist() == [[1, 1, 1]]


def test_float16_is_refused(folders):
    with pytest.raises(UserError, match="float32 or bfloat16"):
        TextEncoder.from_pretrained(folders / "t5", torch.float16)


def test_names_are_looked_up_in_the_cache_only(folders, tmp_path):
    assert find_folder("t5", folders) == folders / "t5"
    snapshot = tmp_path / "models--google--mt5-xxl/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert find_folder("google/mt5-xxl", tmp_path) == snapshot
    with pytest.raises(UserError, match="download the model by hand"):
        TextEncoder.from_pretrained("google/mt5-xxl")


def test_broken_folders_end_in_one_sentence(folders, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="not a T5"):
        TextEncoder.from_pretrained(tmp_path)
    for file in (folders / "t5").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(UserError, match="weights cannot be loaded"):
        TextEncoder.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="tokenizer cannot be loaded"):
        TextEncoder.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer is missing"):
        TextEncoder.from_pretrained(tmp_path)
