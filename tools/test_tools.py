"""What a sceptical reader would check of tools/ and demo/export.py."""

import base64
import functools
import importlib.util
import io
import json
import math
import os
import re
import shlex
import shutil
import sys
import threading
import types
import zipfile
from dataclasses import replace
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root / folder) for folder in ("", "tools", "demo")]
import test_noise2music
from test_noise2music import (SHARDED, close, exits, leave_run, manifest, n2m, random_params,
                              read_safetensors, reference, rng, run_sample, run_train, settings_in,
                              small, write_tone, write_tones)

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import soundfile

import corpora
import evaluate
import export
import label
import listen
import plan
import sample
import t5_encoder
import train

compiled, data, runs = test_noise2music.compiled, test_noise2music.data, test_noise2music.runs

# ---- demo/export.py ----


def test_exported_averages_sample_and_begin_another_run(tmp_path, data, monkeypatch, capfd):
    """The averages, as bfloat16, and the T5, from where they were moved to. `sample.py` remarks on
    words that are new to them."""
    name, model = "waveform_generator", small("waveform_generator", batch_size=2)
    monkeypatch.setitem(n2m.ROUTES, "short", (name,))
    path = leave_run(tmp_path / "runs", model, random_params(model.unet))
    path.rename(path.with_stem("checkpoint-00000002"))  # later than what takes its place
    export.main([str(tmp_path / folder) for folder in ("runs", "exported")])
    demo = (tmp_path / "exported").rename(tmp_path / "demo")
    last = lambda folder: train.checkpoints(folder / name)[-1]
    averages, exported = (read_safetensors(last(tmp_path / f))[0] for f in ("runs", "demo"))
    averages = {k: v for k, v in averages.items() if k.startswith("ema/")}
    assert exported.keys() == averages.keys()
    assert all(v.dtype == jnp.bfloat16 for v in exported.values())
    err = exits(capfd, export.main, tmp_path / "runs", tmp_path / "runs")  # itself: no
    assert "a checkpoint that training goes on from" in err
    export.main([str(tmp_path / "runs"), str(demo)])  # a second time: yes
    shutil.copytree(demo, tmp_path / "mixed")
    for folder in ("runs", "mixed"):  # one model is exported there, another is being trained
        leave_run(tmp_path / folder, small("waveform_cascader"))
    mixed = tmp_path / "mixed"
    kept = last(mixed).rename(last(mixed).with_stem("checkpoint-00000009"))
    err = exits(capfd, export.main, tmp_path / "runs", mixed)
    assert "a checkpoint that training goes on from" in err and last(mixed) == kept
    shutil.rmtree(tmp_path / "runs" / "waveform_cascader")
    t5_encoder.save_t5(tmp_path / "other" / "t5", t5_encoder.random_t5(["another one"], 1))
    leave_run(tmp_path / "other", small("waveform_cascader"))
    err = exits(capfd, export.main, tmp_path / "other", demo)
    assert "would hold models of more than one T5" in err
    assert not (demo / "waveform_cascader").exists()
    assert read_safetensors(last(tmp_path / "runs"))[0].keys() > averages.keys()
    shutil.rmtree(tmp_path / "runs" / "t5")
    shutil.copytree(tmp_path / "other" / "t5", tmp_path / "runs" / "t5")
    err = exits(capfd, export.main, tmp_path / "runs", demo)
    assert f"t5: not the T5 encoder that {name} was trained with" in err
    shutil.rmtree(tmp_path / "runs")
    run_train(name, "--data", data, "--init", last(demo), "--out", tmp_path / "more", "--steps", 1,
              "--learning-rate", 1e-30)
    begun = read_safetensors(last(tmp_path / "more"))[0]
    shutil.copytree(demo / "t5", tmp_path / "linked" / "t5")  # of a model that names no T5
    cascader = leave_run(tmp_path / "linked", small("waveform_cascader")).parent
    cascader.rename(tmp_path / "more" / cascader.name)
    export.main([str(tmp_path / "more"), str(demo)])  # whose T5 it has: left as it is
    assert [path.name for path in train.checkpoints(demo / name)] == [last(tmp_path / "more").name]
    for k in averages:
        close(np.float32(exported[k]), averages[k], rtol=2**-8)
        close(begun[k.replace("ema/", "params/")], np.float32(exported[k]), atol=1e-20)
    for prompt, remark in [("a tone of two hundred hertz", False),
                           ("zither quartet with castanets", True)]:
        run_sample(prompt, "-o", tmp_path / "x.wav", "--models", demo, "--seconds", 0.5, "--steps",
                   1, "--route", "short")
        assert ("zither, quartet" in capfd.readouterr().err) == remark


# ---- plan.py ----


@pytest.mark.skipif(not importlib.util.find_spec("libtpu"), reason="no libtpu (the extra tpu)")
def test_the_tpu_compiler_accepts_a_step_of_sampling_and_of_training(capsys, monkeypatch):
    """Of small models, split both ways, for four TPU v4."""
    sampled, trained = (replace(n2m.MODELS[name], unet=unet) for name, unet in SHARDED.items())
    monkeypatch.setattr(n2m, "MODELS", {model.name: model for model in (sampled, trained)})
    common = ["v4:2x2x1", "--model-parallel", "2", "--seconds", "0.06"]
    plan.main([*common, "--only", sampled.name])
    header, _, row = capsys.readouterr().out.splitlines()
    assert "`sample.py --num 4 --seconds 0.06 --bf16 --model-parallel 2` runs" in header
    assert row.startswith(sampled.name) and "all-reduce" in row and "Table 4: 75.0 ms" in row
    plan.main([*common, "--train", trained.name, "--batch-size", "32"])
    header, _, gradients, update, total = capsys.readouterr().out.splitlines()
    assert "--accumulate 2 --model-parallel 2 --bf16 --remat` runs" in header
    assert gradients.startswith("gradients x 2 ") and "all-reduce" in gradients
    assert update.startswith("update ") and "for the 840000 steps" in total


def test_a_plan_counts_what_lies_on_a_chip_meanwhile(capsys):
    """An array of which each has 4 GiB, beside a program of a few bytes."""
    mesh, chip = n2m.make_mesh(1, jax.devices()[:4]), plan.CHIPS["v4"]
    program = jax.jit(lambda a: a + 1).lower(jnp.ones(8))
    held = plan.across(mesh, [plan.array(4 * mesh.size, 2**28)])
    plan.plan("x", program, 1e6, chip._replace(memory=4.1), held=held)
    assert " 4.00 GiB" in capsys.readouterr().out
    with pytest.raises(ValueError, match="4.0 GiB do not fit a chip of 3.9 GiB"):
        plan.plan("x", program, 1e6, chip._replace(memory=3.9), held=held)


@pytest.mark.parametrize("argv", ["--here --accumulate 2", "--here --train {0}",
                                  "v4:2x2x1 --batch-size 9", "v4:2x2x1 --train {0} --only {0}",
                                  "v4:2x2x1 --train {0} --num 4"])
def test_options_of_a_plan_that_would_do_nothing_are_refused(argv, capfd):
    argv = argv.format("waveform_cascader").split()
    assert "--train" in exits(capfd, plan.main, *argv)


def test_a_step_is_measured_here(capsys):
    """On the devices of this machine; the models of the paper only where they are fast."""
    plan.main("--here --tiny --num 1 --seconds 0.05 --only superresolution_cascader".split())
    header, _, row = capsys.readouterr().out.splitlines()
    assert "of 1 clips of 0.05 s" in header and "TFLOP/s" in header
    ms, share = re.fullmatch(r"superresolution_cascader +(\S+) ms +(\d+) % .* s", row).groups()
    assert float(ms) > 0 and int(share) > 0
    if plan.jax.devices()[0].platform == "cpu":
        with pytest.raises(SystemExit):
            plan.main(["--here"])
        assert "no accelerator is here" in capsys.readouterr().err


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

frames = lambda x: audio(x)[:, None] + np.array([[0.5], [-0.5]])  # with the mean of `audio`
loud = lambda x: np.stack([x.std(axis=1), abs(x).mean(axis=1)], axis=1)
numbers = lambda x: np.ones(len(x))  # no embedding
two = lambda texts: np.ones((2, 2))
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A folder to work in, with a joint embedder of tones and captions such as a user brings."""
    (tmp_path / "toy.py").write_text(TOY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # to which the working folder is added
    (tmp_path / "music").mkdir()
    yield tmp_path
    sys.modules.pop("toy", None)


tone_captions = lambda *tones: [f"a tone of {hz} Hz" for hz in tones]
json_lines = lambda path: [json.loads(line) for line in Path(path).read_text().splitlines()]
longs = lambda path: [line["long"] for line in json_lines(path)]


def vocabulary(path, *tones):
    Path(path).write_text("\n".join(tone_captions(*tones)) + "\n")
    return path


def run_label(*argv, audio="toy:audio", text=("--text-embedder", "toy:text")):
    label.main([str(a) for a in ("music", "--audio-embedder", audio, *text, *argv)])


def test_label_gives_the_nearest_captions_of_each_vocabulary(toy):
    """K of each, where K' = K, after what the file says of itself. Six clips of a long track."""
    write_tones("music/a.flac", 445, seconds=8, title="Song", artist="Nobody", genre="Hum")
    write_tones("music/b.wav", 200, 200, 530)  # by the angle of the mean vector, 310 Hz
    write_tones("music/c.wav", 100, 200, 300, 400, 500, 600, seconds=40)
    vocabulary("one.txt", *range(900, 0, -100)), vocabulary("two.txt", *range(40, 1000, 100))
    vocabulary("three.txt", 60, 160, 300, 420, 480, 700)
    run_label("--vocabulary", "long", "one.txt", 1, 1, "--vocabulary", "short", "three.txt", 3, 3,
              "--vocabulary", "long", "two.txt", 2, 2, "--out", "else/where/labels.jsonl")
    tracks = train.read_tracks(toy / "else/where", True, "labels.jsonl")
    assert [track.path.resolve().name for track in tracks] == ["a.flac", "b.wav"] + ["c.wav"] * 6
    assert [track.start for track in tracks] == [0, 0, 0, 40, 80, 120, 160, 200]
    assert len(train.find_clips(tracks)) == 8
    assert [list(track.long) for track in tracks] == [tone_captions(*row) for row in (
        [400, 440, 540], [300, 340, 240], [100, 140, 40], [200, 240, 140], [300, 340, 240],
        [400, 440, 340], [500, 540, 440], [600, 640, 540])]
    assert list(tracks[0].short) == ["Song", "Nobody", "Hum", *tone_captions(420, 480, 300)]
    assert list(tracks[1].short) == tone_captions(300, 420, 160)
    run_label("--vocabulary", "short", "three.txt", 3, 3, "--out", "f.jsonl", audio="toy:frames")
    assert [line["short"] for line in json_lines("f.jsonl")] == [list(t.short) for t in tracks]


def test_high_quality_labels_all_clips_with_their_metadata_as_one_prompt(toy, capfd):
    """Sec. 3.6. Titles and tags are those of metadata.jsonl; or else of the files."""
    write_tones("music/long.wav", *range(100, 900, 100), seconds=30)
    write_tones("music/song.flac", 500, title="Song", album="Album", genre="Hum")
    label.main(["music", "--high-quality"])
    assert "8 of 9 clips have no title, tags or caption" in capfd.readouterr().err
    *steps, song = json_lines("music/captions.jsonl")
    assert song == {"audio": "song.flac", "start": 0, "long": ["Song, Album, Hum"], "short": []}
    assert [line["start"] for line in steps] == [0, 30, 60, 90, 120, 150, 180, 210]
    metadata = [{"audio": "song.flac", "tags": ["a"], "long": "All of it."},
                {"audio": "long.wav", "title": "Steps", "tags": ["jazz", "piano"]}]
    Path("music/metadata.jsonl").write_text("\n".join(map(json.dumps, metadata)))
    vocabulary("all.txt", *range(100, 900, 100))
    both = [part for kind in ("long", "short") for part in ("--vocabulary", kind, "all.txt", 1, 1)]
    run_label("--high-quality", *both, "--out", "labels.jsonl")
    assert [line["short"] for line in json_lines("labels.jsonl")] == [
        tone_captions(hz) for hz in (500, *range(100, 900, 100))]
    song, *steps = longs("labels.jsonl")
    assert song == ["All of it.", "a", *tone_captions(500)]
    assert steps == [["Steps, jazz, piano", *tone_captions(hz)] for hz in range(100, 900, 100)]


def test_labels_depend_on_the_seed_and_not_on_who_embedded(toy):
    """Byte by byte, from arrays too; of 10 nearest captions 3, the nearest first."""
    tones, captions = [300, 330, 360, 410, 470, 520], range(100, 700, 50)
    for n, hz in enumerate(tones):
        write_tones(f"music/{n}.wav", hz)

    def labelled(seed, **embedders):
        Path("labels.jsonl").unlink(missing_ok=True)
        run_label("--vocabulary", "long", words, "--seed", seed, "--out", "labels.jsonl",
                  **embedders)
        return Path("labels.jsonl").read_bytes()

    words = vocabulary("words.txt", *captions)
    first, embedding = labelled(3), sys.modules["toy"].embedding
    for hz, long in zip(tones, longs("labels.jsonl"), strict=True):
        nearest = tone_captions(*sorted(captions, key=lambda caption: abs(caption - hz))[:10])
        places = [nearest.index(caption) for caption in long]
        assert len(places) == 3 and places == sorted(set(places))
    assert labelled(3) == first != labelled(4)
    np.save("words.npy", embedding([*captions])), np.save("clips.npy", embedding(tones))
    np.savez("clips.npz", np.float32(embedding(tones)))
    for clips in ("clips.npy", "clips.npz"):
        assert labelled(3, audio=clips, text=()) == first


def test_a_stopped_label_goes_on_where_it_was(toy, capfd):
    """Among the clips or the captions, with a part of a block written: the rest is embedded."""
    tones = range(100, 500, 10)  # two blocks of clips, two of captions
    other = [2000 + n / 5 for n in range(4200)]
    for hz in tones:
        write_tones(f"music/{hz}.wav", hz, seconds=1)
    argv = "--vocabulary", "long", vocabulary("words.txt", *other, *tones), 1, 1, "--out"
    err = exits(capfd, label.main, "music", "--audio-embedder", "toy:audio", *argv, "x.jsonl")
    assert "give --text-embedder" in err and "embedded" not in err  # found out first
    run_label(*argv, "whole.jsonl")
    assert longs("whole.jsonl") == [[caption] for caption in tone_captions(*tones)]
    whole, module = Path("whole.jsonl").read_bytes(), sys.modules["toy"]
    calls = lambda kind: [n for k, n in module.calls if k == kind]
    assert calls("audio") == [16] * 4 and calls("text") == [1, 4096, 144]  # the first: the width
    for kind, limit, rest in [("audio", 3, [16, 16]), ("text", 2, [1, 144])]:
        module.calls.clear(), module.limit.update({kind: limit})
        with pytest.raises(KeyboardInterrupt):
            run_label(*argv, f"{kind}.jsonl")
        (part,) = Path(f"{kind}.jsonl.work").glob("*.part")
        with part.open("ab") as file:
            file.write(bytes(50))  # a few rows and a part of one, as a crash may leave them
        assert not Path(f"{kind}.jsonl").exists()
        module.calls.clear(), module.limit.clear()
        run_label(*argv, f"{kind}.jsonl")
        assert calls(kind) == rest and Path(f"{kind}.jsonl").read_bytes() == whole
        assert not list(toy.rglob("*.part"))
    again = "music", "--high-quality", "--out", "text.jsonl"
    assert "there already" in exits(capfd, label.main, *again)
    Path("text.jsonl").unlink(), module.calls.clear()
    run_label(*argv, "text.jsonl", "--seed", 1)
    assert calls("audio") == [16] and calls("text") == [1]
    vocabulary("words.txt", *other, *reversed(tones))  # as many other captions
    Path("text.jsonl").unlink()
    run_label(*argv, "text.jsonl")
    assert Path("text.jsonl").read_bytes() == whole
    Path("text.jsonl").unlink()
    for matrix in Path("text.jsonl.work").glob("*.i32"):
        os.truncate(matrix, 4)  # as a power cut may leave it: no caption 0 for the rest
    err = exits(capfd, label.main, "music", "--audio-embedder", "toy:audio", "--text-embedder",
                "toy:text", *argv, "text.jsonl")
    assert ".i32: is cut off; delete it" in err


def test_clips_without_an_embedding_are_left_out(toy, capfd):
    """Of silence, by functions or in arrays; what cannot be decoded is not taken for silence."""
    for name, hz in [("good", 400), ("silent", 0), ("well", 300)]:
        write_tones(f"music/{name}.wav", hz)
    soundfile.write("music/nan.wav", np.full(32_000, np.nan), 16_000, "FLOAT")
    Path("music/text.wav").write_text("not audio")
    argv = "--vocabulary", "long", vocabulary("words.txt", 200, 300, 400), 1, 1, "--out"
    run_label(*argv, "functions.jsonl")
    err = capfd.readouterr().err
    assert "text.wav" in err and "2 of 4 clips have no embedding" in err
    assert "nan.wav: holds samples that are not numbers, or over 10 times full scale; sk" in err
    np.save("clips.npy", [[0.0, 1.0], [np.nan, 1.0], [1.0, 0.0], [1.0, np.inf]])
    run_label(*argv, "arrays.jsonl", audio="clips.npy")
    run_label(*argv, "loud.jsonl", audio="toy:loud")
    got = [{Path(line["audio"]).stem: line["long"] for line in json_lines(f"{name}.jsonl")}
           for name in ("functions", "arrays", "loud")]
    assert got[:2] == [{"good": tone_captions(400), "well": tone_captions(300)},
                       {"good": tone_captions(400), "silent": tone_captions(200)}]
    assert [*got[2]] == ["good", "silent", "well"]


@pytest.mark.parametrize("of, name, at", [
    (train, "load_audio", 35),  # before a file is opened
    (soundfile, "SoundFile", 115)])  # between its two openings
def test_a_blink_of_the_system_is_not_kept_as_a_failure(toy, capfd, monkeypatch, of, name, at):
    """A folder that comes back costs nothing; one that does not stops the run, and another goes on.
    A file that failed is tried again."""
    tones = range(100, 500, 10)
    for hz in tones:
        write_tones(f"music/{hz}.wav", hz, seconds=1)
    argv = "--vocabulary", "long", vocabulary("words.txt", *tones), 1, 1, "--out"
    run_label(*argv, "whole.jsonl")
    plain, calls, away = getattr(of, name), [], Path("away")

    def blinking(path, *args):
        calls.append(path)
        if len(calls) == at:
            Path("music").rename(away)
            comes_back and threading.Timer(0.2, lambda: away.rename("music")).start()
        return plain(path, *args)

    monkeypatch.setattr(of, name, blinking)
    monkeypatch.setattr(train, "WAITS", (0.1, 0.4))
    for comes_back in (True, False):
        calls.clear()
        if comes_back:
            run_label(*argv, "blink.jsonl")
        else:
            err = exits(capfd, lambda _: run_label(*argv, "gone.jsonl")).splitlines()
            assert "wav: No such file" in err[-1] and "ETA" not in err[-1]
            away.rename("music")
            run_label(*argv, "gone.jsonl")
    for out in ("blink.jsonl", "gone.jsonl"):
        assert Path(out).read_bytes() == Path("whole.jsonl").read_bytes()
    good, stat = Path("music/200.wav").read_bytes(), os.stat("music/200.wav")
    soundfile.write("music/200.wav", np.full(2_000, np.nan), 2_000, "FLOAT")
    for n in (39, 40):  # then it is mended, and nobody can tell from its time
        os.utime("music/200.wav", ns=(stat.st_atime_ns, stat.st_mtime_ns))
        Path("bad.jsonl").unlink(missing_ok=True)
        run_label(*argv, "bad.jsonl")
        assert len(json_lines("bad.jsonl")) == n
        Path("music/200.wav").write_bytes(good)
    assert Path("bad.jsonl").read_bytes() == Path("blink.jsonl").read_bytes()
    with train.lock(Path("blink.jsonl.work/lock")):
        Path("blink.jsonl").unlink()
        err = exits(capfd, lambda _: run_label(*argv, "blink.jsonl"))
        assert f"process {os.getpid()} on" in err


def test_what_has_changed_is_embedded_anew(toy):
    """A file that was broken and is mended, as long as it was; an embedder of another width."""
    write_tones("music/good.wav", 400)
    soundfile.write("music/bad.wav", np.full(20_000, np.nan), 2_000, "FLOAT")
    vocabulary("words.txt", 200, 300, 400), label.load_embedder("toy:audio")
    module = sys.modules["toy"]
    narrow, mend = module.embedding, lambda: write_tones("music/bad.wav", 300)
    widen = lambda: setattr(module, "embedding", lambda hz: np.repeat(narrow(hz), 2, axis=-1))
    for change, tones in [(lambda: None, [400]), (mend, [300, 400]), (widen, [300, 400])]:
        change()
        run_label("--vocabulary", "long", "words.txt", 1, 1, "--out", "x.jsonl")
        assert longs("x.jsonl") == [[caption] for caption in tone_captions(*tones)]
        Path("x.jsonl").unlink()


def test_float16_embeddings_are_numbers_however_long(toy):
    """Their sum may be over 65504, the largest of float16."""
    write_tones("music/a.wav", 400), write_tones("music/b.wav", 400), vocabulary("words.txt", 1, 2)
    np.save("words.npy", np.float16([[200] * 512, [200] * 256 + [0] * 256]))
    shutil.copy("words.npy", "clips.npy")
    run_label("--vocabulary", "long", "words.txt", 1, 1, audio="clips.npy", text=())
    assert longs("music/captions.jsonl") == [[caption] for caption in tone_captions(1, 2)]


def test_odd_captions_names_and_links(toy, capfd):
    """U+2028 and U+0085 end a line for str.splitlines. A name need not be UTF-8. a/link/../music is
    not a/music."""
    odd = "naïve\u2028 音楽 \x85 🎹 tone of 400 Hz"
    Path("words.txt").write_text(f"{odd}\na tone of 900 Hz\n", "utf-8")
    write_tones("music/é.wav", 400, title="one\u2029two")
    os.rename(write_tones(toy / "b.wav", 400), os.fsencode(toy) + b"/music/\xff.wav")
    (toy / "far/away").mkdir(parents=True), (toy / "link").symlink_to(toy / "far/away")
    run_label("--vocabulary", "long", "words.txt", 1, 1, "--out", "link/captions.jsonl")
    assert "skipped" not in capfd.readouterr().err
    track, other = sorted(train.read_tracks(toy / "link", needs_text=True))
    assert other.path.samefile(os.fsdecode(b"music/\xff.wav")) and other.long == (odd,)
    assert track.long == (odd,) and track.short == ("one\u2029two",)
    assert track.path.samefile(toy / "music/é.wav")
    assert [e["prompt"] for e in sample.read_prompts(Path("link/captions.jsonl"))] == [odd] * 2


# ---- corpora.py: Secs. 3.5 and 4.3.3, App. D ----


@pytest.mark.parametrize("text", [
    "A 50's pop ballad feat. X on vocals. |The mood is sad.",
    "Rock vs. The World, at 120.5 bpm. |Dr. Dre and St. Vincent are heard.",
    "J. S. Bach wrote it. |It is a fugue in C. |The organ, Op. 5 No. 2, is loud.",
    "B.B. King plays with R.E.M. |The sound is by a.k.a. The Boss, of the 80s. |90s rave follows.",
    "the song is slow. |it has strings, brass, etc. and drums. |the mood is sad",
    "Strings, brass, etc. |Slow... then fast. |Slow... |Then nothing.",
    'She sings "Stop. Go on." over drums. |The end is quiet.',
    'The singer shouts "Hey!" and claps. |Is it jazz? |“It is over. Go home.” he says.',
    "Recorded at 3 a.m. |The key is A. |It's calm, e.g. the flute, i.e. approx. 3 min. long.",
    "The drums are loud.|The bass is soft.",
    'A 12" single, the "A" side. |It is fast.',
    "P!nk sings loudly. |will.i.am raps. |AC/DC rocks.",
    "No. |No voices. |In 4/4. |Yes! |(It is noisy.) |She is off key.",
    "A band from the U.S. with strings, 120 b.p.m. and loud. |The end.",
    "1. One line\n|- and another."])
def test_a_caption_is_split_into_sentences(text):
    expected = [re.sub(r"^(1\.|-) ", "", sentence.strip()) for sentence in text.split("|")]
    assert corpora.sentences(text.replace("|", "")) == expected
    assert corpora.sentences('"It is all quoted. Both are."') == ["It is all quoted.", "Both are."]
    assert corpora.sentences(" ... \n") == []
    for run in ("!", "a", "ha."):  # as a language model may write: no time that grows with a power
        assert corpora.sentences(run * 3000 + "! The end.")[-1][-8:] == "The end."


MUSICCAPS = """\
ytid,start_s,end_s,audioset_positive_labels,aspect_list,caption,\
author_id,is_balanced_subset,is_audioset_eval
-0Gj8-vB1q4,30,40,"/m/0140xf,/m/02cjck","['low quality', ""50's pop"", 'slow']",\
"This is ""pop"", feat. X. It is slow.",4,False,True
AbCdEfGhIjK,0,10,/m/04rlf,"['slow']","It is slow.
The end.",1,True,False
"""


def test_vocabularies_of_the_raters(toy, capfd):
    """Sec. 3.5, from MusicCaps as published: Rater-LF, sentences, and Rater-SF, tags."""
    Path("musiccaps-public.csv").write_text(MUSICCAPS)
    label.main(["vocabulary", "raters", "musiccaps-public.csv", "-o", "v"])
    assert capfd.readouterr().out == (
        "v/rater_lf.txt and v/rater_sf.txt: 2 captions (10,028 in the paper), 4 sentences (35,333)"
        ", of them 3 different; 3 different tags (23,906)\n")
    captions = lambda name: label.read_vocabulary("long", f"v/{name}", 1, 1).captions
    assert captions("rater_lf.txt") == ['This is "pop", feat. X.', "It is slow.", "The end."]
    assert captions("rater_sf.txt") == ["low quality", "50's pop", "slow"]
    Path("v/rater_lf.txt").unlink()  # both or none
    err = exits(capfd, label.main, "vocabulary", "raters", "musiccaps-public.csv", "-o", "v")
    assert "v/rater_sf.txt: there already" in err and not Path("v/rater_lf.txt").exists()


def test_a_language_model_is_asked_and_its_answers_are_cleaned(toy, capfd):
    """LaMDA-LF, Sec. 3.5: from titles and artists to prompts, and from answers to sentences."""
    Path("songs.csv").write_text('id,title,artist\n1,"Up {artist}, Up",Ann & Bo\n2,Happy,The Cat\n')
    Path("template.txt").write_text('"One" by A: It is slow.\n"{title}" by {artist}:')
    label.main(["vocabulary", "songs", "songs.csv", "template.txt"])
    asked = json_lines("vocabularies/prompts.jsonl")
    assert [line["prompt"] for line in asked] == [
        '"One" by A: It is slow.\n"Up {artist}, Up" by Ann & Bo:',
        '"One" by A: It is slow.\n"Happy" by The Cat:']
    said = ["The song has a happy mood. Bo sings up high. Up, up {artist} up and away it goes. It "
            "is slow. It is good and it is",
            "The song has a happy mood! A song by the cat on drums. It is Happy with many strings. "
            "Happy drums play and " + "la " * 37 + "end.\nIt goes on to another song."]
    lines = [json.dumps(line | {"answer": answer}) for line, answer in zip(asked, said)]
    Path("answers.jsonl").write_text("\n".join(lines) + "\n")
    label.main(["vocabulary", "answers", "answers.jsonl"])
    assert Path("vocabularies/lamda_lf.txt").read_text() == "The song has a happy mood.\n"
    assert capfd.readouterr().out.splitlines()[1] == (
        "vocabularies/lamda_lf.txt: 1 sentences (4 million in the paper); dropped: 4 with a title "
        "or artist, 2 too short or long, 1 after the first line, 1 cut off, 1 there already")


SEGMENTS = """\
# Segments csv created Sun Mar  5 10:54:25 2017
# num_ytids=5, num_segs=5, num_unique_labels=5, num_positive_labels=10
# YTID, start_seconds, end_seconds, positive_labels
--PJHxphWEs, 30.000, 40.000, "/m/04rlf,/m/07y_7,/m/0l14_3"
Yb_dEfGhIjK, 0.000, 10.000, "/m/0342h,/m/04rlf,/m/09x0r"
0123456789_, 120.000, 130.000, "/m/04rlf,/t/dd00034"
absent_____, 0.000, 10.000, "/m/04rlf,/m/05r5c"
speech_____, 0.000, 10.000, "/m/04rlf,/m/09x0r"
"""
CLASSES = """\
index,mid,display_name
0,/m/09x0r,Speech
137,/m/04rlf,Music
140,/m/0342h,Guitar
153,/m/05r5c,Piano
189,/m/0l14_3,Bowed string instrument
191,/m/07y_7,"Violin, fiddle"
279,/t/dd00034,Tender music
"""


def audioset_of(folder, *tones):
    """Clips named in three of the ways in which scripts name them, and the published files."""
    Path("eval_segments.csv").write_text(SEGMENTS)
    Path("class_labels_indices.csv").write_text(CLASSES)
    for name, hz in zip(["--PJHxphWEs_30000", "YYb_dEfGhIjK", "0123456789__120_130"], tones):
        write_tones(f"{folder}/{name}.wav", hz)


def test_mulamcap_is_two_commands_from_audioset(toy, capfd):
    """Sec. 3.5: 3 captions of LaMDA-LF, 3 of Rater-LF and 6 of Rater-SF for all music (App. D)."""
    audioset_of("music", 300, 500, 400)
    label.main(["audioset", "music", "eval_segments.csv"])
    assert ("3 clips, of the music that is listed: 4 for evaluation (MuLaMCap: 4,497)"
            in capfd.readouterr().out)
    assert [line["labels"] for line in json_lines("music/metadata.jsonl")] == [
        ["Bowed string instrument", "Violin, fiddle"], ["Guitar"], ["Tender music"]]
    vocabularies = [("long", vocabulary("lamda.txt", *range(100, 900, 50))),
                    ("long", vocabulary("raters.txt", *range(110, 900, 50))),
                    ("short", vocabulary("tags.txt", *range(120, 900, 50)))]
    run_label(*(word for kind, path in vocabularies for word in ("--vocabulary", kind, path)))
    lines = json_lines("music/captions.jsonl")
    assert [Path(line["audio"]).stem for line in lines] == [
        "--PJHxphWEs_30000", "YYb_dEfGhIjK", "0123456789__120_130"]
    assert all((len(line["long"]), len(line["short"])) == (6, 6) for line in lines)


def test_audiosets_music_labels():
    """App. D has 130 ids, each once; the comment above them names the eleven that were repaired."""
    labels, source = corpora.MUSIC_LABELS, Path(corpora.__file__).read_text()
    assert len(labels) == len(set(labels)) == 130
    assert all(re.fullmatch(r"/(m/0[0-9a-z_]{3,7}|t/dd000\d\d)", name) for name in labels)
    repaired = re.search(r"the ontology: /m/([^.]+)\.", source)[1].replace("#", "").split()
    assert len(repaired) == 11 and all(f"/m/{name}" in labels for name in repaired)


def test_prompts_of_the_evaluation_sets(toy, capfd):
    """Sec. 4.3.3, in the paper's form: alone, or as the captions of the clips that are there."""
    audioset_of("music", 300, 500, 400)
    write_tones("music/-0Gj8-vB1q4.wav", 300), Path("music/f").mkdir()
    write_tones("music/f/a-30-59.mp3", 300, rate=16_000)
    without = "NoCaptionAtA,30,40,,['slow'],,4,False,True\n"
    Path("musiccaps-public.csv").write_text(MUSICCAPS + without)
    Path("annotations_final.csv").write_text(
        '"clip_id"\t"no voice"\t"hard rock"\t"1"\t"mp3_path"\n'
        '"2"\t"1"\t"0"\t"0"\t"f/a-30-59.mp3"\n"6"\t"1"\t"1"\t"0"\t"f/b-0-29.mp3"\n'
        '"1"\t"0"\t"0"\t"0"\t"f/c-0-29.mp3"\n')
    for name, file, wanted, held, seconds, size in [
            ("mtat", "annotations_final.csv", ["no voice", "no voice, hard rock"], [0], 29,
             "21,638"),
            ("audioset", "eval_segments.csv", ["Bowed string instrument, Violin, fiddle",
                                               "Tender music", "Piano"], [0, 1], 30, "1,482"),
            ("musiccaps", "musiccaps-public.csv", ['This is "pop", feat. X. It is slow.',
                                                   "It is slow. The end."], [0], 30, "5.5K")]:
        evaluate.main(["prompts", name, file])
        evaluate.main(["prompts", name, file, "--clips", "music"])
        alone, clips = capfd.readouterr().out.splitlines()
        assert f"{len(wanted)} of {len(wanted)} prompts" in alone and size in alone
        assert f"{len(held)} of {len(wanted)} prompts" in clips
        assert sample.read_prompts(Path(f"{name}.jsonl")) == [
            {"prompt": prompt, "seconds": seconds} for prompt in wanted]
        captions = Path("music/captions.jsonl")
        assert [e["prompt"] for e in sample.read_prompts(captions)] == [wanted[n] for n in held]
        captions.unlink()


# ---- evaluate.py, Secs. 4.3 to 4.6 ----


def evaluated(capfd, *argv):
    """What `evaluate.py scores` says: the JSON, and stderr."""
    capfd.readouterr()
    evaluate.main([str(a) for a in ("scores", *argv)])
    out, err = capfd.readouterr()
    return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")), err


def test_evaluate_prints_the_closed_form_of_fad(toy, capfd):
    """Diagonal covariances: the squared differences of the deviations, and of the means."""
    signs = functools.reduce(np.kron, [[[1, 1], [1, -1]]] * 3)[:, 1:5]  # orthogonal, of mean 0
    one, two, shift = np.array([1, 2, 0.5, 3]), np.array([2, 2, 0.1, 1]), np.array([0.5, 0, -2, 1])
    x, y = signs * one, np.tile(signs, (2, 1)) * two + shift
    for name, array in {"x": x, "y": y, "frames": x.reshape(4, 2, 4), "moved": x + shift,
                        "few": x[:3]}.items():
        np.save(f"{name}.npy", array)
    np.savez("x.npz", x)
    fad = np.sum((np.sqrt(8 / 7) * one - np.sqrt(16 / 15) * two) ** 2) + shift @ shift
    for name in ("x.npy", "x.npz", "frames.npy"):
        result, err = evaluated(capfd, name, "y.npy")
        close(result["fad"], fad, rtol=1e-9)
        assert [result[key] for key in ("n", "n_reference", "width")] == [8, 16, 4]
        assert [*result][-1] == "fad_infinity" and "no pairs" in err and "fewer" not in err
    result, err = evaluated(capfd, "moved.npy", "x.npy")
    close(result["fad"], shift @ shift, rtol=1e-9)
    assert "similarity" in result and not err
    result, err = evaluated(capfd, "few.npy", "x.npy")
    assert "3 generated embeddings are fewer than their width 4: FAD is biased" in err
    assert "fad_infinity" not in result


def test_evaluate_compares_pairs(toy, capfd):
    """Table 6 for orthogonal embeddings, and generated ones halfway to another."""
    truth = np.eye(6)
    np.save("truth.npy", truth * 5), np.save("text.npy", 3 * truth)
    np.save("frames.npy", np.stack([truth, np.roll(truth, 1, axis=1)], axis=1))
    argv = capfd, "frames.npy", "truth.npy"
    result, _ = evaluated(*argv, "--text-embedder", "text.npy")
    assert (result["n"], result["n_reference"]) == (12, 6)
    rows = ("ground truth audio", "randomly shuffled audio", "generated audio")
    for row, cosine in zip(rows, (1, 0, math.sqrt(0.5))):
        columns = result["similarity"][row]
        close([columns["gt-text"], columns["gt-audio"]], cosine, atol=1e-12)
    assert [*evaluated(*argv)[0]["similarity"]["generated audio"]] == ["gt-audio"]
    np.save("one.npy", truth[None])  # one clip of six frames has none to be shuffled with
    result, err = evaluated(capfd, "one.npy", "one.npy")
    assert "similarity" not in result and "no pairs, or but one" in err


def test_evaluate_reads_folders_and_what_the_samples_were_sampled_from(toy, capfd):
    """Tones, whose cosines are those of known angles. What --keep-stages wrote is no sample."""
    Path("out").mkdir()
    for n, (made, prompt, real) in enumerate([(400, 410, 420), (500, 540, 530)]):
        write_tones(f"out/000{n}.wav", made), write_tones(f"out/000{n}.waveform_generator.wav", 900)
        Path(f"out/000{n}.json").write_text(json.dumps({"prompt": f"a tone of {prompt} Hz"}))
        write_tones(f"music/{n}.wav", real)
    cosines = lambda *hz: np.mean(np.cos(np.array(hz) / 1000))
    argv = capfd, "out", "music", "--audio-embedder", "toy:audio", "--text-embedder", "toy:text"
    err = exits(capfd, evaluate.main, "scores", "out", ".", *argv[3:])
    assert ".: holds samples in a folder below it" in err
    result, _ = evaluated(*argv)  # no captions beside the music: the prompts
    out, music = np.exp(0.45j), np.exp(0.475j)  # means and deviations in the complex plane
    fad = (abs(np.cos(0.05) * out - np.cos(0.055) * music) ** 2
           + 2 * abs(np.sin(0.05) * out - np.sin(0.055) * music) ** 2)
    close(result["fad"], fad, rtol=1e-3)
    for row, columns in {"ground truth audio": (cosines(10, 10), 1),
                         "generated audio": (cosines(10, 40), cosines(20, 30)),
                         "randomly shuffled audio": (cosines(120, 120), cosines(110, 110))}.items():
        close([*result["similarity"][row].values()], columns, rtol=1e-6)
    manifest(toy / "music", *({"audio": f"{n}.wav", "long": tone_captions(hz)}
                              for n, hz in enumerate((400, 600))))
    rows = evaluated(*argv)[0]["similarity"]  # captions beside the music
    close([*rows["generated audio"].values()], [cosines(0, 100), cosines(20, 30)], rtol=1e-6)
    statistics = "--audio-embedder", "noise2music:log_mel_statistics"
    result, err = evaluated(capfd, "out", "out", *statistics)
    assert 0 <= result["fad"] < 1e-9 and (result["n"], result["width"]) == (20, 160)
    assert "fewer than their width" in err
    write_tones("out/new.wav", 400), Path("out/0000.json").write_text('{"prompt": {"3": 1}}')
    result, err = evaluated(capfd, "out", "music", *statistics)
    assert result["fad"] > 0.1 and "1 of 5 files, such as new.wav, have no .json" in err
    assert evaluate.text_of(train.Track(Path("out/0000.wav"), ("a caption",))) == "a caption"


def test_the_excerpt_is_the_middle(toy, capfd):
    """Sec. 4.3.3; of the clip, where there is a "start"; a short file has silence after it."""
    write_tones("music/a.wav", 0, 500, 0), write_tones("music/c.wav", 100, 600, 700, seconds=30)
    write_tones("music/b.wav", 0, 0, 0, 300, 0, 0, 0, seconds=5)
    folder = manifest(toy / "music", {"audio": "a.wav"}, {"audio": "b.wav"},
                      {"audio": "c.wav", "start": 20}, {"audio": "c.wav", "start": 50})
    angles = np.array([0.5, 0.3, 0.6, 0.7])
    np.save("truth.npy", np.stack([np.cos(angles), np.sin(angles)], axis=1))
    for seconds in (4, 10, 15):
        result, _ = evaluated(capfd, "music", "truth.npy", "--audio-embedder", "toy:audio",
                              "--excerpt", seconds)
        similarity = result["similarity"]["generated audio"]["gt-audio"]
        close([similarity, result["fad"]], [1, 0], atol=1e-6)
    audio, short = evaluate.excerpt(train.read_tracks(folder, False)[0], 12)  # 1 s, 10 of tone, 1
    assert not short
    peaks = np.abs(audio.reshape(120, 1_600)).max(axis=1)  # each 0.1 s
    assert max(peaks[:9].max(), peaks[111:].max()) < 0.02 and peaks[11:109].min() > 0.29
    audio, short = evaluate.excerpt(train.read_tracks(folder, False)[2], 40)  # of 20 to 50 s
    assert short and np.abs(audio[29 * 16_000 :][:16_000]).max() > 0.29
    assert np.abs(audio[30 * 16_000 :]).max() == 0
    audio, short = evaluate.excerpt(train.Track(write_tones(toy / "d.wav", 400, seconds=2)), 10)
    assert short
    peaks = np.abs(audio.reshape(100, 1_600)).max(axis=1)
    assert peaks[:19].min() > 0.29 and peaks[21:-1].max() < 0.02  # the resampling is circular


def test_sweep_varies_one_parameter_at_a_time():
    """Figs. 2 and 3: guidance; the schedules of Table 8 at Table 3's steps; 1/4 to 2 of these."""
    kinds = ["front_heavy", "back_heavy", "uniform", "back_heavy_eval"]
    for route, stages in {"waveform": [("waveform_generator", 1000, 3, True),
                                       ("waveform_cascader", 800, 3, True)],
                          "spectrogram": [("spectrogram_generator", 1000, 4, True),
                                          ("spectrogram_vocoder", 100, 3, False)]}.items():
        expected = [(None, {})]
        for name, steps, n, reads_text in stages:
            expected += [(name, {"cfg_scale": w}) for w in (1, 2, 5, 10, 15) if reads_text]
            expected += [(name, {"step_schedule": k, "steps": steps}) for k in kinds[:n]]
            expected += [(name, {"steps": n}) for n in (steps // 4, steps // 2, steps, 2 * steps)]
        models = {name: (n2m.MODELS[name], None) for name in sample.stages_of(route, False)}
        assert evaluate.sweep_points(models) == expected
    few = {"waveform_cascader": (small("waveform_cascader"), None)}  # of 3 steps
    assert [c["steps"] for _, c in evaluate.sweep_points(few)[6:]] == [3, 3, 3, 1, 1, 3, 6]


def test_a_sweep_goes_on_where_it_was_stopped(toy, runs, monkeypatch, capfd):
    """Without its last line, and one clip of that point, it samples this clip again."""
    captions = ["slow piano", "fast drums", "bass"]
    for folder, n in [("music", 3), ("two", 2)]:  # --limit 2 makes the one the other
        manifest(toy / folder, *({"audio": f"{k}.wav", "long": [captions[k]]} for k in range(n)))
        for k in range(n):
            write_tone(toy / folder / f"{k}.wav", 0.5, hz=300 + 100 * k)
    points, run_job, sampled = evaluate.sweep_points, evaluate.run_job, []
    three = lambda weights: [points(weights)[i] for i in (0, 1, -1)]
    recorded = lambda *args: sampled.append(str(args[-1].out)) or run_job(*args)
    monkeypatch.setattr(evaluate, "sweep_points", three)
    monkeypatch.setattr(evaluate, "run_job", recorded)
    embedding = ["--audio-embedder", "toy:loud", "--excerpt", "0.5"]
    argv = ["sweep", "music", "--models", str(runs), *embedding, "--limit", "2", "--seconds", "0.5"]
    sweep = lambda out="s.jsonl": evaluate.main([*argv, "-o", out])
    sweep()
    names = ["base", "waveform_generator-1.0", "waveform_cascader-6"]
    assert sampled == [f"s/{name}/000{n}.wav" for name in names for n in (0, 1)]
    text, lines = Path("s.jsonl").read_bytes(), json_lines("s.jsonl")
    assert [(line["model"], line.get("cfg_scale"), line.get("steps")) for line in lines] == [
        (None, None, None), ("waveform_generator", 1, None), ("waveform_cascader", None, 6)]
    settings = [settings_in(toy / "s" / name) for name in names]
    for line, name, (first, second) in zip(lines, names, settings):
        assert [(s["prompt"], s["seed"]) for s in (first, second)] == [*zip(captions, (0, 1))]
        assert first["rate"] == 16_000  # Sec. 4.3.1: no super-resolution
        assert line["seconds_per_clip"] == second["sampled_in"]  # the first compiles
        close(line["fad"], evaluated(capfd, f"s/{name}", "two", *embedding)[0]["fad"])
    base, guidance, steps = (first["stages"] for first, _ in settings)
    changed = lambda name, change: base | {name: base[name] | change}
    assert guidance == changed("waveform_generator", {"cfg_scale": 1})
    assert steps == changed("waveform_cascader", {"steps": 6})
    assert lines[2]["fad"] != lines[0]["fad"]  # guidance changes nothing in an untrained network
    clip, lines = "s/waveform_cascader-6/0000", "s.jsonl"
    for lost, again in [([], []), ([lines], []), ([lines, f"{clip}.json"], [f"{clip}.wav"])]:
        sampled.clear()
        for path in map(Path, lost):
            path.write_bytes(b"".join(path.read_bytes().splitlines(True)[:-1]))  # the last line
        sweep()
        assert sampled == again and Path("s.jsonl").read_bytes() == text
    shutil.copy(f"{clip}.wav", "s/waveform_cascader-6/0002.wav")  # of a sweep without the limit
    Path(lines).write_bytes(b"".join(text.splitlines(True)[:-1]))
    assert "s/waveform_cascader-6: holds clips of another sweep" in exits(capfd, lambda _: sweep())
    for out in ("music.jsonl", "music/s.jsonl"):  # these would be read as the reference
        assert "would lie in the folder music" in exits(capfd, lambda _, out=out: sweep(out))
    manifest(toy / "music", *({"audio": f"{k}.wav", "long": ["a waltz"]} for k in range(3)))
    assert "s.jsonl: points of other settings" in exits(capfd, lambda _: sweep())


def test_tables_5_and_6_in_the_papers_layout(toy, capfd):
    """Rows of ours and, in brackets, of the paper, where the names are its own; by a function, and
    by arrays in the folders. Table 6 is the last embedder's."""
    write_tones("music/0.wav", 420), write_tones("music/1.wav", 530)
    manifest(toy / "music", *({"audio": f"{n}.wav", "long": tone_captions(410 + 130 * n)}
                              for n in range(2)))
    for folder, tones in [("ours", (400, 500)), ("other", (420, 530))]:
        Path(folder).mkdir()
        for n, hz in enumerate(tones):
            write_tones(f"{folder}/{n}.wav", hz)
    for folder, shift in [("music", 0), ("ours", 2), ("other", 0)]:
        np.save(f"{folder}/VGG.npy", rng().normal(size=(9, 2)) + [shift, 0])
        np.save(f"{folder}/Mine.npy", rng().normal(size=(9, 2)) + [0, shift / 2])

    def printed(*embedders):
        words = [word for name in embedders for word in ("--embedder", name)]
        evaluate.main(["tables", "musiccaps", "ours", "other", "music", *words,
                       "--text-embedder", "toy:text"])
        out, err = capfd.readouterr()
        assert "compare with no published number" in err
        return {(title, row[:44].strip()): row[44:].split() for part in out.split("Table ")[1:]
                for title, row in [(part[0], row) for row in part.splitlines()]}

    table = printed("VGG", "Mine", "MuLan=toy:audio")
    assert [*table[("5", "5, FAD: MusicCaps")]] == ["VGG", "Mine", "MuLan"]
    assert table["5", "Noise2Music Waveform"] == ["(2.134)", "(0.110)"]
    assert table["5", "MusicLM"] == ["(4.000)"]
    assert table["5", "ours"][:2] == ["4.000", "1.000"] and float(table["5", "ours"][2]) > 0
    assert [abs(float(fad)) for fad in table["5", "other"]] == [0, 0, 0]
    cosines = lambda *hz: f"{np.mean(np.cos(np.array(hz) / 1000)):.3f}"
    assert table["6", "Ground Truth Audio"] == [cosines(10, 10), "(0.452)", "1.000", "(1.000)"]
    assert table["6", "Randomly Shuffled Audio"] == [cosines(120, 120), "(0.248)",
                                                     cosines(110, 110), "(0.278)"]
    assert table["6", "ours"] == [cosines(10, 40), cosines(20, 30)]
    assert table["6", "MusicLM"] == ["(0.510)"]
    table = printed("Mine=toy:audio")
    rows = ["5, FAD: MusicCaps", "ours", "other", "6, similarity by Mine: MusicCaps"]
    assert [row for _, row in table] == [*rows, "Ground Truth Audio", "Randomly Shuffled Audio",
                                         "ours", "other"]
    for folder in ("ours", "other"):
        np.save(f"{folder}/Mine.npy", rng().normal(size=(8, 2)))  # no pairs with 9
    assert [row for _, row in printed("Yours=toy:audio", "Mine")] == rows  # none of Yours


def test_figures_2_and_3_of_a_sweep(toy, monkeypatch):
    """FAD against similarity along guidance and schedules; both against time, along the steps."""
    figure = pytest.importorskip("matplotlib.figure", reason="matplotlib draws (extra plot)").Figure
    points = [("generator", {"cfg_scale": w}) for w in (1, 2, 5)]
    points += [("generator", {"step_schedule": k, "steps": 8}) for k in ("uniform", "back_heavy")]
    points += [("vocoder", {"steps": n}) for n in (2, 4)]
    lines = [{"model": model, **changes, "fad": n, "seconds_per_clip": 10 * n,
              "similarity": {"generated audio": {"gt-text": -n, "gt-audio": 0}}}
             for n, (model, changes) in enumerate([(None, {}), *points])]
    Path("s.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    drawn, savefig = [], figure.savefig
    save = lambda f, *a, **k: drawn.append(f) or savefig(f, *a, **k)
    monkeypatch.setattr(figure, "savefig", save)
    evaluate.main(["plot", "s.jsonl"])
    assert all(Path(f"s-figure-{n}.png").stat().st_size > 5_000 for n in (2, 3))
    curves = [[(line.get_label(), line.get_xydata().tolist()) for line in ax.get_lines()]
              for figure in drawn for ax in figure.axes]
    assert curves == [
        [("generator: CFG scale", [[1, -1], [2, -2], [3, -3]]),
         ("generator: step schedule", [[4, -4], [5, -5]])],
        [("vocoder: steps", [[60, 6], [70, 7]])], [("vocoder: steps", [[60, -6], [70, -7]])]]
    marks = [[text.get_text() for text in ax.texts] for figure in drawn for ax in figure.axes]
    assert marks == [["1", "2", "5", "uniform", "back"], ["2", "4"], ["2", "4"]]


# ---- listen.py, Table 7 ----


def test_a_page_to_listen_to_holds_all_of_it(toy, capfd):
    """The excerpts of each source and the prompts, and no address of anything else."""
    Path("out").mkdir()
    for n, hz in enumerate((400, 500)):
        write_tones(f"out/000{n}.wav", hz, rate=16_000), write_tones(f"music/{n}.wav", hz + 100)
        Path(f"out/000{n}.json").write_text(json.dumps({"prompt": f"<!-- <script> {hz}"}))
    listen.main(["music", "out", "--excerpt", "2"])
    assert "listen.html: 2 prompts, 2 pairs" in capfd.readouterr().out
    html = Path("listen.html").read_text()
    assert html.count("</script>") == 1 and not re.search(r"https?:|src=|href=|@import|url\(", html)
    data = re.search(r"^const .* = ({.*})  //", html, re.M)[1]
    assert "<" not in data  # a browser would look for the end of another script
    page = json.loads(data)
    assert page["sources"] == ["music", "out"]
    assert page["prompts"] == ["<!-- <script> 400", "<!-- <script> 500"]
    kind, flac = page["clips"][1][0].split(",")
    audio, rate = soundfile.read(io.BytesIO(base64.b64decode(flac)))
    assert kind == "data:audio/flac;base64" and rate == 16_000
    close(audio, evaluate.excerpt(train.Track(Path("out/0000.wav")), 2)[0], atol=1e-4)


def test_wins_are_counted_as_table_7_counts_them(toy, capfd):
    """Of both files. Nobody wins where neither is better."""
    for name, rows in {"ann": [("x", "y", -2), ("y", "z", 0)], "bob": [("y", "x", 1)]}.items():
        answers = [{"prompt": "p", "a": a, "b": b, "score": score} for a, b, score in rows]
        Path(f"{name}.json").write_text(json.dumps({"answers": answers}))
    evaluate.main(["listen", "ann.json", "bob.json"])
    *rows, paper = capfd.readouterr().out.splitlines()
    assert [row.split() for row in rows] == [
        [name, str(n), "wins", "in", str(of), "comparisons"]
        for name, n, of in [("x", 2, 2), ("y", 0, 3), ("z", 0, 1)]]
    assert "MusicCaps 959" in paper and sum(listen.TABLE_7.values()) == 2931


PESTO = """
import numpy as np, pesto, torch

def audio(x):
    activations = pesto.predict(torch.tensor(x), 16_000, step_size=500.0)[3].numpy()
    return activations.reshape(len(x), -1, 128, 3).sum(axis=-1)  # (B, frames, semitones)

def text(texts):  # the n-th overtone n times weaker: nothing like a sine, but of the same pitch
    t, waves = np.arange(32_000) / 16_000, []
    for hz in [float(text.split()[-2]) for text in texts]:
        overtones = range(1, int(8_000 / hz))
        waves.append(sum(0.3 / n * np.sin(2 * np.pi * n * hz * t) for n in overtones))
    return audio(np.float32(waves)).mean(axis=1)
"""


@reference
def test_an_embedder_that_knows_pitch_labels_and_evaluates_by_pitch(toy, monkeypatch, capfd):
    """PESTO (Riou et al., 2023), whose weights lie in its package. Sines get the captions that it
    embeds as saw-tooth waves; and by its FAD saw-tooth waves of these pitches are nearer to the
    sines than sines of other pitches, unlike by log-mel."""
    # PESTO only reads files with torchaudio, which would have to fit torch.
    monkeypatch.setitem(sys.modules, "torchaudio", types.ModuleType("torchaudio"))
    pytest.importorskip("pesto", reason="pesto-pitch is an embedder that nobody here wrote")
    Path("pitch.py").write_text(PESTO)
    tones, others, t = [220, 262, 330, 392], [247, 294, 370, 440], np.arange(16_000) / 8_000
    for folder, overtones in [("music", 1), ("saw", 8), ("other", 1)]:
        Path(folder).mkdir(exist_ok=True)
        for hz in others if folder == "other" else tones:
            waves = (0.3 / n * np.sin(2 * np.pi * n * hz * t) for n in range(1, overtones + 1))
            soundfile.write(f"{folder}/{hz}.wav", sum(waves), 8_000)
    vocabulary("words.txt", *others, *tones)
    run_label("--vocabulary", "long", "words.txt", 1, 1, "--out", "labels.jsonl",
              audio="pitch:audio", text=("--text-embedder", "pitch:text"))
    assert longs("labels.jsonl") == [[caption] for caption in tone_captions(*tones)]
    fad = lambda folder, embedder: evaluated(capfd, folder, "music", "--excerpt", 2,
                                             "--audio-embedder", embedder)[0]["fad"]
    assert 3 * fad("saw", "pitch:audio") < fad("other", "pitch:audio")
    assert fad("saw", mel := "noise2music:log_mel_statistics") > fad("other", mel)
    sys.modules.pop("pitch")


# ---- Every table and figure of the paper ----


def test_every_table_and_figure_of_the_paper_is_here():
    """Tables 5 to 7 with the rows that are printed (2, 3, 4, 8 and 9 are typed a second time in
    test_noise2music.py); of Table 1, whose texts are not public, what makes such. Figures as what
    they depict, or what draws them."""
    rows = [sum(map(len, table.values())) for table in (evaluate.TABLE_5, evaluate.TABLE_6)]
    assert [*rows, len(listen.TABLE_7)] == [9, 15, 5]
    citing = {"Table 1": corpora.raters, "Table 7": listen.wins, "Fig 1": n2m.unet,
              "Fig 2": evaluate.plot, "Fig 3": evaluate.plot, "Fig 5": n2m.block}
    for name, function in citing.items():
        assert name in test_noise2music.cited(function.__doc__), name
    assert (root / "demo/pictures/steps.png").is_file()  # Fig. 4, by demo/pictures.py


# ---- What they refuse, in one line ----

ARRAYS = {  # each in a .npy, beside a vocabulary of three captions of the same name
    "ok": np.ones((3, 2)), "two": np.ones((2, 2)), "five": np.ones((3, 5)),
    "nan": np.array([[1, 1], [np.nan, 1], [1, 1]]), "int": np.ones((3, 2), int), "flat": np.ones(3),
    "empty": np.ones((0, 2)), "frames": np.ones((2, 3, 2)), "none": np.full((2, 2), np.nan),
    "x": rng().normal(size=(8, 4)), "wide": rng().normal(size=(8, 3)), "one": np.ones((1, 4))}
REFUSALS = [(script, f"{start} {argv}", words) for script, start, rows in [
    ("label", "music --audio-embedder toy:audio --text-embedder toy:text --vocabulary", {
        "long two.txt 1 1": "two.npy: embeddings (2, 2) for the 3 of two.txt",
        "long five.txt 1 1": "five.txt: embeddings 5 wide, of the clips 2",
        "long nan.txt 1 1": "nan.txt: embeddings that are not numbers, of lines [2]",
        "long int.txt 1 1": "int.npy: holds int64 (3, 2)",
        "long flat.txt 1 1": "flat.npy: holds float64 (3,)",
        "long empty.txt 1 1": "empty.npy: holds float64 (0, 2)",
        "long text.txt 1 1": "text.npy: ", "long zero.txt 1 1": "zero.npy: ",
        "long gap.txt": "gap.txt:2: an empty line", "long absent.txt": "absent.txt",
        "long twice.txt 1 1": "twice.txt: 1 lines repeat another",
        "long words.txt 3 2": "3 captions for K' = 3 of K = 2",
        "long words.txt 1 4": "3 captions for K' = 1 of K = 4",
        "long words.txt x 3": "x and 3 should be K' and K",
        "medium words.txt": "long or short, not 'medium'", "long": "--vocabulary takes KIND FILE",
        "long ok.txt 1 1 --seed -1": "--seed"}),
    ("label", "music --vocabulary long ok.txt 1 1 --audio-embedder", {
        "both.npz": "both.npz: holds 2 arrays, not one", "text.npz": "text.npz: ",
        "member.npz": "member.npz: ", "ok.npy": "ok.npy: embeddings (3, 2) for the 2 of clips",
        "frames.npy": "frames.npy: embeddings (2, 3, 2) for the 2 of clips",
        "none.npy": "none.npy: none of 2 embeddings is of numbers",
        "absent.npy": "absent.npy: No such file", "absent:audio": "No module named 'absent'",
        "./toy.py:audio": "./toy.py:audio: ", "toy:absent": "no attribute 'absent'",
        "toy:calls": "toy:calls: not a function",
        "toy:numbers": "toy:numbers: made (16,) of audio (16, 160000)"}),
    ("label", "music --audio-embedder toy:audio --vocabulary long words.txt 1 1", {
        "": "put them in words.npy, a row for each line",
        "--text-embedder toy:two": "toy:two: made (2, 2) of 1 texts",
        "--text-embedder ok.npy": "--text-embedder is a function"}),
    ("label", "music", {"": "give a --vocabulary, or --high-quality",
                        "--vocabulary long ok.txt": "--vocabulary needs an --audio-embedder",
                        "--high-quality --audio-embedder toy:audio": "compare clips with a --voc"}),
    ("label", "vocabulary", {
        "": "vocabulary --help", "raters a b": "raters takes a file",
        "songs csv.csv": "SONGS.csv TEMPL",
        "raters csv.csv": "csv.csv: lacks aspect_list, caption; give the file as its makers pub",
        **{f"raters {name}.csv": f"{name}.csv: row 1: aspect_list is not a list of tags"
           for name in ("aspects", "quoted")},
        "raters cut.csv": "cut.csv: row 1 is cut off; give the file as its makers publish it",
        "raters ends.csv": "ends.csv: new-line character seen in unquoted field",
        "songs csv.csv words.txt": "words.txt: says nowhere {title}",
        "songs csv.csv both.npz": "both.npz:1: is not UTF-8",
        "raters zero.npy": "no rows in it",
        "answers words.txt": "words.txt:1: not a JSON object with title, artist, answer",
        "answers half.jsonl": "half.jsonl:1: not a JSON object",
        "answers told/captions.jsonl": "captions.jsonl:1: not a JSON object"}),
    ("label", "audioset music", {
        "csv.csv": "class_labels_indices.csv",
        "bad/csv.csv": "csv.csv:1: not a YouTube id, a start",
        "bad/ends.csv": "ends.csv: new-line character seen in unquoted field"}),
    ("evaluate", "prompts", {"": "prompts --help",
                             "mtat csv.csv": "csv.csv: lacks clip_id, mp3_path;",
                             "musiccaps times.csv": "times.csv: row 1: could not convert string",
                             "mtat mtat.csv --clips music": "music: holds none of the 1 clips",
                             "audioset bad/csv.csv --clips absent": "absent: no such folder"}),
    ("evaluate", "", {"": "command", "score": "'score'"}),
    ("evaluate", "tables musiccaps", {
        "told told/ music --embedder VGG": "give each folder once",
        "told music --embedder VGG": "VGG.npy: No such file", "told music": "--embedder",
        "told music --embedder VGG=toy:absent": "no attribute 'absent'"}),
    ("evaluate", "plot", {"words.txt": "words.txt:1: not a JSON object",
                          "mtat.jsonl": "no points of a sw", "zero.npy": "no points of a sw"}),
    ("listen", "", {
        "music": "give two folders or more", "told music told": "each once",
        "told bad": "hold [2, 1] clips", "csv.json": "csv.json: not what the page saves",
        "mtat.json": "mtat.json: not what the page saves",
        "absent told": "absent: no such folder"}),
    ("evaluate", "scores", {
        "wide.npy x.npy": "the generated embeddings are 3 wide, the reference's 4",
        "nan.npy x.npy": "not all of them numbers",
        "x.npy one.npy": "the 1 reference embeddings are too few",
        "absent x.npy --audio-embedder toy:audio": "absent: no such folder",
        "flat.npy x.npy": "flat.npy: holds float64 (3,)", "x.npy absent.npy": "No such file",
        "music x.npy": "music: a folder of audio needs an --audio-embedder",
        "music x.npy --audio-embedder x.npy": "x.npy: is an array; give it in the place of the",
        "music x.npy --audio-embedder toy:numbers": "toy:numbers: made (16,) of audio",
        "bad x.npy --audio-embedder toy:audio": "text.wav: ",
        "x.npy x.npy --text-embedder toy:text": "no captions beside the reference",
        "x.npy x.npy --text-embedder wide.npy": "wide.npy: text embeddings (8, 3); wanted (8, 4)",
        "none.npy none.npy": "not all of them numbers", "x.npy": "REFERENCE",
        "ok.npy ok.npy --text-embedder nan.npy": "nan.npy: text embeddings that are not numbers",
        "x.npy x.npy --excerpt 0": "--excerpt", "x.npy x.npy --excerpt nan": "--excerpt",
        "x.npy x.npy --seed -1": "--seed"}),
    ("evaluate", "sweep music --models runs --excerpt 1", {
        "": "needs an --audio-embedder",
        "--audio-embedder toy:audio": "not every clip has a caption; give the prompts",
        "-o s.json": "-o takes the name of a .jsonl", "--limit 1": "--limit",
        **{f"--seconds {s}": "--seconds" for s in (-1, 0, "nan")},
        "--audio-embedder toy:audio --prompts absent": "absent"}),
    ("evaluate", "sweep x.npy --prompts gap.txt", {"": "sweep needs an --audio-embedder"}),
    ("evaluate", "sweep told --models music --audio-embedder toy:audio --excerpt 1", {
        "": "no trained waveform_generator", "--prompts lone.txt": "give two prompts or more",
        "--prompts ok.txt": "ok.txt: 3 prompts of the 2 clips of told; give one of each",
        "--text-embedder wide.npy": "wide.npy: text embeddings (8, 3); wanted (2, "}),
    ("evaluate", "sweep told --models runs --audio-embedder toy:audio --excerpt 1", {
        "-o list.jsonl": "list.jsonl: points of other settings"}),
    ("plan", "", {"v5:2x2x1": "is not KIND:AxBxC", "v4:2x2x1 --num 0": "--num",
                  "v4:2x2x1 --only x": "--only"}),
    ("export", "absent", {"x": "no checkpoints"}),
] for argv, words in rows.items()]


@pytest.mark.parametrize("script, argv, words", REFUSALS)
def test_tools_refuse_in_one_line(toy, runs, capfd, script, argv, words):
    for folder in ("music", "told"):
        for name in "ab":
            (toy / folder).mkdir(exist_ok=True), write_tones(f"{folder}/{name}.wav", 400, seconds=1)
    manifest(toy / "told", *({"audio": f"{name}.wav", "long": ["slow"]} for name in "ab"))
    Path("bad").mkdir(), Path("bad/text.wav").write_text("not audio"), Path("runs").symlink_to(runs)
    for name, array in ARRAYS.items():
        vocabulary(f"{name}.txt", 1, 2, 3), np.save(f"{name}.npy", array)
    for name, content in [("text", b"a tone of 1 Hz\n"), ("zero", b"")]:
        vocabulary(f"{name}.txt", 1, 2, 3), Path(f"{name}.npy").write_bytes(content)
    vocabulary("words.txt", 1, 2, 3), Path("gap.txt").write_text("a\n\nc\n")
    Path("half.jsonl").write_text(r'{"title": "a", "artist": "b", "answer": "c \ud83d"}')
    Path("list.jsonl").write_text("[1]\n"), Path("lone.txt").write_text("a\n")
    Path("twice.txt").write_text("a\nb\na\n")
    np.savez("both.npz", np.ones(2), np.ones(2)), Path("text.npz").write_text("text")
    zipfile.ZipFile("member.npz", "w").writestr("readme.txt", "text")
    for name, content in {"csv": "title,artist\n", "bad/csv": "",
                          "aspects": "caption,aspect_list\n",
                          "quoted": "caption,aspect_list\nx,\"'slow'\"\n",
                          "cut": "id,caption,aspect_list\n",
                          "ends": "caption,aspect_list\na\rb,c\n", "bad/ends": "a\rb,c\n",
                          "times": "ytid,start_s,end_s,caption\na,b,c,d\n",
                          "bad/class_labels_indices": "mid,display_name\n",
                          "mtat": "clip_id\ttag\tmp3_path\n2\t1\ta.mp3\n"}.items():
        rest = "" if name in ("mtat", "times") else "x,y\n"
        Path(f"{name}.csv").write_bytes((content + rest).encode())
    Path("csv.json").write_text("{}"), Path("mtat.jsonl").write_text('{"fad": 1, "similarity": 0}')
    Path("mtat.json").write_text('{"answers": [{"a": null, "b": "x", "score": 1}]}')
    main = {"label": label, "evaluate": evaluate, "listen": listen, "plan": plan,
            "export": export}[script].main
    err = exits(capfd, main, *shlex.split(argv))
    said = [line for line in err.splitlines() if "embedded: " not in line]  # beside the progress
    assert words in err and len(said) == 1
    assert not list(toy.rglob("captions.jsonl*.part")) and not list(toy.glob("s*"))
    assert not Path("music/captions.jsonl").exists()


# ---- demo/walkthrough.ipynb ----


@reference
def test_the_walkthrough_runs_from_top_to_bottom_and_is_saved_as_it_ran():
    """With 3 steps of training, 2 of sampling; its own assertions hold its numbers against ours."""
    for name in ("nbformat", "ipykernel", "matplotlib", "nbclient"):
        pytest.importorskip(name, reason="the walkthrough is run by nbclient (the extra demo)")
    import nbclient
    import nbformat
    path = root / "demo" / "walkthrough.ipynb"
    notebook = nbformat.read(path, 4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    correlation = lambda: float(re.search(r"correlation with the bar (\S+)", "".join(
        o.text for o in code[-1].outputs if o.output_type == "stream"))[1])
    assert [cell.execution_count for cell in code] == [*range(1, len(code) + 1)]
    assert path.stat().st_size < 2e6 and correlation() > 0.9
    code[0].source, changes = re.subn(r"(SECONDS, STEPS = .*,) \d+\n", r"\1 3\n", code[0].source)
    assert changes == 1
    code[0].source += """
weights = {name: (replace(m, inference=replace(m.inference, steps=2)), p)
           for name, (m, p) in weights.items()}
model, params = weights["waveform_generator"]"""
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3",
                            resources={"metadata": {"path": str(path.parent)}}).execute()
    assert abs(correlation()) < 0.5  # 3 steps memorise nothing
