"""Attacks that take minutes: what the tests show once, a thousand times. Needs the extra "test".

    python tools/campaign.py kills       # kill -9 of train, label, --prompts, sweep; then resumed
    python tools/campaign.py flips       # bits and ends of a checkpoint and of a T5 folder
    python tools/campaign.py fuzz 300    # seconds for each reader
    python tools/campaign.py long 20000  # steps of training; and 60 prompts of 60 lengths

Each row prints its counts as JSON. What must be 0 makes the exit status 1 where it is not.
"""

import contextlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # which the processes begun here inherit
    programs = tempfile.TemporaryDirectory()
    os.environ |= {"JAX_COMPILATION_CACHE_DIR": programs.name}
os.environ |= {"JAX_PLATFORMS": "cpu"} | os.environ

import numpy as np

import noise2music as n2m
import t5_encoder
import test_noise2music as test
import train
from train import checkpoints, new_parser, number, run_command

KILLS = {"train": 50, "label": 20, "sample": 20, "evaluate": 20}
NAME = "superresolution_cascader"
WORDS = "slow fast loud soft piano drums bass flute".split()


# ---- Scripts as processes of their own, on small models ----

def audio(x):
    """An embedder of tones, by their pitch."""
    hz = np.abs(np.fft.rfft(x)).argmax(axis=1) * n2m.MEL_RATE / x.shape[1]
    return np.stack([np.cos(hz / 1000), np.sin(hz / 1000)], axis=1)


def text(texts):
    return audio(np.stack([np.sin(np.arange(1600) * len(text) / 9) for text in texts]))


def child(script: str, *argv: str):
    """Runs a script; if KILL_AT=n is set, until the n-th call of what makes a file whole."""
    left = [int(os.environ.get("KILL_AT", 0))]

    def deadly(function):
        def call(*args):
            left[0] -= 1
            left[0] or os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)
        return call

    if left[0]:
        os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    n2m.tiny = lambda model: test.small(model.name)
    __import__(script).main(list(argv))


def start(script: str, argv, **environment):
    return subprocess.Popen([sys.executable, __file__, "child", script, *map(str, argv)],
                            env=os.environ | environment, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)


def make_data(folder: Path, n: int):
    folder.mkdir()
    for k in range(n):
        test.write_tone(folder / f"{k}.wav", 2.0, hz=200 + 9 * k)
    test.manifest(folder, *({"audio": f"{k}.wav", "long": WORDS[k % 8]} for k in range(n)))


def make_runs(folder: Path):
    t5_encoder.save_t5(folder / "t5", t5_encoder.random_t5(WORDS, 0))
    for name in n2m.MODELS:
        test.leave_run(folder, test.small(name))


# ---- kills ----

def result_of(folder: Path) -> dict:
    """All that a script has written, but for times, locks and what a restart goes on from."""
    timed = rb'"(sampled_in|seconds_per_clip|clips_per_second)": [0-9.e+-]+|, "settings".*'
    return {str(path.relative_to(folder)): re.sub(timed, b"", path.read_bytes())
            if path.suffix in (".json", ".jsonl") else path.read_bytes()
            for path in sorted(folder.rglob("*")) if path.is_file()
            and "lock" not in path.name and ".work" not in path.parent.name}


def kills(args):
    """Half of the kills at any time, half in the writing of a file. Some runs end between two."""
    rng, total = np.random.default_rng(args.seed), {}
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        make_data(tmp / "data", 40), make_runs(tmp / "runs")
        (tmp / "words.txt").write_text("\n".join(WORDS))
        (tmp / "prompts.txt").write_text("\n".join(WORDS))
        models = "--models", tmp / "runs", "--seconds", 0.3
        commands = {
            "train": (NAME, "--tiny", "--data", tmp / "data", "--batch-size", 2, "--steps", 400,
                      "--seconds", 0.1, "--log-every", 1, "--save-every", 20, "--out", tmp / "out"),
            "label": (tmp / "data", "--vocabulary", "long", tmp / "words.txt", 1, 2, "--out",
                      tmp / "out" / "captions.jsonl", "--audio-embedder", "campaign:audio",
                      "--text-embedder", "campaign:text"),
            "sample": ("--prompts", tmp / "prompts.txt", "--no-superres", "-o", tmp / "out",
                       *models),
            "evaluate": ("sweep", tmp / "data", "--audio-embedder", "campaign:audio", "--limit", 2,
                         "--excerpt", 0.3, "-o", tmp / "out" / "s.jsonl", *models)}
        for script, argv in commands.items():
            if args.only not in (None, script):
                continue
            counts = dict(kills=0, in_writing=0, runs=0, unequal=0, parts_left=0, tracebacks=0)
            whole, begun, took, out = None, False, 0, tmp / "out"
            limit = KILLS[script] * args.share
            while counts["kills"] < limit or begun:
                if not begun:
                    shutil.rmtree(out, ignore_errors=True), out.mkdir()
                resume = ["--resume"] if checkpoints(out / NAME) else []
                end = not whole or rng.random() < 0.3 or counts["kills"] >= limit
                writing = not end and rng.random() < 0.5
                begun, then = True, time.monotonic()
                process = start(script, [*argv, *resume],
                                **{"KILL_AT": str(rng.integers(1, 6 if script == "label" else 40))}
                                if writing else {})
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(None if end or writing else rng.uniform(1, took))
                process.kill()
                error, code = process.communicate()[1], process.returncode
                counts["kills"] += code == -signal.SIGKILL
                counts["in_writing"] += bool(writing) and code == -signal.SIGKILL
                # All may have been written before a kill: the next start then refuses.
                done = code == 0 or re.search("there already|at its last step already", error)
                counts["tracebacks"] += "Traceback" in error or not (
                    done or code == -signal.SIGKILL)
                if done:
                    took = max(took, time.monotonic() - then)
                    found, begun = result_of(out), False
                    counts["runs"] += 1
                    counts["parts_left"] += sum(".part" in name for name in found)
                    counts["unequal"] += found != (whole := whole or found)
            total[script] = counts
            print(json.dumps({script: counts}), flush=True)
    return sum(c[k] for c in total.values() for k in ("unequal", "parts_left", "tracebacks"))


# ---- flips ----

def flips(args):
    """Of a checkpoint any change is an error. Of a T5 folder it is one, or another fingerprint, or
    changes no token and no embedding."""
    rng, silent = np.random.default_rng(args.seed), 0
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        make_runs(tmp)
        encoder = t5_encoder.load_text_encoder(tmp / "t5")
        right = encoder.encode(WORDS, 8)[0]

        def checkpoint_differs(path):
            train.load_checkpoint(path, NAME)
            return True

        def t5_differs(path):
            found = t5_encoder.load_text_encoder(path.parent)
            t5_encoder.check(found.fingerprint == encoder.fingerprint, "not the text encoder")
            return not np.array_equal(found.encode(WORDS, 8)[0], right)

        cases = [(checkpoints(tmp / NAME)[0], checkpoint_differs)]
        cases += [(path, t5_differs) for path in sorted((tmp / "t5").iterdir())]
        for path, differs in cases:
            data, counts = path.read_bytes(), dict(refused=0, harmless=0, silent=0)
            changed = [(bit // 8, bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1:])
                       for bit in rng.integers(0, 8 * len(data), 1000)]
            changed += [(len(data) * k // 100, b"") for k in range(100)]
            for at, rest in changed:
                path.write_bytes(data[:at] + rest)
                try:
                    counts["silent" if differs(path) else "harmless"] += 1
                except ValueError:
                    counts["refused"] += 1
            path.write_bytes(data)
            silent += counts["silent"]
            print(json.dumps({path.name: counts}), flush=True)
    return silent


# ---- fuzz ----

def readers(tmp: Path):
    """{name: (reader of a path, what a file of it may hold)}"""
    import label
    import sample
    make_runs(tmp / "runs")
    wav = {}
    for kind in ("wav", "flac", "ogg", "mp3"):
        test.write_tone(tmp / f"a.{kind}", 1.0)
        wav[kind] = (tmp / f"a.{kind}").read_bytes()
    captions = b'{"audio": "a.wav", "long": ["x"], "short": "y", "start": 0.5}\n' * 3
    prompts = b'slow\n{"prompt": "x", "seed": 1, "seconds": 2.5}\n' + captions
    np.save(array := io.BytesIO(), np.ones((3, 4), np.float32))
    np.savez(arrays := io.BytesIO(), np.ones((3, 4), np.float32))
    np.save(objects := io.BytesIO(), np.array([{}, []], object), allow_pickle=True)
    t5, log = tmp / "runs" / "t5", b'{"step": 1, "loss": 0.5}\n{"step": 2}\n'

    def of_folder(path):
        shutil.copytree(t5, tmp / "t5", dirs_exist_ok=True)
        shutil.copy(path, tmp / "t5" / path.name)
        t5_encoder.load_t5(tmp / "t5")
        shutil.copy(t5 / path.name, tmp / "t5" / path.name)

    def tracks(path):
        train.find_clips(train.read_tracks(path.parent, True, path.name))

    clip = lambda path: (train.track_clips(train.Track(path)),
                         train.load_audio(path, 0.2, 0.5, n2m.MEL_RATE))
    parts = {f"x.{kind}": (clip, data) for kind, data in wav.items()}
    return parts | {
        "lines.txt": (t5_encoder.read_lines, "é\r\nb\n".encode()),
        "captions.jsonl": (tracks, captions), "prompts.txt": (sample.read_prompts, prompts),
        "log.jsonl": (lambda path: train.read_log(path, lambda e: e["step"] < 2), log),
        "x.npy": (label.load_embeddings, array.getvalue()),
        "o.npy": (label.load_embeddings, objects.getvalue()),
        "x.npz": (label.load_embeddings, arrays.getvalue()),
        "c.safetensors": (lambda path: train.load_checkpoint(path, NAME),
                          checkpoints(tmp / "runs" / NAME)[0].read_bytes()[:20_000]),
        **{path.name: (of_folder, path.read_bytes()) for path in sorted(t5.iterdir())}}


def mutated(rng, data: bytes) -> bytes:
    """A few changes: bits, runs of other bytes, pieces moved, doubled or cut, odd numbers."""
    odd = [b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"[" * 5000, b"1e999", b"9" * 5000, b'"', b"{",
           b"\n", b"\xe2\x80\xa8", b"\\ud800", b"NaN", b"-1", b"null", b"\xff\xff\xff\x7f"]
    for _ in range(rng.integers(1, 5)):
        at, other, n = rng.integers(len(data) + 1), rng.integers(len(data) + 1), rng.integers(1, 40)
        at = at if rng.random() < 0.5 else at % 100  # headers, as often as not
        piece = [data[other : other + n], rng.bytes(n), odd[rng.integers(len(odd))], b""]
        data = data[:at] + piece[rng.integers(4)] + data[at + n * rng.integers(2) :]
    return data


def fuzz(args):
    rng, wrong = np.random.default_rng(args.seed), 0
    unpickled = []
    pickle.load = pickle.loads = lambda *_, **__: unpickled.append(1)
    with tempfile.TemporaryDirectory() as tmp, contextlib.redirect_stderr(io.StringIO()):
        train.WAITS, tmp = (), Path(tmp)
        for name, (read, data) in readers(tmp).items():
            counts, end = dict(read=0, refused=0, wrong=0), time.monotonic() + args.n
            while time.monotonic() < end:
                (path := tmp / name).write_bytes(mutated(rng, data))
                sys.stderr.seek(0), sys.stderr.truncate()
                try:
                    read(path)
                    counts["read"] += 1
                except (ValueError, OSError) as error:
                    counts["refused"] += 1
                    counts["wrong"] += len(str(error)) > 1000
                except Exception as error:
                    counts["wrong"] += 1
                    print(f"{name}: {type(error).__name__} {error}"[:200], flush=True)
                    shutil.copy(path, f"wrong-{name}")
            wrong += counts["wrong"] + len(unpickled)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
            print(json.dumps({name: counts | {"unpickled": len(unpickled), "peak_MB": peak}}),
                  flush=True)
    return wrong


# ---- long ----

def resident(process) -> int:
    found = re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
    return int(found[1]) // 1024 if found else 0


def long(args):
    steps, at = int(args.n), {}
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        make_data(tmp / "data", 5), make_runs(tmp / "runs")
        lengths = [json.dumps({"prompt": WORDS[k % 8], "seconds": 0.3 + k / 20}) for k in range(60)]
        (tmp / "prompts.txt").write_text("\n".join(lengths))
        argv = [NAME, "--tiny", "--data", tmp / "data", "--batch-size", 2, "--seconds", 0.1,
                "--log-every", 1, "--out", tmp / "long", "--save-every", 1000]
        for goal in (steps // 2, steps):
            process = start("train", [*argv, "--steps", goal, *["--resume"] * (goal == steps)])
            log = tmp / "long" / NAME / "log.jsonl"
            while process.poll() is None:
                lines = log.read_bytes().count(b"\n") if log.exists() else 0
                at[lines * 10 // steps] = resident(process)  # the last of each tenth
                time.sleep(0.5)
            assert process.returncode == 0, process.stderr.read()
        entries = test.log_of(tmp / "long" / NAME)
        whole = [entry["step"] for entry in entries] == [*range(1, steps + 1)]
        mean = lambda a, b: round(float(np.mean([e["loss"] for e in entries[a:b]])), 4)
        half, n = steps // 2, steps // 20
        print(json.dumps({"steps": steps, "log_whole": whole, "resident_MB_by_tenth": at,
                          "loss_before_and_after_the_resume": [mean(half - n, half),
                                                               mean(half, half + n)]}), flush=True)
        process, at = start("sample", ["--prompts", tmp / "prompts.txt", "-o", tmp / "out",
                                       "--models", tmp / "runs", "--no-superres"]), {}
        while process.poll() is None:
            at[len(list((tmp / "out").glob("*.wav"))) // 10 * 10] = resident(process)
            time.sleep(0.2)
        assert process.returncode == 0, process.stderr.read()
        print(json.dumps({"prompts": 60, "resident_MB_after": at}))
    return not whole


def parse_args(argv=None):
    parser = new_parser("campaign.py", __doc__)
    add = parser.add_argument
    add("row", choices=("kills", "flips", "fuzz", "long"))
    add("n", nargs="?", type=number(float, 0), help="seconds a reader, or steps")
    add("--only", choices=tuple(KILLS), help="kills of this script alone")
    add("--share", type=number(float, 0, 1), default=1, help="of the kills (1)")
    add("--seed", type=number(int, 0), default=0)
    args = parser.parse_args(argv)
    args.n = args.n or {"fuzz": 300, "long": 20_000}.get(args.row)
    return args


def run(args):
    if globals()[args.row](args):
        raise SystemExit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["child"]:
        child(*sys.argv[2:])
    else:
        run_command(run, parse_args())
