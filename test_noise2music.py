"""What a sceptical reader would check: the paper against noise2music.py, T5 against its reference, and both scripts."""

import dataclasses
import functools
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib

cache = tempfile.TemporaryDirectory()
os.environ["JAX_COMPILATION_CACHE_DIR"] = cache.name  # shared with the processes that tests start

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
import soundfile

import noise2music as n2m
import sample
import t5_encoder
import train
from t5_encoder import (T5Config, count_tokens, encode, load_t5, position_buckets, random_t5, read_safetensors,
                        save_t5, tokenize, write_safetensors)

reference = pytest.mark.reference  # needs the packages of the extra "reference"; skipped, with a reason, without them


# ---------------------------------------------------------------------------------------------------------------------
# t5_encoder.py
# ---------------------------------------------------------------------------------------------------------------------


CAPTIONS = [
    "A slow, melancholic piano ballad with warm strings and a soft female voice.",
    "Energetic techno at 140 BPM: distorted kick, acid bass, sparse hi-hats",
    "Musique électronique française, très douce; ça va bien — à l'été, naïve & cœur",
    "ρεμπέτικο με μπουζούκι", "Русская народная песня с балалайкой", "音楽は静かで美しいピアノ曲です",
    "一首节奏明快的电子舞曲", "موسيقى عربية هادئة مع العود", "धीमा भारतीय शास्त्रीय संगीत सितार के साथ",
    "느린 피아노 음악", "</s> <pad> <unk> <extra_id_0> are words, and/or not <s> 1234567890 #$%^*()[]{}|\\",
]
ORDINARY = CAPTIONS[:-1] + [
    "", " ", "      ", "a", "  leading and trailing   ", "many    spaces     between", "tabs\tand\nnewlines\r\n here\t",
    "nbsp\u00a0thin\u2009ideographic\u3000space", "zero\u200bwidth\u200djoiner\ufeff", "soft\u00adhyphen",
    "🎵 emoji 🎹🎹 family 👨‍👩‍👧 flag 🇫🇷", "e\u0301 combining a\u030a\u0323 z\u0335\u0321", "ｆｕｌｌ　ｗｉｄｔｈ１２３！", "ﬁne ﬂow ½ ² ™ Å Ω",
    "ẞ ß İ ı ǅ", "العربيةEnglishमिला", "ไทย ພາສາລາວ ქართული ሙዚቃ", "𝔅𝔩𝔞𝔠𝔨 𝕄𝕖𝕥𝕒𝕝", "\u202eright to left\u202c", "a/b\\c\"d'e`f",
    "UPPER lower MiXeD", "...!!!???", "12,345.678e-9", "line\u2028separator\u2029paragraph",
    "control\x01\x02\x1f\x7fcharacters", "x" * 300, "jazz " * 2000, "音" * 500, "\U0010ffff\ufffe", "a\ufffdb",
]


def transformers_or_skip():
    pytest.importorskip("torch", reason="the reference encoder runs on torch")
    return pytest.importorskip("transformers", reason="values are compared with transformers' T5EncoderModel")


def reference_encoder(proj, **sizes):
    """A transformers T5EncoderModel whose random weights make every part of the computation matter."""
    transformers, torch = transformers_or_skip(), pytest.importorskip("torch")
    sizes = {"vocab_size": 301, "d_model": 37, "d_kv": 5, "d_ff": 53, "num_layers": 3, "num_heads": 7} | sizes
    torch.manual_seed(0)
    model = transformers.T5EncoderModel(transformers.T5Config(feed_forward_proj=proj, **sizes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.12 + ("layer_norm" in name))
            if "relative_attention_bias" in name:
                parameter.mul_(5)
    return model


def reference_values(model, ids, mask):
    import torch
    with torch.no_grad():
        out = model.double()(input_ids=torch.tensor(ids).long(), attention_mask=torch.tensor(mask).long())
    return out.last_hidden_state.float().numpy()


def ids_and_mask(vocab_size, batch=3, length=151):
    rng = np.random.default_rng(0)
    mask = np.arange(length) < np.array([length, 83, 2])[:batch, None]
    return np.where(mask, rng.integers(1, vocab_size, (batch, length)), 0).astype(np.int32), mask


def save_reference(model, folder, **options):
    model.save_pretrained(folder, **options)
    spiece = random_t5([], 0, vocab_size=301).tokenizer.serialized_model_proto()
    (folder / "spiece.model").write_bytes(spiece)


VARIANTS = {"v1.0": dict(proj="relu"), "v1.1": dict(proj="gated-gelu"),
            "other buckets": dict(proj="gated-gelu", relative_attention_num_buckets=10,
                                  relative_attention_max_distance=23, layer_norm_epsilon=1e-2, num_layers=1)}


# ---------------------------------------------------------------------------------------------------------------------
# T5: the encoder
# ---------------------------------------------------------------------------------------------------------------------

@reference
@pytest.mark.parametrize("variant", VARIANTS)
def test_t5_values_equal_transformers(variant, tmp_path):
    model = reference_encoder(**VARIANTS[variant])
    save_reference(model, tmp_path)
    t5 = load_t5(tmp_path)
    ids, mask = ids_and_mask(301)
    ours = np.asarray(jax.jit(t5_encoder.t5_encoder, static_argnums=1)(t5.params, t5.config, ids, mask))
    theirs = reference_values(model, ids, mask)
    assert ours.shape == (3, 151, 37) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-5)  # at masked positions too
    # What must matter does: else the comparison could not fail.
    for path in (("position_bias",), ("wo",), ("attention_norm",), ("final_norm",)):
        broken = jax.tree.map(lambda x: x, t5.params)
        (broken if len(path) == 1 else broken[path[0]])[path[-1]] *= 1.05
        assert np.abs(t5_encoder.t5_encoder(broken, t5.config, ids, mask) - theirs).max() > 1e-3, path


@reference
@pytest.mark.parametrize("buckets, distance", [(32, 128), (32, 127), (10, 23), (64, 1000), (7, 3), (4, 2)])
def test_position_buckets_equal_transformers(buckets, distance):
    import_t5 = transformers_or_skip().models.t5.modeling_t5.T5Attention._relative_position_bucket
    import torch
    length = 1300
    offset = torch.arange(length)[None, :] - torch.arange(length)[:, None]
    config = T5Config(9, 9, 9, 9, 9, 9, buckets, distance)
    theirs = import_t5(offset, num_buckets=buckets, max_distance=distance).numpy()
    np.testing.assert_array_equal(position_buckets(config, length), theirs)


def test_masked_tokens_do_not_matter():
    t5 = random_t5(CAPTIONS, 0)
    ids, mask = ids_and_mask(t5.config.vocab_size)
    other = np.where(mask, ids, ids[:, ::-1])
    a, b = (np.asarray(t5_encoder.t5_encoder(t5.params, t5.config, x, mask)) for x in (ids, other))
    np.testing.assert_array_equal(a[mask], b[mask])
    assert np.abs(a - b)[~mask].max() > 0.1
    nothing = t5_encoder.t5_encoder(t5.params, t5.config, ids, np.zeros_like(mask))
    assert np.isfinite(nothing).all()


def test_encode_does_not_depend_on_padding_or_batch():
    t5 = random_t5(CAPTIONS, 0)
    one, mask = encode(t5, CAPTIONS[:1], 61)
    many, _ = encode(t5, CAPTIONS[:3], 90)
    count = count_tokens(t5, CAPTIONS[0]) + 1
    assert mask.sum() == count <= 61 and one.shape == (1, 61, 64) and isinstance(one, np.ndarray)
    np.testing.assert_allclose(one[0, :count], many[0, :count], atol=1e-5)


def test_bfloat16_computation_is_close(tmp_path):
    save_t5(tmp_path, random_t5(CAPTIONS, 0))
    exact, mask = encode(load_t5(tmp_path), CAPTIONS, 64)
    half = load_t5(tmp_path, jnp.bfloat16)
    assert {x.dtype.name for x in jax.tree.leaves(half.params)} == {"bfloat16"}
    rounded, _ = encode(half, CAPTIONS, 64)
    error = np.sqrt(np.mean((rounded - exact)[mask]**2))  # embeddings have mean square 1
    assert rounded.dtype == np.float32 and 1e-4 < error < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# T5: text to tokens
# ---------------------------------------------------------------------------------------------------------------------

def unigram_without_bytes():
    """A sentencepiece model trained like the released T5s': no byte pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=model, vocab_size=400, hard_vocab_limit=False, pad_id=0,
        eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def reference_tokenizer(tokenizer, folder):
    transformers = transformers_or_skip()
    pytest.importorskip("google.protobuf", reason="transformers reads spiece.model with protobuf")
    (folder / "spiece.model").write_bytes(tokenizer.serialized_model_proto())
    return transformers.T5Tokenizer.from_pretrained(folder, local_files_only=True)


@reference
def test_token_ids_equal_transformers(tmp_path):
    tokenizer = unigram_without_bytes()
    reference = reference_tokenizer(tokenizer, tmp_path)
    for text in ORDINARY:
        ids, mask = tokenize(tokenizer, [text], 20000)
        assert ids[mask].tolist() == reference(text).input_ids, ascii(text)[:80]


@reference
def test_random_t5_token_ids_equal_transformers(tmp_path):
    t5 = random_t5(CAPTIONS, 0)
    reference = reference_tokenizer(t5.tokenizer, tmp_path)
    for text in ORDINARY:
        ids, mask = tokenize(t5, [text], 20000)
        pieces = [t5.tokenizer.id_to_piece(int(i)) for i in ids[mask]]
        if not any(piece.startswith("<0x") for piece in pieces):  # the reference has no bytes for T5
            assert ids[mask].tolist() == reference(text).input_ids, ascii(text)[:80]
        else:
            assert 2 not in ids[mask] and 2 in reference(text).input_ids


@pytest.mark.parametrize("text", ["</s>", "a</s>b", "<pad>", "<unk>", "<extra_id_0> x", "<0x41>", "▁</s>▁"])
def test_text_cannot_spell_control_tokens(text, tmp_path):
    for tokenizer in (unigram_without_bytes(), random_t5(CAPTIONS, 0).tokenizer):
        ids, mask = tokenize(tokenizer, [text], 99)
        assert not np.isin(ids[mask][:-1], [0, 1, 2]).any() and ids[mask][-1] == 1
        assert tokenizer.decode(ids[mask][:-1].tolist()).strip() == text.strip("▁")
        assert all(tokenizer.id_to_piece(int(i)) != "<0x41>" for i in ids[mask])


@reference
def test_reference_parses_control_tokens_where_we_do_not(tmp_path):
    tokenizer = unigram_without_bytes()
    reference = reference_tokenizer(tokenizer, tmp_path)
    assert reference("a</s>b").input_ids.count(1) == 2
    assert tokenize(tokenizer, ["a</s>b"], 99)[0].tolist()[0].count(1) == 1


def test_truncation_keeps_the_end_token():
    t5 = random_t5(CAPTIONS, 0)
    full, _ = tokenize(t5, ["jazz " * 99], 1000)
    count = count_tokens(t5, "jazz " * 99)
    for length in (1, 2, 7, count, count + 1, count + 2):
        ids, mask = tokenize(t5, ["jazz " * 99, "", "a"], length)
        assert ids.shape == mask.shape == (3, length) and ids.dtype == np.int32 and mask.dtype == bool
        kept = min(length, count + 1)
        assert mask[0].sum() == kept and ids[0, kept - 1] == 1 and (ids[0, kept:] == 0).all()
        np.testing.assert_array_equal(ids[0, :kept - 1], full[0, :kept - 1])
        assert mask[1].sum() == 1 and ids[1, 0] == 1


def test_tokenize_says_what_it_cannot_take():
    t5 = random_t5([], 0)
    for texts, length in (("a string", 8), (["a"], 0)):
        with pytest.raises(ValueError) as error:
            tokenize(t5, texts, length)
        assert len(str(error.value).splitlines()) == 1
    np.testing.assert_array_equal(tokenize(t5, ["lone \ud800 one"], 20), tokenize(t5, ["lone ? one"], 20))


# ---------------------------------------------------------------------------------------------------------------------
# T5: random T5
# ---------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("captions", [[], [""], ["   "], ["techno"], ["音楽"], ["x" * 10000], ["a\nb\0c\td"], CAPTIONS])
def test_random_t5_takes_any_captions(captions):
    t5, again = (random_t5(captions, 3) for _ in range(2))
    assert t5.tokenizer.serialized_model_proto() == again.tokenizer.serialized_model_proto()
    jax.tree.map(np.testing.assert_array_equal, t5.params, again.params)
    assert t5.tokenizer.get_piece_size() <= t5.config.vocab_size <= 1000
    text = "any script: 音楽 موسيقى 🎵"
    ids, mask = tokenize(t5, [text], 200)
    assert 2 not in ids[mask] and t5.tokenizer.decode(ids[mask][:-1].tolist()) == text


def test_random_t5_tells_texts_apart():
    t5 = random_t5(CAPTIONS, 0)
    embeddings, mask = encode(t5, CAPTIONS, 64)
    assert abs(np.mean(embeddings[mask]**2) - 1) < 0.01
    mean = np.stack([e[m].mean(0) for e, m in zip(embeddings, mask)])
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    assert (mean @ mean.T - np.eye(len(mean))).max() < 0.9
    # Context counts, not the token alone: the same word in another sentence.
    (a, b), _ = encode(t5, ["jazz piano", "jazz drums and guitar"], 16)
    assert 0.05 < np.sqrt(np.mean((a[0] - b[0])**2)) < 1
    assert not np.array_equal(random_t5(CAPTIONS, 1).params["embed"], t5.params["embed"])


# ---------------------------------------------------------------------------------------------------------------------
# T5: folders
# ---------------------------------------------------------------------------------------------------------------------

@reference
@pytest.mark.parametrize("sizes", [{}, dict(d_model=13, d_kv=3, num_heads=5, d_ff=17, num_layers=3)])
def test_saved_t5_loads_here_and_in_transformers(sizes, tmp_path):
    t5 = random_t5(CAPTIONS, 0, **sizes)
    save_t5(tmp_path / "new" / "t5", t5)
    again = load_t5(tmp_path / "new" / "t5")
    assert read_safetensors(tmp_path / "new" / "t5" / "model.safetensors")[1] == {"format": "pt"}  # transformers 4
    assert again.config == t5.config
    jax.tree.map(np.testing.assert_array_equal, again.params, t5.params)
    transformers = transformers_or_skip()
    model, info = transformers.T5EncoderModel.from_pretrained(
        tmp_path / "new" / "t5", local_files_only=True, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids, mask = tokenize(t5, CAPTIONS, 140)
    np.testing.assert_allclose(encode(again, CAPTIONS, 140)[0], reference_values(model.eval(), ids, mask), atol=1e-5)


@reference
@pytest.mark.parametrize("kind", ["bfloat16", "float16", "shards", "no index", "whole model", "embed_tokens only"])
def test_folders_that_transformers_writes(kind, tmp_path):
    model = reference_encoder("gated-gelu")
    ids, mask = ids_and_mask(301)
    options, tolerance = {}, 1e-5
    if kind in ("bfloat16", "float16"):  # rounded weights in float32 arithmetic, here and there
        import torch
        model = model.to(getattr(torch, kind))
    if kind in ("shards", "no index"):
        options = dict(max_shard_size="20KB")
    if kind == "whole model":
        whole = transformers_or_skip().T5ForConditionalGeneration(model.config).eval()
        whole.shared.load_state_dict(model.shared.state_dict())
        whole.encoder.load_state_dict(model.encoder.state_dict())
        save_reference(whole, tmp_path)
    else:
        save_reference(model, tmp_path, **options)
    if kind == "no index":
        (tmp_path / "model.safetensors.index.json").unlink()
    if kind == "embed_tokens only":
        tensors, metadata = read_safetensors(tmp_path / "model.safetensors")
        tensors["encoder.embed_tokens.weight"] = tensors.pop("shared.weight")
        write_safetensors(tmp_path / "model.safetensors", tensors, metadata)
    if kind in ("shards", "no index"):
        shards = sorted(tmp_path.glob("model-*.safetensors"))
        assert len(shards) > 2 and not (tmp_path / "model.safetensors").exists()
    t5 = load_t5(tmp_path)
    assert {x.dtype.name for x in jax.tree.leaves(t5.params)} == {"float32"}
    ours = t5_encoder.t5_encoder(t5.params, t5.config, ids, mask)
    np.testing.assert_allclose(ours, reference_values(model.float(), ids, mask), atol=tolerance)
    if kind in ("shards", "no index"):
        shards[1].unlink()
        with pytest.raises(ValueError, match=rf"{shards[1].name}: this shard is missing"):
            load_t5(tmp_path)


@reference
def test_shards_of_the_decoder_alone_may_be_absent(tmp_path):
    model = transformers_or_skip().T5ForConditionalGeneration(reference_encoder("gated-gelu").config)
    save_reference(model, tmp_path, max_shard_size="20KB")
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in files.items() if name == "shared.weight" or name.startswith("encoder.")}
    assert set(files.values()) - needed
    for file in set(files.values()) - needed:
        (tmp_path / file).unlink()
    same(np.asarray(load_t5(tmp_path).params["embed"]), model.shared.weight.detach().numpy())


def edit_config(folder, **entries):
    config = json.loads((folder / "config.json").read_text()) | entries
    config = {key: value for key, value in config.items() if value != "absent"}
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder, edit):
    tensors, metadata = read_safetensors(folder / "model.safetensors")
    edit(tensors)
    write_safetensors(folder / "model.safetensors", tensors, metadata)


def only_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")


BROKEN = {
    "model_type is 'bert'": lambda f: edit_config(f, model_type="bert"),
    "model_type is None": lambda f: edit_config(f, model_type="absent"),
    "d_model is missing": lambda f: edit_config(f, d_model="absent"),
    "num_heads is missing or not a number": lambda f: edit_config(f, num_heads=-4),
    "num_layers is missing or not a number": lambda f: edit_config(f, num_layers=2.5),
    "d_ff is missing or not a number": lambda f: edit_config(f, d_ff=True),
    "layer_norm_epsilon is missing or": lambda f: edit_config(f, layer_norm_epsilon=float("nan")),
    "relative_attention_num_buckets is missing or not": lambda f: edit_config(f, relative_attention_num_buckets=3),
    "feed_forward_proj 'gated-silu'; give a T5": lambda f: edit_config(f, feed_forward_proj="gated-silu"),
    r"feed_forward_proj \['relu'\]": lambda f: edit_config(f, feed_forward_proj=["relu"]),
    "tensor encoder.block.0.layer.1.DenseReluDense.wi.weight is missing": lambda f: edit_config(f, feed_forward_proj="relu"),
    "tensor encoder.block.2.layer.0.* is missing": lambda f: edit_config(f, num_layers=3),
    "more layers than the 1": lambda f: edit_config(f, num_layers=1),
    r"shared.weight is float32 .*, config.json asks": lambda f: edit_config(f, vocab_size=1001),
    r"spiece.model: not of this T5": lambda f: edit_config(f, vocab_size=200),
    r"config.json: bad JSON": lambda f: (f / "config.json").write_text("{"),
    r"config.json: bad JSON ": lambda f: (f / "config.json").write_text("[" * 100000),
    r"config.json: bad JSON \(it is no object\)": lambda f: (f / "config.json").write_text("[]"),
    r"spiece.model: no sentencepiece model; put": lambda f: (f / "spiece.model").rename(f / "tokenizer.json"),
    r"spiece.model: no sentencepiece model": lambda f: (f / "spiece.model").write_bytes(b"not a model"),
    r"spiece.model: not of this T5: 0 pieces": lambda f: (f / "spiece.model").write_bytes(b""),
    r"no safetensors of a T5": lambda f: (f / "model.safetensors").unlink(),
    r"pytorch_model.bin: a pickle .*save_pretrained": only_pickle,
    r"tensor encoder.final_layer_norm.weight is missing": lambda f: edit_tensors(f, lambda t: t.pop("encoder.final_layer_norm.weight")),
    r"final_layer_norm.weight is int8": lambda f: edit_tensors(
        f, lambda t: t.update({"encoder.final_layer_norm.weight": np.ones(64, np.int8)})),
}


@pytest.mark.parametrize("words", BROKEN)
def test_broken_folders_are_named_in_one_line(words, tmp_path, t5_folder):
    for name in ("config.json", "spiece.model", "model.safetensors"):
        (tmp_path / name).write_bytes((t5_folder / name).read_bytes())
    load_t5(tmp_path)
    BROKEN[words](tmp_path)
    with pytest.raises(ValueError, match=words) as error:
        load_t5(tmp_path)
    assert str(error.value).startswith(str(tmp_path)) and len(str(error.value).splitlines()) == 1


@pytest.fixture(scope="session")
def t5_folder(tmp_path_factory):
    save_t5(folder := tmp_path_factory.mktemp("t5"), random_t5(CAPTIONS, 0))
    return folder


def test_early_config_has_defaults(tmp_path, t5_folder):
    save_t5(tmp_path, random_t5([], 0))
    edit_config(tmp_path, feed_forward_proj="absent", relative_attention_max_distance="absent",
                layer_norm_epsilon="absent")
    config = t5_encoder.read_config(tmp_path / "config.json")
    assert (config.feed_forward_proj, config.relative_attention_max_distance, config.layer_norm_epsilon) == \
        ("relu", 128, 1e-6)


def test_absent_folder_is_not_downloaded():
    with pytest.raises(ValueError, match="google/t5-v1_1-small: no such folder"):
        load_t5("google/t5-v1_1-small")


@reference
def test_pickle_command_converts(tmp_path):
    """The command that the message names is one that works."""
    transformers_or_skip()
    import torch
    model = reference_encoder("relu", num_layers=1)
    save_reference(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError) as error:
        load_t5(tmp_path)
    code = str(error.value).split('-c "')[1].rstrip('"')
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    load_t5(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# T5: safetensors
# ---------------------------------------------------------------------------------------------------------------------

def some_tensors():
    rng = np.random.default_rng(0)
    tensors = {dtype: (rng.standard_normal((3, 5)) * 9).astype(dtype) for dtype in (
        "float32", "float16", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
        "bool", jnp.bfloat16)}
    tensors = {np.dtype(dtype).name: value for dtype, value in tensors.items()}
    return tensors | {"scalar": np.float32(2.5).reshape(()), "empty": np.zeros((0, 3), np.int16), "é/名\n": np.ones(1),
                      "jax": jnp.arange(7, dtype=jnp.bfloat16), "strided": np.arange(12.0).reshape(3, 4).T[::2]}


def same(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_safetensors_round_trip(tmp_path):
    tensors, metadata = some_tensors(), {"step": "7", "note": 'q"uote \u00e9 "crc32":"00000000"'}
    write_safetensors(tmp_path / "a.safetensors", tensors, metadata)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    read, meta = read_safetensors(tmp_path / "a.safetensors")
    assert meta == metadata and read.keys() == tensors.keys()
    for name in tensors:
        same(read[name], tensors[name])
        assert read[name].flags.aligned and not read[name].flags.owndata
    read, _ = read_safetensors(tmp_path / "a.safetensors", keep=lambda name: name.startswith("u"))
    assert set(read) == {"uint8", "uint16", "uint32", "uint64"}
    write_safetensors(tmp_path / "b.safetensors", {"x": np.arange(3, dtype=">f4")}, {})
    same(read_safetensors(tmp_path / "b.safetensors")[0]["x"], np.arange(3, dtype="<f4"))
    write_safetensors(tmp_path / "b.safetensors", {}, {})  # in place of the old one
    assert read_safetensors(tmp_path / "b.safetensors") == ({}, {})


@reference
def test_safetensors_package_reads_ours(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="the format is compared with its own package")
    tensors = {k: v for k, v in some_tensors().items() if k not in ("bfloat16", "jax")}
    write_safetensors(tmp_path / "a", tensors, {"format": "pt"})
    read = safetensors.load_file(tmp_path / "a")
    assert read.keys() == tensors.keys()
    for name in tensors:
        same(read[name], tensors[name])
    torch = pytest.importorskip("torch", reason="bfloat16 is read through torch")
    import safetensors.torch
    write_safetensors(tmp_path / "a", some_tensors(), {"format": "pt"})
    read = safetensors.torch.load_file(tmp_path / "a")
    same(read["jax"].float().numpy(), np.arange(7, dtype=np.float32))
    assert read["bfloat16"].dtype == torch.bfloat16
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        crc = file.metadata()["crc32"]
    data = (tmp_path / "a").read_bytes()
    assert f"{zlib.crc32(data.replace(crc.encode(), b'0' * 8, 1)):08x}" == crc
    assert struct.unpack("<Q", data[:8])[0] % 8 == 0


@reference
def test_we_read_the_safetensors_package(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy", reason="the format is compared with its own package")
    tensors = {k: np.ascontiguousarray(v) for k, v in some_tensors().items() if k not in ("bfloat16", "jax", "scalar")}
    for metadata in (None, {"a": "b"}):
        safetensors.save_file(tensors, tmp_path / "a", metadata)
        read, meta = read_safetensors(tmp_path / "a")
        assert meta == (metadata or {}) and read.keys() == tensors.keys()
        for name in tensors:
            same(read[name], tensors[name])


def test_unstorable_things_leave_no_file(tmp_path):
    for tensors, metadata in (({"x": np.zeros(2, complex)}, {}), ({"x": np.zeros(2)}, {"a": 1})):
        with pytest.raises(ValueError) as error:
            write_safetensors(tmp_path / "a", tensors, metadata)
        assert str(error.value).startswith(str(tmp_path / "a")) and not list(tmp_path.iterdir())
    write_safetensors(tmp_path / "a", {"x": np.arange(4)}, {})

    class Interrupted:  # an array that fails when its turn comes, after others were written
        shape, dtype = (3,), np.dtype("float32")

        def __array__(self, *args, **kwargs):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_safetensors(tmp_path / "a", {"a": np.ones(9), "x": Interrupted()}, {})
    assert os.listdir(tmp_path) == ["a"]  # the old file, whole
    same(read_safetensors(tmp_path / "a")[0]["x"], np.arange(4))
    with pytest.raises(OSError, match="nowhere"):
        write_safetensors(tmp_path / "nowhere" / "a", {}, {})
    with pytest.raises(OSError, match="absent"):
        read_safetensors(tmp_path / "absent")


def raises_one_line(path):
    with pytest.raises(ValueError) as error:
        read_safetensors(path)
    message = str(error.value)
    assert message.startswith(f"{path}: ") and len(message.splitlines()) == 1 and len(message) < 500
    return message


def test_every_damage_to_a_written_file_is_found(tmp_path):
    path = tmp_path / "a"
    write_safetensors(path, {"w": np.arange(9, dtype=np.float32), "b": jnp.ones(5, jnp.bfloat16),
                             "é": np.zeros((2, 1), bool)}, {"step": "3", "note": "tab\tésc\x1f"})
    good = path.read_bytes()
    for bit in range(len(good) * 8):  # each single bit of the file
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        raises_one_line(path)
    for length in range(len(good)):
        path.write_bytes(good[:length])
        raises_one_line(path)
    for tail in (b"\0", b" ", b"{}", good):
        path.write_bytes(good + tail)
        raises_one_line(path)
    rng = np.random.default_rng(0)
    for _ in range(1000):  # runs of noise, zeros, and pieces in another place
        bad, at, length = bytearray(good), rng.integers(len(good)), rng.integers(1, 64)
        source = rng.integers(len(good))
        bad[at:at + length] = (rng.bytes(length), bytes(length), good[source:source + length])[rng.integers(3)]
        if bad != good:
            path.write_bytes(bad)
            raises_one_line(path)
    path.write_bytes(good)
    read_safetensors(path)


F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
MALFORMED = {  # name: (header or its bytes, data bytes, announced length or None for the true one)
    "empty file": (None, b"", None), "three bytes": (None, b"abc", None),
    "absurd length": ({}, b"", 2**63 + 5), "length beyond the file": ({}, b"", 999), "length 0": (b"", b"", 0),
    "no JSON": (b"{nonsense", b"", None), "no UTF-8": (b'{"\xff": 1}', b"", None),
    "an array": (b"[]", b"", None), "a number": (b"7", b"", None), "null": (b"null", b"", None),
    "deep JSON": (b'{"a":' + b"[" * 200_000, b"", None), "deep object": (b'{"a":' * 100_000, b"", None),
    "huge integer": (b'{"a":{"dtype":"F32","shape":[' + b"9" * 9999 + b'],"data_offsets":[0,8]}}', bytes(8), None),
    "name twice": (b'{"a":%s,"a":%s}' % ((json.dumps(F32).encode(),) * 2), bytes(8), None),
    "key twice": (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', bytes(8), None),
    "metadata no object": ({"__metadata__": 3}, b"", None),
    "metadata no strings": ({"__metadata__": {"a": [1]}}, b"", None),
    "entry no object": ({"a": 3}, bytes(8), None), "entry null": ({"a": None}, bytes(8), None),
    "no offsets": ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8), None),
    "unknown dtype": ({"a": F32 | {"dtype": "F33"}}, bytes(8), None),
    "dtype no string": ({"a": F32 | {"dtype": ["F32"]}}, bytes(8), None),
    "negative shape": ({"a": F32 | {"shape": [-2]}}, bytes(8), None),
    "two negative": ({"a": F32 | {"shape": [-2, -1]}}, bytes(8), None),
    "fraction": ({"a": F32 | {"shape": [2.0]}}, bytes(8), None),
    "boolean": ({"a": F32 | {"shape": [2, True]}}, bytes(8), None),
    "shape a string": ({"a": F32 | {"shape": "2"}}, bytes(8), None),
    "infinite": (b'{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,8]}}', bytes(8), None),
    "huge shape": ({"a": F32 | {"shape": [2**40, 2**40]}}, bytes(8), None),
    "huge empty shape": ({"a": F32 | {"shape": [0, 2**47, 2**47], "data_offsets": [0, 0]}}, b"", None),
    "many dimensions": ({"a": F32 | {"shape": [2] + [1] * 70}}, bytes(8), None),
    "shape and offsets differ": ({"a": F32 | {"shape": [3]}}, bytes(8), None),
    "offsets swapped": ({"a": F32 | {"data_offsets": [8, 0]}}, bytes(8), None),
    "offsets negative": ({"a": F32 | {"data_offsets": [-8, 0]}}, bytes(8), None),
    "three offsets": ({"a": F32 | {"data_offsets": [0, 8, 8]}}, bytes(8), None),
    "offset out of range": ({"a": F32 | {"shape": [2**40], "data_offsets": [0, 2**42]}}, bytes(8), None),
    "overlap": ({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12), None),
    "same place": ({"a": F32, "b": F32}, bytes(8), None),
    "hole": ({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, bytes(20), None),
    "hole at the start": ({"a": F32 | {"data_offsets": [4, 12]}}, bytes(12), None),
    "truncated": ({"a": F32}, bytes(7), None), "longer": ({"a": F32}, bytes(9), None),
    "crc": ({"__metadata__": {"crc32": "00000000"}, "a": F32}, bytes(8), None),
    "crc no digits": ({"__metadata__": {"crc32": "\ud800"}, "a": F32}, bytes(8), None),
    "crc absent": ({"__metadata__": {"crc32_of": "x"}, "a": F32}, bytes(8), None),
    "newline in the name": ({"a\nb" * 999: F32 | {"dtype": "x\ny" * 999}}, bytes(8), None),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_safetensors(case, tmp_path):
    header, data, length = MALFORMED[case]
    if header is not None:
        header = header if isinstance(header, bytes) else json.dumps(header).encode()
        data = struct.pack("<Q", len(header) if length is None else length) + header + data
    (tmp_path / "a").write_bytes(data)
    raises_one_line(tmp_path / "a")
    if case != "huge empty shape":  # which only numpy's limits rule out
        with pytest.raises(ValueError):  # also where no tensor is wanted
            read_safetensors(tmp_path / "a", keep=lambda name: False)


def test_header_over_the_limit(tmp_path):
    with open(tmp_path / "a", "wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_100)  # sparse: takes no space
    assert "no safetensors file" in raises_one_line(tmp_path / "a")


def test_sound_handmade_safetensors(tmp_path):
    """The counterpart of the malformed ones: what they are varied from is read."""
    for header in ({"a": F32}, {"__metadata__": {"a": "b"}, "a": F32, "b": F32 | {"shape": [0], "data_offsets": [8, 8]}}):
        text = json.dumps(header).encode()
        (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<ff", 1, 2))
        assert read_safetensors(tmp_path / "a")[0]["a"].tolist() == [1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# train.py: data
# ---------------------------------------------------------------------------------------------------------------------


def write_tone(path, seconds=2.0, rate=16_000, channels=1, hz=440.0, subtype=None):
    t = np.arange(round(seconds * rate)) / rate
    soundfile.write(path, 0.5 * np.sin(2 * np.pi * hz * t)[:, None].repeat(channels, 1), rate, subtype)
    return path


def manifest(folder, *entries):
    folder.mkdir(exist_ok=True)
    lines = [e if isinstance(e, str) else json.dumps(e) for e in entries]
    (folder / "captions.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder


def exits(capfd, main, *argv, status=2):
    """Runs a script's main, which must end with one line on stderr and no traceback; returns that line."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    err = capfd.readouterr().err
    assert stop.value.code == status and "Traceback" not in err
    return err


def test_a_track_gives_six_clips_that_do_not_overlap(tmp_path):
    """Sec. 3.6, from 400 s down to less than a clip."""
    for seconds, n in [(400, 6), (181, 6), (179, 5), (61, 2), (59, 1), (3, 1)]:
        clips = train.track_clips(train.Track(write_tone(tmp_path / f"{seconds}.wav", seconds, rate=2_000), (), ()))
        starts = [clip.start for clip in clips] + [max(seconds, 30)]
        assert len(clips) == n and starts[0] == 0 and min(np.diff(starts)) >= 30


@pytest.mark.parametrize("suffix, rate, channels", [("wav", 8_000, 1), ("flac", 44_100, 2), ("ogg", 48_000, 2), ("mp3", 22_050, 1), ("aiff", 11_025, 3)])
def test_audio_of_any_kind_becomes_the_same_mono_tone(tmp_path, suffix, rate, channels):
    path = write_tone(tmp_path / f"a.{suffix}", 2.0, rate, channels, hz=440)
    audio = train.load_audio(path, 0.5, 1.0, 16_000)
    assert audio.shape == (16_000,) and audio.dtype == np.float32
    spectrum = np.abs(np.fft.rfft(audio))
    assert spectrum.argmax() == 440 and 0.3 < np.abs(audio[4000:12000]).max() < 0.7


def test_short_files_are_padded_with_silence(tmp_path):
    audio = train.load_audio(write_tone(tmp_path / "a.wav", 1.0), 0.0, 30, 16_000)
    assert audio.shape == (480_000,) and np.abs(audio[:15_000]).max() > 0.4 and np.abs(audio[20_000:]).max() < 1e-2


def test_text_batch_is_long_prompts_and_packed_tags():
    """Sec. 4.1; words stand for tokens here."""
    track = train.Track(None, ("one long prompt", "another"), ("a b", "c", "d e f", "g"))
    count = lambda text: len(text.split())
    assert train.text_batch(track, 5, count) == ["one long prompt", "another", "a b, c", "d e f, g"]
    assert train.text_batch(track, 100, count)[2:] == ["a b, c, d e f, g"]


def test_examples_are_a_pure_function_of_seed_and_index(tmp_path):
    """What makes a resumed run see the data that it would have seen."""
    clips = [train.Clip(train.Track(write_tone(tmp_path / f"{k}.wav", 3, hz=100 * k), (f"{k}",), ()), 0.0) for k in range(1, 8)]
    model = n2m.tiny(n2m.MODELS["waveform_cascader"])
    make = functools.partial(train.make_example, clips, model, 5, lambda track: list(track.long), {})
    first = [make(i) for i in range(14)]
    batches = train.batches(make, 2, 8)
    again = next(batches) + next(batches)
    batches.close()
    for a, b in zip(first[8:12], again):
        np.testing.assert_array_equal(a.audio, b.audio)
        assert a.text == b.text
    assert sorted(e.text for e in first[:7]) == sorted(e.text for e in first[7:]) == list("1234567")  # epochs
    assert [e.text for e in first[:7]] != [e.text for e in first[7:]]  # in another order
    other = functools.partial(train.make_example, clips, model, 6, lambda track: list(track.long), {})
    assert [other(i).text for i in range(7)] != [e.text for e in first[:7]]


def test_bad_files_are_reported_counted_and_skipped(tmp_path, capfd):
    good = write_tone(tmp_path / "good.wav")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.flac").write_text("not audio")
    soundfile.write(tmp_path / "zero.wav", np.zeros(0), 16_000)
    soundfile.write(tmp_path / "nan.wav", np.full(32_000, np.nan), 16_000, "FLOAT")
    cut = write_tone(tmp_path / "cut.flac", 20.0)
    cut.write_bytes(cut.read_bytes()[:-10_000])
    names = ["good", "empty", "zero", "nan"]
    folder = manifest(tmp_path, *({"audio": f"{n}.wav", "long": [n]} for n in names), {"audio": "text.flac", "long": "x"},
                      {"audio": "cut.flac", "short": ["cut"]}, {"audio": "absent.wav", "long": ["x"]}, '{"audio": "good.wav"',
                      "[1, 2]", {"audio": "good.wav", "long": [3]}, {"audio": "good.wav"}, "[" * 100_000)
    clips = train.find_clips(train.read_tracks(folder, needs_text=True))
    err = capfd.readouterr().err
    for word in ("absent.wav", ":8:", ":9:", ":10:", ":11:", ":12:", "empty.wav", "zero.wav", "text.flac"):
        assert word in err, word
    assert {clip.track.path.name for clip in clips} == {"good.wav", "nan.wav", "cut.flac"}
    bad = {}
    model = n2m.tiny(n2m.MODELS["spectrogram_generator"])
    for i in range(20):
        assert train.make_example(clips, model, 0, lambda track: list(track.long), bad, i).text == "good"
    assert {path.name for path in bad} == {"nan.wav", "cut.flac"}
    err = capfd.readouterr().err
    assert err.count("nan.wav") == err.count("cut.flac") == 1 and good.name not in err


def test_txt_captions(tmp_path, capfd):
    write_tone(tmp_path / "a.wav"), write_tone(tmp_path / "b.wav")
    (tmp_path / "a.txt").write_text("first caption\n\nsecond caption\n")
    (tmp_path / "c.txt").write_text("about nothing")
    (track,) = train.read_tracks(tmp_path, needs_text=True)
    assert track == (tmp_path / "a.wav", ("first caption", "second caption"), ())
    err = capfd.readouterr().err
    assert "b.wav: audio without a caption" in err and "c.txt: a caption without audio" in err
    assert len(train.read_tracks(tmp_path, needs_text=False)) == 2  # the vocoder needs no captions


# ---------------------------------------------------------------------------------------------------------------------
# train.py: optimiser, checkpoints, the run
# ---------------------------------------------------------------------------------------------------------------------


tiny = n2m.tiny  # before a test replaces it


def small(name, **training):
    """A model on the code path of all the others, small enough to compile and train in a test."""
    model = tiny(n2m.MODELS[name])
    unet = dataclasses.replace(model.unet, base_dimension=8, head_width=4, text_width=64, attention_heads=2 * (model.unet.attention_heads > 0))
    inference = dataclasses.replace(model.inference, steps=3)
    return dataclasses.replace(model, unet=unet, inference=inference, training=dataclasses.replace(model.training, **training))


def test_learning_rate_and_ema_of_section_4_1():
    c = n2m.MODELS["waveform_generator"].training
    tx = train.optimizer(c)
    w = jnp.zeros(1)
    for step, rate in [(0, 0.0), (5_000, 0.5e-4), (10_000, 1e-4), (1_255_000, 0.5e-4), (2_500_000, 0.0)]:
        adam, schedule = tx.init(w)
        state = (adam._replace(count=jnp.int32(1_000_000)), schedule._replace(count=jnp.int32(step)))
        update, _ = tx.update(jnp.ones(1), (adam._replace(mu=jnp.ones(1), nu=jnp.ones(1), count=jnp.int32(1_000_000)), state[1]))
        assert abs(-float(update[0]) - rate) < 1e-9


def test_accumulation_averages_gradients(monkeypatch):
    """Two halves of a batch with the loss of the whole: the same update."""
    model = small("superresolution_cascader", batch_size=4)
    monkeypatch.setattr(train, "gradients", lambda params, model, key, audio, *_: (
        jax.tree.map(lambda p: jnp.full_like(p, audio.mean()), params), (jnp.asarray(audio.mean(1)), jnp.asarray(audio.mean(1)))))
    audio = np.arange(8.0).reshape(4, 2)
    runs = [train.train_step(train.init_state(model, 0), model, 0, audio, None, None, n, jnp.float32, False) for n in (1, 2, 4)]
    for state, losses, _, norm in runs[1:]:
        np.testing.assert_allclose(norm, runs[0][3], rtol=1e-5)
        np.testing.assert_array_equal(losses, runs[0][1])
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-9), state.params, runs[0][0].params)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for k in range(3):
        write_tone(folder / f"{k}.wav", 6.0, hz=200 * (k + 1))
    return manifest(folder, *({"audio": f"{k}.wav", "long": [f"a tone of {k} hundred hertz"], "short": ["tone"]} for k in range(3)))


@pytest.fixture
def small_models(monkeypatch):
    monkeypatch.setattr(n2m, "tiny", lambda model: small(model.name))


def run_train(*argv):
    train.main([str(a) for a in argv])


def test_a_resumed_run_is_the_uninterrupted_run_bit_for_bit(tmp_path, data, small_models):
    common = ["waveform_cascader", "--tiny", "--data", data, "--batch-size", 2, "--log-every", 1]
    run_train(*common, "--out", tmp_path / "whole", "--steps", 5)
    run_train(*common, "--out", tmp_path / "parts", "--steps", 2, "--seed", 0)
    with (tmp_path / "parts/waveform_cascader/log.jsonl").open("a") as log:
        log.write('{"step": 3, "loss": 9}\n{"step"')  # what a killed run leaves behind
    run_train(*common, "--out", tmp_path / "parts", "--steps", 5, "--resume")
    whole, parts = ((tmp_path / d / "waveform_cascader") for d in ("whole", "parts"))
    a, b = (train.checkpoints(d)[-1] for d in (whole, parts))
    assert a.name == b.name == "checkpoint-00000005.safetensors"
    tensors_a, tensors_b = (t5_encoder.read_safetensors(p)[0] for p in (a, b))
    assert tensors_a.keys() == tensors_b.keys()
    for name in tensors_a:
        np.testing.assert_array_equal(tensors_a[name], tensors_b[name], err_msg=name)
    logs = [[json.loads(line) for line in (d / "log.jsonl").read_text().splitlines()] for d in (whole, parts)]
    assert [e["step"] for e in logs[1]] == [1, 2, 3, 4, 5]
    assert [e["loss"] for e in logs[0]] == [e["loss"] for e in logs[1]]


def test_what_a_checkpoint_refuses(tmp_path, capfd):
    model = small("superresolution_cascader")
    folder = tmp_path / model.name
    folder.mkdir()
    metadata = {"seed": 3, "index": 12, "t5": None, "t5_fingerprint": None}
    state = train.init_state(model, 3)
    for step in (1, 2, 3):
        path = train.save_checkpoint(folder, state._replace(step=jnp.int32(step)), model, metadata)
    assert [p.name[-13:-12] for p in train.checkpoints(folder)] == ["2", "3"]  # the last two are kept
    loaded, params, meta = train.load_model(tmp_path, model.name)
    assert loaded == model and meta == metadata
    jax.tree.map(np.testing.assert_array_equal, params, state.ema)
    raw = path.read_bytes()
    for broken in (raw[:-1], raw[: len(raw) // 2], raw[:40_000] + bytes([raw[40_000] ^ 4]) + raw[40_001:], b"", raw.replace(b'"seed"', b'"need"', 1)):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=path.name) as error:
            train.load_model(tmp_path, model.name)
        assert "\n" not in str(error.value)
    path.write_bytes(raw)
    (tmp_path / "spectrogram_vocoder").mkdir()
    (tmp_path / "spectrogram_vocoder" / path.name).write_bytes(raw)
    with pytest.raises(ValueError, match="of superresolution_cascader, not of spectrogram_vocoder"):
        train.load_model(tmp_path, "spectrogram_vocoder")


def test_training_refuses_in_one_line(tmp_path, data, capfd, small_models):
    (tmp_path / "empty").mkdir()
    fails = functools.partial(exits, capfd, train.main)
    base = ["waveform_generator", "--out", tmp_path / "runs", "--tiny"]
    assert "no such folder" in fails(*base, "--data", tmp_path / "absent")
    assert "no audio with a caption" in fails(*base, "--data", tmp_path / "empty")
    assert "no such file" in fails(*base, "--overfit", tmp_path / "absent.wav")
    assert "--data" in fails(*base)
    assert "MODEL" in fails("mulan", *base[1:], "--data", data)
    assert "--batch-size" in fails(*base, "--data", data, "--batch-size", 0)
    assert "does not divide" in fails(*base, "--data", data, "--accumulate", 3)
    assert "--resume" in fails(*base, "--data", data, "--resume")
    assert "--noise-schedule" in fails(*base, "--data", data, "--noise-schedule", "x")
    assert "absent" in fails(*base, "--data", data, "--t5", tmp_path / "absent")
    (tmp_path / "file").touch()
    assert "file" in fails(*base[:1], "--out", tmp_path / "file", "--tiny", "--data", data)
    assert not (tmp_path / "runs" / "waveform_generator").exists()
    only_bad = manifest(tmp_path / "bad", {"audio": "a.wav", "long": ["x"]})
    (only_bad / "a.wav").write_bytes(b"RIFF....WAVE")
    assert "nothing to train on" in fails(*base, "--data", only_bad)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, data, capfd, small_models):
    common = ["superresolution_cascader", "--tiny", "--data", data, "--out", tmp_path, "--batch-size", 2]
    run_train(*common, "--steps", 2)
    err = exits(capfd, train.main, *common, "--resume", "--steps", 9, "--learning-rate", 1e30, "--warmup-steps", 0, status=1)
    assert "not finite" in err and "step " in err and "checkpoint-00000002" in err
    assert [p.name for p in train.checkpoints(tmp_path / common[0])] == ["checkpoint-00000002.safetensors"]


def test_memorise_kill_resume_sample(tmp_path):
    """One clip memorised by train.py, killed in the middle and resumed; then sampled, it is the clip."""
    t = np.arange(round(1.28 * 3_200)) / 3_200
    notes = 0.3 * np.sin(2 * np.pi * np.array([220, 330, 262, 440])[(t / 0.32).astype(int)] * t) * np.exp(-4 * (t % 0.32))
    soundfile.write(tmp_path / "clip.wav", notes, 3_200, "FLOAT")
    command = [sys.executable, "train.py", "waveform_generator", "--tiny", "--overfit", tmp_path / "clip.wav", "--out", tmp_path / "runs",
               "--seconds", "1.28", "--steps", "240", "--decay-steps", "300", "--warmup-steps", "20", "--save-every", "40"]
    folder = tmp_path / "runs" / "waveform_generator"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        while run.poll() is None and len(train.checkpoints(folder)) < 2:
            time.sleep(0.05)
        run.kill()
    assert run.returncode == -signal.SIGKILL and int(train.checkpoints(folder)[-1].stem[-8:]) < 240
    subprocess.run([*command, "--resume"], check=True, stdout=subprocess.DEVNULL)

    model, params, _ = train.load_model(tmp_path / "runs", "waveform_generator")
    t5 = t5_encoder.load_t5(tmp_path / "runs" / "t5")
    text, text_mask = t5_encoder.encode(t5, ["clip"], model.training.token_length)
    keys = jax.random.split(jax.random.key(9), 2)
    condition = n2m.Condition(text=jnp.repeat(text, 2, 0), text_mask=jnp.repeat(text_mask, 2, 0))
    clips = n2m.sample(params, model, condition, keys, len(t))[:, :, 0]
    for clip in clips:
        assert np.corrcoef(clip, notes)[0, 1] > 0.9
    wav, rate = soundfile.read(folder / "sample-00000240.wav")
    assert rate == 3_200 and np.corrcoef(wav, notes)[0, 1] > 0.9


def test_sigterm_saves_first(tmp_path, data):
    command = [sys.executable, "-c", "import noise2music as n2m, train, test_noise2music as test; n2m.tiny = lambda m: test.small(m.name); train.main()",
               "superresolution_cascader", "--tiny", "--data", data, "--out", tmp_path, "--log-every", "1", "--batch-size", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        while "step 3/" not in run.stdout.readline():
            assert run.poll() is None
        run.terminate()
        _, err = run.communicate(timeout=60)
    assert run.returncode == 128 + signal.SIGTERM and "--resume" in err and "Traceback" not in err
    assert len(train.checkpoints(tmp_path / "superresolution_cascader")) == 1


# ---------------------------------------------------------------------------------------------------------------------
# sample.py
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All five models, small and untrained, as train.py leaves them."""
    out = tmp_path_factory.mktemp("runs")
    t5 = t5_encoder.random_t5(["slow piano", "fast drums and bass"], 0)
    t5_encoder.save_t5(out / "t5", t5)
    for name in n2m.NAMES:
        model = small(name)
        (out / name).mkdir()
        metadata = {"seed": 0, "index": 0, "t5": None, "t5_fingerprint": train.t5_fingerprint(t5)}
        train.save_checkpoint(out / name, train.init_state(model, 0), model, metadata)
    return out


def run_sample(*argv):
    sample.main([str(a) for a in argv])


def test_a_prompt_becomes_a_wav_by_each_route(tmp_path, runs, capfd):
    for route in n2m.ROUTES:
        out = tmp_path / route / "music.wav"
        run_sample("slow piano", "-o", out, "--models", runs, "--route", route, "--seconds", 0.7, "--num", 2, "--keep-stages", "--seed", 5)
        for i in range(2):
            audio, rate = soundfile.read(out.with_name(f"music-{i}.wav"))
            assert rate == 24_000 and audio.shape == (16_800,) and audio.std() > 0
            settings = json.loads(out.with_name(f"music-{i}.json").read_text())
            assert settings["seed"] == 5 and settings["clip"] == i and settings["prompt"] == "slow piano"
            assert [*settings["stages"]] == list(n2m.ROUTES[route])
            assert soundfile.info(out.with_name(f"music-{i}.{n2m.ROUTES[route][1]}.wav")).samplerate == 16_000
        assert not list(out.parent.glob("*.part"))
    assert np.load(tmp_path / "spectrogram/music-1.spectrogram_generator.npy").shape == (70, 80)


def test_clip_i_of_a_seed_is_the_same_whatever_num_is(tmp_path, runs):
    """And another seed, or another clip, is another one."""
    for name, num, seed in [("one", 1, 3), ("two", 2, 3), ("other", 1, 4)]:
        run_sample("slow piano", "-o", tmp_path / f"{name}.wav", "--models", runs, "--seconds", 0.5, "--num", num, "--seed", seed, "--no-superres")
    one, first, second, other = (soundfile.read(tmp_path / f"{name}.wav")[0] for name in ("one", "two-0", "two-1", "other"))
    np.testing.assert_allclose(one, first, atol=2e-4)
    assert abs(np.corrcoef(one, second)[0, 1]) < 0.5 and abs(np.corrcoef(one, other)[0, 1]) < 0.5


def test_a_file_of_prompts_continues_where_it_was_interrupted(tmp_path, runs, capfd):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('slow piano\n\n{"prompt": "fast drums", "seed": 9, "seconds": 0.4}\n')
    argv = ["--prompts", prompts, "-o", tmp_path / "out", "--models", runs, "--seconds", 0.5, "--no-superres"]
    run_sample(*argv)
    wavs = sorted((tmp_path / "out").glob("*.wav"))
    assert [soundfile.info(w).frames for w in wavs] == [8_000, 6_400]
    before = [w.stat().st_mtime_ns for w in wavs]
    wavs[1].with_suffix(".json").unlink()  # as if stopped while the second was written
    run_sample(*argv)
    after = [w.stat().st_mtime_ns for w in wavs]
    assert after[0] == before[0] and after[1] != before[1]


def test_inference_parameters_reach_the_stages(tmp_path, runs):
    run_sample("slow piano", "-o", tmp_path / "a.wav", "--models", runs, "--seconds", 0.3, "--steps", "2,3,4", "--schedule", "uniform,back_heavy,front_heavy",
               "--cfg-scale", 2, "--gamma", "0,1,0.5")
    stages = json.loads((tmp_path / "a.json").read_text())["stages"].values()
    assert [s["steps"] for s in stages] == [2, 3, 4] and [s["gamma"] for s in stages] == [0, 1, 0.5]
    assert [s["cfg_scale"] for s in stages] == [2, 2, None] and [s["step_schedule"][0] for s in stages] == ["u", "b", "f"]


def test_sampling_refuses_in_one_line(tmp_path, runs, capfd):
    fails = functools.partial(exits, capfd, sample.main)
    base = ["slow piano", "--models", runs, "-o", tmp_path / "x.wav"]
    (tmp_path / "folder.wav").mkdir()
    (tmp_path / "file").touch()
    assert "python train.py waveform_generator" in fails("slow piano", "--models", tmp_path, "-o", tmp_path / "x.wav")
    assert "empty" in fails("  ", *base[1:])
    assert "give a prompt" in fails("--models", runs)
    assert "--seconds" in fails(*base, "--seconds", "x")
    for seconds in (0, -1, "nan", 1e9):
        assert "seconds must be from" in fails(*base, "--seconds", seconds)
    assert "--num" in fails(*base, "--num", -1)
    assert "--steps" in fails(*base, "--steps", 0)
    assert "--steps" in fails(*base, "--steps", "1,2")
    assert "Table 8" in fails(*base, "--schedule", "sideways")
    assert "--cfg-scale" in fails(*base, "--cfg-scale", "-1")
    assert "is a folder" in fails(*base[:-1], tmp_path / "folder.wav")
    assert ".wav" in fails(*base[:-1], tmp_path / "x.mp3")
    assert "file" in fails(*base[:-1], tmp_path / "file" / "x.wav")
    assert "absent" in fails("--prompts", tmp_path / "absent", "--models", runs)
    assert "no prompt" in fails("--prompts", tmp_path / "file", "--models", runs)
    (tmp_path / "bad.jsonl").write_text('good\n{"prompt": \n')
    assert "bad.jsonl:2" in fails("--prompts", tmp_path / "bad.jsonl", "--models", runs)
    (tmp_path / "odd.jsonl").write_text('{"prompt": "x", "sed": 1}\n')
    assert "odd.jsonl:1" in fails("--prompts", tmp_path / "odd.jsonl", "--models", runs)
    other = tmp_path / "t5"
    t5_encoder.save_t5(other, t5_encoder.random_t5(["another vocabulary"], 1))
    assert "not the T5 encoder" in fails(*base, "--t5", other)
    assert not (tmp_path / "x.wav").exists() and not list(tmp_path.glob("*.part"))


def test_hard_prompts_are_music_too(tmp_path, runs, capfd):
    """10,000 words are cut, with a remark; any script is encodable."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("word " * 10_000 + "\nспокойное фортепиано 静かなピアノ 🎹 </s> <extra_id_0>\n", "utf-8")
    run_sample("--prompts", prompts, "-o", tmp_path / "out", "--models", runs, "--seconds", 0.3, "--no-superres", "--steps", 1)
    assert len(list((tmp_path / "out").glob("*.wav"))) == 2
    assert "the model reads the first 63" in capfd.readouterr().err
