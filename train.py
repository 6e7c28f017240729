"""Train any of the five models of Noise2Music (Secs. 3.6 and 4.1) on a folder of captioned audio.

    python train.py waveform_generator --tiny --overfit song.ogg --out runs     # the first thing to try
    python train.py waveform_generator --tiny --data music --out runs
    python train.py waveform_generator --data music --t5 t5-v1_1-xl --out runs  # the paper's, on an accelerator

The data folder holds audio that libsndfile reads (wav, flac, ogg, mp3, ...; any rate, any channels, any length) and
either `captions.jsonl`, a JSON object a line,

    {"audio": "jazz/one.flac", "long": ["A slow piano ballad.", ...], "short": ["jazz", "piano", ...]}

(with `"start": 30` it captions the 30 s from there, otherwise the whole track), or, beside each `one.flac`, a `one.txt`
with a long caption a line. `python tools/label.py --help` says how music without captions gets them. Everything is
written to OUT/MODEL: checkpoints (the last two are kept), `log.jsonl`, and samples with --sample-every. `sample.py
--models OUT` reads them from there.
"""

import argparse
import dataclasses
import functools
import json
import os
import re
import signal
import sys
import time
import zlib
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import soundfile
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

import noise2music as n2m
import t5_encoder
from t5_encoder import check

CLIP_SECONDS = 30  # Sec. 3.6: "six non-overlapping 30-second clips" from each soundtrack
CLIPS_PER_TRACK = 6
AUDIO = {".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff", ".au", ".caf", ".w64", ".rf64"}
CACHE = 4 * 2**30
PREVIEW_STEPS = 64


def warn(message):
    print(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr, flush=True)


def fail(message, status=2):
    warn(message)
    raise SystemExit(status)


def new_parser(prog: str, description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message}; see {prog} --help")
    return parser


# ---- The data set (Secs. 3.6 and 4.1) ----


class Track(NamedTuple):
    path: Path
    long: tuple[str, ...]  # captions that each stand alone
    short: tuple[str, ...]  # tags that are joined
    start: float | None = None  # seconds; of the one clip that they caption


class Example(NamedTuple):
    audio: np.ndarray  # (samples,) at the model's audio_rate
    text: str


class Clip(NamedTuple):
    track: Track
    start: float  # seconds into the track
    seconds: float  # 30, or less where the track is shorter


def strings(entry, key):
    value = entry.get(key, [])
    value = [value] if isinstance(value, str) else value
    check(isinstance(value, list) and all(isinstance(v, str) for v in value), f'"{key}" is not a list of strings')
    return tuple(v.strip() for v in value if v.strip())


def parse_caption(folder: Path, line: str, needs_text: bool) -> Track:
    entry = json.loads(line)
    check(isinstance(entry, dict) and isinstance(entry.get("audio"), str), 'not an object with an "audio" path')
    start = entry.get("start")
    check(start is None or type(start) in (int, float) and 0 <= start < float("inf"), '"start" is not a number of seconds')
    short = strings(entry, "title") + strings(entry, "tags") + strings(entry, "short")  # Sec. 3.6's three types of labels
    track = Track(folder / entry["audio"], strings(entry, "long"), short, start)
    check(track.path.is_file(), f"{entry['audio']}: no such file")
    check(track.long or track.short or not needs_text, f"{entry['audio']}: no caption")
    return track


def read_tracks(folder: Path, needs_text: bool, manifest: str = "captions.jsonl") -> list[Track]:
    """The captioned tracks of a data folder. What is wrong with an entry is reported, and the entry skipped."""
    check(folder.is_dir(), f"{folder}: no such folder; it should be one of audio with captions (see --help)")
    manifest, tracks = folder / manifest, []
    if manifest.exists():
        for number, line in enumerate(manifest.read_text("utf-8", "replace").splitlines(), 1):
            try:
                if line.strip():
                    tracks.append(parse_caption(folder, line, needs_text))
            except (ValueError, RecursionError) as error:
                warn(f"{manifest}:{number}: {error}; line skipped")
    else:
        files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO | {".txt"} and p.is_file())
        texts = {p.with_suffix(""): p for p in files if p.suffix.lower() == ".txt"}
        audio = {p.with_suffix(""): p for p in files if p.suffix.lower() != ".txt"}
        for stem in sorted(texts.keys() - audio.keys()):
            warn(f"{texts[stem]}: a caption without audio of the same name; skipped")
        for stem, path in audio.items():
            text = texts[stem].read_text("utf-8", "replace") if stem in texts else ""
            long = tuple(line.strip() for line in text.splitlines() if line.strip())
            if long or not needs_text:
                tracks.append(Track(path, long, ()))
            else:
                warn(f"{path}: audio without a caption in {stem.name}.txt; skipped")
    check(tracks, f"{folder}: no audio with a caption in it; write {manifest.name}, or a .txt beside each file")
    return tracks


def track_clips(track: Track, most: int = CLIPS_PER_TRACK) -> list[Clip]:
    """Sec. 3.6: up to six non-overlapping 30 s clips. choice: spread evenly; a shorter track is one clip."""
    info = soundfile.info(track.path)
    duration = info.frames / info.samplerate
    check(duration > (track.start or 0), f"has no audio at {track.start} s" if track.start else "has no audio in it")
    if track.start is not None:
        return [Clip(track, track.start, min(duration - track.start, CLIP_SECONDS))]
    n = int(np.clip(duration // CLIP_SECONDS, 1, most))
    return [Clip(track, k * duration / n, min(duration, CLIP_SECONDS)) for k in range(n)]


def find_clips(tracks: list[Track], most: int = CLIPS_PER_TRACK) -> list[Clip]:
    """The clips of all tracks, by their headers; files that cannot be opened are reported and skipped."""

    def clips_or_error(track):
        try:
            return track_clips(track, most)
        except (OSError, ValueError, RuntimeError) as error:
            return error

    clips, bad = [], 0
    with ThreadPoolExecutor() as pool:
        for track, found in zip(tracks, pool.map(clips_or_error, tracks)):
            if isinstance(found, Exception):
                warn(f"{track.path}: {reason(found, track.path)}; skipped")
                bad += 1
            else:
                clips += found
    check(clips, f"{tracks[0].path}: this and all other audio files are unusable ({bad} in all)")
    return clips


def reason(error, path):
    """What an exception says, in one line and without the path again."""
    text = str(error).replace(f"Error opening {str(path)!r}: ", "").replace(f"{path}: ", "")
    return " ".join(text.split()).rstrip(".")


def load_audio(path: Path, start: float, seconds: float, rate: int) -> np.ndarray:
    """`seconds` of a file from `start`, mono at `rate` Hz, padded with silence: float32 (seconds * rate,).

    ValueError or RuntimeError where the file does not hold what its header says, or numbers that are not finite.
    """
    with soundfile.SoundFile(path) as file:
        file.seek(min(round(start * file.samplerate), file.frames))
        wanted = min(round(seconds * file.samplerate), file.frames - file.tell())
        audio = file.read(wanted, dtype="float32", always_2d=True).mean(axis=1)  # choice: mixed to mono
        check(len(audio) >= max(1, wanted - file.samplerate // 10), "is cut off, or has no audio in it")
        check(np.isfinite(audio).all(), "holds samples that are not numbers")
        audio = np.pad(audio, (0, round(seconds * file.samplerate) - len(audio)))
    return n2m.fft_resample(audio, round(seconds * rate), np)


def text_batch(track: Track, token_length: int, count_tokens) -> list[str]:
    """Sec. 4.1: the long prompts one by one; the short ones concatenated, then segmented to the token length.

    choice: joined by ", ", and segmented between tags, so that none is cut in two.
    """
    segments = []
    for tag in track.short:
        joined = f"{segments[-1]}, {tag}" if segments else tag
        if segments and count_tokens(joined) < token_length:  # one token is </s>
            segments[-1] = joined
        else:
            segments.append(tag)
    return [*track.long, *segments]


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def cached_audio(clips: list[Clip], rate: int):
    """`load_audio` that keeps what it decoded, CACHE bytes at the most: a small data set is decoded once."""
    clip_bytes = 4 * rate * np.mean([clip.seconds for clip in clips])
    return functools.lru_cache(maxsize=int(CACHE / clip_bytes))(load_audio)


def make_example(clips, model: n2m.Model, seed: int, texts_of, bad: dict, index: int, load=load_audio) -> Example:
    """Example number `index` of a run, a pure function of the seed and the index, so that a run resumes exactly.

    Each epoch visits every clip once. A file that turns out to be bad is reported once, noted in `bad`, and replaced.
    """
    rng = np.random.default_rng([seed, 1, index])
    epoch, i = divmod(index, len(clips))
    clip, audio = clips[epoch_order(len(clips), seed, epoch)[i]], None
    for _ in range(100):
        try:
            if clip.track.path not in bad:
                audio = load(clip.track.path, clip.start, clip.seconds, model.audio_rate)
                break
        except (OSError, ValueError, RuntimeError) as error:
            if bad.setdefault(clip.track.path, error) is error:
                warn(f"{clip.track.path}: {reason(error, clip.track.path)}; skipped ({len(bad)} bad so far)")
        clip = clips[rng.integers(len(clips))]
    check(audio is not None, f"{clip.track.path}: of {len(bad)} files none can be decoded; nothing to train on")
    # Sec. 4.1: whole clips for the generators, random snippets for the others; silence where a file is shorter.
    samples = round(model.training.seconds * model.audio_rate)
    start = rng.integers(max(len(audio) - samples, 0) + 1)
    audio = audio[start : start + samples]
    texts = texts_of(clip.track)
    text = texts[rng.integers(len(texts))] if texts else ""  # "a random element of the corresponding text batch"
    return Example(np.pad(audio, (0, samples - len(audio))), text)


def memorised_example(track: Track, model: n2m.Model) -> Example:
    """The beginning of the clip in the middle of a track: the one example of --overfit."""
    check(track.path.is_file(), f"{track.path}: no such file; --overfit takes an audio file")
    try:
        clips = track_clips(track)
        start = clips[len(clips) // 2].start
        audio = load_audio(track.path, start, model.training.seconds, model.audio_rate)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{track.path}: {reason(error, track.path)}; choose another file") from None
    return Example(audio, track.long[0])


THREADS = os.cpu_count() or 1  # that decode


def batches(make, batch_size: int, index: int, rows=None, seconds=None, ahead: int = 4):
    """Endless lists of examples from number `index` on, decoded by background threads `ahead` batches ahead.

    `rows` are those of a batch that this process decodes, all by default; `seconds` collects what each example took.
    """
    rows = range(batch_size) if rows is None else rows

    def timed(index):
        begin = time.perf_counter()
        example = make(index)
        if seconds is not None:
            seconds.append(time.perf_counter() - begin)
        return example

    with ThreadPoolExecutor(THREADS) as pool:
        queue = deque()
        try:
            while True:
                while len(queue) <= ahead:
                    queue.append(pool.map(timed, [index + row for row in rows]))
                    index += batch_size
                yield list(queue.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def text_encoder(t5: t5_encoder.T5, token_length: int):
    """texts -> embeddings (B, L, E) and mask (B, L). Each different text is encoded once."""
    one = functools.lru_cache(maxsize=4096)(lambda text: t5_encoder.encode(t5, [text], token_length))

    def encode(texts):
        return tuple(np.concatenate(part) for part in zip(*map(one, texts)))

    return encode


# ---- The step (Sec. 4.1) ----


class State(NamedTuple):
    params: dict
    ema: dict
    opt: optax.OptState
    step: jax.Array


def optimizer(c: n2m.TrainingConfig):
    """Sec. 4.1: Adam; 10k warm-up steps to 1e-4, then a cosine that ends at 2.5 M steps. choice: at zero."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, c.learning_rate, c.warmup_steps, c.decay_steps)
    return optax.adam(schedule, c.beta1, c.beta2)


def state_layout(model: n2m.Model, mesh) -> State:
    """How a State lies on a mesh: parameters by the first column of SHARDING, their average and Adam's moments by the second."""
    now, rest = n2m.shardings(model.unet, mesh, 0), n2m.shardings(model.unet, mesh, 1)
    everywhere = NamedSharding(mesh, PartitionSpec())
    adam, *others = jax.eval_shape(functools.partial(init_state, model, 0)).opt
    adam = adam._replace(count=everywhere, mu=rest, nu=rest)
    return State(now, rest, (adam, *jax.tree.map(lambda _: everywhere, others)), everywhere)


def place(tree, layout):
    """The arrays of a tree, the same in every process, on the devices of all of them."""
    return jax.tree.map(lambda a, s: jax.make_array_from_callback(a.shape, s, np.asarray(a).__getitem__), tree, layout)


def gather(a) -> np.ndarray:
    """The whole of an array of which other processes hold parts. Every process must ask for it."""
    return np.asarray(a if a.is_fully_addressable else multihost_utils.process_allgather(a, tiled=True))


def on_mesh(tree, layout):
    """Inside jit: `tree`, laid out as layout(mesh) says where a mesh is set."""
    mesh = jax.sharding.get_abstract_mesh()
    return tree if mesh.empty else jax.lax.with_sharding_constraint(tree, layout(mesh))


def init_state(model: n2m.Model, seed: int, params=None) -> State:
    params = n2m.init_params(jax.random.key(seed), model.unet) if params is None else params
    ema = jax.tree.map(jnp.copy, params)  # a copy, since `update` gives the state's memory away
    return State(params, ema, optimizer(model.training).init(params), jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames=("model", "dtype", "remat"))
def gradients(params, model, key, audio, text, text_mask, dtype, remat):
    """Gradients of the batch's mean loss, and what is logged of it: the loss of each clip and its t."""

    def loss(params):
        losses, t = n2m.diffusion_loss(params, model, key, audio, text, text_mask, dtype, remat)
        return losses.mean(), (n2m.constrain(losses), n2m.constrain(t))  # whole, for every process to log

    grads, logged = jax.grad(loss, has_aux=True)(params)
    return on_mesh(grads, lambda mesh: n2m.shardings(model.unet, mesh, 1)), logged


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def update(state: State, model, grads):
    c, n = model.training, state.step
    updates, opt = optimizer(c).update(grads, state.opt)
    params = optax.apply_updates(state.params, updates)
    decay = jnp.minimum(c.ema, (1 + n) / (10 + n))  # departs: Sec. 4.1 has 0.9999 from the start; short runs need less
    ema = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, state.ema, params)
    return on_mesh(State(params, ema, opt, n + 1), functools.partial(state_layout, model)), optax.tree.norm(grads)


def process_rows(batch_size: int, accumulate: int) -> list[int]:
    """The rows of a batch that this process reads: its share of each part, so that the batch is the same on any number."""
    part, share = batch_size // accumulate, batch_size // accumulate // jax.process_count()
    return [k * part + jax.process_index() * share + row for k in range(accumulate) for row in range(share)]


def train_step(state: State, model: n2m.Model, seed: int, audio, text, text_mask, accumulate, dtype, remat, mesh=None):
    """One step on a batch, in `accumulate` parts of equal size. Returns the state, losses (B,), t (B,), gradient norm.

    With a mesh, which `jax.set_mesh` has set, the state lies on it, and the arrays hold the `process_rows` of the batch.
    """
    key = jax.random.fold_in(jax.random.key(seed), state.step)
    parts = [None if a is None else np.split(a, accumulate) for a in (audio, text, text_mask)]
    if mesh:
        rows = NamedSharding(mesh, PartitionSpec("data"))
        parts = [p and [jax.make_array_from_process_local_data(rows, a) for a in p] for p in parts]
    total, logged = None, []
    for k in range(accumulate):  # a Python loop: the gradient of a convolution is 50 times slower inside lax.scan on a CPU
        part = [None if p is None else p[k] for p in parts]
        grads, aux = gradients(state.params, model, jax.random.fold_in(key, k), *part, dtype, remat)
        total = grads if total is None else jax.tree.map(jnp.add, total, grads)
        logged.append(aux)
    grads = jax.tree.map(lambda g: g / accumulate, total) if accumulate > 1 else total
    state, norm = update(state, model, grads)
    losses, t = (jnp.concatenate(a) for a in zip(*logged))
    return state, losses, t, norm


# ---- Several processes (Sec. 4.1 trains with batches of 2048) ----


def join_processes(args):
    """Makes this process one of --processes, each with its own devices, that train together."""
    if args.processes > 1:
        jax.distributed.initialize(args.coordinator, args.processes, args.process, heartbeat_timeout_seconds=30)
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # one process speaks; warnings come from each


def training_mesh(args, batch_size: int):
    mesh = n2m.make_mesh(args.model_parallel)
    check(jax.local_device_count() % args.model_parallel == 0,
          f"--model-parallel {args.model_parallel} does not divide the {jax.local_device_count()} devices of a process")
    args.accumulate = args.accumulate or default_parts(batch_size, mesh)
    part = batch_size // args.accumulate
    check(part % mesh.shape["data"] == 0, f"a batch of {batch_size} in {args.accumulate} parts does not divide among "
                                          f"{mesh.shape['data']} groups of devices; choose another --batch-size or --accumulate")
    return mesh


def default_parts(batch_size: int, mesh) -> int:
    """As few parts of a batch as leave a device 8 clips at once. choice: 8, which a TPU's convolutions want (`conv1d`)."""
    across = mesh.shape["data"]
    fits = [n for n in range(1, batch_size + 1) if batch_size % (n * across) == 0 and batch_size // (n * across) <= 8]
    check(fits, f"a batch of {batch_size} does not divide among {across} groups of devices; choose another --batch-size")
    return fits[0]


def wait_for_all(what: str):
    """A meeting point of all processes."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def any_process(flag: bool) -> bool:
    return bool(flag if jax.process_count() == 1 else multihost_utils.process_allgather(np.array(flag)).any())


# ---- Checkpoints: one safetensors file each ----


def flatten(tree):
    """(names, leaves) of a tree: "params/down/0/resample/w", ..."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves], [leaf for _, leaf in leaves]


def model_from_json(text: str) -> n2m.Model:
    tuples = lambda d: {k: tuple(v) if isinstance(v, list) else v for k, v in d.items()}
    d = json.loads(text)
    parts = {"unet": n2m.UNetConfig, "training": n2m.TrainingConfig, "inference": n2m.InferenceConfig}
    return n2m.Model(**{k: parts[k](**tuples(v)) if k in parts else v for k, v in d.items()})


def write_checkpoint(path: Path, tensors: dict, model: n2m.Model, metadata: dict):
    metadata = {"model": json.dumps(dataclasses.asdict(model)), **{k: json.dumps(v) for k, v in metadata.items()}}
    t5_encoder.write_safetensors(path, tensors, metadata)


def save_checkpoint(folder: Path, state: State, model: n2m.Model, metadata: dict) -> Path:
    """Everything a run is: parameters, EMA, optimiser, step; configuration, seed and data position as metadata.

    Of several processes the first one writes.
    """
    path = folder / f"checkpoint-{int(state.step):08d}.safetensors"
    state = jax.tree.map(gather, state)
    if jax.process_index():
        return path
    write_checkpoint(path, dict(zip(*flatten(state))), model, metadata)
    for old in checkpoints(folder)[:-2]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*.safetensors"))


def load_checkpoint(path: Path, name: str, keep=lambda name: True):
    """(model, {name: array}, metadata) of a checkpoint of the model called `name`. ValueError in one line if it is not."""
    tensors, metadata = t5_encoder.read_safetensors(path, keep)
    try:
        model = model_from_json(metadata.pop("model"))
        metadata = {k: json.loads(v) for k, v in metadata.items()}
        metadata["seed"], metadata["index"], metadata["t5"]
    except (KeyError, TypeError, ValueError, AttributeError):
        raise ValueError(f"{path}: not a checkpoint of this project; move it away") from None
    check(model.name == name, f"{path}: a checkpoint of {model.name}, not of {name}; move it to its own folder")
    return model, tensors, metadata


def restore(tree, tensors: dict, prefix: str, path: Path):
    """The tensors named `prefix`... in the structure, and the types, of `tree` (arrays or their shapes)."""
    names, leaves = flatten(tree)
    for name, leaf in zip(names, leaves):
        array = tensors.get(prefix + name)
        check(array is not None and array.shape == leaf.shape,
              f"{path}: lacks {prefix + name} of shape {leaf.shape}; it is of another version or model")
    arrays = [tensors[prefix + name].astype(leaf.dtype) for name, leaf in zip(names, leaves)]
    return jax.tree.unflatten(jax.tree.structure(tree), arrays)


def load_model(folder: Path, name: str, raw: bool = False):
    """(model, params, metadata) to sample from: the EMA (Sec. 4.1), or with `raw` the unaveraged parameters."""
    found = checkpoints(folder / name)
    check(found, f"{folder / name}: no trained {name} here; train one:  python train.py {name} --data DIR --out {folder}")
    prefix = "params/" if raw else "ema/"
    model, tensors, metadata = load_checkpoint(found[-1], name, lambda n: n.startswith(prefix))
    return model, restore_params(model, tensors, prefix, found[-1]), metadata


def restore_params(model: n2m.Model, tensors: dict, prefix: str, path: Path):
    shapes = jax.eval_shape(lambda key: n2m.init_params(key, model.unet), jax.random.key(0))
    return restore(shapes, tensors, prefix, path)


def fitting_params(model: n2m.Model, tensors: dict, seed: int, path: Path):
    """Fresh parameters, but for those of which a checkpoint holds the average, in the same place and shape."""
    fresh = n2m.init_params(jax.random.key(seed), model.unet)
    names, leaves = flatten(fresh)
    found = [tensors.get("ema/" + name) for name in names]
    found = [array if array is not None and array.shape == leaf.shape else None for array, leaf in zip(found, leaves)]
    taken = sum(leaf.size for array, leaf in zip(found, leaves) if array is not None)
    print(f"{taken / 1e6:.1f} M of {sum(leaf.size for leaf in leaves) / 1e6:.1f} M parameters from {path}")
    arrays = [leaf if array is None else array.astype(leaf.dtype) for array, leaf in zip(found, leaves)]
    return jax.tree.unflatten(jax.tree.structure(fresh), arrays)


# ---- T5 (Sec. 3.4) ----


def prepare_t5(folder: str | None, out: Path, captions, seed: int) -> tuple[t5_encoder.T5, str | None]:
    """The text encoder of a run, and its folder where it is not OUT/t5: --t5, or OUT/t5, or a new random one there."""
    if folder:
        return t5_encoder.load_t5(folder), str(Path(folder).resolve())
    if not (out / "t5").exists() and jax.process_index() == 0:
        warn(f"no --t5: made a small random T5 encoder in {out / 't5'}; it tells prompts apart, but knows no English")
        out.mkdir(parents=True, exist_ok=True)
        t5_encoder.save_t5(out / "t5.part", t5_encoder.random_t5(captions, seed))
        (out / "t5.part").rename(out / "t5")
    wait_for_all("t5")
    return t5_encoder.load_t5(out / "t5"), None


def t5_fingerprint(t5: t5_encoder.T5) -> str:
    """Tells one text encoder from another: the CRC-32 of its vocabulary and of its smaller tensors."""
    small = [np.asarray(a) for a in jax.tree.leaves(t5.params) if a.size < 2**22]
    return f"{functools.reduce(lambda crc, a: zlib.crc32(a, crc), small, zlib.crc32(t5.tokenizer.serialized_model_proto())):08x}"


# ---- The run ----


def progress_line(what: str, done: int, n: int, begin: float, first: int):
    """On stderr: how far, and how long yet. Rewritten on a terminal."""
    eta = (time.monotonic() - begin) / max(done - first, 1) * (n - done)
    end = "\r" if sys.stderr.isatty() and done < n else "\n"
    print(f"{what}: {done}/{n}  ETA {time.strftime('%H:%M:%S', time.gmtime(eta))}", end=end, file=sys.stderr, flush=True)


def write_wav(path: Path, audio: np.ndarray, rate: int):
    """A 16-bit wav, whole or not at all. audio (T,), clipped to [-1, 1]."""
    part = path.with_name(path.name + ".part")
    try:
        soundfile.write(part, np.clip(audio, -1, 1), rate, "PCM_16", format="WAV")
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def preview(params, model: n2m.Model, audio, text, text_mask, seed: int):
    """One clip sampled in 64 steps, and its correlation with `audio` (samples,), which also is what it is conditioned on."""
    seconds, truth = model.training.seconds, jnp.asarray(audio)[None]
    truth_x = n2m.log_mel(truth) if n2m.writes_log_mel(model) else truth
    low = n2m.fft_resample(truth, round(seconds * model.low_rate)) if model.low_rate else n2m.log_mel(truth)
    condition = n2m.sampling_condition(model, low, seconds)._replace(text=text, text_mask=text_mask)
    fewer = dataclasses.replace(model, inference=dataclasses.replace(model.inference, steps=PREVIEW_STEPS))
    length = n2m.padded_length(model.unet, truth_x.shape[1])
    x = n2m.sample(params, fewer, condition, jax.random.split(jax.random.key(seed), 1), length)[:, : truth_x.shape[1]]
    correlation = float(jnp.corrcoef(x.ravel(), truth_x.ravel())[0, 1])
    return (n2m.griffin_lim(x) if n2m.writes_log_mel(model) else x[:, :, 0])[0], correlation


def check_finite(pending, folder: Path):
    """Stops the run where a loss or a gradient is not finite; the checkpoints on disk are from before that step."""
    for step, losses, _, norm in pending:
        if not (np.isfinite(losses).all() and np.isfinite(norm)):
            kept = [path.name for path in checkpoints(folder)[-1:]] or ["none"]
            fail(f"step {step}: the loss or its gradient is not finite; stopped. Last good checkpoint in {folder}: "
                 f"{kept[0]}. Go on from it with --resume and a lower --learning-rate", status=1)


def report(pending, seconds, decoding, steps: int, log):
    """Prints a progress line, and appends it to log.jsonl, on what `pending` holds: (step, losses, t, norm) a step.

    `decoding` holds the seconds that the last clips took to decode: their rate should be above that of the steps.
    """
    steps_done, losses, t, norms = zip(*pending)
    losses, t = np.concatenate(losses), np.concatenate(t)
    step, rate = steps_done[-1], len(losses) / seconds
    # By quarter of t: one number hides that the ends differ a hundredfold.
    quarters = [losses[(t >= q / 4) & (t < (q + 1) / 4)] for q in range(4)]
    quarters = [float(q.mean()) if q.size else None for q in quarters]
    entry = dict(step=step, loss=float(losses.mean()), loss_by_quarter_of_t=quarters,
                 grad_norm=float(np.mean(norms)), clips_per_second=rate, decoded_per_second=THREADS * len(decoding) / sum(decoding))
    log.write(json.dumps(entry) + "\n")
    log.flush()
    quarters = " ".join("-" if q is None else f"{q:.4f}" for q in quarters)
    eta = time.strftime("%H:%M:%S", time.gmtime((steps - step) * seconds / len(pending)))
    print(f"step {step}/{steps}  loss {entry['loss']:.4f} by t [{quarters}]  grad {entry['grad_norm']:.3f}  "
          f"{rate:.1f} clips/s (decoder {entry['decoded_per_second']:.0f})  ETA {eta}", flush=True)


def open_log(path: Path, step: int):
    """log.jsonl for appending, without the lines after `step` that a killed run may have left."""
    lines = path.read_text().splitlines() if path.exists() else []
    kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
    path.write_text("".join(line + "\n" for line in kept))
    return path.open("a")


def train(args, model, state, metadata, make, encode, folder: Path, mesh):
    """The loop: step, log, sample, save; until the last step, a signal, or a loss that is not finite."""
    c, stop = model.training, []
    for number in (signal.SIGINT, signal.SIGTERM):  # the first one saves and stops, a second one stops at once
        signal.signal(number, lambda n, _: (stop.append(n), signal.signal(n, signal.SIG_DFL)))
    dtype = jnp.bfloat16 if args.bf16 else jnp.float32
    first, pending, clock, step = make(0), [], time.monotonic(), int(state.step)
    log = open(os.devnull, "w") if jax.process_index() else open_log(folder / "log.jsonl", step)
    rows, decoding = process_rows(c.batch_size, args.accumulate), deque(maxlen=1000)
    print(f"training to step {c.steps}; the first step compiles", flush=True)
    for examples in batches(make, c.batch_size, metadata["index"], rows, decoding):
        audio = np.stack([e.audio for e in examples])
        text, text_mask = encode([e.text for e in examples]) if encode else (None, None)
        with jax.set_mesh(mesh):
            state, *logged = train_step(state, model, metadata["seed"], audio, text, text_mask, args.accumulate, dtype,
                                        args.remat, mesh)
        step, metadata["index"] = step + 1, metadata["index"] + c.batch_size
        pending.append((step, *logged))
        last = step == c.steps or (step % args.log_every == 0 or jax.process_count() == 1) and any_process(bool(stop))
        sampling = args.sample_every and step % args.sample_every == 0 or args.overfit and step == c.steps
        saving = step % args.save_every == 0 or last
        if step % args.log_every == 0 or sampling or saving:
            pending = [(n, *map(np.asarray, values)) for n, *values in pending]
            check_finite(pending, folder)
            report(pending, time.monotonic() - clock, decoding, c.steps, log)
            pending = []
        if saving:
            path = save_checkpoint(folder, state, model, metadata)
        if sampling:
            params = jax.tree.map(gather, state.ema)
            if jax.process_index() == 0:
                text, text_mask = encode([first.text]) if encode else (None, None)
                sampled, correlation = preview(params, model, first.audio, text, text_mask, step)
                wav = folder / f"sample-{step:08d}.wav"
                write_wav(wav, np.asarray(sampled), n2m.MEL_RATE if n2m.writes_log_mel(model) else model.rate)
                print(f"{wav}: correlation with the {'memorised clip' if args.overfit else 'first clip'} {correlation:.3f}")
        if not pending:
            clock = time.monotonic()
        if last:
            break
    if stop and step < c.steps:
        fail(f"stopped at step {step}, saved as {path}; --resume goes on from there", status=128 + stop[0])
    print(f"done: {path}")


# ---- The command line ----

OVERRIDES = {  # fields of TrainingConfig that have an option each
    "steps": "training steps", "batch_size": "clips a step", "seconds": "length of what a step sees of a clip",
    "learning_rate": "peak of Adam's learning rate", "warmup_steps": "linear warm-up", "decay_steps": "end of the cosine",
    "beta1": "of Adam", "beta2": "of Adam", "ema": "decay of the averaged parameters",
    "occlusion": "share of prompts hidden, for guidance", "t_max": "noise augmentation up to this time",
    "noise_schedule": "one of " + ", ".join(n2m.SCHEDULES), "loss_weight": "one of " + ", ".join(n2m.LOSS_WEIGHTS),
}  # fmt: skip


def parse_args(argv=None):
    parser = new_parser("train.py", __doc__)
    parser.add_argument("model", choices=n2m.NAMES, metavar="MODEL", help="one of " + ", ".join(n2m.NAMES))
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, metavar="DIR", help="folder of audio and captions")
    source.add_argument("--overfit", type=Path, metavar="FILE", help="memorise one clip: if this fails, nothing else will work")
    parser.add_argument("--out", type=Path, metavar="RUNS", help="folder of all runs; this one goes into RUNS/MODEL")
    parser.add_argument("--tiny", action="store_true", help="a small variant of the model, for a CPU")
    parser.add_argument("--init", type=Path, metavar="FILE", help="begin with a checkpoint's averaged parameters, its size, T5 and "
                        "configuration: demo/MODEL/checkpoint-N.safetensors; with --tiny, in a tiny model, with those that fit it")
    parser.add_argument("--t5", metavar="DIR", help="T5 encoder, Hugging Face's layout (default: RUNS/t5, random if absent)")
    many = parser.add_argument_group("many devices: one process uses all it sees; or several, with the same command but --process")
    many.add_argument("--model-parallel", type=int, default=1, metavar="N",
                      help="devices that share a matrix (default: 1); the rest share the batch")
    many.add_argument("--processes", type=int, default=1, metavar="N", help="how many processes train together, on a shared --out")
    many.add_argument("--process", type=int, metavar="I", help="which of them this one is, from 0")
    many.add_argument("--coordinator", metavar="HOST:PORT",
                      help="where process 0 listens; a TPU pod needs none of the last three but --processes")
    parser.add_argument("--accumulate", type=int, metavar="N", help="split a batch into N parts to save memory (default: as few as "
                        "leave a device 8 clips at once)")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16; parameters stay float32")
    parser.add_argument("--remat", action="store_true", help="recompute blocks in the backward pass to save memory")
    parser.add_argument("--seed", type=int, help="of the parameters, the noise and the order of the data (default: 0)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, bit for bit")
    parser.add_argument("--log-every", type=int, default=20, metavar="N", help="steps between progress lines (default: 20)")
    parser.add_argument("--save-every", type=int, default=500, metavar="N", help="steps between checkpoints (default: 500)")
    parser.add_argument("--sample-every", type=int, default=0, metavar="N", help="steps between sampled wavs (default: none)")
    table = parser.add_argument_group("overrides of Table 2 and Sec. 4.1 (or of what --tiny makes of them)")
    for field in dataclasses.fields(n2m.TrainingConfig):
        if field.name in OVERRIDES:
            default = "by model" if field.default in (dataclasses.MISSING, 0.0) else field.default
            table.add_argument("--" + field.name.replace("_", "-"), type=field.type, metavar="X",
                               help=f"{OVERRIDES[field.name]} (paper: {default})")
    args = parser.parse_args(argv)
    if args.out is None or args.data is None and args.overfit is None:
        parser.error("give --out and one of --data and --overfit")
    if args.init and args.resume:
        parser.error("--init begins a run; leave it out to go on with --resume")
    if not 0 <= (args.seed or 0) < 2**63:
        parser.error(f"--seed must be from 0 to 2^63 - 1, not {args.seed}")
    if args.process is not None and not 0 <= args.process < args.processes:
        parser.error(f"--process must be from 0 to {args.processes - 1}, not {args.process}")
    for name in ("accumulate", "model_parallel", "processes", "log_every", "save_every", "steps", "batch_size", "seconds",
                 "decay_steps", "learning_rate"):
        if (value := getattr(args, name)) is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} must be positive, not {value}")
    return args


def configure(args, model: n2m.Model) -> n2m.Model:
    """The model with the command line's overrides."""
    changes = {name: getattr(args, name) for name in OVERRIDES if getattr(args, name) is not None}
    training = dataclasses.replace(model.training, **changes)
    check(training.noise_schedule in n2m.SCHEDULES and training.loss_weight in n2m.LOSS_WEIGHTS,
          f"--noise-schedule is one of {', '.join(n2m.SCHEDULES)}; --loss-weight one of {', '.join(n2m.LOSS_WEIGHTS)}")
    check(training.batch_size % (args.accumulate or 1) == 0,
          f"--accumulate {args.accumulate} does not divide the batch size {training.batch_size}")
    check(0 <= training.warmup_steps < training.decay_steps, "--warmup-steps must be below --decay-steps")
    check(training.seconds <= CLIP_SECONDS, f"--seconds {training.seconds} is longer than a clip of {CLIP_SECONDS} s")
    return dataclasses.replace(model, training=training)


def begin(args, folder: Path):
    """(model, tensors or None, metadata): a new run, or one that begins with --init's parameters, or the one to resume."""
    found = checkpoints(folder)
    check(bool(found) or not args.resume, f"{folder}: no checkpoint to resume from; leave --resume out to start")
    check(args.resume or not found, f"{folder}: holds {len(found)} checkpoints; --resume goes on, another --out starts anew")
    if not found:
        model, tensors = n2m.tiny(n2m.MODELS[args.model]) if args.tiny else n2m.MODELS[args.model], None
        metadata = {"seed": args.seed or 0, "index": 0, "t5": None, "t5_fingerprint": None}
        if args.init:
            saved, tensors, old = load_checkpoint(args.init, args.model, lambda name: name.startswith("ema/"))
            model = model if args.tiny else saved
            if mark := old["t5_fingerprint"]:
                metadata |= {"t5": old["t5"] or str(args.init.resolve().parents[1] / "t5"), "t5_fingerprint": mark}
        return configure(args, model), tensors, metadata
    model, tensors, metadata = load_checkpoint(found[-1], args.model)
    model = configure(args, model)
    check(args.seed in (None, metadata["seed"]), f"{found[-1]}: of seed {metadata['seed']}; leave --seed out")
    check(tensors["step"] < model.training.steps, f"{found[-1]}: at its last step already; give more --steps")
    return model, tensors, metadata


def words_of(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", text.lower())


def prepare_text(args, model: n2m.Model, metadata: dict, tracks):
    """(model, encode, texts_of): the model as wide as its T5, that T5, and the prompts of a track (Sec. 4.1)."""
    captions = sorted({text for track in tracks for text in track.long + track.short})
    t5, metadata["t5"] = prepare_t5(args.t5 or metadata["t5"], args.out, captions, metadata["seed"])
    mark = t5_fingerprint(t5)
    check(metadata["t5_fingerprint"] in (None, mark), f"{args.t5 or args.out / 't5'}: not the T5 that this run began with")
    metadata["t5_fingerprint"] = mark
    words = sorted({word for text in captions for word in words_of(text)})
    metadata["words"] = words if len(words) <= 5000 else None  # for `sample.py` to tell what a small model never read of
    model = dataclasses.replace(model, unet=dataclasses.replace(model.unet, text_width=t5.config.d_model))
    length, count = model.training.token_length, functools.partial(t5_encoder.count_tokens, t5)
    return model, text_encoder(t5, length), functools.cache(lambda track: text_batch(track, length, count))


def prepare(args):
    """Everything `train` needs: configuration, state, data and text encoder, new or resumed."""
    folder = args.out / args.model
    model, tensors, metadata = begin(args, folder)
    if args.overfit:
        tracks = [Track(args.overfit, (args.overfit.stem,), ())]
        example = memorised_example(tracks[0], model)
        print(f"memorising {model.training.seconds:g} s of {args.overfit}")
    else:
        tracks = read_tracks(args.data, n2m.uses_text(model))
        clips = find_clips(tracks)
        print(f"{len(tracks)} tracks, {len(clips)} clips of up to {CLIP_SECONDS} s")
    encode, texts_of = None, lambda track: []
    if n2m.uses_text(model):
        model, encode, texts_of = prepare_text(args, model, metadata, tracks)
    if args.overfit:
        make = lambda index: example
    else:
        load = cached_audio(clips, model.audio_rate)
        make = functools.partial(make_example, clips, model, metadata["seed"], texts_of, {}, load=load)

    if args.resume:
        shapes = jax.eval_shape(functools.partial(init_state, model, 0))
        state = restore(shapes, tensors, "", checkpoints(folder)[-1])
    else:
        params = None
        if args.init and args.tiny:
            params = fitting_params(model, tensors, metadata["seed"], args.init)
        elif args.init:
            params = restore_params(model, tensors, "ema/", args.init)
        state = init_state(model, metadata["seed"], params)
    mesh = training_mesh(args, model.training.batch_size)
    state = place(state, state_layout(model, mesh))
    folder.mkdir(parents=True, exist_ok=True)
    n = n2m.param_count(model)
    print(f"{model.name}: {n / 1e6:.1f} M parameters, {n * 16 / 2**30:.2f} GiB with their average and Adam's moments, "
          f"on {mesh.size} x {jax.devices()[0].device_kind}")
    return model, state, metadata, make, encode, folder, mesh


def run_command(run, args):
    """Runs a script's command: what its user can mend becomes one line and exit status 2.

    With a compilation cache, so that a second process compiles nothing; JAX_COMPILATION_CACHE_DIR moves it.
    """
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "noise2music"))
    try:
        run(args)
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        warn(f"process {jax.process_index()}: another process of this run has ended, so this one ends too; start all of them again "
             f"with --resume ({str(error).splitlines()[0][:80]})")
        os._exit(1)  # not through the shutdown that would wait for it
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:  # python -X dev shows where
            raise
        fail(" ".join(str(error).split()))


def run(args):
    join_processes(args)
    train(args, *prepare(args))


def main(argv=None):
    run_command(run, parse_args(argv))


if __name__ == "__main__":
    main()
