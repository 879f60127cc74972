"""The prompt refiner: its folder, its words, and what is made of them."""

import importlib.util
import json
import logging
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from osp_fast.errors import UserError
from osp_fast.models.chat import TODAY, TRIAL, Chat, clean_answer
from osp_fast.models.prompt_refiner import (
    INSTRUCTION,
    PromptRefiner,
    check_refiner,
    decoder_layers,
    refiner_on_meta,
)
from osp_fast.models.quantize import Int8Linear

SPEC = importlib.util.spec_from_file_location("small_refiner", Path(__file__).with_name("small_refiner.py"))
small = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(small)
PROMPT = "a red circle moves"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A chat model whose generation_config.json samples, and forbids to say the same word again."""
    sampling = dict(do_sample=True, temperature=0.7, top_k=5, no_repeat_ngram_size=1)
    return small.save_refiner(tmp_path_factory.mktemp("refiner"), **sampling)


@pytest.fixture(scope="module")
def refiner(folder):
    return PromptRefiner.from_pretrained(folder, max_new_tokens=64)


def greedy(refiner, prompt, tokens):
    """The likeliest words one after the other, by calls of the network alone."""
    text = f"<|system|> {INSTRUCTION} <|end|> <|user|> {prompt} <|end|> <|model|>"
    unknown = small.WORDS.index("<unk>")
    given = [small.WORDS.index(word) if word in small.WORDS else unknown for word in text.split()]
    answer = []
    for _ in range(tokens):
        answer.append(refiner.network(torch.tensor([given + answer])).logits[0, -1].argmax().item())
        if small.WORDS[answer[-1]] == "<|end|>":
            break
    return [small.WORDS[token] for token in answer]


def spoken(words):
    return " ".join(word for word in words if word[0] != "<")


@pytest.mark.parametrize("prompt", [PROMPT, "grass", ""])
def test_it_says_the_likeliest_words(refiner, prompt):
    words = greedy(refiner, prompt, 64)
    assert len(set(words)) < len(words) < 64  # with repetitions, which the folder's settings forbid, and an end
    assert refiner.refine(prompt, 0) == refiner.refine(prompt, 1) == spoken(words)


def test_a_long_answer_ends_with_a_sentence(folder, refiner):
    words = greedy(refiner, "a circle moves", 64)
    at = words.index(".")
    assert "." not in words[at + 1 : at + 4]
    assert words[-2] != "." and words[-1] == "<|end|>"  # it ends by itself, with its last token
    for length, kept in ((at, at), (at + 1, at + 1), (at + 3, at + 1), (len(words), len(words))):
        answer = PromptRefiner.from_pretrained(folder, max_new_tokens=length).refine("a circle moves", 0)
        assert answer == spoken(words[:kept])


def test_draws_depend_on_the_seed_alone(folder):
    refiner = PromptRefiner.from_pretrained(folder, max_new_tokens=24, temperature=1.5)
    before = torch.get_rng_state()
    answers = [refiner.refine(PROMPT, seed) for seed in (0, 1, 2, 0)]
    assert torch.equal(torch.get_rng_state(), before)
    assert len(set(answers)) == 3 and answers[0] == answers[3]
    torch.manual_seed(5)
    assert refiner.refine(PROMPT, 1) == answers[1]
    torch.set_rng_state(before)
    # Hardly any temperature is none.
    cold = PromptRefiner.from_pretrained(folder, max_new_tokens=64, temperature=1e-3)
    assert cold.refine(PROMPT, 3) == spoken(greedy(cold, PROMPT, 64))


def test_draws_have_the_probabilities_of_a_softmax():
    from osp_fast.models.prompt_refiner import _Draws

    scores, draws, counts = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]), _Draws(2.0, 0), torch.zeros(4)
    for _ in range(4000):
        counts[draws(None, scores).argmax()] += 1
    assert torch.allclose(counts / 4000, (scores[0] / 2).softmax(0), atol=0.03) and counts[3] == 0


def test_nothing_is_printed(folder, capfd):
    from transformers.utils.logging import warning_once

    warning_once.cache_clear()  # of what another test may have caused
    told = []
    handler = logging.Handler()
    handler.emit = told.append
    loggers = [logging.getLogger("transformers"), logging.getLogger()]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for temperature in (0.0, 1.0):
                PromptRefiner.from_pretrained(folder, max_new_tokens=4, temperature=temperature).refine(PROMPT, 0)
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
    assert not told and capfd.readouterr() == ("", "")


def test_weights(folder):
    refiner = PromptRefiner.from_pretrained(folder, torch.bfloat16)
    assert refiner.blocks is refiner.network.model.layers and len(refiner.blocks) == 3
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in refiner.parameters())
    eight_bit = PromptRefiner.from_pretrained(folder, torch.bfloat16, max_new_tokens=8, eight_bit=True)
    kinds = [type(module) for module in eight_bit.blocks.modules()]
    assert kinds.count(Int8Linear) == 3 * 7 and nn.Linear not in kinds
    assert type(eight_bit.network.lm_head) is nn.Linear
    assert eight_bit.refine(PROMPT, 0)
    empty = refiner_on_meta(folder, torch.bfloat16)
    given, shapes = refiner.network.state_dict(), empty.state_dict()
    assert {name: (t.shape, t.dtype) for name, t in given.items()} == {n: (t.shape, t.dtype) for n, t in shapes.items()}
    assert all(p.is_meta for p in empty.parameters()) and len(decoder_layers(empty)) == 3


def test_layers_are_the_longest_list_that_is_in_no_other():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(1, 1) for _ in range(9))

    network = nn.Module()
    network.mixed = nn.ModuleList([nn.Linear(1, 1), nn.ReLU(), nn.ReLU(), nn.ReLU()])
    with pytest.raises(UserError, match="no list of like layers"):
        decoder_layers(network)
    network.vision = nn.ModuleList(nn.ReLU() for _ in range(2))
    network.layers = nn.ModuleList(Layer() for _ in range(3))
    assert decoder_layers(network) is network.layers


@pytest.mark.parametrize(
    "template",
    [small.TEMPLATE_WITHOUT_SYSTEM, "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"],
    ids=["refuses", "leaves out"],
)
def test_templates_without_an_instruction_get_it_with_the_prompt(tmp_path, template):
    refiner = PromptRefiner.from_pretrained(small.save_refiner(tmp_path, template), max_new_tokens=4)
    text = refiner._chat.tokenizer.apply_chat_template(
        [{"role": "user", "content": f"{INSTRUCTION}\n\n{PROMPT}"}], tokenize=False, add_generation_prompt=True
    )
    expected = refiner._chat.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert refiner._chat.question(PROMPT) == (expected, False)
    assert refiner.refine(PROMPT, 0)


def test_answers_depend_neither_on_the_day_nor_on_thoughts(folder):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{%- if strftime_now is defined %}{% set day = strftime_now('%d %B %Y, %H') %}{% endif %}"
        "{{ day }} {{ enable_thinking }} {% for m in messages %}{{ m.content }}{% endfor %}<think>\n"
    )
    chat = Chat(tokenizer, "Do it", "here")
    assert chat._render(TRIAL) == f"01 January {TODAY.year}, 00 False Do it{TRIAL}<think>"
    question = chat.question(TRIAL)
    assert question.thinks and chat.answer([6, 7, 8], question, True) == ""


@pytest.mark.parametrize(
    "text, cut_off, expected",
    [
        ("  A cat\n\nwalks.\t<|end|>", False, "A cat walks."),
        ("<think>\nA dog?\n</think>\n\nA cat.<|end|>", False, "A cat."),
        ("a dog? </think> A cat.", False, "A cat."),
        ("<think> a dog, or", True, ""),
        ("<think>a</think>A cat.<think>b", True, "A cat."),
        ("<|end|>", False, ""),
        ('"A cat walks."', False, "A cat walks."),
        ("“A cat’s walk”", False, "A cat’s walk"),
        ("„Eine Katze“", False, "Eine Katze"),
        ("「猫。」", False, "猫。"),
        ("'A cat's walk.'", False, "A cat's walk."),
        ('"A cat" and "a dog"', False, '"A cat" and "a dog"'),
        ('"A cat" walks.', False, '"A cat" walks.'),
        ("'A cat walks.", False, "'A cat walks."),
        ('"', False, ""),
        ('"A cat walks. It jum', True, "A cat walks."),
        ("A cat walks 3.5 km. It (a cat!) ju", True, "A cat walks 3.5 km."),
        ("A cat says “Go!” Then i", True, "A cat says “Go!”"),
        ("一只猫走。它跳", True, "一只猫走。"),
        ("A cat walks without en", True, "A cat walks without en"),
        ("A cat walks. It jumps", False, "A cat walks. It jumps"),
    ],
)
def test_cleaning(text, cut_off, expected):
    assert clean_answer(text, {"<|end|>", "<|en"}, cut_off) == expected


def test_a_prompt_that_is_too_long_is_told(tmp_path):
    refiner = PromptRefiner.from_pretrained(small.save_refiner(tmp_path, positions=120), max_new_tokens=8)
    assert refiner.refine("a " * 10, 0)
    with pytest.raises(UserError, match="prompt takes 1.. tokens .* up to 8, but .* made for 120: lower"):
        refiner.refine("a " * 50, 0)


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    "breaks, message",
    [
        (lambda f: (f / "chat_template.jinja").unlink(), "there is no chat template"),
        (lambda f: (f / "chat_template.jinja").write_text("{% for"), "the chat template cannot be used"),
        (lambda f: (f / "chat_template.jinja").write_text("Hello"), "cannot be used .it leaves out what the user says"),
        (lambda f: edit(f / "config.json", auto_map={"AutoModelForCausalLM": "code.Model"}), "names code of the fold"),
        (lambda f: edit(f / "tokenizer_config.json", auto_map={"AutoTokenizer": "code.T"}), "names code of the folder"),
        (lambda f: edit(f / "config.json", model_type="t5"), "'t5' is not a causal language model"),
        (lambda f: edit(f / "config.json", model_type="unheard"), "cannot be read .*unheard.*: copy the folder"),
        (lambda f: (f / "tokenizer.json").unlink(), "the tokenizer is missing"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "the tokenizer cannot be loaded"),
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds adapters"),
        (lambda f: (f / "model.safetensors").unlink(), "weights cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"no"), "weights cannot be loaded"),
        (lambda f: edit(f / "config.json", num_hidden_layers=4), r"weights do not fit .*layers\.3"),
        (lambda f: edit(f / "config.json", intermediate_size=32), "weights do not fit .*mlp|weights cannot be loaded"),
        (shutil.rmtree, "no model folder"),
    ],
)
def test_broken_folders_end_in_one_sentence(folder, tmp_path, breaks, message, capfd):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    breaks(broken)
    with pytest.raises(UserError, match=f"^--caption_refiner: .*{message}") as caught:
        PromptRefiner.from_pretrained(broken)
    assert "\n" not in str(caught.value)
    if "weights" not in message and broken.exists():
        with pytest.raises(UserError, match=f"^--caption_refiner: .*{message}"):
            check_refiner(broken)
    assert capfd.readouterr().out == ""


def test_the_folders_code_is_not_run(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit(broken / "config.json", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    with pytest.raises(UserError, match="never run"):
        refiner_on_meta(broken, torch.float32)
    assert not (tmp_path / "ran").exists()


def test_names_and_torchao(folder, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--some--chat/snapshots/abc"
    shutil.copytree(folder, snapshot)
    assert PromptRefiner.from_pretrained("some/chat", max_new_tokens=4, cache_dir=tmp_path).refine(PROMPT, 0)
    check_refiner(folder)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match="^--text_8bit needs the package torchao"):
        PromptRefiner.from_pretrained("nowhere", eight_bit=True)
