"""What a TPU that is not here would need, by its own compiler (Secs. 4.1 and 4.2.2).

    pip install "jax[tpu]"                                # brings the compiler
    python tools/plan.py v4:2x2x1                         # Table 4: one denoising step of each model, four clips of 30 s
    python tools/plan.py v4:4x4x4 --train waveform_generator --batch-size 2048
"""

import functools
import math
import os
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import noise2music as n2m
from sample import for_tpu
from t5_encoder import check
from train import default_parts, gradients, init_state, new_parser, run_command, state_layout, update

class Chip(NamedTuple):
    flops: float  # a second, of bfloat16
    hbm: float  # bytes a second
    links: float  # bytes a second, to the other chips
    memory: float  # GiB


CHIPS = {"v4": Chip(275e12, 1.2e12, 0.3e12, 32)}  # Jouppi et al. (2023); for another kind, a row


PLAN_HEADER = (f"{'model':25s} {'params':>8s} {'arithmetic':>11s} {'HBM traffic':>12s} {'collectives':>12s} {'step':>10s} "
               f"{'HBM a chip':>11s} {'compiled in':>12s}")


def plan_mesh(topology: str, model_parallel: int):
    """(mesh, Chip) of a TPU such as v4:2x2x1, for compilation only. Needs libtpu, and no TPU."""
    kind = topology.partition(":")[0]
    check(kind in CHIPS, f"{topology!r} is not KIND:AxBxC with a kind of {', '.join(CHIPS)} (CHIPS in plan.py)")
    # What libtpu otherwise asks of the machine that it takes for a TPU's host.
    os.environ |= {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": f"{kind}-8", "TPU_WORKER_HOSTNAMES": "localhost",
                   "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    jax.config.update("jax_platforms", "cpu")
    try:
        from jax.experimental import topologies

        devices = topologies.get_topology_desc(topology, "tpu", chip_config_name="megacore").devices
    except Exception as error:
        reason = str(error).splitlines()[0][:200]
        raise ValueError(f"{topology}: {reason}; it needs libtpu (pip install 'jax[tpu]'), and a shape such as "
                         "v4:2x2x1") from None
    return n2m.make_mesh(model_parallel, devices), CHIPS[kind]


def shaped(mesh, shape, dtype, *axes):
    """An array that is not there, laid out by SHARDING: what a program is compiled for."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, n2m.partition(mesh, shape, axes)))


def collectives(hlo: str) -> tuple[dict, int]:
    """How many collectives of each kind a compiled program has, and the bytes they put on a chip's links."""
    size = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
    counts, total = {}, 0
    kinds = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
    for result, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", hlo):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", result)
        sent = sum(size.get(t, 4) * math.prod(int(d) for d in dims.split(",") if d) for t, dims in arrays)
        counts[kind] = counts.get(kind, 0) + 1
        total += sent * (2 if kind == "all-reduce" else 1)  # a ring reduces, then gathers
    return counts, total


def plan(name: str, lowered, params: float, chip: Chip, repeat: int = 1, beside: str = ""):
    """Compiles a program, prints its row of the plan, and returns (ms a run, GiB a chip).

    The time is what a chip needs for the larger of its arithmetic and its memory traffic, and for its collectives
    after that; `repeat` counts the runs in a step.
    """
    begin = time.monotonic()
    compiled = lowered.compile()
    seconds = time.monotonic() - begin
    cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
    counts, sent = collectives(compiled.as_text())
    arithmetic, traffic, links = (1e3 * repeat * a for a in (
        cost["flops"] / chip.flops, cost["bytes accessed"] / chip.hbm, sent / chip.links))
    step = max(arithmetic, traffic) + links
    kinds = " + ".join(f"{n} {kind}" for kind, n in counts.items()) or "no collectives"
    used = (memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
            - memory.alias_size_in_bytes) / 2**30
    print(f"{name:25s} {params / 1e6:6.1f} M {arithmetic:8.1f} ms {traffic:9.1f} ms {links:9.2f} ms {step:7.1f} ms "
          f"{used:7.2f} GiB {seconds:10.0f} s   {kinds}{beside}", flush=True)
    check(used <= chip.memory,
          f"{name}: {used:.1f} GiB do not fit a chip of {chip.memory} GiB; a larger --accumulate or topology does")
    return step, used


# ---- Serving (Sec. 4.2.2) ----

def lower_step(model: n2m.Model, mesh, num: int, seconds: float):
    """One denoising step of `num` clips, with its guidance, clipping and noise, in bfloat16, as `sample` would run it."""
    cfg, T, text = model.unet, n2m.padded_length(model.unet, round(seconds * model.rate)), None
    spec, places = n2m.unet_spec(cfg), n2m.shardings(cfg, mesh)
    params = jax.tree.map(lambda p, place: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16, sharding=place), spec, places,
                          is_leaf=lambda p: isinstance(p, n2m.Param))
    array = lambda *shape, dtype=jnp.float32: shaped(mesh, (num, *shape), dtype, "batch")
    condition = n2m.Condition(array(T, 1) if model.low_rate else None,
                              array(T // n2m.HOP, cfg.aligned_channels) if cfg.aligned_channels else None)
    if n2m.uses_text(model):
        text = array(model.training.token_length, cfg.text_width), array(model.training.token_length, dtype=jnp.bool_)
        condition = condition._replace(text=text[0], text_mask=text[1])
    keys = array(dtype=jax.eval_shape(lambda: jax.random.key(0)).dtype)
    update = n2m.Update(*[shaped(mesh, (1,), jnp.float32)] * len(n2m.Update._fields))
    with jax.set_mesh(mesh):
        return n2m._sample_chunk.lower(params, model, array(T, cfg.out_channels), condition, keys, 1, update,
                                       model.inference.cfg_scale, jnp.bfloat16)


def print_serving(args):
    """Table 4 for this code on a TPU that need not be there: the five models of the paper, compiled ahead of time."""
    mesh, chip = plan_mesh(args.topology, args.model_parallel)
    num, seconds = args.num or 4, args.seconds or 30.0
    print(f"one denoising step of {num} clips of {seconds:g} s on {args.topology}, bfloat16, guidance included\n{PLAN_HEADER}")
    for name, model in n2m.MODELS.items():
        lowered = lower_step(for_tpu(model, num, seconds, mesh), mesh, num, seconds)
        plan(name, lowered, n2m.param_count(model), chip, beside=f"; Table 4: {n2m.TABLE_4[name]} ms")


# ---- Training (Sec. 4.1) ----

def print_training(args):
    """What a step of a model of the paper takes on a TPU that need not be there."""
    mesh, chip = plan_mesh(args.topology, args.model_parallel)
    model = n2m.MODELS[args.train]
    changes = {k: v for k, v in (("batch_size", args.batch_size), ("seconds", args.seconds)) if v}
    model = replace(model, training=replace(model.training, **changes))
    c, cfg, n = model.training, model.unet, n2m.param_count(model)
    parts = args.accumulate or default_parts(c.batch_size, mesh)
    part = c.batch_size // parts
    model = n2m.in_pieces(model, part // mesh.shape["data"], round(c.seconds * model.rate))
    batch = [shaped(mesh, (part, round(c.seconds * model.audio_rate)), jnp.float32, "batch"), None, None]
    if n2m.uses_text(model):
        batch[1:] = [shaped(mesh, (part, c.token_length, cfg.text_width), jnp.float32, "batch"),
                     shaped(mesh, (part, c.token_length), jnp.bool_, "batch")]
    state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
                         jax.eval_shape(functools.partial(init_state, model, 0)), state_layout(model, mesh))
    print(f"one training step of {c.batch_size} clips of {c.seconds:g} s on {args.topology}, bfloat16, in {parts} parts, "
          f"{part // mesh.shape['data']} clips a chip at once\n{PLAN_HEADER}")
    with jax.set_mesh(mesh):
        lowered = gradients.lower(state.params, model, jax.eval_shape(jax.random.key, 0), *batch, jnp.bfloat16, True)
        step, used = plan(f"gradients x {parts}", lowered, n, chip, parts)
        lowered = update.lower(state, model, state.ema)  # gradients lie as their averages do
        step += plan("update", lowered, n, chip)[0]
    days = step / 1e3 * c.steps / 86400
    print(f"{args.train}: {step:.0f} ms a step, {days:.1f} days for the {c.steps} steps of Table 2")


# ---- The command line ----


def parse_args(argv=None):
    parser = new_parser("plan.py", __doc__)
    parser.add_argument("topology", metavar="TPU", help="such as v4:2x2x1")
    parser.add_argument("--train", choices=n2m.NAMES, metavar="MODEL", help="a training step of this model, not Table 4")
    parser.add_argument("--model-parallel", type=int, default=1, metavar="N", help="devices that share a matrix (default: 1)")
    parser.add_argument("--num", type=int, default=4, metavar="N", help="clips (default: 4, as in Table 4)")
    parser.add_argument("--seconds", type=float, help="of a clip (default: 30, or what the model is trained on)")
    parser.add_argument("--batch-size", type=int, metavar="N", help="of --train (default: the paper's)")
    parser.add_argument("--accumulate", type=int, metavar="N", help="parts of a batch (default: as few as leave a device 8 clips)")
    return parser.parse_args(argv)


def run(args):
    return print_training(args) if args.train else print_serving(args)


def main(argv=None):
    run_command(run, parse_args(argv))


if __name__ == "__main__":
    main()
