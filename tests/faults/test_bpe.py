"What a person may hand to the tokenizer by mistake: each case names the place and the mend, and writes nothing half"
import json
import os

import pytest

from llmbench.core import UserError
from llmbench.text.bpe import BPE, SPECIALS
from llmbench.text.merges import GPT2_PATTERN


@pytest.fixture
def file(tmp_path): return BPE.train("the cat, the bat, the 猫 and the 云 "*3, 300).save(tmp_path)


def edited(file, change):
    d = json.loads(file.read_text())
    change(d)
    file.write_text(json.dumps(d))
    return file


FILES = dict(  # name: (what is done to the file's JSON, what the message must say)
    wordpiece=(lambda d: d["model"].update(type="WordPiece"), ["model.type", "WordPiece", "transformers"]),
    unigram=(lambda d: d["model"].update(type="Unigram", vocab=[["a", -1.]]), ["model.type", "Unigram"]),
    no_type_no_merges=(lambda d: [d["model"].pop(k) for k in ("type", "merges")], ["model.type"]),
    no_model=(lambda d: d.pop("model"), ["no field model"]),
    model_is_a_list=(lambda d: d.update(model=[]), ["no field model"]),
    sentencepiece=(lambda d: d["model"].update(byte_fallback=True), ["byte_fallback", "model"]),
    dropout=(lambda d: d["model"].update(dropout=.1), ["dropout"]),
    suffix=(lambda d: d["model"].update(end_of_word_suffix="</w>"), ["end_of_word_suffix"]),
    vocab_is_a_list=(lambda d: d["model"].update(vocab=["a"]), ["vocab", "whole numbers"]),
    vocab_empty=(lambda d: d["model"].update(vocab={}), ["vocab"]),
    id_is_text=(lambda d: d["model"]["vocab"].update(the="12"), ["vocab", "whole numbers"]),
    id_is_true=(lambda d: d["model"]["vocab"].update(the=True), ["vocab", "whole numbers"]),
    id_negative=(lambda d: d["model"]["vocab"].update(the=-1), ["vocab", "from 0 on"]),
    id_twice=(lambda d: d["model"]["vocab"].update(the=9), ["1 ids", "more than one token"]),
    byte_missing=(lambda d: d["model"]["vocab"].pop("ä"), ["no token for 1 of the 256 bytes"]),
    not_bytes=(lambda d: d["model"]["vocab"].update({"▁the": 999}), ["'▁the'", "SentencePiece"]),
    merges_missing=(lambda d: d["model"].pop("merges"), ["merges", "list"]),
    merge_of_three=(lambda d: d["model"]["merges"].insert(2, ["a", "b", "c"]), ["merges[2]", "not a pair"]),
    merge_of_numbers=(lambda d: d["model"]["merges"].insert(0, [1, 2]), ["merges[0]", "not a pair"]),
    merge_with_two_blanks=(lambda d: d["model"]["merges"].insert(0, "t  h"), ["merges[0]", "not a pair"]),
    merge_a_number=(lambda d: d["model"]["merges"].insert(0, 7), ["merges[0]", "not a pair"]),
    merge_from_elsewhere=(lambda d: d["model"]["merges"].append(["z", "q"]), ["'zq'", "not in the vocabulary", "same tokenizer"]),
    merge_side_unknown=(lambda d: d["model"]["merges"].append(["zzz", "q"]), ["'zzz'", "not in the vocabulary"]),
    normalizer=(lambda d: d.update(normalizer=dict(type="NFC")), ["normalizer", "set it to null"]),
    no_cuts=(lambda d: d.update(pre_tokenizer=None), ["pre_tokenizer", "byte-level"]),
    metaspace=(lambda d: d.update(pre_tokenizer=dict(type="Metaspace")), ["pre_tokenizer[0]", "Metaspace"]),
    whitespace=(lambda d: d["pre_tokenizer"]["pretokenizers"].insert(0, dict(type="Whitespace")), ["pre_tokenizer[0]", "Whitespace"]),
    bytes_before_cuts=(lambda d: d["pre_tokenizer"]["pretokenizers"].reverse(), ["end with ByteLevel"]),
    no_steps=(lambda d: d["pre_tokenizer"].update(pretokenizers=[]), ["pre_tokenizer", "byte-level"]),
    step_without_type=(lambda d: d["pre_tokenizer"]["pretokenizers"].insert(0, {}), ["pre_tokenizer[0]"]),
    step_is_text=(lambda d: d["pre_tokenizer"]["pretokenizers"].insert(0, "Split"), ["pre_tokenizer", "cut text"]),
    prefix_space=(lambda d: d["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True), ["add_prefix_space", "Set it to false"]),
    removed=(lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"), ["pre_tokenizer[0]", "Removed"]),
    inverted=(lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(invert=True), ["invert"]),
    bad_pattern=(lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern=dict(Regex="(oh")), ["pre_tokenizer[0]", "'(oh' cannot be read"]),
    no_pattern=(lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern={}), ["pre_tokenizer[0]", "pattern"]),
    set_operation=(lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(pattern=dict(Regex=r"[\w&&[^\d]]+")), ["&&"]),
    special_strips=(lambda d: d["added_tokens"][1].update(lstrip=True), ["added_tokens[1]", "lstrip"]),
    special_without_id=(lambda d: d["added_tokens"][1].pop("id"), ["added_tokens[1]", "id"]),
    special_empty=(lambda d: d["added_tokens"][1].update(content=""), ["added_tokens[1]", "content"]),
    special_is_text=(lambda d: d["added_tokens"].append("<x>"), ["added_tokens[7]"]),
    special_two_ids=(lambda d: d["added_tokens"][2].update(id=99), ["<|end|>", "two ids, 2 and 99"]),
    special_takes_an_id=(lambda d: d["added_tokens"].append(dict(d["added_tokens"][0], content="<x>", id=50)), ["more than one token"]),
    specials_are_an_object=(lambda d: d.update(added_tokens={"a": 1}), ["added_tokens", "list"]),
)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_exactly_is_refused(file, name):
    change, words = FILES[name]
    with pytest.raises(UserError) as e: BPE.load(edited(file, change))
    for word in [str(file), *words]: assert word in str(e.value), f"{word!r} is not in: {e.value}"


@pytest.mark.parametrize("content, word", [(b"", "broken JSON"), (b"\xff\xfe{", "not UTF-8"), (b"[1, 2]", "no field model"), (b'{"model": {"vocab": {"a": 0', "broken JSON"), (b"null", "no field model")],
    ids=["empty", "binary", "list", "cut_off", "null"])
def test_a_broken_file_says_so(tmp_path, content, word):
    (tmp_path/"tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=word) as e: BPE.load(tmp_path)
    assert "tokenizer.json" in str(e.value)


def test_a_missing_file_or_an_empty_folder_says_so(tmp_path):
    for path in (tmp_path, tmp_path/"none", tmp_path/"none.json"):
        with pytest.raises(UserError, match="cannot read"): BPE.load(path)


def test_a_file_with_another_name_and_a_bom_can_be_read(file, tmp_path):
    (tmp_path/"mine.json").write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert BPE.load(tmp_path/"mine.json").encode("the cat") == BPE.load(file).encode("the cat")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_says_so(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot write"): BPE.train("owl", 263).save(tmp_path/"deep")
    tmp_path.chmod(0o700)


def test_saving_into_a_file_says_so(tmp_path):
    (tmp_path/"taken").write_text("x")
    with pytest.raises(UserError, match="cannot write"): BPE.train("owl", 263).save(tmp_path/"taken")
    assert (tmp_path/"taken").read_text() == "x" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("line, word", [("the", "line 3"), ("a b c", "line 3"), ("q zzz", "'zzz'"), ("z  q", "line 3")])
def test_gpt2_files_name_the_line(file, tmp_path, line, word):
    vocab, merges = tmp_path/"vocab.json", tmp_path/"merges.txt"
    bpe = BPE.load(file)
    vocab.write_text(json.dumps(bpe.vocab))
    good = [" ".join(m) for m in bpe.merges]
    merges.write_bytes("\r\n".join(["#version: 0.2", *good, ""]).encode())
    assert BPE.from_gpt2(vocab, merges).encode("the 猫") == BPE(bpe.vocab, bpe.merges, bpe.special_ids, (GPT2_PATTERN,)).encode("the 猫")
    merges.write_text("\n".join(["#version: 0.2", good[0], line, *good[1:]]))
    with pytest.raises(UserError) as e: BPE.from_gpt2(vocab, merges)
    assert word in str(e.value) and "merges.txt" in str(e.value)


def test_gpt2_files_that_are_no_such_files(tmp_path):
    vocab, merges = tmp_path/"vocab.json", tmp_path/"merges.txt"
    with pytest.raises(UserError, match="cannot read"): BPE.from_gpt2(vocab, merges)
    vocab.write_text("[]")
    with pytest.raises(UserError, match=r"merges\.txt.*cannot read"): BPE.from_gpt2(vocab, merges)
    merges.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"): BPE.from_gpt2(vocab, merges)
    merges.write_text("a b")
    with pytest.raises(UserError, match="vocab.json"): BPE.from_gpt2(vocab, merges)


@pytest.mark.parametrize("texts, size, settings, words", [
    ([], 300, {}, ["no text", "at least one document"]),
    (["", ""], 300, {}, ["no text"]),
    ("", 300, {}, ["no text"]),
    (["owl"], 262, {}, ["262", "7 special", "Use 263 or more"]),
    (["owl"], 255, dict(specials=()), ["Use 256 or more"]),
    (["owl", None], 300, {}, ["document 1", "NoneType"]),
    ([b"owl"], 300, {}, ["document 0", "bytes"]),
    (["owl"], 300, dict(specials=("<a>", "<a>")), ["distinct"]),
    (["owl"], 300, dict(specials=("",)), ["not empty"]),
    (["owl"], 300, dict(specials=("###",)), ["'###'", "<|###|>"]),
    (["owl"], 300, dict(specials=("é",)), ["'é'", "a piece of text"]),
    (["owl"], 300, dict(specials="owl"), ["'owl'"]),
    (["owl"], 300, dict(pattern="(oh"), ["pattern"]),
])
def test_training_says_what_would_be_possible(texts, size, settings, words):
    with pytest.raises(UserError) as e: BPE.train(texts, size, **settings)
    for word in words: assert word in str(e.value), f"{word!r} is not in: {e.value}"


@pytest.mark.parametrize("ids, word", [([-100], "label such as -100"), ([278], "id 278 is not in this vocabulary of 278"), ([0, 10**9], "1000000000"), ([[1], [2]], "one row")])
def test_decode_names_the_id(file, ids, word):
    bpe = BPE.load(file)
    for read in (bpe.decode, bpe.decode_bytes, bpe.pieces):
        with pytest.raises(ValueError, match=word): read(ids)


def test_a_missing_special_token_is_named():
    bpe = BPE.train("owl", 300, specials=("<s>",))
    with pytest.raises(UserError, match=r"no <\|end\|>.*It has <s>"): print(bpe.end_id)
    with pytest.raises(UserError, match=r"no <\|pad\|>"): print(bpe.pad_id)
    assert SPECIALS == ("<|pad|>", "<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>")
    assert [getattr(BPE.train("owl", 300), name) for name in ("pad_id", "bos_id", "end_id")] == [0, 1, 2]  # pad is never the end


def test_a_users_text_cannot_become_control(file):
    bpe, control = BPE.load(file), set(range(7))
    for text in [*SPECIALS, "".join(SPECIALS), "<|end|"+"><|end|>", "<|<|end|>end|>", "＜|end|＞"]:
        assert not control & set(bpe.encode(text)) and not control & set(bpe.encode_offsets(text)[0])
        assert bpe.decode(bpe.encode(text)) == text
