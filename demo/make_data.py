"""Real music with true captions: tunes of the music21 corpus, played by a General MIDI soundfont.

    sudo apt-get install -y fluidsynth fluid-soundfont-gm
    pip install -e ".[demo]"
    python demo/make_data.py data         # data/train and data/heldout: 10 h and 2 h, 1.4 GB
    python train.py waveform_generator --tiny --data data/train --out runs

Every clip is 12 s of one piece, on one of twelve instruments, transposed into its range, at a tempo
that makes the captioned word true: it is the number of notes begun in a second that "slow",
"medium" and "fast" mean. A tenth of the tunes, whole, is held out; no chorale is. The result
depends on the seed and the soundfont alone; a run that was stopped goes on where it was.

Sources and licences. The music: O'Neill's Music of Ireland (1850 tunes, 1903), Ryan's Mammoth
Collection (1883), Aird's Airs (1782) and J. S. Bach's chorales, among which the Prelude in C, BWV
846, is called one too; all in the public domain, transcribed to ABC and MusicXML by volunteers, and
part of music21 (BSD) with their permission. Left out: the Essen folk songs (given for
non-commercial use) and Palestrina ("rights to all derivative electronic formats reserved"). The
sound: FluidR3, Frank Wen, MIT licence.
"""

import json
import re
import shutil
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import mido
import numpy as np
import soundfile
from music21 import converter, corpus

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train
from t5_encoder import check, read_lines, whole_file

SECONDS, RATE = 12, 24_000


class Piece(NamedTuple):
    id: str
    title: str
    genre: str
    region: str
    composer: str
    mode: str  # "major", "minor", or "" where it is neither or not known
    notes: list  # [onset, duration (quarter notes), MIDI pitch], by onset


# ---- The words that captions are made of ----

INSTRUMENTS = {  # its words, the first most often; General MIDI program; middle of its range
    "piano": (("piano", "grand piano", "pianoforte"), 0, 67),
    "harpsichord": (("harpsichord", "cembalo"), 6, 67),
    "music box": (("music box", "musical box"), 10, 84),
    "marimba": (("marimba", "wooden marimba"), 12, 64),
    "organ": (("organ", "church organ", "pipe organ"), 19, 65),
    "accordion": (("accordion", "squeezebox"), 21, 69),
    "guitar": (("guitar", "acoustic guitar", "classical guitar"), 24, 60),
    "violin": (("violin", "fiddle"), 40, 76),
    "cello": (("cello", "violoncello"), 42, 50),
    "trumpet": (("trumpet", "brass trumpet"), 56, 70),
    "clarinet": (("clarinet", "woodwind clarinet"), 71, 65),
    "flute": (("flute", "transverse flute"), 73, 81),
}
TEMPI = {  # the words for it; notes begun in a second, from and to
    "slow": (("slow", "calm", "leisurely", "gentle", "unhurried"), 1.0, 1.9),
    "medium": (("medium", "moderate", "mid-tempo", "steady"), 3.0, 4.2),
    "fast": (("fast", "quick", "lively", "rapid", "brisk"), 6.5, 9.5),
}
LONG = (  # {a} is the article of the word that follows it
    "{a} {tempo} {region} {genre} on the {instrument}.",
    "{a} {tempo} {genre} played on the {instrument}.",
    "{tempo} {instrument} music, {a} {region} {genre}.",
    "The {instrument} plays {a} {genre} at {a} {tempo} pace.",
    "{a} {tempo} piece for {instrument}.",
    "Someone plays {a} {tempo} {region} {genre} on the {instrument}.",
    "Solo {instrument}: {a} {tempo} {mode} {genre}.",
    "{a} {region} {genre} in {a} {mode} key, {tempo}, for {instrument}.",
    "Listen to this {tempo} {genre} by {composer}, arranged for {instrument}.",
    "{instrument}, {tempo}.",
)


def sentence(template: str, words: dict) -> str:
    """A template filled in; without the words that are not known of this piece."""
    text = " ".join(template.format(a="{a}", **words).split())
    while "{a}" in text:
        article = lambda m: ("an " if m[1] in "aeiouAEIOU" else "a ") + m[1]
        text = re.sub(r"\{a\} (\w)", article, text, count=1)
    return text[0].upper() + text[1:]


def captions(rng, piece: Piece, instrument: str, tempo: str) -> tuple[list[str], list[str]]:
    """Five long captions by as many templates, and the tags."""
    usual_or_any = lambda words: words[0] if rng.random() < 0.5 else words[rng.integers(len(words))]
    known = lambda t: all(getattr(piece, k) for k in ("mode", "composer") if "{" + k + "}" in t)
    fits = [t for t in LONG if known(t)]
    long = []
    for template in rng.choice(fits, 5, replace=False):
        words = {"instrument": usual_or_any(INSTRUMENTS[instrument][0]),
                 "tempo": usual_or_any(TEMPI[tempo][0])}
        long.append(sentence(template, piece._asdict() | words))
    short = [usual_or_any(INSTRUMENTS[instrument][0]), usual_or_any(TEMPI[tempo][0]),
             piece.genre, piece.region, piece.composer]
    return long, [tag for tag in [*short, piece.mode] if tag]


# ---- The pieces ----

GENRES = ("slip jig", "reel", "jig", "hornpipe", "strathspey", "clog", "fling", "march", "waltz",
          "polka", "quickstep")


def genre_of(title: str, rhythm: str) -> str:
    """From ABC's R: field or from the title; "tune" where neither says."""
    text = f"{rhythm} {title}".lower()
    text = text.replace("slipjig", "slip jig").replace("quick step", "quickstep")
    return next((genre for genre in GENRES if genre in text), "tune")


def mode_of(key: str) -> str:
    """Of ABC's K: field, such as G, Am, Ddor."""
    found = re.match(r"[A-G][#b]?\s*([A-Za-z]*)", key)
    modes = {"": "major", "maj": "major", "major": "major", "m": "minor", "min": "minor",
             "minor": "minor"}
    return modes.get(found[1].lower(), "") if found else ""


def notes_of(score) -> list:
    """[onset, duration, pitch] of every note, ties joined, by onset."""
    notes = []
    for part in score.parts or [score]:
        sounding = {}
        for element in part.flatten().notes:
            for note in element.notes if element.isChord else [element]:
                if not hasattr(note, "pitch") or element.duration.isGrace:
                    continue
                onset, length = float(element.offset), float(element.quarterLength)
                pitch = int(note.pitch.midi)
                if note.tie and note.tie.type in ("stop", "continue") and pitch in sounding:
                    sounding[pitch][1] += length
                else:
                    sounding[pitch] = [onset, length, pitch]
                    notes.append(sounding[pitch])
    return sorted(notes)


def abc_pieces(path: Path, region: str) -> list[Piece]:
    pieces = []
    for tune in re.split(r"(?m)^(?=X:)", path.read_text("utf-8", "replace"))[1:]:
        field = {key: (re.findall(rf"(?m)^{key}:\s*(.*?)\s*$", tune) or [""])[0] for key in "XTRK"}
        try:
            notes = notes_of(converter.parse(tune, format="abc"))
        except Exception as error:  # music21 raises what it likes at what volunteers typed
            print(f"{path.name} {field['X']}: {type(error).__name__}; left out", file=sys.stderr)
            continue
        pieces.append(Piece(f"{path.stem}-{field['X']}", field["T"],
                            genre_of(field["T"], field["R"]), region, "", mode_of(field["K"]),
                            notes))
    return pieces


def chorale(path: Path) -> list[Piece]:
    score = converter.parse(path)
    return [Piece(path.stem, path.stem.upper(), "chorale", "German", "Bach",
                  score.analyze("key").mode, notes_of(score))]


def parse(path_and_region) -> list[Piece]:
    path, region = path_and_region
    pieces = chorale(path) if path.suffix == ".mxl" else abc_pieces(path, region)
    return [p for p in pieces if len({onset for onset, _, _ in p.notes}) >= 24]


def all_pieces(out: Path, pool) -> list[Piece]:
    """Read once, kept in pieces.jsonl."""
    cache = out / "pieces.jsonl"
    if not cache.exists():
        root = Path(corpus.__file__).parent
        sources = (("oneills1850", "*.abc", "Irish"), ("ryansMammoth", "*.abc", "American"),
                   ("airdsAirs", "*.abc", "Scottish"), ("bach", "*.mxl", "German"))
        files = [(path, region) for folder, pattern, region in sources
                 for path in sorted((root / folder).glob(pattern))]
        pieces = [piece for found in pool.map(parse, files, chunksize=8) for piece in found]
        with whole_file(cache) as file:
            file.write("".join(json.dumps(piece) + "\n" for piece in pieces).encode())
    return [Piece(*json.loads(line)) for line in read_lines(cache)]


def held_out(piece: Piece) -> bool:
    """By title: the three collections have tunes in common. A chorale's title is but a number."""
    return zlib.crc32(re.sub(r"[^a-z]", "", piece.title.lower()).encode()) % 10 == 0


# ---- The clips ----


def excerpt(rng, piece: Piece, tempo: str):
    """(notes in seconds, notes begun in a second) of SECONDS of a piece from a random note on. What
    is left of the piece is repeated as often as it takes."""
    _, low, high = TEMPI[tempo]
    rate, onsets = rng.uniform(low, high), np.unique([onset for onset, _, _ in piece.notes])
    wanted = int(rate * SECONDS) + 1
    start = onsets[rng.integers(max(1, len(onsets) - wanted))]
    notes = [[onset - start, length, pitch] for onset, length, pitch in piece.notes
             if onset >= start]
    end = max(onset + length for onset, length, _ in notes)
    repeats = range(1 + wanted // max(1, len(onsets) // 4))
    notes = [[onset + k * end, length, pitch] for k in repeats for onset, length, pitch in notes]
    begun = np.unique([onset for onset, _, _ in notes])[: wanted + 1]
    # Seconds, so that `wanted` notes begin in wanted / rate seconds.
    quarter = wanted / rate / (begun[-1] - begun[0])
    return [(onset * quarter, length * quarter, pitch) for onset, length, pitch in notes
            if onset * quarter < SECONDS], rate


def midi(rng, notes, program: int, center: int) -> mido.MidiFile:
    """One track, transposed by octaves to around `center` and by up to three semitones; a little
    uneven in loudness."""
    middle = np.median([pitch for _, _, pitch in notes])
    shift = 12 * round((center - middle) / 12) + int(rng.integers(-3, 4))
    events = [(0.0, mido.Message("program_change", program=program))]
    for onset, length, pitch in notes:
        pitch = int(np.clip(pitch + shift, 21, 108))
        on = mido.Message("note_on", note=pitch, velocity=int(rng.integers(80, 112)))
        events.append((onset, on))
        events.append((onset + max(0.05, 0.92 * length), mido.Message("note_off", note=pitch)))
    file = mido.MidiFile(ticks_per_beat=1000)  # by default at two beats a second: a tick is 0.5 ms
    track, now = mido.MidiTrack(), 0
    for time, message in sorted(events, key=lambda e: e[0]):
        tick = round(time * 2000)
        track.append(message.copy(time=tick - now))
        now = tick
    file.tracks.append(track)
    return file


def render(file: mido.MidiFile, soundfont: Path) -> np.ndarray:
    """(SECONDS * RATE,) mono, at a loudness of -15 dBFS or with its peak at 0.95, whichever is less
    loud."""
    with tempfile.TemporaryDirectory() as folder:
        mid, wav = Path(folder) / "a.mid", Path(folder) / "a.wav"
        file.save(mid)
        run = subprocess.run(
            ["fluidsynth", "-niq", "-g", "0.5", "-r", str(RATE), "-o", "synth.chorus.active=0",
             "-o", "synth.dynamic-sample-loading=1", "-F", str(wav), str(soundfont), str(mid)],
            capture_output=True, text=True, errors="replace")
        check(not run.returncode, f"fluidsynth: {run.stderr.strip()[-200:] or 'failed'}")
        audio = soundfile.read(wav, dtype="float32", always_2d=True)[0].mean(axis=1)
    audio = np.pad(audio[: SECONDS * RATE], (0, max(0, SECONDS * RATE - len(audio))))
    return audio * min(10 ** (-15 / 20) / np.sqrt(np.mean(audio**2)), 0.95 / np.abs(audio).max())


def make_clip(job) -> dict:
    """Clip `number` of a split, a function of it and the seed; its line of captions.jsonl."""
    number, piece, path, soundfont, seed = job
    split = zlib.crc32(path.parent.name.encode())
    rng, words = np.random.default_rng([seed, split, number]).spawn(2)
    instrument = list(INSTRUMENTS)[number % 12]
    tempo = list(TEMPI)[number // 12 % 3]
    notes, rate = excerpt(rng, piece, tempo)
    long, short = captions(words, piece, instrument, tempo)
    _, program, center = INSTRUMENTS[instrument]
    file = midi(rng, notes, program, center)
    if not path.exists():
        with whole_file(path) as flac:
            soundfile.write(flac, render(file, soundfont), RATE, "PCM_16", format="FLAC")
    return {"audio": path.name, "long": long, "short": short, "instrument": instrument,
            "tempo": tempo, "notes_per_second": round(rate, 2), "piece": piece.id,
            "genre": piece.genre, "region": piece.region}


def make_split(out: Path, name: str, pieces: list[Piece], n: int, args, pool):
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    order = np.random.default_rng([args.seed, zlib.crc32(name.encode())])
    rounds = [order.permutation(len(pieces)) for _ in range(n // len(pieces) + 1)]
    jobs = [(number, pieces[i], folder / f"{number:05d}.flac", args.soundfont, args.seed)
            for number, i in enumerate(np.concatenate(rounds)[:n])]
    lines = []
    for entry in pool.map(make_clip, jobs, chunksize=4):
        lines.append(json.dumps(entry) + "\n")
        if len(lines) % 100 == 0 or len(lines) == n:
            print(f"{folder}: {len(lines)}/{n} clips", flush=True)
    with whole_file(folder / "captions.jsonl") as file:
        file.write("".join(lines).encode())


def make(args):
    check(args.soundfont.is_file(), f"{args.soundfont}: no such file; apt-get install "
          "fluid-soundfont-gm, or name another with --soundfont")
    with args.soundfont.open("rb") as file:  # else fluidsynth would play another
        head, size = file.read(12), args.soundfont.stat().st_size
        check(head[8:] == b"sfbk" and 8 + int.from_bytes(head[4:8], "little") <= size,
              f"{args.soundfont}: not a whole soundfont; name an .sf2 with --soundfont")
    check(shutil.which("fluidsynth"), "fluidsynth: not installed; apt-get install fluidsynth")
    args.out.mkdir(parents=True, exist_ok=True)
    made, kept = f"seed {args.seed}, {args.soundfont.name}\n", args.out / "made_with.txt"
    check(not kept.exists() or kept.read_text() == made,
          f"{args.out}: made with other options ({kept}); name another OUT")
    kept.write_text(made)
    with ProcessPoolExecutor() as pool:
        pieces = all_pieces(args.out, pool)
        splits = {"heldout": [p for p in pieces if held_out(p)],
                  "train": [p for p in pieces if not held_out(p)]}
        print(f"{len(pieces)} pieces, {len(splits['heldout'])} of them held out", flush=True)
        for name, n in (("train", args.train), ("heldout", args.heldout)):
            make_split(args.out, name, splits[name], n, args, pool)


def main():
    parser = train.new_parser("make_data.py", __doc__)
    add = parser.add_argument
    add("out", type=Path, metavar="OUT")
    add("--train", type=train.count, default=3000, metavar="N", help="clips to train on (3000)")
    add("--heldout", type=train.count, default=600, metavar="N",
        help="clips of held-out pieces (600)")
    add("--soundfont", type=Path, metavar="FILE", help="any .sf2 of General MIDI",
        default=Path("/usr/share/sounds/sf2/FluidR3_GM.sf2"))
    add("--seed", type=train.number(int, 0), default=0, help="of all that is drawn (0)")
    train.run_command(make, parser.parse_args())


if __name__ == "__main__":
    main()
