"""What a sceptical reader would check of tools/ and demo/export.py."""

import functools
import importlib.util
import json
import math
import os
import shutil
import sys
import types
import zipfile
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "tools", "demo")]
from test_noise2music import (  # noqa: F401 (fixtures)
    SHARDED, close, data, exits, manifest, n2m, read_safetensors, reference, rng, run_sample, run_train, runs, small,
    small_models, write_tone, write_tones)

import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

import evaluate
import export
import label
import plan
import sample
import train

# ---- demo/export.py ----


def test_exported_averages_sample_and_begin_another_run(tmp_path, data, small_models, capfd, monkeypatch):
    """`export` keeps the averages, as bfloat16, and the T5. `sample.py` reads them, and remarks on words that are new to them; so does
    `--init`, which with `--tiny` takes what fits. All of it from where they were moved to."""
    common = ["--data", data, "--batch-size", 2, "--seconds", "0.64"]
    for name in n2m.ROUTES["waveform"][:2]:
        run_train(name, *common, "--tiny", "--out", tmp_path / "runs", "--steps", 2)
    export.main(["%s" % (tmp_path / name) for name in ("runs", "exported")])
    demo = (tmp_path / "exported").rename(tmp_path / "demo")
    tensors = lambda folder: read_safetensors(train.checkpoints(folder / "waveform_generator")[-1])[0]
    averages = {k: v for k, v in tensors(tmp_path / "runs").items() if k.startswith("ema/")}
    exported = tensors(demo)
    assert exported.keys() == averages.keys() and all(v.dtype == jnp.bfloat16 for v in exported.values())
    for k in averages:
        close(np.float32(exported[k]), averages[k], rtol=2**-8)
    shutil.rmtree(tmp_path / "runs")

    weights = train.checkpoints(demo / "waveform_generator")[-1]
    run_train("waveform_generator", *common, "--init", weights, "--out", tmp_path / "more", "--steps", 1, "--learning-rate", 1e-30)
    begun = tensors(tmp_path / "more")
    for k in averages:
        close(begun[k.replace("ema/", "params/")], np.float32(exported[k]), atol=1e-20)

    grown = small("waveform_generator")
    grown = replace(grown, unet=replace(grown.unet, blocks=(grown.unet.blocks[0] + 1, *grown.unet.blocks[1:])))
    monkeypatch.setattr(n2m, "tiny", lambda model: grown)
    run_train("waveform_generator", *common, "--init", weights, "--tiny", "--out", tmp_path / "grown", "--steps", 1, "--learning-rate", 1e-30)
    begun = {k: v for k, v in tensors(tmp_path / "grown").items() if k.startswith("params/")}
    assert len(begun) > len(averages)
    for k in averages:
        close(begun[k.replace("ema/", "params/")], np.float32(exported[k]), atol=1e-20)
    assert "no checkpoints" in exits(capfd, export.main, tmp_path / "absent", tmp_path / "no")

    for prompt, remark in [("a tone of two hundred hertz", False), ("zither quartet with castanets", True)]:
        run_sample(prompt, "-o", tmp_path / "x.wav", "--models", demo, "--seconds", 0.3, "--steps", 1, "--no-superres")
        assert ("zither, quartet" in capfd.readouterr().err) == remark


# ---- plan.py ----


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu, of the extra tpu, is not installed")
def test_the_tpu_compiler_accepts_the_sharding(capsys):
    """A small model, split both ways, for four TPU v4, one sampling and one training step."""
    mesh, chip = plan.plan_mesh("v4:2x2x1", 2)
    model = replace(n2m.MODELS["waveform_cascader"], unet=SHARDED["waveform_cascader"])
    step, used = plan.plan("small", plan.lower_step(model, mesh, 4, 0.06), 0, chip)
    assert 0 < step < 1 and 0 < used < 0.1 and "all-reduce" in capsys.readouterr().out


# ---- label.py, Secs. 3.5 and 3.6 ----

TOY = """
import numpy as np

calls, limit = [], {}

def embedding(hz):  # an angle, so that the nearest by cosine is the nearest in Hz
    return np.stack([np.cos(np.divide(hz, 1000)), np.sin(np.divide(hz, 1000))], axis=-1)

def audio(x):
    assert x.shape[0] == 16 and x.dtype == np.float32
    note("audio", len(x))
    hz = np.abs(np.fft.rfft(x)).argmax(axis=1) * 16_000 / x.shape[1]
    return np.where(x.any(axis=1)[:, None], embedding(hz), np.nan)  # silence has no pitch

def text(texts):
    note("text", len(texts))
    return embedding([float(text.split()[-2]) for text in texts])

def note(kind, n):
    if [kind for kind, _ in calls].count(kind) == limit.get(kind):
        raise KeyboardInterrupt
    calls.append((kind, n))

def frames(x):  # of two kinds, with the mean of `audio`
    return audio(x)[:, None] + np.array([[0.5], [-0.5]])

def numbers(x):  # what is no embedding
    return np.ones(len(x))

def two(texts):
    return np.ones((2, 2))

def loud(x):
    return np.stack([x.std(axis=1), abs(x).mean(axis=1)], axis=1)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder to work in with a joint embedder of tones and captions in it, such as a user would bring."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which the working folder is added
    (tmp_path / "music").mkdir()
    yield tmp_path
    sys.modules.pop("toy", None)


def tone_captions(*tones):
    return [f"a tone of {hz} Hz" for hz in tones]


def vocabulary(path, *tones):
    path.write_text("\n".join(tone_captions(*tones)) + "\n")
    return path


def run_label(*argv, audio="toy:audio", text=("--text-embedder", "toy:text")):
    label.main([str(a) for a in ("music", "--audio-embedder", audio, *text, *argv)])


def json_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_label_gives_the_nearest_captions_of_each_vocabulary(toy):
    """Its K of each, where K' = K; after what the file says of itself. Six clips of a long track; paths that resolve."""
    write_tones(toy / "music/a.flac", 445, seconds=8, title="Song", artist="Nobody", genre="Hum")
    write_tones(toy / "music/b.wav", 200, 200, 530)  # on the average, by the angle of the mean vector, 310 Hz
    write_tones(toy / "music/c.wav", 100, 200, 300, 400, 500, 600, seconds=40)
    vocabulary(toy / "one.txt", *range(900, 0, -100)), vocabulary(toy / "two.txt", *range(40, 1000, 100))
    vocabulary(toy / "three.txt", 60, 160, 300, 420, 480, 700)
    run_label("--vocabulary", "long", "one.txt", 1, 1, "--vocabulary", "short", "three.txt", 3, 3,
              "--vocabulary", "long", "two.txt", 2, 2, "--out", "else/where/labels.jsonl")
    tracks = train.read_tracks(toy / "else/where", True, "labels.jsonl")
    assert [track.path.resolve() for track in tracks] == [toy / "music" / name for name in ["a.flac", "b.wav"] + ["c.wav"] * 6]
    assert [track.start for track in tracks] == [0, 0, 0, 40, 80, 120, 160, 200] and len(train.find_clips(tracks)) == 8
    assert [list(track.long) for track in tracks] == [tone_captions(*row) for row in (
        [400, 440, 540], [300, 340, 240],
        [100, 140, 40], [200, 240, 140], [300, 340, 240], [400, 440, 340], [500, 540, 440], [600, 640, 540])]
    assert list(tracks[0].short) == ["Song", "Nobody", "Hum", *tone_captions(420, 480, 300)]
    assert list(tracks[1].short) == tone_captions(300, 420, 160)
    run_label("--vocabulary", "short", "three.txt", 3, 3, "--out", "frames.jsonl", audio="toy:frames")
    assert [line["short"] for line in json_lines("frames.jsonl")] == [list(track.short) for track in tracks]


def test_high_quality_labels_all_clips_with_their_metadata_as_one_prompt(toy):
    """Sec. 3.6. Titles and tags are those of metadata.jsonl; or else of the files."""
    write_tones(toy / "music/long.wav", 100, 200, 300, 400, 500, 600, 700, 800, seconds=30)
    write_tones(toy / "music/song.flac", 500, title="Song", album="Album", genre="Hum")
    label.main(["music", "--high-quality"])
    of_files = json_lines("music/captions.jsonl")
    assert of_files[-1] == {"audio": "song.flac", "start": 0, "long": ["Song, Album, Hum"], "short": []}
    assert [line["start"] for line in of_files[:-1]] == [0, 30, 60, 90, 120, 150, 180, 210]
    metadata = [{"audio": "song.flac", "tags": ["a"], "long": "All of it."},
                {"audio": "long.wav", "title": "Steps", "tags": ["jazz", "piano"]}]
    (toy / "music/metadata.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in metadata))
    vocabulary(toy / "all.txt", *range(100, 900, 100))
    both = [part for kind in ("long", "short") for part in ("--vocabulary", kind, "all.txt", 1, 1)]
    run_label("--high-quality", *both, "--out", "labels.jsonl")
    song, *steps = json_lines("labels.jsonl")
    assert song["long"] == ["All of it.", "a", "a tone of 500 Hz"] and song["short"] == ["a tone of 500 Hz"]
    for n, line in enumerate(steps, 1):
        assert line["long"] == ["Steps, jazz, piano", *line["short"]] and line["short"] == tone_captions(100 * n)
    assert n == 8


def test_labels_depend_on_the_seed_and_not_on_who_embedded(toy):
    """Twice the same, byte by byte, and from arrays of the same embeddings; of 10 nearest captions 3, the nearest first."""
    tones, captions = [300, 330, 360, 410, 470, 520], range(100, 700, 50)
    for n, hz in enumerate(tones):
        write_tones(toy / f"music/{n}.wav", hz)
    words = vocabulary(toy / "words.txt", *captions)
    outputs = {}
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        run_label("--vocabulary", "long", words, "--seed", seed, "--out", f"{name}.jsonl")
        outputs[name] = (toy / f"{name}.jsonl").read_bytes()
    embedding = sys.modules["toy"].embedding
    np.save("words.npy", embedding(list(captions)))
    np.save("clips.npy", embedding(tones)), np.savez("clips.npz", np.float32(embedding(tones)))
    for clips in ("clips.npy", "clips.npz"):
        run_label("--vocabulary", "long", words, "--seed", 3, "--out", f"{clips}.jsonl", audio=clips, text=())
        assert (toy / f"{clips}.jsonl").read_bytes() == outputs["a"]
    assert outputs["a"] == outputs["b"] != outputs["c"]
    for hz, line in zip(tones, json_lines("a.jsonl"), strict=True):
        nearest = tone_captions(*sorted(captions, key=lambda caption: abs(caption - hz))[:10])
        places = [nearest.index(caption) for caption in line["long"]]
        assert len(places) == 3 and places == sorted(set(places))


def test_a_stopped_label_goes_on_where_it_was(toy, capfd):
    """Among the clips or the captions, with a part of a block written: only the rest is embedded, and the result is the same."""
    tones, other = range(100, 500, 10), [2000 + n % 900 for n in range(4200)]  # two blocks of clips, two of captions
    for hz in tones:
        write_tones(toy / f"music/{hz}.wav", hz, seconds=1)
    argv = "--vocabulary", "long", vocabulary(toy / "words.txt", *other, *tones), 1, 1, "--out"
    run_label(*argv, "whole.jsonl")
    assert [line["long"] for line in json_lines("whole.jsonl")] == [[caption] for caption in tone_captions(*tones)]
    whole, module = (toy / "whole.jsonl").read_bytes(), sys.modules["toy"]
    calls = lambda kind: [n for k, n in module.calls if k == kind]
    assert calls("audio") == [16, 16, 16, 16] and calls("text") == [1, 4096, 144]  # the first finds out the width
    for kind, limit, rest in [("audio", 3, [16, 16]), ("text", 2, [1, 144])]:
        module.calls.clear(), module.limit.update({kind: limit})
        with pytest.raises(KeyboardInterrupt):
            run_label(*argv, f"{kind}.jsonl")
        (part,) = (toy / f"{kind}.jsonl.work").glob("*.part")
        with part.open("ab") as file:
            file.write(bytes(50))  # a few rows and a part of one, as a crash may leave them
        assert not (toy / f"{kind}.jsonl").exists()
        module.calls.clear(), module.limit.clear()
        run_label(*argv, f"{kind}.jsonl")
        assert calls(kind) == rest and (toy / f"{kind}.jsonl").read_bytes() == whole and not list(toy.rglob("*.part"))
    assert "there already" in exits(capfd, label.main, "music", "--high-quality", "--out", "text.jsonl")
    (toy / "text.jsonl").unlink(), module.calls.clear()
    run_label(*argv, "text.jsonl", "--seed", 1)
    assert calls("audio") == [16] and calls("text") == [1]
    vocabulary(toy / "words.txt", *other, *reversed(tones))  # other captions of the same number: the same ones are nearest
    (toy / "text.jsonl").unlink()
    run_label(*argv, "text.jsonl")
    assert (toy / "text.jsonl").read_bytes() == whole


def test_clips_without_an_embedding_are_left_out(toy, capfd):
    write_tones(toy / "music/good.wav", 400), write_tones(toy / "music/silent.wav", 0), write_tones(toy / "music/well.wav", 300)
    soundfile.write(toy / "music/nan.wav", np.full(32_000, np.nan), 16_000, "FLOAT")
    (toy / "music/text.wav").write_text("not audio")
    argv = "--vocabulary", "long", vocabulary(toy / "words.txt", 200, 300, 400), 1, 1, "--out"
    run_label(*argv, "functions.jsonl")
    err = capfd.readouterr().err
    for words in ("text.wav", "nan.wav: holds samples that are not numbers; skipped", "2 of 4 clips have no embedding"):
        assert words in err
    np.save("clips.npy", [[0.0, 1.0], [np.nan, 1.0], [1.0, 0.0], [1.0, np.inf]])  # the clips: good, nan, silent, well
    run_label(*argv, "arrays.jsonl", audio="clips.npy")
    labels = [{line["audio"]: line["long"][0] for line in json_lines(f"{name}.jsonl")} for name in ("functions", "arrays")]
    assert labels == [{"music/good.wav": "a tone of 400 Hz", "music/well.wav": "a tone of 300 Hz"},
                      {"music/good.wav": "a tone of 400 Hz", "music/silent.wav": "a tone of 200 Hz"}]
    run_label(*argv, "loud.jsonl", audio="toy:loud")  # to which silence has an embedding; but what cannot be decoded is no silence
    assert [line["audio"] for line in json_lines("loud.jsonl")] == [f"music/{name}.wav" for name in ("good", "silent", "well")]


def test_a_mended_file_is_embedded_anew(toy):
    """Whoever reads that a file is broken, mends it and runs `label` again."""
    write_tones(toy / "music/good.wav", 400)
    soundfile.write(toy / "music/bad.wav", np.full(20_000, np.nan), 2_000, "FLOAT")
    argv = "--vocabulary", "long", vocabulary(toy / "words.txt", 200, 300, 400), 1, 1, "--out", "labels.jsonl"
    run_label(*argv)
    (toy / "labels.jsonl").unlink()
    write_tones(toy / "music/bad.wav", 300)  # as long as it was
    run_label(*argv)
    assert [line["long"] for line in json_lines("labels.jsonl")] == [["a tone of 300 Hz"], ["a tone of 400 Hz"]]


def test_an_embedder_of_another_width_begins_anew(toy):
    """Whoever works on an embedder runs it again under the same name."""
    for hz in (300, 400, 500):
        write_tones(toy / f"music/{hz}.wav", hz)
    label.load_embedder("toy:audio")
    module = sys.modules["toy"]
    narrow, module.embedding = module.embedding, lambda hz: np.repeat(narrow(hz), 2, axis=-1)
    vocabulary(toy / "words.txt", 520, 400, 310)
    for k, nearest in [(1, ([310], [400], [520])), (2, ([310, 400], [400, 310], [520, 400]))]:
        run_label("--vocabulary", "long", "words.txt", k, k, "--out", "labels.jsonl")
        assert [line["long"] for line in json_lines("labels.jsonl")] == [tone_captions(*row) for row in nearest]
        (toy / "labels.jsonl").unlink()
        module.embedding = narrow


def test_float16_embeddings_are_numbers_however_long(toy):
    """Their sum may be over 65504, the largest of float16."""
    write_tones(toy / "music/a.wav", 400), write_tones(toy / "music/b.wav", 400)
    vocabulary(toy / "words.txt", 1, 2)
    np.save("words.npy", np.float16([[200] * 512, [200] * 256 + [0] * 256])), np.save("clips.npy", np.load("words.npy"))
    run_label("--vocabulary", "long", "words.txt", 1, 1, "--out", "labels.jsonl", audio="clips.npy", text=())
    assert [line["long"] for line in json_lines("labels.jsonl")] == [[caption] for caption in tone_captions(1, 2)]


def test_captions_of_any_characters_come_back(toy):
    """U+2028 and U+0085 end a line for str.splitlines, and a caption may hold them; a file's name need not be UTF-8."""
    write_tones(toy / "music/é.wav", 400)
    odd = "naïve\u2028 音楽 \x85 🎹 tone of 400 Hz"
    (toy / "words.txt").write_text(f"{odd}\na tone of 900 Hz\n", "utf-8")
    (toy / "music/metadata.jsonl").write_text(json.dumps({"audio": "é.wav", "title": "one\u2029two"}) + "\n")
    run_label("--vocabulary", "long", "words.txt", 1, 1)
    (track,) = train.read_tracks(toy / "music", needs_text=True)
    assert track.long == (odd,) and track.short == ("one\u2029two",) and track.path == toy / "music/é.wav"
    assert sample.read_prompts(toy / "music/captions.jsonl") == [{"prompt": odd}]


def test_a_name_that_is_not_utf8_is_reported_and_skipped(toy, capfd):
    write_tones(toy / "music/a.wav", 400, title="Song")
    os.rename(write_tones(toy / "b.wav", 400), os.fsencode(toy) + b"/music/\xff.wav")
    label.main(["music", "--high-quality"])
    assert [line["audio"] for line in json_lines("music/captions.jsonl")] == ["a.wav"]
    assert ".wav: " in (err := capfd.readouterr().err) and err.endswith("; skipped\n") and err.count("\n") == 1


def test_the_result_may_lie_behind_a_link(toy):
    """a/link/../music is not a/music."""
    write_tones(toy / "music/a.wav", 400, title="Song")
    (toy / "far/away").mkdir(parents=True), (toy / "link").symlink_to(toy / "far/away")
    label.main(["music", "--high-quality", "--out", "link/labels.jsonl"])
    (track,) = train.read_tracks(toy / "link", False, "labels.jsonl")
    assert track.path.samefile(toy / "music/a.wav")


two_d = np.ones((3, 2))
REFUSED_LABELS = [  # words of the message, the arguments that differ, and what lies beside the vocabulary
    ("words.npy: embeddings (2, 2) for the 3 lines of words.txt", {}, np.ones((2, 2))),
    ("words.txt: embeddings 5 wide, of the clips 2", {}, np.ones((3, 5))),
    ("words.txt: 1 embeddings are not numbers", {}, np.where([[0], [1], [0]], np.nan, two_d)),
    ("words.npy: holds int64 (3, 2)", {}, two_d.astype(int)),
    ("words.npy: holds float64 (3,)", {}, np.ones(3)),
    ("words.npy: is empty", {}, np.ones((0, 2))),
    ("words.npy: ", {}, b"a tone of 1 Hz\n"),
    ("words.npy: ", {}, b""),
    ("two.npz: holds 2 arrays, not one", {"audio": "two.npz"}, two_d),
    ("text.npz: ", {"audio": "text.npz"}, two_d),
    ("member.npz: ", {"audio": "member.npz"}, two_d),
    ("three.npy: embeddings (3, 2) for 2 clips", {"audio": "three.npy"}, two_d),
    ("frames.npy: embeddings (2, 3, 2) for 2 clips", {"audio": "frames.npy"}, two_d),
    ("nan.npy: none of 2 embeddings is of numbers", {"audio": "nan.npy"}, two_d),
    ("absent.npy: No such file", {"audio": "absent.npy"}, two_d),
    ("No module named 'absent'", {"audio": "absent:audio"}, two_d),
    ("./toy.py:audio: ", {"audio": "./toy.py:audio"}, two_d),
    ("no attribute 'absent'", {"audio": "toy:absent"}, two_d),
    ("toy:calls: not a function", {"audio": "toy:calls"}, two_d),
    ("toy:numbers: made (16,) of audio (16, 160000)", {"audio": "toy:numbers"}, two_d),
    ("--vocabulary needs an --audio-embedder", {"audio": None}, two_d),
    ("toy:two: made (2, 2) of 1 texts", {"text": "toy:two"}, None),
    ("put them in words.npy, a row for each line", {"text": None}, None),
    ("--text-embedder is a function", {"text": "three.npy"}, None),
    ("gap.txt:2: an empty line", {"vocabulary": ["long", "gap.txt"]}, None),
    ("3 captions for K' = 3 of K = 2", {"vocabulary": ["long", "words.txt", 3, 2]}, None),
    ("3 captions for K' = 1 of K = 4", {"vocabulary": ["long", "words.txt", 1, 4]}, None),
    ("x and 3 should be K' and K", {"vocabulary": ["long", "words.txt", "x", 3]}, None),
    ("long or short, not 'medium'", {"vocabulary": ["medium", "words.txt"]}, None),
    ("--vocabulary takes KIND FILE", {"vocabulary": ["long"]}, None),
    ("absent.txt", {"vocabulary": ["long", "absent.txt"]}, None),
    ("give a --vocabulary, or --high-quality", {"vocabulary": None}, None),
    ("--seed must not be negative", {"seed": -1}, None),
]


@pytest.mark.parametrize("words, change, beside", REFUSED_LABELS, ids=[f"{i}-{row[0]}" for i, row in enumerate(REFUSED_LABELS)])
def test_label_refuses_in_one_line(toy, capfd, words, change, beside):
    write_tones(toy / "music/a.wav", 400, seconds=1), write_tones(toy / "music/b.wav", 500, seconds=1)
    vocabulary(toy / "words.txt", 1, 2, 3), (toy / "gap.txt").write_text("a\n\nc\n")
    if beside is not None:
        (toy / "words.npy").write_bytes(beside) if isinstance(beside, bytes) else np.save("words.npy", beside)
    np.savez("two.npz", two_d, two_d), np.save("nan.npy", two_d[:2] * np.nan)
    np.save("three.npy", two_d), np.save("frames.npy", np.ones((2, 3, 2)))
    (toy / "text.npz").write_text("text"), zipfile.ZipFile("member.npz", "w").writestr("readme.txt", "text")
    options = {"audio-embedder": change.get("audio", "toy:audio"), "text-embedder": change.get("text", "toy:text"),
               "vocabulary": change.get("vocabulary", ["long", "words.txt", 1, 1]), "seed": change.get("seed", 0)}
    argv = [part for name, value in options.items() if value is not None for part in ["--" + name, *np.atleast_1d(value)]]
    err = exits(capfd, label.main, "music", *argv)
    assert words in err and len([line for line in err.splitlines() if "embedded: " not in line]) == 1  # beside the progress
    assert not list(toy.rglob("captions.jsonl")) and not list(toy.rglob("captions.jsonl.part"))


def test_label_finds_a_missing_text_embedder_before_it_embeds_all_clips(toy, capfd):
    for n in range(20):
        write_tones(toy / f"music/{n}.wav", 400, seconds=1)
    argv = "--audio-embedder", "toy:audio", "--vocabulary", "long", vocabulary(toy / "words.txt", *range(10))
    assert "give --text-embedder" in exits(capfd, label.main, "music", *argv)
    assert "toy" not in sys.modules or len(sys.modules["toy"].calls) <= 1


# ---- evaluate.py, Secs. 4.3 to 4.6 ----


def evaluated(capfd, *argv):
    """What `evaluate.py scores` says: the JSON, and stderr."""
    capfd.readouterr()
    evaluate.main([str(a) for a in ("scores", *argv)])
    out, err = capfd.readouterr()
    return json.loads(out, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON")), err


def test_evaluate_prints_the_closed_form_of_fad(tmp_path, capfd):
    """Diagonal covariances: the sum of the squared differences of the deviations, and of the means."""
    signs = functools.reduce(np.kron, [[[1, 1], [1, -1]]] * 3)[:, 1:5]  # 8 rows; columns orthogonal, of mean 0
    one, two, shift = np.array([1, 2, 0.5, 3]), np.array([2, 2, 0.1, 1]), np.array([0.5, 0, -2, 1])
    arrays = {"x.npy": signs * one, "y.npy": np.tile(signs, (2, 1)) * two + shift, "frames.npy": (signs * one).reshape(4, 2, 4),
              "moved.npy": signs * one + shift, "few.npy": (signs * one)[:3]}
    for name, array in arrays.items():
        np.save(tmp_path / name, array)
    np.savez(tmp_path / "x.npz", signs * one)
    fad = np.sum((np.sqrt(8 / 7) * one - np.sqrt(16 / 15) * two) ** 2) + shift @ shift  # variances over N - 1
    for x in ("x.npy", "x.npz", "frames.npy"):
        result, err = evaluated(capfd, tmp_path / x, tmp_path / "y.npy")
        close(result["fad"], fad, rtol=1e-9)
        assert (result["n"], result["n_reference"], result["width"]) == (8, 16, 4) and "fad_infinity" in result
        assert "similarity" not in result and "no pairs" in err and "fewer" not in err
    result, err = evaluated(capfd, tmp_path / "moved.npy", tmp_path / "x.npy")
    close(result["fad"], shift @ shift, rtol=1e-9)
    assert "similarity" in result and not err
    result, err = evaluated(capfd, tmp_path / "few.npy", tmp_path / "x.npy")
    assert "3 generated embeddings are fewer than their width 4: FAD is biased" in err and "fad_infinity" not in result


def test_evaluate_compares_pairs(tmp_path, capfd):
    """Table 6 where all cosines are known: orthogonal embeddings, and generated ones halfway to another."""
    truth = np.eye(6)
    np.save(tmp_path / "truth.npy", truth * 5), np.save(tmp_path / "text.npy", 3 * truth)
    np.save(tmp_path / "frames.npy", np.stack([truth, np.roll(truth, 1, axis=1)], axis=1))
    result, _ = evaluated(capfd, tmp_path / "frames.npy", tmp_path / "truth.npy", "--text-embedder", tmp_path / "text.npy")
    assert result["n"] == 12 and result["n_reference"] == 6
    for row, cosine in [("ground truth audio", 1), ("randomly shuffled audio", 0), ("generated audio", math.sqrt(0.5))]:
        close([result["similarity"][row][column] for column in ("gt-text", "gt-audio")], cosine, atol=1e-12)
    result, _ = evaluated(capfd, tmp_path / "frames.npy", tmp_path / "truth.npy")
    assert [*result["similarity"]["generated audio"]] == ["gt-audio"]


def test_evaluate_reads_folders_and_what_the_samples_were_sampled_from(toy, capfd):
    """By tones whose similarities are the cosines of known angles. The stages of --keep-stages are no samples."""
    (toy / "out").mkdir()
    for n, (made, prompt, real) in enumerate([(400, 410, 420), (500, 540, 530)]):
        write_tones(toy / f"out/000{n}.wav", made), write_tones(toy / f"out/000{n}.waveform_generator.wav", 900)
        (toy / f"out/000{n}.json").write_text(json.dumps({"prompt": f"a tone of {prompt} Hz"}))
        write_tones(toy / f"music/{n}.wav", real)
    cosines = lambda *hz: np.mean(np.cos(np.array(hz) / 1000))
    embedders = "--audio-embedder", "toy:audio", "--text-embedder", "toy:text"
    result, _ = evaluated(capfd, "out", "music", *embedders)  # no captions beside the music: the prompts
    out, music = np.exp(0.45j), np.exp(0.475j)  # two points on a circle: their means and deviations in the complex plane
    fad = abs(np.cos(0.05) * out - np.cos(0.055) * music) ** 2 + 2 * abs(np.sin(0.05) * out - np.sin(0.055) * music) ** 2
    close(result["fad"], fad, rtol=1e-3)
    rows = result["similarity"]
    close([*rows["ground truth audio"].values()], [cosines(10, 10), 1], rtol=1e-6)
    close([*rows["generated audio"].values()], [cosines(10, 40), cosines(20, 30)], rtol=1e-6)
    close([*rows["randomly shuffled audio"].values()], [cosines(530 - 410, 540 - 420), cosines(110, 110)], rtol=1e-6)
    manifest(toy / "music", *({"audio": f"{n}.wav", "long": [f"a tone of {hz} Hz"]} for n, hz in enumerate((400, 600))))
    rows = evaluated(capfd, "out", "music", *embedders)[0]["similarity"]  # captions beside the music
    close([*rows["generated audio"].values()], [cosines(0, 100), cosines(20, 30)], rtol=1e-6)
    result, err = evaluated(capfd, "out", "out", "--audio-embedder", "noise2music:log_mel_statistics")
    assert 0 <= result["fad"] < 1e-6 and (result["n"], result["width"]) == (20, 160) and "fewer than their width" in err
    assert evaluated(capfd, "out", "music", "--audio-embedder", "noise2music:log_mel_statistics")[0]["fad"] > 0.1


def test_the_excerpt_is_the_middle(toy, capfd):
    """Sec. 4.3.3; of a clip with a "start", the middle of that clip; and a short file is all taken, with silence after it."""
    write_tones(toy / "music/a.wav", 0, 500, 0), write_tones(toy / "music/b.wav", 0, 0, 0, 300, 0, 0, 0, seconds=5)
    write_tones(toy / "music/c.wav", 100, 600, 700, seconds=30)
    entries = {"audio": "a.wav"}, {"audio": "b.wav"}, {"audio": "c.wav", "start": 20}, {"audio": "c.wav", "start": 50}
    folder = manifest(toy / "music", *entries)
    angles = np.array([0.5, 0.3, 0.6, 0.7])
    np.save("truth.npy", np.stack([np.cos(angles), np.sin(angles)], axis=1))
    for seconds in (4, 10, 15):
        result, _ = evaluated(capfd, "music", "truth.npy", "--audio-embedder", "toy:audio", "--excerpt", seconds)
        close([result["similarity"]["generated audio"]["gt-audio"], result["fad"]], [1, 0], atol=1e-6)
    audio = evaluate.excerpt(train.read_tracks(folder, False)[0], 12)  # a second of silence, ten of the tone, and one of silence
    peaks = np.abs(audio.reshape(120, 1_600)).max(axis=1)  # each 0.1 s
    assert peaks[:9].max() < 0.02 and peaks[11:109].min() > 0.29 and peaks[111:].max() < 0.02
    audio = evaluate.excerpt(train.Track(write_tones(toy / "d.wav", 400, seconds=2), (), ()), 10)
    peaks = np.abs(audio.reshape(100, 1_600)).max(axis=1)
    assert peaks[:19].min() > 0.29 and peaks[21:-1].max() < 0.02  # the resampling is circular


REFUSED_EVALUATIONS = {
    "the generated embeddings are 3 wide, the reference's 4": ["wide.npy", "x.npy"],
    "not all of them numbers": ["nan.npy", "x.npy"],
    "the 1 reference embeddings are too few": ["x.npy", "one.npy"],
    "absent: no such folder": ["absent", "x.npy", "--audio-embedder", "toy:audio"],
    "flat.npy: holds float64 (8,)": ["flat.npy", "x.npy"],
    "absent.npy: No such file": ["x.npy", "absent.npy"],
    "music: a folder of audio needs an --audio-embedder": ["music", "x.npy"],
    "x.npy: is an array; give it in the place of the folder music": ["music", "x.npy", "--audio-embedder", "x.npy"],
    "toy:numbers: made (16,) of audio": ["music", "x.npy", "--audio-embedder", "toy:numbers"],
    "text.wav: ": ["bad", "x.npy", "--audio-embedder", "toy:audio"],
    "no captions beside the reference": ["x.npy", "x.npy", "--text-embedder", "toy:text"],
    "wide.npy: text embeddings (8, 3); wanted (8, 4), a row for each clip": ["x.npy", "x.npy", "--text-embedder", "wide.npy"],
    "nan.npy: text": ["x.npy", "x.npy", "--text-embedder", "nan.npy"],
    "--excerpt must be from 0.1": ["x.npy", "x.npy", "--excerpt", 0],
    "--excerpt must be from 0.1 ": ["x.npy", "x.npy", "--excerpt", "nan"],
    "--seed must be from 0": ["x.npy", "x.npy", "--seed", -1],
    "REFERENCE": ["x.npy"],
}


@pytest.mark.parametrize("words", REFUSED_EVALUATIONS)
def test_evaluate_refuses_in_one_line(toy, capfd, words):
    x = rng().normal(size=(8, 4))
    for name, array in {"x": x, "wide": x[:, :3], "nan": np.where(x == x.max(), np.nan, x), "one": x[:1], "flat": x[:, 0]}.items():
        np.save(f"{name}.npy", array)
    write_tones(toy / "music/a.wav", 400), (toy / "bad").mkdir(), (toy / "bad/text.wav").write_text("not audio")
    err = exits(capfd, evaluate.main, "scores", *REFUSED_EVALUATIONS[words])
    assert words.strip() in err and err.count("\n") == 1


def test_sweep_varies_one_parameter_at_a_time():
    """Figs. 2 and 3: five guidance scales, the schedules of Table 8 at the steps of Table 3, a quarter to twice the steps."""
    for route, (generator, second), counts, schedules in [
            ("waveform", ("waveform_generator", "waveform_cascader"), (1000, 800), (3, 3)),
            ("spectrogram", ("spectrogram_generator", "spectrogram_vocoder"), (1000, 100), (4, 3))]:
        expected = [(None, {})]
        for name, steps, kinds in zip((generator, second), counts, schedules):
            if name != "spectrogram_vocoder":  # which reads no text
                expected += [(name, {"cfg_scale": w}) for w in (1, 2, 5, 10, 15)]
            kinds = ["front_heavy", "back_heavy", "uniform", "back_heavy_eval"][:kinds]
            expected += [(name, {"step_schedule": kind, "steps": steps}) for kind in kinds]
            expected += [(name, {"steps": n}) for n in (steps // 4, steps // 2, steps, 2 * steps)]
        models = {name: (n2m.MODELS[name], None) for name in n2m.ROUTES[route][:2]}
        assert evaluate.sweep_points(models) == expected
    few = {"waveform_cascader": (small("waveform_cascader"), None)}  # of 3 steps
    assert [changes["steps"] for _, changes in evaluate.sweep_points(few)[6:]] == [3, 3, 3, 1, 1, 3, 6]


def test_a_sweep_goes_on_where_it_was_stopped(toy, runs, monkeypatch, capfd):
    """Three of its points. Without its last line, and without one clip of that point, it samples this clip again."""
    captions = ["slow piano", "fast drums", "bass"]
    for folder, n in [("music", 3), ("two", 2)]:  # --limit 2 makes the one the other
        manifest(toy / folder, *({"audio": f"{k}.wav", "long": [captions[k]]} for k in range(n)))
        for k in range(n):
            write_tone(toy / folder / f"{k}.wav", 0.5, hz=300 + 100 * k)
    points, run_job, sampled = evaluate.sweep_points, evaluate.run_job, []
    monkeypatch.setattr(evaluate, "sweep_points", lambda weights: [points(weights)[i] for i in (0, 1, -1)])
    monkeypatch.setattr(evaluate, "run_job", lambda *args: sampled.append(str(args[-1])) or run_job(*args))
    embedding = ["--audio-embedder", "toy:loud", "--excerpt", 0.5]
    argv = ["sweep", "music", "--models", runs, *embedding, "-o", "s.jsonl", "--limit", 2, "--seconds", 0.5]
    evaluate.main([str(a) for a in argv])
    names = ["base", "waveform_generator-1.0", "waveform_cascader-6"]
    assert sampled == [f"s/{name}/000{n}.wav" for name in names for n in (0, 1)]
    text, lines = (toy / "s.jsonl").read_bytes(), json_lines("s.jsonl")
    assert [(line["model"], line.get("cfg_scale"), line.get("steps")) for line in lines] == [
        (None, None, None), ("waveform_generator", 1, None), ("waveform_cascader", None, 6)]
    settings = [[json.loads((toy / f"s/{name}/000{n}.json").read_text()) for n in (0, 1)] for name in names]
    for line, name, (first, second) in zip(lines, names, settings):
        assert [(s["prompt"], s["seed"]) for s in (first, second)] == [("slow piano", 0), ("fast drums", 1)]
        assert first["rate"] == 16_000  # Sec. 4.3.1: no super-resolution
        assert line["seconds_per_clip"] == second["sampled_in"] and line["n"] == 2  # the first compiles
        close(line["fad"], evaluated(capfd, f"s/{name}", "two", *embedding)[0]["fad"])
    base, guidance, steps = (first["stages"] for first, _ in settings)
    assert guidance == base | {"waveform_generator": base["waveform_generator"] | {"cfg_scale": 1}}
    assert steps == base | {"waveform_cascader": base["waveform_cascader"] | {"steps": 6}}
    assert lines[2]["fad"] != lines[0]["fad"]  # an untrained network reads no text, so guidance changes nothing
    sampled.clear()
    evaluate.main([str(a) for a in argv])
    assert not sampled and (toy / "s.jsonl").read_bytes() == text
    (toy / "s.jsonl").write_bytes(b"".join(text.splitlines(True)[:-1]))
    evaluate.main([str(a) for a in argv])
    assert not sampled and (toy / "s.jsonl").read_bytes() == text
    (toy / "s.jsonl").write_bytes(b"".join(text.splitlines(True)[:-1]))
    (toy / "s/waveform_cascader-6/0000.json").unlink()
    evaluate.main([str(a) for a in argv])
    assert sampled == ["s/waveform_cascader-6/0000.wav"] and (toy / "s.jsonl").read_bytes() == text  # the same clip


def test_sweep_refuses_in_one_line(toy, runs, capfd):
    write_tones(toy / "music/a.wav", 400), write_tones(toy / "music/b.wav", 500)
    fails = functools.partial(exits, capfd, evaluate.main, "sweep", "music", "--models", runs)
    embedder = "--audio-embedder", "toy:audio"
    assert "needs an --audio-embedder" in fails()
    assert "not every clip has a caption; give the prompts" in fails(*embedder)
    assert "-o takes the name of a .jsonl" in fails(*embedder, "-o", "s.json")
    assert "--limit must be at least 2" in fails(*embedder, "--limit", 1)
    for seconds in (-1, 0, "nan"):
        assert "seconds must be from" in fails(*embedder, "--seconds", seconds)
    assert "absent" in fails(*embedder, "--prompts", "absent")
    manifest(toy / "music", *({"audio": f"{name}.wav", "long": ["slow piano"]} for name in "ab"))
    assert "no trained waveform_generator" in fails(*embedder, "--models", toy)
    assert not list(toy.glob("*.jsonl")) and not list(toy.glob("s*/"))


PESTO = """
import numpy as np, pesto, torch

def audio(x):
    activations = pesto.predict(torch.tensor(x), 16_000, step_size=500.0)[3].numpy()  # (B, frames, 384)
    return activations.reshape(len(x), -1, 128, 3).sum(axis=-1)  # of semitones

def text(texts):  # the n-th overtone n times weaker: nothing like a sine, but of the same pitch
    t, waves = np.arange(32_000) / 16_000, []
    for text in texts:
        hz = float(text.split()[-2])
        waves.append(sum(0.3 / n * np.sin(2 * np.pi * n * hz * t) for n in range(1, int(8_000 / hz))))
    return audio(np.float32(waves)).mean(axis=1)
"""


@reference
def test_an_embedder_that_knows_pitch_labels_and_evaluates_by_pitch(toy, monkeypatch, capfd):
    """PESTO (Riou et al., 2023), whose weights lie in its package. Sines get the captions that it embeds as saw-tooth waves;
    and by its FAD saw-tooth waves of these pitches are nearer to the sines than sines of other pitches, unlike by log-mel."""
    # PESTO only reads files with torchaudio, which would have to fit torch.
    monkeypatch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
    pytest.importorskip("pesto", reason="the package pesto-pitch is an embedder that nobody here wrote")
    (toy / "pitch.py").write_text(PESTO)
    tones, others = [220, 262, 330, 392], [247, 294, 370, 440]
    t = np.arange(16_000) / 8_000
    for folder, pitches, overtones in [("music", tones, 1), ("saw", tones, 8), ("other", others, 1)]:
        (toy / folder).mkdir(exist_ok=True)
        for hz in pitches:
            wave = sum(0.3 / n * np.sin(2 * np.pi * n * hz * t) for n in range(1, overtones + 1))
            soundfile.write(toy / folder / f"{hz}.wav", wave, 8_000)
    vocabulary(toy / "words.txt", *others, *tones)
    embedders = {"audio": "pitch:audio", "text": ("--text-embedder", "pitch:text")}
    run_label("--vocabulary", "long", "words.txt", 1, 1, "--out", "labels.jsonl", **embedders)
    assert [line["long"] for line in json_lines("labels.jsonl")] == [[caption] for caption in tone_captions(*tones)]
    fad = {(folder, embedder): evaluated(capfd, folder, "music", "--audio-embedder", embedder, "--excerpt", 2)[0]["fad"]
           for folder in ("saw", "other") for embedder in ("pitch:audio", "noise2music:log_mel_statistics")}
    assert 3 * fad["saw", "pitch:audio"] < fad["other", "pitch:audio"]
    assert fad["saw", "noise2music:log_mel_statistics"] > fad["other", "noise2music:log_mel_statistics"]
    sys.modules.pop("pitch")
