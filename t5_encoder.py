"""T5 encoder in pure JAX: prompts in, token embeddings out. And safetensors, the one file format.

Sec. 3.4 conditions on "the non-pooled token embedding sequence" of a T5 encoder (Raffel et al.
2020), and does not say which. choice: v1.1 XL, because Table 2's counts single out its width, 2048.
Any T5 v1.0, v1.1 or Flan folder in the Hugging Face layout will do (nothing is downloaded):

    text = load_text_encoder("t5-v1_1-xl")
    embeddings, mask = text.encode(["upbeat jazz"], 64)  # (1, 64, 2048), (1, 64)

B batch, L tokens (m as keys), E width, H heads, K head width, F feed-forward width, N layers.
Bad content is a ValueError of one line (file, trouble, remedy), the system's trouble an OSError.
"""

import contextlib
import dataclasses
import functools
import io
import json
import math
import os
import platform
import shutil
import stat
import zlib
from collections import Counter
from pathlib import Path
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import sentencepiece


class TextEncoder(NamedTuple):
    """All that training and sampling know of a text encoder."""
    width: int              # E of its embeddings
    encode: Callable        # (list of texts, L) -> embeddings (B, L, E) float32, mask (B, L) bool
    count_tokens: Callable  # text -> number of tokens, </s> not counted; 0 if none is known
    fingerprint: str        # tells one text encoder from another; checkpoints hold it


def load_text_encoder(folder):
    """The text encoder in a folder. To use one that is not a T5, change this function alone."""
    t5 = load_t5(folder)
    return TextEncoder(t5.config.d_model, functools.partial(encode, t5),
                       functools.partial(count_tokens, t5), fingerprint(t5))


# ---- the encoder (Raffel et al. 2020, Sec. 2.1; gated feed-forward: Shazeer 2020) ----

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


def declare(config):
    """Every parameter once: {name in params: (name in the file, shape, initial std; None is ones)}.
    {} is the layer; in params the layers are stacked, (N, *shape). Matrices are (out, in)."""
    E, H, K, F = config.d_model, config.num_heads, config.d_kv, config.d_ff
    attention, ff = "encoder.block.{}.layer.0", "encoder.block.{}.layer.1"
    wi = ("wi_0", "wi_1") if config.feed_forward_proj == "gated-gelu" else ("wi",)
    return {
        "embed": ("shared", (config.vocab_size, E), 1.0),
        "position_bias": ("encoder.block.0.layer.0.SelfAttention.relative_attention_bias",
                          (config.relative_attention_num_buckets, H), E**-0.5),  # for all layers
        "attention_norm": (f"{attention}.layer_norm", (E,), None),
        "q": (f"{attention}.SelfAttention.q", (H * K, E), (E * K)**-0.5),
        "k": (f"{attention}.SelfAttention.k", (H * K, E), E**-0.5),
        "v": (f"{attention}.SelfAttention.v", (H * K, E), E**-0.5),
        "o": (f"{attention}.SelfAttention.o", (E, H * K), (H * K)**-0.5),
        "ff_norm": (f"{ff}.layer_norm", (E,), None),
        **{name: (f"{ff}.DenseReluDense.{name}", (F, E), E**-0.5) for name in wi},
        "wo": (f"{ff}.DenseReluDense.wo", (E, F), F**-0.5),
        "final_norm": ("encoder.final_layer_norm", (E,), None),
    }


@functools.partial(jax.jit, static_argnums=1)
def t5_encoder(params, config, ids, mask):
    """Token embeddings after the final norm: (B, L, E) float32. Compiled once for each (B, L).

    ids (B, L) int32 below vocab_size; mask (B, L) bool, True at the tokens that may be attended to.
    What comes out at masked positions means nothing. All is float32, on every device."""
    eps = config.layer_norm_epsilon
    bias = params["position_bias"][position_buckets(config, ids.shape[1])]
    bias = bias.transpose(2, 0, 1) + jnp.where(mask, 0.0, -1e30)[:, None, None, :]  # (B, H, L, m)

    def block(x, p):
        y = rms_norm(x, p["attention_norm"], eps)
        heads = *ids.shape, config.num_heads, config.d_kv
        q, k, v = ((y @ p[name].mT).reshape(heads) for name in "qkv")  # (B, L, H, K)
        # T5 does not divide by sqrt(K): its initialisation has absorbed the factor.
        y = jax.nn.dot_product_attention(q, k, v, bias, scale=1.0)  # (B, L, H, K)
        x = x + y.reshape(*ids.shape, -1) @ p["o"].mT  # (B, L, E); H K need not be E
        y = rms_norm(x, p["ff_norm"], eps)
        if config.feed_forward_proj == "gated-gelu":  # in the tanh form, as T5 was trained
            y = jax.nn.gelu(y @ p["wi_0"].mT, approximate=True) * (y @ p["wi_1"].mT)  # (B, L, F)
        else:
            y = jax.nn.relu(y @ p["wi"].mT)  # (B, L, F)
        return x + y @ p["wo"].mT, None  # (B, L, E)

    layers = {ours: params[ours] for ours, (name, _, _) in declare(config).items() if "{}" in name}
    # numerics: else a TPU rounds the factors of a float32 product to bfloat16, a GPU to TF32.
    with jax.default_matmul_precision("float32"):
        x, _ = jax.lax.scan(block, params["embed"][ids], layers)  # (B, L, E)
    return rms_norm(x, params["final_norm"], eps)


def rms_norm(x, scale, eps):
    """Scale only: no mean is subtracted and nothing is added (Raffel et al. 2020, Sec. 2.1)."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def position_buckets(config, length):
    """(L, m) numpy: the bucket of the distance from each query to each key. One half of the buckets
    is for later keys. In each half, the first half of the buckets hold one distance each; the rest
    hold ranges that are even in its logarithm."""
    half = config.relative_attention_num_buckets // 2
    exact = half // 2
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    # numerics: float32 as in T5's own code; float64 agrees for the released sizes, not for all.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio /= np.float32(math.log(config.relative_attention_max_distance / exact))
    far = np.minimum(exact + (ratio * (half - exact)).astype(int), half - 1)
    return np.where(offset > 0, half, 0) + np.where(distance < exact, distance, far)


# ---- text to tokens to embeddings ----

class T5(NamedTuple):
    config: T5Config
    params: dict  # as declared
    tokenizer: sentencepiece.SentencePieceProcessor


def text_to_ids(t5, text):
    # departs: text that spells a control token ("</s>", "<extra_id_0>") stays text; transformers
    # makes it that token, with which a prompt could cut itself off.
    return t5.tokenizer.encode(text.encode("utf-8", "replace").decode())  # a lone surrogate is "?"


def tokenize(t5, texts, length):
    """ids (B, L) int32 and mask (B, L) bool of a list of strings, L = length, True at the tokens.
    choice: every row ends in </s> (1), which counts and stays where the text is cut; then <pad>."""
    check(not isinstance(texts, str) and length >= 1, "give a list of texts, a length above 0")
    ids = np.zeros((len(texts), length), np.int32)
    for row, text in zip(ids, texts):
        tokens = [*text_to_ids(t5, text)[:length - 1], 1]
        row[:len(tokens)] = tokens
    return ids, ids > 0


def count_tokens(t5, text):
    """Number of tokens of a string, without </s>; 0 if all are <unk>, or the "▁" before one."""
    ids = text_to_ids(t5, text)
    return len(ids) if set(ids) - {t5.tokenizer.unk_id(), t5.tokenizer.piece_to_id("▁")} else 0


def encode(t5, texts, length):
    """Embeddings (B, L, E) float32 and mask (B, L) bool, numpy: see tokenize."""
    ids, mask = tokenize(t5, texts, length)
    return np.asarray(t5_encoder(t5.params, t5.config, ids, mask)), mask


def fingerprint(t5):
    """The CRC-32 of the vocabulary, of the smaller parameters (enough, and quick for XL too) and of
    what config.json says that is neither a default nor seen in the shapes of the parameters."""
    names = "relative_attention_max_distance", "layer_norm_epsilon"
    said = {k: v for k in names if (v := getattr(t5.config, k)) != getattr(T5Config, k)}
    arrays = jax.tree.leaves(t5.params)  # in the order of their names
    small = [np.asarray(array) for array in arrays if array.size < 2**22]
    vocabulary = t5.tokenizer.serialized_model_proto()
    return f"{crc32(repr(said).encode() if said else b'', vocabulary, *small):08x}"


# ---- files: what is read is doubted, what is written is whole ----

def check(ok, complaint):
    if not ok:
        raise ValueError(complaint)


@contextlib.contextmanager
def reading(path):
    """Whatever check, Python or numpy refuse to do with the content of path becomes one line."""
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RuntimeError) as e:
        raise ValueError(f"{path}: {e!s:.300}; copy, download or write this file again") from None


def regular(path):
    """The Path, unless it is a device or a pipe, which may never end."""
    check(stat.S_ISREG(os.stat(path).st_mode), f"{path}: is no regular file; name one")
    return Path(path)


def read_lines(path):
    """The lines of a file in UTF-8, with or without a byte order mark. They end in a newline and in
    nothing else: a caption may hold U+2028."""
    data = regular(path).read_bytes().removeprefix(b"\xef\xbb\xbf").removesuffix(b"\n")
    try:
        text = data.decode()
        check("\0" not in text, "as UTF-16 has it")
    except ValueError as error:
        number = 1 + data.count(b"\n", 0, getattr(error, "start", data.find(b"\0")))
        seems = "UTF-16" if b"\0" in data or data[:2] in (b"\xff\xfe", b"\xfe\xff") else "Latin-1"
        raise ValueError(f"{path}:{number}: is not UTF-8 but, it seems, {seems}; save the file as "
                         "UTF-8") from None
    return [line.removesuffix("\r") for line in text.split("\n")]


def parse_json(text):
    """What a JSON text holds. ValueError where a key comes twice, or the nesting has no end."""
    def unique(pairs):
        check(len(pairs) == len(dict(pairs)), f"a key comes twice among {[k for k, _ in pairs]}")
        return dict(pairs)
    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("is nested too deeply") from None


def own_part(path):
    """The name of path while it is written, with machine and process: nobody else writes it."""
    return path.with_name(f"{path.name}.{platform.node()}.{os.getpid()}.part")


def remove_parts(folder):
    """Removes what killed processes of this machine were writing in a folder."""
    for part in folder.glob("*.part"):
        name, *end = part.name.rsplit(".", 2)
        if name.endswith("." + platform.node()) and end[0].isdigit():
            with contextlib.suppress(OSError, ValueError, OverflowError):  # another user's, no PID
                try:
                    os.kill(int(end[0]), 0)  # is it there?
                except ProcessLookupError:
                    shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path):
    """An OSError from within names the path. By itself that of a full disk has none."""
    try:
        yield
    except OSError as error:
        error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def whole_file(path):
    """A binary file to write. It gets its name when all of it is on the disk; on an error, never.
    An OSError names the path. Folders are made."""
    path = Path(path)
    part = own_part(path)
    try:
        with naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_parts(path.parent)
            with open(part, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


# ---- folders in the Hugging Face layout ----

def load_t5(folder):
    """The T5 of a local folder, from config.json, spiece.model and safetensors, in float32."""
    folder = Path(folder)
    check(folder.is_dir(), f"{folder}: no such folder; name a T5's by --t5 (none is downloaded)")
    with reading(path := folder / "config.json"):
        # The first T5s lack "feed_forward_proj".
        entries = {"feed_forward_proj": "relu"} | parse_json(regular(path).read_bytes())
        kind = entries.get("model_type"), entries["feed_forward_proj"]
        check(kind in (("t5", "relu"), ("t5", "gated-gelu")),
              f"no T5 v1.0, v1.1 or Flan, as model_type and feed_forward_proj are {kind!r:.99}")
        config = T5Config(**{k: v for k, v in entries.items() if k in T5Config.__annotations__})
        check(all(type(getattr(config, name)) is int for name, kind in
                  T5Config.__annotations__.items() if kind is int), "a size is not a whole number")
        check(0 < config.layer_norm_epsilon < 1, "layer_norm_epsilon is not between 0 and 1")
        exact = config.relative_attention_num_buckets // 4
        check(0 < exact < config.relative_attention_max_distance,
              "relative_attention_num_buckets is below 4, or a quarter of it is not below "
              "relative_attention_max_distance")
    with reading(path := folder / "spiece.model"):
        check(model := regular(path).read_bytes(), "is empty")  # old sentencepieces would crash
        tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model)
        found = tokenizer.pad_id(), tokenizer.eos_id(), tokenizer.get_piece_size()
        check(found[:2] == (0, 1) and found[2] <= config.vocab_size,
              f"not of this T5: <pad>, </s> and the number of pieces are {found}")
    return T5(config, load_params(folder, config), tokenizer)


def load_params(folder, config):
    tensors, params = {}, {}
    for path in sorted(folder.glob("model*.safetensors")):  # one file, or its shards
        tensors |= read_safetensors(path)[0]
    check(tensors, f"{folder}: no model.safetensors, nor its shards. A pytorch_model.bin can run "
          "code; where you trust it: python -c \"from transformers import T5EncoderModel as T; "
          f"T.from_pretrained({str(folder)!r}).save_pretrained({str(folder)!r})\"")
    tensors.setdefault("shared.weight", tensors.get("encoder.embed_tokens.weight"))
    with reading(folder):
        for ours, (name, shape, _) in declare(config).items():
            layers = []
            for i in range(config.num_layers):
                layers.append(array := tensors.get(f"{name.format(i)}.weight"))
                fits = array is not None and array.shape == shape
                check(fits and jnp.issubdtype(array.dtype, jnp.floating),
                      f"no {name.format(i)}.weight of floats {shape}, which config.json asks for")
            params[ours] = jnp.float32(np.stack(layers) if "{}" in name else layers[0])
        check(f"encoder.block.{config.num_layers}.layer.0.layer_norm.weight" not in tensors,
              f"more layers than the {config.num_layers} of config.json")
    return params


def save_t5(folder, t5):
    """Writes a folder that load_t5 and transformers' T5EncoderModel.from_pretrained read."""
    folder, tensors = Path(folder), {}
    entries = {"architectures": ["T5EncoderModel"], "model_type": "t5", **vars(t5.config)}
    with whole_file(folder / "config.json") as file:
        file.write(json.dumps(entries, indent=2).encode() + b"\n")
    with whole_file(folder / "spiece.model") as file:
        file.write(t5.tokenizer.serialized_model_proto())
    for ours, (name, shape, _) in declare(t5.config).items():
        layers = np.asarray(t5.params[ours]).reshape(-1, *shape)  # all of its layers, or the one
        tensors |= {f"{name.format(i)}.weight": layer for i, layer in enumerate(layers)}
    write_safetensors(folder / "model.safetensors", tensors, {"format": "pt"})  # for transformers


# ---- a small random T5, for tests and for training on a small machine ----

def random_t5(captions, seed, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4):
    """A T5 like v1.1 with random weights, its tokenizer trained on the captions (may be none).

    It knows nothing, but different texts get different embeddings. Captions and seed determine it.
    departs: rare characters become bytes, where the released T5s have <unk>: with 1000 pieces most
    scripts would be rare."""
    captions = [caption.encode("utf-8", "replace").decode() for caption in captions]
    common = {c for c, _ in Counter("".join(captions)).most_common(500)}  # all must get a piece
    captions = ["".join(c if c in common else " " for c in caption) for caption in captions]
    neutral = ["a slow quiet piano piece with soft expressive strings and a deep warm bass line, "
               "recorded live", "Fast 1960s jazz & electronic dance music: loud drums, 'bright' "
               "synthesizer melody at 128 BPM!"]  # the trainer fails on too little text
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*captions, *neutral]), model_writer=model,
        model_type="unigram", vocab_size=1000, hard_vocab_limit=False, byte_fallback=True,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, num_threads=1, minloglevel=2)
    tokenizer = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    config = T5Config(tokenizer.get_piece_size(), d_model, d_kv, d_ff, num_layers, num_heads)
    params, keys = {}, jax.random.split(jax.random.key(seed), len(declare(config)))
    for key, (ours, (name, shape, std)) in zip(keys, declare(config).items()):
        shape = (num_layers, *shape) if "{}" in name else shape
        params[ours] = jnp.ones(shape) if std is None else std * jax.random.normal(key, shape)
    return T5(config, params, tokenizer)


# ---- safetensors: 8 bytes of header length, JSON header, tensors back to back; little-endian ----

DTYPES = {"BOOL": "bool", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16",
          "U32": "uint32", "I32": "int32", "U64": "uint64", "I64": "int64",
          "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
# Two entries in the metadata of our files; others have neither. "crc32_of" says that "crc32" must
# be there, so that a flipped bit in the key "crc32" does not switch the check off.
CHECKSUM = {"crc32": "00000000", "crc32_of": "this file with 00000000 as its crc32"}


def crc32(*parts):
    """The CRC-32 of bytes and numpy arrays, as if they were one file."""
    return functools.reduce(lambda crc, part: zlib.crc32(part, crc), parts, 0)


def write_safetensors(path, tensors, metadata):
    """Writes {name: numpy or jax array}, {name: string} and a CRC-32 to path: all or, on any error,
    nothing. ValueError for a dtype or metadata that the format cannot hold."""
    path, entries, arrays, end = Path(path), {}, [], 0
    codes = {name: code for code, name in DTYPES.items()}
    check(all(isinstance(v, str) for v in metadata.values()), f"{path}: metadata must be strings")
    # Large items first, as the safetensors package does: every tensor is then aligned.
    for name in sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name)):
        dtype, shape = tensors[name].dtype, tensors[name].shape
        check(dtype.name in codes, f"{path}: safetensors holds no {dtype} ({name})")
        arrays.append(np.ascontiguousarray(tensors[name], dtype.name).reshape(-1).view(np.uint8))
        begin, end = end, end + arrays[-1].size
        entries[name] = {"dtype": codes[dtype.name], "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps({"__metadata__": CHECKSUM | metadata, **entries}).encode()
    text += b" " * (-len(text) % 8)
    start = len(text).to_bytes(8, "little") + text
    with whole_file(path) as file:
        file.writelines([start.replace(b"00000000", b"%08x" % crc32(start, *arrays), 1), *arrays])


def read_safetensors(path, keep=lambda name: True):
    """({name: memory-mapped numpy array} of the names that keep accepts, {name: string} metadata).
    ValueError for anything but a whole, sound file, its CRC-32 included where it has one."""
    with reading(path):
        data = np.memmap(regular(path), np.uint8, "r")
        base = 8 + int.from_bytes(data[:8].tobytes(), "little")  # where the tensors begin
        check(base <= min(len(data), 100_000_008), "no safetensors, or cut off in the header")
        header = parse_json(data[8:base].tobytes())
        metadata, tensors, end = header.pop("__metadata__", {}), {}, 0
        check(all(isinstance(value, str) for value in metadata.values()), "metadata not of strings")
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            begin, stop, dtype = *entry["data_offsets"], entry["dtype"]
            check(dtype in DTYPES, f"{name!a:.80} is of type {dtype!a:.20}, which is not read here")
            array = np.ndarray(entry["shape"], DTYPES[dtype], data, base + begin)
            check(begin == end and array.nbytes == stop - begin, f"{name!a:.80} is out of place")
            tensors[name], end = array, stop
        check(len(data) == base + end, f"{len(data)} bytes, but its header describes {base + end}")
        if metadata.keys() & CHECKSUM.keys():
            crc = metadata.get("crc32", "")
            start = data[:base].tobytes().replace(crc.encode(), b"00000000", 1)
            check(crc == f"{crc32(start, data[base:]):08x}", "wrong CRC-32")
    return ({name: array for name, array in tensors.items() if keep(name)},
            {key: value for key, value in metadata.items() if key not in CHECKSUM})
