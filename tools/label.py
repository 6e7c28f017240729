"""Caption a folder of music by pseudo-labels (Sec. 3.5) and by its own titles and tags (Sec. 3.6).

    python tools/label.py music --vocabulary long lamda_lf.txt --vocabulary short rater_sf.txt \\
        --audio-embedder my_mulan:audio --text-embedder my_mulan:text          # the training set of Sec. 3.6
    python tools/label.py audioset --vocabulary long lamda_lf.txt 3 --vocabulary long rater_lf.txt 3 \\
        --vocabulary short rater_sf.txt 6 ...                                 # MuLaMCap, Sec. 3.5
    python tools/label.py library --high-quality                              # metadata alone, all clips of a track

For each 30 s clip, the K captions of each vocabulary whose embeddings are nearest to the clip's, by cosine; K' of them are
drawn with probabilities inverse to how often each was near to a clip. The embeddings, of one space for audio and text, are
yours: MuLan is not public. An audio embedder takes audio (16, samples), float32 at 16 kHz, and returns (16, E) or, of frames,
(16, F, E); a text embedder takes a list of texts and returns (N, E). Or else an array (clips, E) in a .npy or .npz: its
rows in the order of metadata.jsonl or of the sorted file names, and of the clips of a track.

DIR/metadata.jsonl, if there, says of each track {"audio": "one.flac", "title": "...", "tags": ["jazz", "piano"]}; otherwise all
audio in DIR is taken, with the title, artist, album and genre that the files themselves hold. The result is the captions.jsonl
that training reads. A run that was stopped goes on where it was, with what it has embedded (delete the folder OUT.work after
a change inside an embedder). The memory is about that of the captions as text, the
clips' embeddings, and 1 GB.
"""

import functools
import importlib
import json
import os
import sys
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import noise2music as n2m
from t5_encoder import check
from train import (CLIP_SECONDS, CLIPS_PER_TRACK, THREADS, Clip, Track, find_clips, load_audio, new_parser, progress_line,
                   read_tracks, reason, run_command, warn)

# ---- Embedders: what stands in for MuLan, VGGish and Trill, which are not public (Secs. 3.5 and 4.3.2) ----

WINDOWS = 16  # pieces of audio that an embedder gets at once: always as many, so that it need not compile twice


def load_embedder(spec: str):
    """What an --audio-embedder or --text-embedder names: the array in a .npy or .npz, or a package.module:function."""
    if spec.endswith((".npy", ".npz")):
        return load_embeddings(Path(spec))
    sys.path.append(os.getcwd())  # where the user's own module may be
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{spec}: {error}; an embedder is a .npy or .npz file, or package.module:function") from None
    check(callable(function), f"{spec}: not a function")
    return function


def load_embeddings(path: Path) -> np.ndarray:
    """The embeddings in a .npy, which is not read into memory, or alone in a .npz: (N, E) or, of frames, (N, F, E)."""
    try:
        array = np.load(path, mmap_mode="r")
        if not isinstance(array, np.ndarray):
            check(len(array.files) == 1, f"holds {len(array.files)} arrays, not one")
            array = np.asarray(array[array.files[0]])
        check(array.dtype.kind == "f" and array.ndim in (2, 3), f"holds {array.dtype} {array.shape}")
        check(array.size, "is empty")
    except Exception as error:  # of ten kinds, for a damaged file
        why = error.strerror if isinstance(error, OSError) and error.strerror else reason(error, path)
        raise ValueError(f"{path}: {why}; embeddings are one array of floats, (N, E) or (N, frames, E)") from None
    return array


def embed(function, spec: str, inputs) -> np.ndarray:
    """function(inputs), checked: (N, E) or (N, F, E) for N texts or N pieces of audio, these WINDOWS at a time."""
    if isinstance(inputs, list):
        out = np.asarray(function(inputs), np.float32)
        check(out.ndim == 2 and len(out) == len(inputs),
              f"{spec}: made {out.shape} of {len(inputs)} texts; wanted ({len(inputs)}, E)")
    else:
        padded = np.pad(inputs, [(0, -len(inputs) % WINDOWS), (0, 0)])
        out = [np.asarray(function(padded[i : i + WINDOWS]), np.float32) for i in range(0, len(padded), WINDOWS)]
        check(all(o.ndim in (2, 3) and len(o) == WINDOWS for o in out),
              f"{spec}: made {out[0].shape} of audio {padded[:WINDOWS].shape}; wanted (N, E) or (N, frames, E)")
        out = np.concatenate(out)[: len(inputs)]
    check(out.size, f"{spec}: made an empty {out.shape} of {len(inputs)} inputs")
    return out


# ---- Pseudo-labels and the mining of data (Secs. 3.5 and 3.6) ----

K = 10  # Sec. 3.5: "We use K = 10 and K' = 3"


K_PRIME = {"long": 3, "short": 6}  # Sec. 3.6: "three pseudo labels from the LaMDA-LF vocabulary, and six [...] from [...] Rater-SF"


ROWS = 4096  # clips or captions between two writes to the disk: what a restart repeats at most


class Vocabulary(NamedTuple):
    kind: str  # "long" or "short"
    path: Path
    captions: list[str]
    k_prime: int
    k: int


def read_vocabulary(kind, path, k_prime=None, k=K) -> Vocabulary:
    """--vocabulary KIND FILE [K' [K]]: a caption a line."""
    check(kind in K_PRIME, f"--vocabulary: the captions of {path} are long or short, not {kind!r}")
    try:
        k_prime, k = int(K_PRIME[kind] if k_prime is None else k_prime), int(k)
    except ValueError:
        raise ValueError(f"--vocabulary {kind} {path}: {k_prime} and {k} should be K' and K, whole numbers") from None
    captions = [line.strip() for line in Path(path).read_text("utf-8", "replace").removesuffix("\n").split("\n")]
    for number, caption in enumerate(captions, 1):
        check(caption, f"{path}:{number}: an empty line; every line is a caption")
    check(0 < k_prime <= k <= len(captions),
          f"{path}: {len(captions)} captions for K' = {k_prime} of K = {k}; wanted K' <= K <= captions")
    check(k <= n2m.CAPTION_BLOCK // n2m.CAPTION_GROUP, f"{path}: K = {k} is over {n2m.CAPTION_BLOCK // n2m.CAPTION_GROUP}")
    return Vocabulary(kind, Path(path), captions, k_prime, k)


def blockwise(path: Path, shape: tuple[int, int], dtype, make, what: str, block: int = ROWS) -> np.ndarray:
    """A matrix on the disk, made `block` rows at a time by make(start, end). A restart goes on after the last whole block."""
    (n, width), part = shape, path.with_name(path.name + ".part")
    if not path.exists():
        with part.open("ab") as file:
            row = width * np.dtype(dtype).itemsize
            first = done = file.tell() // (row * block) * block
            file.truncate(done * row)
            begin = shown = time.monotonic()
            while done < n:
                end = min(done + block, n)
                rows = np.ascontiguousarray(make(done, end), dtype)
                check(rows.shape == (end - done, width), f"{what}: rows {rows.shape} where the first had a width of {width}")
                file.write(rows)
                file.flush()
                done = end
                if done == n or time.monotonic() - shown > (0.2 if sys.stderr.isatty() else 30):
                    shown = time.monotonic()
                    progress_line(what, done, n, begin, first)
        os.replace(part, path)
    return np.memmap(path, dtype, "r", shape=shape)


def crc(*parts) -> str:
    """Tells one input from another, in the names of what was made of them."""
    return f"{functools.reduce(lambda c, part: zlib.crc32(str(part).encode('utf-8', 'surrogateescape'), c), parts, 0):08x}"


def embed_clips(function, spec, clips: list[Clip]) -> np.ndarray:
    """(N, E): of each clip the average over its 10-second windows (Sec. 3.5); not numbers where it cannot be decoded."""

    def decoded(clip):
        try:
            return n2m.windows(load_audio(clip.track.path, clip.start, clip.seconds, n2m.MEL_RATE))
        except (OSError, ValueError, RuntimeError) as error:
            warn(f"{clip.track.path}: {reason(error, clip.track.path)}; skipped")
            return n2m.windows(np.full(1, np.nan, np.float32))

    with ThreadPoolExecutor(THREADS) as pool:
        pieces = list(pool.map(decoded, clips))
    good = [np.isfinite(piece).all() for piece in pieces]
    out = embed(function, spec, np.nan_to_num(np.concatenate(pieces)))
    out = out.mean(axis=1) if out.ndim == 3 else out  # choice: of frames, the average too
    out = np.stack([part.mean(axis=0) for part in np.split(out, np.cumsum([len(piece) for piece in pieces])[:-1])])
    return np.where(np.array(good)[:, None], out, np.nan)


def clip_embeddings(spec: str, clips: list[Clip], work: Path):
    """(N, E) for N clips, the user's array, or made by the user's function and kept in `work`; and what tells it from others."""
    embedder = load_embedder(spec)
    of = crc(*((clip.track.path.resolve(), clip.track.path.stat().st_mtime_ns, clip.start, clip.seconds) for clip in clips))
    if isinstance(embedder, np.ndarray):
        check(embedder.ndim == 2 and len(embedder) == len(clips),
              f"{spec}: embeddings {embedder.shape} for {len(clips)} clips; wanted a row for each, in order (see label.py --help)")
        return embedder, crc(of, spec, os.stat(spec).st_mtime_ns)
    width = embed_clips(embedder, spec, clips[:1]).shape[1]
    of, make = crc(of, spec, width), lambda start, end: embed_clips(embedder, spec, clips[start:end])
    return blockwise(work / f"clips-{of}.f32", (len(clips), width), np.float32, make, "clips embedded", 2 * WINDOWS), of


def caption_embeddings(spec: str | None, v: Vocabulary, work: Path):
    """The same for M captions, (M, E): the array beside the vocabulary, lamda.npy beside lamda.txt, or by --text-embedder."""
    path, of = v.path.with_suffix(".npy"), crc(*v.captions)
    if path.exists():
        array = load_embeddings(path)
        check(array.ndim == 2 and len(array) == len(v.captions),
              f"{path}: embeddings {array.shape} for the {len(v.captions)} lines of {v.path}")
        return array, crc(of, path, path.stat().st_mtime_ns)
    check(spec, f"{v.path}: no embeddings; put them in {path}, a row for each line, or give --text-embedder")
    function = load_embedder(spec)
    check(callable(function), f"--text-embedder is a function; the array of {v.path} belongs in {path}")
    make = lambda start, end: embed(function, spec, v.captions[start:end])
    width = make(0, 1).shape[-1]
    of = crc(of, spec, width)
    return blockwise(work / f"{v.path.stem}-{of}.f32", (len(v.captions), width), np.float32, make, f"{v.path.name} embedded"), of


def pseudo_labels(args, clips: list[Clip], work: Path):
    """Sec. 3.5: the clips that have an embedding, and the captions of each: {"long": [...], "short": [...]}."""
    vocabularies = [read_vocabulary(*v) for v in args.vocabulary]
    load_embedder(args.audio_embedder)  # says what is wrong with it before the captions are embedded
    texts = [caption_embeddings(args.text_embedder, v, work) for v in vocabularies]
    x, of = clip_embeddings(args.audio_embedder, clips, work)
    for v, (y, _) in zip(vocabularies, texts):
        check(y.shape[1] == x.shape[1],
              f"{v.path}: embeddings {y.shape[1]} wide, of the clips {x.shape[1]}; they must be of one space")
        bad = np.flatnonzero(~np.isfinite(y.sum(axis=1, dtype=np.float64)))
        check(not len(bad), f"{v.path}: {len(bad)} embeddings are not numbers; the first is of line {bad.min(initial=len(y)) + 1}")
    good = np.flatnonzero(np.isfinite(x.sum(axis=1, dtype=np.float64)))
    check(len(good), f"{args.audio_embedder}: none of {len(clips)} embeddings is of numbers")
    if len(good) < len(clips):
        warn(f"{len(clips) - len(good)} of {len(clips)} clips have no embedding of numbers; left out")
    labels = [{"long": [], "short": []} for _ in good]
    for number, (v, (y, text_of)) in enumerate(zip(vocabularies, texts)):
        nearest = lambda start, end, y=y, k=v.k: n2m.top_captions(y, x[good[start:end]], k)
        kept = work / f"{v.path.stem}-top-{crc(of, text_of, v.k)}.i32"
        top = blockwise(kept, (len(good), v.k), np.int32, nearest, f"nearest of {v.path.name}")
        for entry, drawn in zip(labels, n2m.draw_captions(top, v.k_prime, [args.seed, number]).tolist()):
            entry[v.kind] += [v.captions[i] for i in drawn]
    return [clips[i] for i in good], labels


def header_tags(track: Track) -> Track:
    """A track with what its file says of itself, where metadata.jsonl says nothing: title, artist, album and genre."""
    if track.short:
        return track
    try:
        with soundfile.SoundFile(track.path) as file:
            found = file.copy_metadata()
    except (OSError, ValueError, RuntimeError):
        return track  # `find_clips` has its say
    tags = (found.get(key, "").strip() for key in ("title", "artist", "album", "genre"))
    return track._replace(short=tuple(tag for tag in tags if tag))


def label(args):
    """Sec. 3.6: writes the captions.jsonl of a folder of music: for each clip its title, tags and pseudo-labels."""
    out = args.out or args.folder / "captions.jsonl"
    check(not out.exists(), f"{out}: there already; move it away, or name another with --out")
    work = out.with_name(out.name + ".work")
    tracks = [header_tags(track) for track in read_tracks(args.folder, False, "metadata.jsonl")]
    # Sec. 3.6: the high-quality tracks "are segmented to non-overlapping 30-second clips", all of them
    clips = find_clips(tracks, 10**6 if args.high_quality else CLIPS_PER_TRACK)
    print(f"{len(tracks)} tracks, {len(clips)} clips of up to {CLIP_SECONDS} s", flush=True)
    labels = [{"long": [], "short": []} for _ in clips]
    if args.vocabulary:
        work.mkdir(parents=True, exist_ok=True)
        clips, labels = pseudo_labels(args, clips, work)
    part = out.with_name(out.name + ".part")
    with part.open("w") as file:
        for clip, pseudo in zip(clips, labels):
            long, short = list(clip.track.long), list(clip.track.short)
            if args.high_quality and short:  # "while the metadata of the tracks are concatenated to form the text prompt"
                long, short = [*long, ", ".join(short)], []
            path = clip.track.path.parent.resolve() / clip.track.path.name
            entry = {"audio": os.path.relpath(path, out.parent.resolve()), "start": round(clip.start, 3),
                     "long": long + pseudo["long"], "short": short + pseudo["short"]}
            file.write(json.dumps(entry) + "\n")
    os.replace(part, out)
    kept = f"; {work} keeps the embeddings for another run, and can be deleted" if work.exists() else ""
    print(f"{out}: {len(clips)} clips with their captions{kept}")


def parse_args(argv=None):
    parser = new_parser("label.py", __doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="the music")
    parser.add_argument("--vocabulary", nargs="+", action="append", default=[], metavar="X",
                        help="KIND FILE [K' [K]]: long or short, a file of a caption a line, how many to give each clip (3 long, 6 "
                        "short), out of how many (10); may be repeated")
    parser.add_argument("--audio-embedder", metavar="E", help="package.module:function, or an array in a .npy or .npz")
    parser.add_argument("--text-embedder", metavar="E", help="package.module:function; or put lamda.npy beside lamda.txt")
    parser.add_argument("--high-quality", action="store_true",
                        help="concatenate titles and tags to one prompt, and take all clips of a track")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: DIR/captions.jsonl")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    args = parser.parse_args(argv)
    if any(not 2 <= len(v) <= 4 for v in args.vocabulary):
        parser.error("--vocabulary takes KIND FILE [K' [K]]")
    if args.vocabulary and not args.audio_embedder:
        parser.error("--vocabulary needs an --audio-embedder to compare the captions with")
    if not (args.vocabulary or args.high_quality):
        parser.error("give a --vocabulary, or --high-quality for the metadata alone")
    if args.seed < 0:
        parser.error("--seed must not be negative")
    return args


def main(argv=None):
    run_command(label, parse_args(argv))


if __name__ == "__main__":
    main()
