"""T5 encoder in pure JAX: prompts in, token embeddings out.

Sec. 3.4 conditions the diffusion models on "the non-pooled token embedding sequence" of a pre-trained T5 encoder
(Raffel et al. 2020), and not on which T5. choice: v1.1 XL, E = 2048, which the sizes of Table 2 single out. This
file takes any T5 v1.0, v1.1 or Flan folder in the Hugging Face layout (and downloads none):

    embeddings, mask = encode(load_t5("t5-v1_1-xl"), ["upbeat jazz"], length=64)  # (1, 64, 2048), (1, 64)

B batch, L tokens (m as keys), E width, H heads, K head width, F feed-forward width, N layers. The last section is
safetensors, the project's one file format. Bad content is a ValueError, the system's trouble an OSError: one line.
"""

import dataclasses
import functools
import io
import json
import math
import os
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece


@dataclasses.dataclass(frozen=True)
class T5Config:
    """The sizes of one T5 encoder, under their names in config.json."""
    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "gated-gelu"  # v1.1 and Flan; "relu" is v1.0


class T5(NamedTuple):
    config: T5Config
    params: dict  # see declare()
    tokenizer: sentencepiece.SentencePieceProcessor


# ---- the encoder (Raffel et al. 2020, Sec. 2.1; gated feed-forward: Shazeer 2020) ----

@functools.partial(jax.jit, static_argnums=1)
def t5_encoder(params, config, ids, mask):
    """Token embeddings after the final norm: (B, L, E) float32. Compiled once for each (B, L).

    ids (B, L) int32 below vocab_size; mask (B, L) bool, True at the tokens that may be attended to. What comes out
    at masked positions means nothing. The arithmetic is in the type of params, norms and softmax in float32.
    """
    bias = params["position_bias"].astype(jnp.float32)[position_buckets(config, ids.shape[1])]  # (L, m, H)
    bias = bias.transpose(2, 0, 1) + jnp.where(mask, 0.0, -1e30)[:, None, None, :]  # (B, H, L, m)

    def block(x, p):
        y = rms_norm(x, p["attention_norm"], config.layer_norm_epsilon)
        q, k, v = ((y @ p[name].mT).reshape(*ids.shape, config.num_heads, config.d_kv) for name in "qkv")
        # T5 does not divide by sqrt(K): its initialisation has absorbed the factor.
        scores = jnp.einsum("blhk,bmhk->bhlm", q, k, preferred_element_type=jnp.float32) + bias
        y = jnp.einsum("bhlm,bmhk->blhk", jax.nn.softmax(scores).astype(x.dtype), v)
        x = x + y.reshape(*ids.shape, -1) @ p["o"].mT  # (B, L, E); H K need not be E
        y = rms_norm(x, p["ff_norm"], config.layer_norm_epsilon)
        if config.feed_forward_proj == "gated-gelu":
            gate = jax.nn.gelu(y @ p["wi_0"].mT, approximate=True)  # the tanh form, as T5 was trained
            y = gate * (y @ p["wi_1"].mT)  # (B, L, F)
        else:
            y = jax.nn.relu(y @ p["wi"].mT)  # (B, L, F)
        return x + y @ p["wo"].mT, None  # (B, L, E)

    # numerics: float32 products stay float32 where the hardware would round their factors (TPU, TF32).
    with jax.default_matmul_precision("float32"):
        layers = {name: p for name, p in params.items() if name not in ("embed", "position_bias", "final_norm")}
        x, _ = jax.lax.scan(block, params["embed"][ids], layers)  # (B, L, E)
    return rms_norm(x, params["final_norm"], config.layer_norm_epsilon).astype(jnp.float32)


def rms_norm(x, scale, eps):
    """Scale only: no mean is subtracted and nothing is added (Raffel et al. 2020, Sec. 2.1)."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def position_buckets(config, length):
    """(L, m) numpy: the bucket of the distance from each query to each key. Half of them is for later keys. Half of
    each half holds one distance each, the rest grow logarithmically, and the last holds all beyond max_distance.
    """
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    # numerics: float32 as in T5's own code; float64 puts some distances into the next bucket.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio /= np.float32(math.log(config.relative_attention_max_distance / exact))
    far = np.minimum(exact + (ratio * (half - exact)).astype(int), half - 1)
    return np.where(offset > 0, half, 0) + np.where(distance < exact, distance, far)


def declare(config):
    """Every parameter once: {its name in params: (its name in the file, shape, initial std)}. "{}" is the layer: in
    params such a parameter is stacked, (N, *shape). Matrices are (out, in). Std None is a norm's ones, the others T5's.
    """
    E, H, K, F = config.d_model, config.num_heads, config.d_kv, config.d_ff
    attention, ff = "encoder.block.{}.layer.0", "encoder.block.{}.layer.1"
    return {
        "embed": ("shared", (config.vocab_size, E), 1.0),
        "position_bias": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias",  # for all layers
                          (config.relative_attention_num_buckets, H), E**-0.5),
        "attention_norm": (f"{attention}.layer_norm", (E,), None),
        "q": (f"{attention}.SelfAttention.q", (H * K, E), (E * K)**-0.5),
        "k": (f"{attention}.SelfAttention.k", (H * K, E), E**-0.5),
        "v": (f"{attention}.SelfAttention.v", (H * K, E), E**-0.5),
        "o": (f"{attention}.SelfAttention.o", (E, H * K), (H * K)**-0.5),
        "ff_norm": (f"{ff}.layer_norm", (E,), None),
        **{wi: (f"{ff}.DenseReluDense.{wi}", (F, E), E**-0.5)
           for wi in (("wi_0", "wi_1") if config.feed_forward_proj == "gated-gelu" else ("wi",))},
        "wo": (f"{ff}.DenseReluDense.wo", (E, F), F**-0.5),
        "final_norm": ("encoder.final_layer_norm", (E,), None),
    }


# ---- text to tokens to embeddings ----

def tokenize(t5, texts, length):
    """ids (B, L) int32 and mask (B, L) bool of a list of strings, L = length, True at the tokens.

    t5: a T5 or its tokenizer. Every row ends in </s> (1), kept where the text is cut, then <pad> (0). departs: text
    that spells a control token ("</s>", "<extra_id_0>") stays text; transformers makes it that token, with which a
    prompt could cut itself off.
    """
    check(not isinstance(texts, str) and length >= 1, "tokenize takes a list of strings and a length of at least 1")
    ids, mask = np.zeros((len(texts), length), np.int32), np.zeros((len(texts), length), bool)
    for row, text in enumerate(texts):
        text = text.encode("utf-8", "replace").decode()  # sentencepiece fails on what is not Unicode: "?"
        tokens = [*getattr(t5, "tokenizer", t5).encode(text)[:length - 1], 1]
        ids[row, :len(tokens)], mask[row, :len(tokens)] = tokens, True
    return ids, mask


def count_tokens(t5, text):
    """Number of tokens of a string without its </s>: tokenize keeps them all if length is greater."""
    text = text.encode("utf-8", "replace").decode()
    return len(getattr(t5, "tokenizer", t5).encode(text))


def encode(t5, texts, length):
    """Embeddings (B, L, E) float32 and mask (B, L) bool, numpy, of a list of strings: see tokenize."""
    ids, mask = tokenize(t5, texts, length)
    return np.asarray(t5_encoder(t5.params, t5.config, ids, mask)), mask


# ---- folders in the Hugging Face layout ----

AGAIN = "get this T5's files again"
is_encoder = re.compile(r"shared\.weight$|encoder\.").match  # of a tensor's name


def check(ok, complaint):
    if not ok:
        raise ValueError(complaint)


def load_t5(folder, dtype=jnp.float32):
    """The T5 of a local folder: config.json, spiece.model and the encoder's tensors, cast to dtype.

    ValueError (one line: file, what is wrong, what to do) where any of them cannot be used.
    """
    folder = Path(folder)
    check(folder.is_dir(), f"{folder}: no such folder; download a T5 into it first, this code never does")
    config = read_config(folder / "config.json")
    spiece = folder / "spiece.model"
    try:
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=spiece.read_bytes())
    except (FileNotFoundError, RuntimeError):
        raise ValueError(f"{spiece}: no sentencepiece model; put it there (tokenizer.json is not read)") from None
    pad, eos, size = tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.get_piece_size()
    check((pad, eos) == (0, 1) and size <= config.vocab_size, f"{spiece}: not of this T5: {size} pieces for a "
          f"vocab_size of {config.vocab_size}, <pad> {pad}, </s> {eos}; {AGAIN}")
    tensors, params = {}, {}
    for path in weight_files(folder):
        tensors |= {name: (path, array) for name, array in read_safetensors(path, is_encoder)[0].items()}
    tensors.setdefault("shared.weight", tensors.get("encoder.embed_tokens.weight", (path, None)))
    for ours, (name, shape, _) in declare(config).items():
        stack = np.empty((config.num_layers if "{}" in name else 1, *shape), dtype)  # filled in place: XL is 5 GB
        for i in range(len(stack)):
            file, array = tensors.get(f"{name.format(i)}.weight", (path, None))
            found = "missing" if array is None else f"{array.dtype} {array.shape}"
            check(found in [f"{kind} {shape}" for kind in ("float32", "float16", "bfloat16", "float64")],
                  f"{file}: tensor {name.format(i)}.weight is {found}, config.json asks for floats {shape}; {AGAIN}")
            stack[i] = array
        params[ours] = jnp.asarray(stack if "{}" in name else stack[0])
    check(f"encoder.block.{config.num_layers}.layer.0.layer_norm.weight" not in tensors,
          f"{path}: more layers than the {config.num_layers} of config.json; {AGAIN}")
    return T5(config, params, tokenizer)


def save_t5(folder, t5):
    """Writes a folder that load_t5 and transformers' T5EncoderModel.from_pretrained read."""
    folder, tensors = Path(folder), {}
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["T5EncoderModel"], "model_type": "t5", **dataclasses.asdict(t5.config)}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "spiece.model").write_bytes(t5.tokenizer.serialized_model_proto())
    for ours, (name, _, _) in declare(t5.config).items():
        layers = np.asarray(t5.params[ours]) if "{}" in name else [np.asarray(t5.params[ours])]
        tensors |= {f"{name.format(i)}.weight": layer for i, layer in enumerate(layers)}
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})  # transformers wants that entry


def read_json(path):
    try:
        check(isinstance(entries := json.loads(path.read_bytes()), dict), "it is no object")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: bad JSON ({error}); {AGAIN}") from None
    return entries


def read_config(path):
    entries = {"feed_forward_proj": "relu", **read_json(path)}  # early T5 folders lack it
    kind, proj = entries.get("model_type"), entries["feed_forward_proj"]
    check(kind == "t5" and proj in ("relu", "gated-gelu"), f"{path}: model_type is {kind!r:.40}, feed_forward_proj "
          f"{proj!r:.40}; give a T5 v1.0 ('t5', 'relu'), v1.1 or Flan ('t5', 'gated-gelu')")
    values = {field.name: entries.get(field.name, field.default) for field in dataclasses.fields(T5Config)}
    for name, value in values.items():
        low = 4 if name == "relative_attention_num_buckets" else 1
        check(name == "feed_forward_proj" or type(value) is int and low <= value < 2**31 or
              name == "layer_norm_epsilon" and type(value) is float and 0 < value < 1,
              f"{path}: {name} is missing or not a number in its range; {AGAIN}")
    return T5Config(**values)


def weight_files(folder):
    """The safetensors files that hold a folder's encoder: one file, or its shards."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index, pickle = folder / "model.safetensors.index.json", folder / "pytorch_model.bin"
    if index.is_file():
        shards = read_json(index).get("weight_map")
        check(isinstance(shards, dict), f"{index}: no weight_map; {AGAIN}")
        paths = sorted({folder / str(shard) for name, shard in shards.items() if is_encoder(name)})
    else:  # model-00001-of-00002.safetensors
        counts = [path.name[15:20] for path in folder.glob("model-?????-of-[0-9][0-9][0-9][0-9][0-9].safetensors")]
        paths = [folder / f"model-{i + 1:05d}-of-{max(counts)}.safetensors" for i in range(int(max(counts, default=0)))]
    check(paths or not pickle.is_file(), f"{pickle}: a pickle can run code when it is read; convert it once, where you "
          f"trust it: python -c \"from transformers import T5EncoderModel as T; T.from_pretrained({str(folder)!r})."
          f"save_pretrained({str(folder)!r}, safe_serialization=True)\"")
    check(paths, f"{folder}: no safetensors of a T5 encoder (model.safetensors or shards); {AGAIN}")
    for path in paths:
        check(path.is_file(), f"{path}: this shard is missing; download it")
    return paths


# ---- a small random T5, for tests and for training on a small machine ----

NEUTRAL_TEXT = ["a slow quiet piano piece with soft expressive strings and a deep warm bass line, recorded live",
                "Fast 1960s jazz & electronic dance music: loud drums, 'bright' synthesizer melody at 128 BPM!"]


def random_t5(captions, seed, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, vocab_size=1000):
    """A T5 like v1.1 with random weights, its tokenizer trained on the captions (which may be none).

    It knows nothing, but different texts get different embeddings, of mean square 1 by the final norm. Captions and
    seed determine it; vocab_size is an upper bound. departs: rare characters become bytes, where the released T5s
    have <unk>: with a small vocabulary most scripts would be rare.
    """
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(  # with text of our own: the trainer fails on too little
        sentence_iterator=iter([*captions, *NEUTRAL_TEXT]), model_writer=model, model_type="unigram",
        vocab_size=vocab_size, hard_vocab_limit=False, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
        byte_fallback=True, num_threads=1, minloglevel=2)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    config = T5Config(tokenizer.get_piece_size(), d_model, d_kv, d_ff, num_layers, num_heads)
    keys = jax.random.split(jax.random.key(seed), len(declare(config)))
    params = {}
    for key, (ours, (name, shape, std)) in zip(keys, declare(config).items()):
        shape = (num_layers, *shape) if "{}" in name else shape
        params[ours] = jnp.ones(shape) if std is None else std * jax.random.normal(key, shape)
    return T5(config, params, tokenizer)


# ---- safetensors: 8 bytes of header length, JSON header, tensors back to back, all little-endian ----

DTYPES = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "U32": "uint32", "I32": "int32",
          "U64": "uint64", "I64": "int64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
# Of the two checksum entries in the metadata, the second documents the first and says that there must be one:
# else a flipped bit in the key "crc32" would switch the check off.
NO_CRC = {"crc32": "00000000", "crc32_of": "this file with 00000000 as its crc32"}


def write_safetensors(path, tensors, metadata):
    """Writes {name: array} and {name: string} to path: the whole file or, on any error, nothing.

    Arrays are numpy or jax, brought to the host one by one. The file carries a CRC-32 of itself, which read_safetensors
    checks. ValueError for a dtype or metadata that the format cannot hold.
    """
    path, header, end = Path(path), {"__metadata__": {**NO_CRC, **metadata, **NO_CRC}}, 0
    codes = {name: code for code, name in DTYPES.items()}
    check(all(isinstance(value, str) for value in metadata.values()), f"{path}: metadata must be strings: {metadata}")
    # Large items first, as the safetensors package does: every tensor is then aligned.
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        dtype, shape = tensors[name].dtype, tensors[name].shape
        check(dtype.name in codes, f"{path}: safetensors holds no {dtype} ({name})")
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": codes[dtype.name], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    crc = zlib.crc32(text)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")  # in the same folder: replace is then atomic
    try:
        with open(part, "wb") as file:
            file.write(text)
            for name in [*header][1:]:
                array = np.ascontiguousarray(tensors[name], tensors[name].dtype.name)  # the name: little-endian
                file.write(array := array.reshape(-1).view(np.uint8))
                crc = zlib.crc32(array, crc)
            file.seek(text.index(b'"crc32":"00000000"') + len('"crc32":"'))
            file.write(b"%08x" % crc)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # the new name must outlive a power cut too; Windows has no such call
        os.fsync(folder := os.open(path.parent, os.O_DIRECTORY))
        os.close(folder)


def read_safetensors(path, keep=lambda name: True):
    """({name: memory-mapped numpy array} of the names that keep accepts, {name: string} metadata) of a file.

    ValueError (one line: file, what is wrong, what to do) for anything but a whole, sound file; the CRC-32
    is checked where the metadata has one. No memory is taken on the word of a header that may be broken.
    """
    try:
        with open(path, "rb") as file:
            return parse_safetensors(file, os.fstat(file.fileno()).st_size, keep)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}; copy, download or write this file again") from None


def parse_safetensors(file, size, keep):
    start = file.read(8)
    base = 8 + int.from_bytes(start, "little")  # where the data begin
    check(8 <= base <= min(size, 100_000_008), f"no safetensors file, or cut off: {size} bytes cannot be right")
    text = file.read(base - 8)
    header = json.loads(text.decode(), object_pairs_hook=lambda p: d if len(d := dict(p)) == len(p) else None)
    metadata = header.pop("__metadata__", {}) if isinstance(header, dict) else None
    check(isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values()),
          "its header is no JSON object with each name once and strings as metadata")
    spans, end = [], 0
    for name, entry in header.items():
        check(isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"} and
              isinstance(entry["dtype"], str) and entry["dtype"] in DTYPES,
              f"tensor {name!a:.80} has no known dtype, or not just dtype, shape and data_offsets")
        shape, offsets = entry["shape"], entry["data_offsets"]
        check(isinstance(shape, list) and isinstance(offsets, list) and len(shape) <= 32 and len(offsets) == 2 and
              all(type(number) is int and 0 <= number < 2**48 for number in shape + offsets) and
              math.prod(shape) * np.dtype(DTYPES[entry["dtype"]]).itemsize == offsets[1] - offsets[0],
              f"tensor {name!a:.80} has a shape and data_offsets that are no sizes, or do not fit each other")
        spans.append((*offsets, name))
    for begin, stop, name in sorted(spans):
        check(begin == end, f"tensor {name!a:.80} overlaps the one before it, or leaves a hole")
        end = stop
    check(size == base + end, f"cut off or written over: it has {size} bytes, its header describes {base + end}")
    data = np.memmap(file, np.uint8, "r")
    if metadata.keys() & NO_CRC.keys():
        stored = metadata.get("crc32", "")
        crc = zlib.crc32(start + text.replace(b'"crc32":"%s"' % stored.encode(), b'"crc32":"00000000"', 1))
        for i in range(base, size, 2**24):
            crc = zlib.crc32(data[i:i + 2**24], crc)
        check(stored == f"{crc:08x}", "damaged: its bytes do not have the CRC-32 that its metadata states")
    return ({name: data[base + begin:base + end].view(DTYPES[header[name]["dtype"]]).reshape(header[name]["shape"])
             for begin, end, name in spans if keep(name)},
            {key: value for key, value in metadata.items() if key not in NO_CRC})
