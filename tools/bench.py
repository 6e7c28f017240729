"""The small models' speed and memory, measured here: a JSON line each figure. plan.py has Table 4.

    python tools/bench.py network       # small models against torch (extras test, reference)
    python tools/bench.py sampler       # N steps of the sampler, against N calls of the network
    python tools/bench.py decoding      # seconds of audio that one core decodes in a second
    python tools/bench.py start         # the README's first command, with and without compilation
    python tools/bench.py memory        # bytes by clip length and batch, as the compiler plans them

Ratios are of medians within one run, the two sides alternating. On a machine that does something
else at the same time they mean little. `--only MODEL` takes one of the five.
"""

import functools
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import noise2music as n2m
import plan
import train
from plan import median_seconds
from sample import serving_mesh
from t5_encoder import check

BATCH, THREADS = 8, 2


def figure(name: str, **entries):
    print(json.dumps({"figure": name, **entries, "machine": machine()}), flush=True)


def cores() -> int:
    """Those that this process may use, all or, on Linux, what `taskset` leaves."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@functools.cache
def machine() -> str:
    """What a time depends on: the processor, its cores, the packages."""
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else []
    chip = (names or [platform.machine()])[0]
    return f"{chip}, {cores()} cores, jax {jax.__version__}, {jax.devices()[0].device_kind}"


def models(args) -> list[n2m.Model]:
    return [n2m.tiny(model) for name, model in n2m.MODELS.items() if args.only in (None, name)]


# ---- The network, against torch ----

def training_case(model: n2m.Model):
    """(params, x_t, t, condition, text_on) of a training batch, random; all parameters too."""
    condition = plan.text_condition(model, BATCH)
    keys = iter(jax.random.split(jax.random.key(0), 1000))
    fill = lambda a: 0.1 * jax.random.normal(next(keys), a.shape)
    batch = n2m.Batch(fill(jnp.zeros((BATCH, round(model.training.seconds * model.audio_rate)))),
                      condition._replace(text=condition.text if condition.text is None
                                         else fill(condition.text)))
    x, condition = n2m.training_inputs(model, next(keys), batch)
    scaled = lambda a: jax.random.normal(next(keys), a.shape) / math.sqrt(math.prod(a.shape[:-1]))
    params = jax.tree.map(scaled, n2m.init_params(jax.random.key(1), model.unet))
    return params, x, jnp.linspace(0.01, 0.99, BATCH), condition, jnp.ones(BATCH)


def torch_case(torch, inputs):
    """The same for torch, and its leaves: each is stored as torch's own layer has it, so that what
    `torch_unet` permutes is contiguous."""
    def leaf(a):
        a = torch.tensor(np.asarray(a, np.float32))
        return (a.permute(2, 1, 0) if a.ndim == 3 else a.T).contiguous().requires_grad_()

    params, *rest = inputs
    leaves = jax.tree.map(leaf, params)
    view = lambda a: a.permute(2, 1, 0) if a.ndim == 3 else a.T if a.ndim == 2 else a
    return (jax.tree.map(view, leaves), jax.tree.leaves(leaves),
            jax.tree.map(lambda a: torch.tensor(np.asarray(a)), rest))


def network(args):
    """Forward, and a step of training: loss, gradients, Adam and the moving average."""
    try:
        import torch
        from test_noise2music import torch_unet
    except ImportError as error:
        raise ValueError(f'{error}: pip install -e ".[test,reference]"') from None

    torch.set_num_threads(THREADS)
    train.keep_memory()  # for both sides
    check(cores() <= THREADS, f"compare on {THREADS} cores: taskset -c 0,1 python ...")
    for model in models(args):
        cfg, inputs = model.unet, training_case(model)
        params, x, t, condition, text_on = inputs
        p, leaves, (x_torch, t_torch, c_torch, on_torch) = torch_case(torch, inputs)
        forward = jax.jit(n2m.unet, static_argnums=1)
        theirs = lambda: torch_unet(torch, p, cfg, x_torch, t_torch, c_torch, on_torch)

        def forward_torch():
            with torch.inference_mode():
                return theirs().numpy()

        ours = lambda: forward(params, cfg, x, t, condition, text_on)
        a, b = np.asarray(ours()), forward_torch()
        check(np.abs(a - b).max() < 1e-3 * np.abs(b).max(), f"{model.name}: torch differs")
        a, b = median_seconds(ours, forward_torch)
        figure("forward", model=model.name, over_torch=round(a / b, 3), ms=round(1e3 * a, 1))

        loss = lambda params: jnp.mean(n2m.unet(params, cfg, x, t, condition, text_on) ** 2)
        gradient, state = jax.jit(jax.grad(loss)), train.init_state(model, 0, params)
        adam = torch.optim.Adam(leaves, fused=True)
        average = [leaf.detach().clone() for leaf in leaves]

        def step():
            nonlocal state
            state, norm = train.update(state, model, gradient(state.params))
            return norm

        def step_torch():
            adam.zero_grad()
            (theirs() ** 2).mean().backward()
            adam.step()
            torch._foreach_lerp_(average, [leaf.detach() for leaf in leaves], 0.01)

        a, b = median_seconds(step, step_torch)
        figure("training step", model=model.name, over_torch=round(a / b, 3), ms=round(1e3 * a, 1))


# ---- The sampler ----

def sampler(args):
    """What the steps of Eq. 4, guidance and clipping cost beside the network that they call."""
    for model in models(args):
        seconds, cfg = model.training.seconds, model.unet
        params, x_t, condition, keys = plan.step_inputs(model, 1, seconds)
        twice = 1 + n2m.uses_text(model)  # guidance: with the prompt and without
        both = jax.tree.map(lambda a: jnp.concatenate([a] * twice), (x_t, condition))
        forward, N = jax.jit(n2m.unet, static_argnums=1), model.inference.steps
        call = lambda: forward(params, cfg, both[0], jnp.ones(twice), both[1], jnp.ones(twice))
        a, b = median_seconds(lambda: n2m.sample(params, model, condition, keys, x_t.shape[1]),
                              lambda: [call() for _ in range(N)], times=5)
        figure("sampler over its network", model=model.name, ratio=round(a / b, 3), steps=N,
               seconds=round(a, 2), of_audio=seconds)


# ---- Decoding, start, memory ----

def decoding(args):
    """`load_audio` of the demo's own clips in three formats, to the rate of the first model."""
    import soundfile

    rate = n2m.MODELS["waveform_generator"].rate
    audio, own = soundfile.read(next(ROOT.glob("demo/examples/*/*.wav")))
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("wav", "flac", "ogg"):
            soundfile.write(path := Path(folder) / f"a.{kind}", np.tile(audio, 3), own)
            seconds = 3 * len(audio) / own
            took, = median_seconds(lambda path=path: train.load_audio(path, 0, seconds, rate))
            figure("decoding", format=kind, times_real_time=round(seconds / took))


def start(args):
    """Seconds to the first sound, with an empty cache of compiled programs and with a full one."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, ROOT / "sample.py", "a fast Irish reel on the violin", "-o",
                   f"{folder}/out.wav"]
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
        for process in ("first", "second"):
            begin = time.monotonic()
            subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
            figure("start", process=process, seconds=round(time.monotonic() - begin, 1))


def memory(args):
    """A denoising step of each length and number of clips, without the parameters."""
    for model in models(args):
        for num, seconds in [(1, 5), (1, 10), (1, 30), (1, 60), (1, 120), (2, 10), (4, 10)]:
            lowered, _ = plan.lower_step(model, serving_mesh(1, 1), num, seconds)
            used = lowered.compile().memory_analysis()
            figure("memory of a step", model=model.name, clips=num, seconds=seconds,
                   mib=round(used.temp_size_in_bytes / 2**20, 1))


COMMANDS = {f.__name__: f for f in (network, sampler, decoding, start, memory)}


def main(argv=None):
    parser = train.new_parser("bench.py", __doc__)
    parser.add_argument("what", choices=COMMANDS, metavar="WHAT", help=", ".join(COMMANDS))
    parser.add_argument("--only", choices=tuple(n2m.TINY), metavar="MODEL", help="one model")
    args = parser.parse_args(argv)
    train.run_command(COMMANDS[args.what], args)


if __name__ == "__main__":
    main()
