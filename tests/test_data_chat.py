from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_oreal.data.chat import ChatTemplate, drop_long_prompts, load_template, load_tokenizer, template_names
from megatron_oreal.data.types import Prompt
from megatron_oreal.errors import UserError

CHATML = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
DEEPSEEK = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"]
OWN = (
    "{{ '<|im_start|>' }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}>{% endif %}"
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A byte-level tokenizer, so every text has tokens and decodes to itself; '<think>' is added but not special.

    Like DeepSeek's and Llama's it puts a beginning-of-sequence token before plain text by itself.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_tokens(["<think>", "</think>"])
    core.add_special_tokens(CHATML + DEEPSEEK)
    bos = DEEPSEEK[0]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=DEEPSEEK[1], bos_token=bos)
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return load_tokenizer(model_dir)


def ids_of_template(tokenizer, messages, template):
    """What transformers itself makes of it, in both of its return conventions."""
    result = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=True, add_generation_prompt=True)
    return list(result if isinstance(result, list) else result["input_ids"])


def test_prompt_tokens_are_those_of_apply_chat_template(model_dir, tokenizer):
    for name in template_names():
        chat = ChatTemplate.load(model_dir, stop_word="<|im_end|>", chat_template=name, system_prompt="Think.")
        messages = [{"role": "system", "content": "Think."}, {"role": "user", "content": "π/2 ?\n"}]
        got = chat.encode_prompt("π/2 ?\n")
        assert got.dtype == np.int32
        assert got.tolist() == ids_of_template(tokenizer, messages, load_template(name))


def test_oreal_template_is_chatml(model_dir):
    chat = ChatTemplate.load(model_dir, stop_word="<|im_end|>", chat_template="oreal", system_prompt="Be {{exact}}.")
    assert chat.render_prompt("1+1?") == (
        "<|im_start|>system\nBe {{exact}}.<|im_end|>\n<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    )
    alone = ChatTemplate.load(model_dir, stop_word="<|im_end|>", chat_template="oreal")
    assert alone.render_prompt("1+1?") == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"


def test_deepseek_template_is_that_of_its_tokenizer(model_dir, tokenizer):
    chat = ChatTemplate.load(
        model_dir, stop_word="<｜end▁of▁sentence｜>", chat_template="deepseek_r1_distill", system_prompt="Sys."
    )
    assert chat.render_prompt("1+1?") == "<｜begin▁of▁sentence｜>Sys.<｜User｜>1+1?<｜Assistant｜>"
    assert chat.encode_prompt("1+1?")[0] == tokenizer.bos_token_id
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>hm</think>b"},
        {"role": "user", "content": "c"},
    ]
    rendered = tokenizer.apply_chat_template(
        turns, chat_template=load_template("deepseek_r1_distill"), tokenize=False, add_generation_prompt=False
    )
    assert rendered == "<｜begin▁of▁sentence｜><｜User｜>a<｜Assistant｜>b<｜end▁of▁sentence｜><｜User｜>c"


def test_a_template_file_and_the_tokenizers_own_template_are_used(model_dir, tmp_path):
    (tmp_path / "mine.jinja").write_text(OWN)
    from_file = ChatTemplate.load(model_dir, stop_word="<|im_end|>", chat_template=str(tmp_path / "mine.jinja"))
    own_tokenizer = load_tokenizer(model_dir)
    own_tokenizer.chat_template = OWN
    own_tokenizer.save_pretrained(tmp_path / "own")
    own = ChatTemplate.load(tmp_path / "own", stop_word="<|im_end|>")
    assert from_file.render_prompt("q") == own.render_prompt("q") == "<|im_start|>[user]q>"


def test_decode_gives_back_the_text_without_its_stop_word(tokenizer):
    chat = ChatTemplate(tokenizer, stop_word="<|im_end|>", template=OWN)
    text = "<think> a , b . it 's </think> π\n\\boxed{½}"
    prompt, response = chat.encode_example("q", text)
    assert response.dtype == prompt.dtype == np.int32
    assert response[-1] == chat.stop_token_id
    assert chat.decode(response) == text
    assert chat.decode(response[:-1]) == text  # a truncated response has none
    assert chat.decode([]) == ""


def test_decode_keeps_or_skips_the_special_tokens_within(tokenizer):
    chat = ChatTemplate(tokenizer, stop_word="<|im_end|>", template=OWN)
    ids = tokenizer("a<|endoftext|>b<|im_end|>c<|im_end|>", add_special_tokens=False)["input_ids"]
    assert chat.decode(ids) == "a<|endoftext|>b<|im_end|>c"
    assert chat.decode(ids, skip_special_tokens=True) == "abc"


def test_decode_survives_ids_of_a_padded_vocabulary(tokenizer):
    chat = ChatTemplate(tokenizer, stop_word="<|im_end|>", template=OWN)
    a, b = (tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "ab")
    assert chat.decode(np.array([a, len(tokenizer) + 3, b], dtype=np.int32)) == "ab"


def test_example_is_prompt_then_solution_with_its_reasoning_and_one_stop_token(tokenizer):
    chat = ChatTemplate(tokenizer, stop_word="<｜end▁of▁sentence｜>", template=load_template("deepseek_r1_distill"))
    for solution in ("<think>hm</think>2", "<think>hm</think>2<｜end▁of▁sentence｜>"):
        prompt, response = chat.encode_example("1+1?", solution)
        assert prompt.tolist() == chat.encode_prompt("1+1?").tolist()
        assert tokenizer.decode(response) == "<think>hm</think>2<｜end▁of▁sentence｜>"
        assert np.count_nonzero(response == chat.stop_token_id) == 1


def test_stop_word_of_several_tokens_is_refused_by_name(tokenizer):
    with pytest.raises(UserError, match=r"model\.stop_word='END' must be one token.*makes 3 of it: \['E', 'N', 'D'\]"):
        ChatTemplate(tokenizer, stop_word="END", template=OWN)


def test_stop_word_that_is_only_the_unknown_token_is_refused():
    core = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    with pytest.raises(UserError, match=r"model\.stop_word='stop'.*\['\[UNK\]'\]"):
        ChatTemplate(tokenizer, stop_word="stop", template="{{ messages[0].content }}")


def test_no_template_anywhere_is_refused(model_dir):
    with pytest.raises(
        UserError, match=r"model\.chat_template: .*no chat template of its own.*deepseek_r1_distill, oreal"
    ):
        ChatTemplate.load(model_dir, stop_word="<|im_end|>")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("a\n{% for %}", "Jinja syntax error in line 2"),
        ("{{ raise_exception('no system role') }}", "refuses a question .*no system role"),
        ("{{ raise_exception('two\\nlines') }}", "two lines"),
        ("{{ 'a' + 1 }}", "refuses a question"),
        ("{{ messages[0].content.nothing() }}", "refuses a question"),
        ("", "no tokens"),
    ],
)
def test_a_template_that_cannot_work_is_refused_at_construction(tokenizer, template, words):
    with pytest.raises(UserError, match=rf"model\.chat_template: .*{words}"):
        ChatTemplate(tokenizer, stop_word="<|im_end|>", template=template)


def test_unknown_template_names_and_directories_are_refused(tmp_path):
    with pytest.raises(UserError, match="did you mean 'oreal'"):
        load_template("oreall")
    with pytest.raises(UserError, match="no such directory"):
        load_tokenizer(tmp_path / "none")
    with pytest.raises(UserError, match="no tokenizer could be loaded"):
        load_tokenizer(tmp_path)


def test_a_template_file_in_another_encoding_is_refused(tmp_path):
    (tmp_path / "t.jinja").write_bytes("Réponds: {{ messages[0].content }}".encode("latin-1"))
    with pytest.raises(UserError, match=r"model\.chat_template='.*t\.jinja' is not readable UTF-8 text"):
        load_template(str(tmp_path / "t.jinja"))


def test_long_prompts_are_dropped_with_a_count(tokenizer):
    chat = ChatTemplate(tokenizer, stop_word="<|im_end|>", template=OWN)
    short, long = Prompt("s", "1+1?", "2"), Prompt("l", "x" * 100, "2")
    limit = len(chat.encode_prompt(short.question))
    assert drop_long_prompts([long, short], chat, limit) == ([short], 1)
    with pytest.raises(UserError, match=r"data\.max_prompt_tokens=3: all 2 prompts"):
        drop_long_prompts([long, short], chat, 3)
