"""What sample.py needs of finished runs, small enough to give away.

    python demo/export.py runs demo

The averaged parameters in bfloat16, in place of what DIR has of these models, and the T5.
"""

import shutil
import sys
from pathlib import Path

import jax.numpy as jnp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import noise2music as n2m
from sample import t5_of
from t5_encoder import check, read_safetensors
from train import checkpoints, load_checkpoint, new_parser, run_command, write_checkpoint


def export(args):
    last = {name: found[-1] for name in n2m.MODELS
            if (found := checkpoints(args.runs / name) or checkpoints(args.out / name))}
    loaded = {name: load_checkpoint(path, name, lambda tensor: tensor.startswith("ema/"))
              for name, path in last.items()}
    encoders = {metadata["t5_fingerprint"] for _, _, metadata in loaded.values()} - {None}
    check(len(encoders) < 2, f"{args.out}: would hold models of more than one T5; name another DIR")
    loaded = {name: of for name, of in loaded.items() if checkpoints(args.runs / name)}
    older = {name: checkpoints(args.out / name) for name in loaded}
    for each in sum(older.values(), []):  # before anything is written
        check("step" not in read_safetensors(each)[0],
              f"{each}: a checkpoint that training goes on from; name another DIR")
    reads_text = {n: metadata for n, (*_, metadata) in loaded.items() if metadata["t5_fingerprint"]}
    if reads_text:  # all of one T5
        (t5, _), copy = t5_of(reads_text, args.runs, args.t5), args.out / "t5"
        if t5.resolve() != copy.resolve():
            copy.unlink() if copy.is_symlink() else shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(t5, copy)
    for name, (model, tensors, metadata) in loaded.items():
        path = args.out / name / last[name].name
        tensors = {k: v.astype(jnp.bfloat16) for k, v in tensors.items()}
        write_checkpoint(path, tensors, model, metadata | {"t5": None})
        for each in {*older[name]} - {path}:  # one a model: sample.py would take the last
            each.unlink()
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def parse_args(argv=None):
    parser = new_parser("export.py", __doc__)
    parser.add_argument("runs", type=Path, metavar="RUNS", help="--out of the runs")
    parser.add_argument("out", type=Path, metavar="DIR", help="for sample.py --models")
    parser.add_argument("--t5", metavar="DIR", help="where the T5 is, if not where they say")
    args = parser.parse_args(argv)
    if not any(checkpoints(args.runs / name) for name in n2m.MODELS):
        parser.error(f"{args.runs}: no checkpoints in it")
    return args


def main(argv=None):
    run_command(export, parse_args(argv))


if __name__ == "__main__":
    main()
