"""The tiny text encoder's training: what the tokenizer makes of captions, and that states come to name the words."""

import pytest
import torch

from osp_fast.assets.shapes import HELD_OUT, TRAINED, captions
from osp_fast.assets.text_training import HIDDEN, TextRecipe, naming_loss, train_text_encoder
from osp_fast.models.text_encoder import TextEncoder

WIDTH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    texts = [text for kind in TRAINED[::7] for text in captions(kind)]
    train_text_encoder(texts, WIDTH, TextRecipe(steps=60, batch=16), folder)
    return folder


def tokens(folder, text: str) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer.decode(number).strip() for number in tokenizer(text)["input_ids"]]


def test_words_that_tell_clips_apart_are_tokens(folder):
    for kind in (HELD_OUT[0], HELD_OUT[29]):
        words = {kind.colour, kind.shape, kind.motion, *kind.background.split()}
        for text in captions(kind):
            assert set(tokens(folder, text)) == words | {"</s>"}
            assert tokens(folder, f"high quality, high aesthetic, {text}.") == tokens(folder, text)
    assert tokens(folder, "") == ["</s>"]
    assert "".join(tokens(folder, "zebra")) == "zebra</s>"  # a word that it never saw is spelled


def test_states_name_the_words_and_training_lowers_the_loss(folder):
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([captions(kind)[0] for kind in HELD_OUT], padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    nothing, mark = torch.zeros_like(ids, dtype=torch.bool), tokenizer.convert_tokens_to_ids(HIDDEN)
    trained = T5EncoderModel.from_pretrained(folder)
    fresh = T5EncoderModel(trained.config)
    with torch.no_grad():
        after, before = (naming_loss(one, ids, mask, nothing, mark).item() for one in (trained, fresh))
        hidden = naming_loss(trained, ids, mask, mask.bool(), mark).item()
    assert after < 0.5 < before
    assert hidden > 4 * after  # with all words hidden there is nothing to name them by


def test_the_engine_reads_it_and_it_is_the_same_again(folder, tmp_path):
    encoder = TextEncoder.from_pretrained(folder, torch.float32, torch.device("cpu"), 16)
    states, mask = encoder(["a red circle", ""])
    assert states.shape == (2, 16, WIDTH) and mask.sum(1).tolist() == [3, 1]
    texts = [text for kind in TRAINED[::7] for text in captions(kind)]
    train_text_encoder(texts, WIDTH, TextRecipe(steps=60, batch=16), tmp_path)
    for name in ("tokenizer.json", "model.safetensors"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
