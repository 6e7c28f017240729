"""What the models in demo/ can do, measured on pieces and seeds that they were not trained on.

    pip install -e ".[demo]"
    python demo/make_data.py data                       # once
    python demo/check.py prompts prompts.jsonl          # 216: 72 triples of slow, medium, fast
    python sample.py --prompts prompts.jsonl --route waveform --no-superres -o check-waveform
    python demo/check.py clips data check-waveform      # instruments, tempi, FAD, levels, rests
    python demo/check.py stages data                    # each stage alone, on held-out pieces
    python demo/check.py picture reel.wav reel.png      # its mel spectrogram

All results are JSON. An instrument is named by logistic regression on the mean and the deviation of
the 80 log-mel channels, trained on the real clips of data/train: once on the upper 40 dB of every
clip, real or not, where its timbre is, and once on all 100 dB of the log-mel, of which the lower
ones tell most about how quiet the noise is. Tempo is the number of onsets a second by SuperFlux
(Boeck & Widmer, 2013). The result says how far that is from the score's on real clips.
"""

import json
import sys
from pathlib import Path

import librosa
import librosa.display
import matplotlib
import numpy as np
import soundfile
from matplotlib import pyplot
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).parent.parent))
import jax

import make_data
import noise2music as n2m
import sample
import t5_encoder
import train

SECONDS = 10
matplotlib.use("agg")


def prompts(args):
    """Triples that differ in the tempo alone, and in the seed: every instrument six times."""
    rng, lines = np.random.default_rng(args.seed), []
    templates = [t for t in make_data.LONG if "{mode}" not in t and "{composer}" not in t]
    for i in range(72):
        instrument = list(make_data.INSTRUMENTS)[i % 12]
        words = {"instrument": rng.choice(make_data.INSTRUMENTS[instrument][0]),
                 "genre": rng.choice(("reel", "jig", "hornpipe", "tune")),
                 "region": rng.choice(("Irish", "Scottish", "American"))}
        template = rng.choice(templates)
        for tempo, (names, *_) in make_data.TEMPI.items():
            text = make_data.sentence(template, words | {"tempo": rng.choice(names)})
            seed = 10_000 + len(lines)
            lines.append(json.dumps({"prompt": text, "seed": seed, "seconds": SECONDS}) + "\n")
    with t5_encoder.whole_file(args.out) as file:
        file.write("".join(lines).encode())


def instrument_of(number: int) -> str:
    """The instrument of prompt `number`."""
    return list(make_data.INSTRUMENTS)[number // 3 % 12]


# ---- Whole clips ----


def load(path: Path, rate: int = n2m.MEL_RATE) -> np.ndarray:
    """The first SECONDS of a file, (samples,) float32 at `rate`."""
    return train.load_audio(path, 0.0, SECONDS, rate)


def real_clips(folder: Path) -> list[dict]:
    with t5_encoder.reading(path := folder / "captions.jsonl"):
        entries = [json.loads(line) for line in t5_encoder.read_lines(path)]
        needed = {"audio", "long", "instrument", "notes_per_second"}
        t5_encoder.check(all(needed <= entry.keys() for entry in entries), "not of make_data.py")
        return [{**entry, "path": folder / entry["audio"]} for entry in entries]


def statistics(clips) -> np.ndarray:
    """(N, F, 160): a vector a second, `n2m.log_mel_statistics`."""
    return np.concatenate([n2m.log_mel_statistics(audio[None]) for audio in clips])


def features(clips) -> dict:
    """{range: (N, 160)}: the mean and the deviation of each log-mel channel, of the upper 40 dB and
    of all 100 dB of a clip."""
    rows = {40: [], 100: []}
    for audio in clips:
        mel = np.asarray(n2m.log_mel(audio[None])[0])
        for decibel, row in rows.items():
            upper = np.maximum(mel, mel.max() - decibel / 50)  # a unit of log-mel is 50 dB
            row.append(np.concatenate([upper.mean(axis=0), upper.std(axis=0)]))
    return {decibel: np.stack(row) for decibel, row in rows.items()}


def onset_rate(audio: np.ndarray) -> float:
    """Onsets a second. SuperFlux, which looks past vibrato, on the upper 40 dB, so that a bed of
    noise begins no notes.

    Chosen among hundreds of settings on 180 clips of data/train by the notes in their scores;
    librosa's own finds 1.7 times as many. A lag of 40 ms sees less of the vibrato of the cello than
    a shorter one.
    """
    rate = dict(sr=n2m.MEL_RATE, hop_length=n2m.HOP)
    mel = librosa.feature.melspectrogram(y=audio, n_fft=2048, fmin=27.5, n_mels=138, **rate)
    level = librosa.power_to_db(mel, ref=np.max, top_db=40)
    flux = librosa.onset.onset_strength(S=level, lag=4, max_size=3, **rate)
    onsets = librosa.onset.onset_detect(onset_envelope=flux, delta=0.1, wait=3, **rate)
    return len(onsets) / SECONDS


def rising(rates) -> float:
    """The share of triples in which the onset rate rises from slow to medium to fast."""
    triples = np.reshape(rates[: len(rates) // 3 * 3], (-1, 3))
    return float(np.mean([a < b < c for a, b, c in triples]))


def fads(x, x_names, y, y_names) -> dict:
    """FAD of all clips; and, averaged, of the clips of each instrument against those of the same,
    and of the next, one."""
    frames = lambda a: np.asarray(a, np.float64).reshape(-1, a.shape[-1])
    fad = lambda a, b: n2m.frechet_distance(n2m.gaussian(frames(a)), n2m.gaussian(frames(b)))
    names = list(make_data.INSTRUMENTS)
    pairs = {"same_instrument": zip(names, names),
             "shuffled_prompts": zip(names, names[1:] + names[:1])}
    averages = {key: np.mean([fad(x[x_names == a], y[y_names == b]) for a, b in pair])
                for key, pair in pairs.items()}
    return {"all": fad(x, y), **{key: float(average) for key, average in averages.items()}}


def loudness(audio):
    """dB of the power, over the first axis: of a clip, or of each of its frames (size, F)."""
    return 10 * np.log10(np.mean(audio**2, axis=0) + 1e-12)


def levels(clips) -> dict:
    """[lowest, median, highest] of the loudness, of the share of samples at full scale, and of the
    spectral flatness (1 is white)."""
    rows = []
    for audio in clips:
        flatness = librosa.feature.spectral_flatness(y=audio, n_fft=1024, hop_length=512)[0]
        rows.append((loudness(audio), np.mean(np.abs(audio) > 0.99), np.median(flatness)))
    of_each = np.percentile(rows, (0, 50, 100), axis=0).round(4).T.tolist()
    return dict(zip(("dBFS", "clipped", "flatness"), of_each))


# ---- What is heard where nothing is played ----

QUIET = 20  # dB below the loudest frame of a clip


def stride_tones(route: str, rate: int) -> list[float]:
    """Hz, in audio at `rate`: the rates of the U-Nets' outer layers, which leave a tone there."""
    models = [n2m.tiny(n2m.MODELS[name]) for name in n2m.ROUTES[route]]
    found = {model.rate / stride for model in models if not n2m.writes_log_mel(model)
             for stride in np.cumprod(model.unet.strides[:2])}
    return sorted({k * hz for hz in found for k in (1, 2, 3) if k * hz < rate / 2 - 40})


def frames_of(audio, size: int) -> np.ndarray:
    """Frames of `size` samples, a quarter of it apart, (size, F)."""
    return librosa.util.frame(audio, frame_length=size, hop_length=size // 4)


def tones_in_rests(audio, rate: int, frequencies):
    """dB by which a line at each frequency stands above the 40 Hz around it, where a clip is QUIET
    for 4 frames; None of a clip that is not.

    Of the spectrum in dB, the median over those frames: the highest of the 3 bins of a line less
    the median of those around. The highest of three bins of plain noise is 2 dB above it.
    """
    size = 8192
    level = loudness(frames := frames_of(audio, size))
    quiet = level <= level.max() - QUIET
    if quiet.sum() < 4:
        return None
    power = np.abs(np.fft.rfft(frames[:, quiet] * np.hanning(size)[:, None], axis=0))
    spectrum = np.median(20 * np.log10(power + 1e-6), axis=1)
    side = np.arange(3, round(20 * size / rate) + 1)
    return [spectrum[k - 1 : k + 2].max() - np.median(spectrum[np.r_[k - side, k + side]])
            for k in np.round(np.multiply(frequencies, size / rate)).astype(int)]


def rests(paths, route: str) -> dict:
    """Tones at the strides' frequencies, and how far a tenth of a clip is below its loudest: the
    medians of all clips with rests."""
    rate = soundfile.info(paths[0]).samplerate
    frequencies, found, floor = stride_tones(route, rate), [], []
    for audio in (load(path, rate) for path in paths):
        if tones := tones_in_rests(audio, rate, frequencies):
            level = loudness(frames_of(audio, 1024))
            found.append(tones)
            floor.append(np.percentile(level, 10) - level.max())
    if not found:
        return {"clips": 0}
    tones = {f"{hz:g} Hz": float(dB) for hz, dB in zip(frequencies, np.median(found, 0).round(1))}
    return {"clips": len(found), "tone_dB": tones, "noise_dB": float(np.median(floor).round(1))}


def clips(args):
    paths = sorted(path for path in args.clips.glob("*.wav") if path.stem.isdigit())
    numbers = [int(path.stem) for path in paths]
    t5_encoder.check(numbers == [*range(max(36, len(paths)))], f"{args.clips}: holds {len(paths)} "
                     "clips of `sample.py --prompts`; it takes the first 36 of `check.py prompts`, "
                     "or more, and none left out")
    route = json.loads(paths[0].with_suffix(".json").read_text())["route"]
    instruments = np.array([*map(instrument_of, numbers)])
    real, held = real_clips(args.data / "train"), real_clips(args.data / "heldout")
    names, held_names = (np.array([e["instrument"] for e in entries]) for entries in (real, held))
    made, kept = [load(path) for path in paths], [load(e["path"]) for e in held]
    of_real, of_held = features(load(e["path"]) for e in real), features(kept)
    of_made = features(made)
    accuracy, accuracy_of_held, right = {}, {}, {}
    for decibel, x in of_real.items():
        regression = LogisticRegression(max_iter=2000)
        classifier = make_pipeline(StandardScaler(), regression).fit(x, names)
        right[decibel] = classifier.predict(of_made[decibel]) == instruments
        accuracy[f"upper {decibel} dB"] = float(right[decibel].mean())
        right_of_held = classifier.predict(of_held[decibel]) == held_names
        accuracy_of_held[f"upper {decibel} dB"] = float(right_of_held.mean())
    x, y, half = statistics(made), statistics(kept), len(held) // 2
    number = lambda i: int(held[i]["audio"][:5])
    order = sorted(range(len(held)), key=lambda i: (number(i) // 36, held_names[i], number(i)))
    made_rates = np.array([onset_rate(audio) for audio in made])
    scored = [[onset_rate(kept[i]), held[i]["notes_per_second"]] for i in order]
    rates, in_score = np.array(scored).T
    by_instrument = lambda measure: {name: measure(name) for name in make_data.INSTRUMENTS}
    result = {
        "clips": len(paths),
        "instrument_accuracy": accuracy,
        "instrument_accuracy_of_heldout": accuracy_of_held,
        "by_instrument": by_instrument(lambda name: float(right[40][instruments == name].mean())),
        "tempo_rises": rising(made_rates),
        "tempo_rises_by_instrument": by_instrument(
            lambda name: rising(made_rates[instruments == name])),
        "tempo_rises_of_heldout": rising(rates[: 36 * (len(held) // 36)]),
        "onsets_of_heldout_off_the_score_by": float(np.median(np.abs(rates / in_score - 1))),
        "fad": fads(x, instruments, y[half:], held_names[half:]),
        "fad_of_a_second_real_half": fads(y[:half], held_names[:half], y[half:], held_names[half:]),
        "levels": levels(made),
        "levels_of_heldout": levels(kept),
        "rests": rests(paths, route),
    }
    print(json.dumps(result, indent=1))


# ---- Each stage alone ----


# dB of the truth that are compared: what can be heard, and all down to the rounding of its 16 bits.
UPPER = (60, 130)


def log_spectral_distances(x, truth) -> list[float]:
    """The deviation of two power spectra in dB, over the frequencies, averaged over frames of 1024:
    for each range of UPPER."""
    power = lambda a: np.abs(librosa.stft(np.asarray(a), n_fft=1024, hop_length=256)) ** 2
    x, y = (10 * np.log10(power(a) + 1e-12) for a in (x, truth))
    floors = [y.max() - decibel for decibel in UPPER]
    squares = [(np.maximum(x, floor) - np.maximum(y, floor)) ** 2 for floor in floors]
    return [float(np.mean(np.sqrt(np.mean(square, axis=0)))) for square in squares]


def stage(model: n2m.Model, params, text_encoder, entry: dict, number: int):
    """Log-spectral distances from the truth of the stage's output, and of what needs no training:
    (2, 2)."""
    truth = load(entry["path"], model.rate)
    if model.low_rate:
        low = n2m.fft_resample(truth, SECONDS * model.low_rate, np)
        plain = n2m.fft_resample(low, len(truth), np)
    else:
        low = np.asarray(n2m.log_mel(truth[None])[0])
        plain = np.asarray(n2m.griffin_lim(low[None])[0])
    given = n2m.Condition()
    if n2m.uses_text(model):
        given = sample.encode(text_encoder, [entry["long"][0]], model)
    condition = n2m.sampling_condition(model, given, jax.numpy.asarray(low)[None], SECONDS)
    length, keys = n2m.padded_length(model.unet, len(truth)), jax.random.key(number)
    x = n2m.sample(params, model, condition, jax.random.split(keys, 1), length)
    x = x[0, : len(truth), 0]
    return log_spectral_distances(x, truth), log_spectral_distances(plain, truth)


def stages(args):
    held = real_clips(args.data / "heldout")[: args.n]
    for name in ("waveform_cascader", "spectrogram_vocoder", "superresolution_cascader"):
        model, params, metadata = train.load_model(args.models, name)
        text_encoder = None
        if n2m.uses_text(model):
            _, text_encoder = sample.t5_of({name: metadata}, args.models, args.t5)
        found = np.array([stage(model, params, text_encoder, entry, 20_000 + i)
                          for i, entry in enumerate(held)])  # (N, 2, 2)
        ours, plain = found.mean(axis=0).round(2)
        closer = np.mean(found[:, 0] < found[:, 1], axis=0).round(3)
        for k, decibel in enumerate(UPPER):
            line = {"stage": name, "clips": len(found), "upper_dB": decibel, "lsd": ours[k],
                    "lsd_untrained": plain[k], "closer": closer[k]}
            print(json.dumps(line), flush=True)


def picture(args):
    with train.open_audio(args.wav) as file:
        audio, rate = file.read(dtype="float32", always_2d=True).mean(axis=1), file.samplerate
    power = librosa.feature.melspectrogram(y=audio, sr=rate, n_fft=2048, hop_length=256, n_mels=128)
    figure, axes = pyplot.subplots(figsize=(8, 2.5), dpi=80, layout="constrained")
    level = librosa.power_to_db(power, ref=np.max)
    librosa.display.specshow(level, sr=rate, hop_length=256, x_axis="time", y_axis="mel", ax=axes)
    figure.savefig(args.png)


def main():
    parser = train.new_parser("check.py", __doc__)
    commands = parser.add_subparsers(
        required=True, parser_class=lambda prog, **_: train.new_parser(prog, __doc__))
    places = {prompts: ["out"], clips: ["data", "clips"], stages: ["data"], picture: ["wav", "png"]}
    for run, names in places.items():
        command = commands.add_parser(run.__name__)
        command.set_defaults(run=run)
        for name in names:
            command.add_argument(name, type=Path)
    commands.choices["prompts"].add_argument("--seed", type=train.number(int, 0), default=1)
    add = commands.choices["stages"].add_argument
    add("--models", type=Path, default=Path(__file__).parent)
    add("--t5", metavar="DIR")
    add("-n", type=train.count, default=72)
    args = parser.parse_args()
    train.run_command(args.run, args)


if __name__ == "__main__":
    main()
