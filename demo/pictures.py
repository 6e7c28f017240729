"""The README's pictures, all of them or those named, into demo/pictures/.

    pip install -e ".[demo]"
    python demo/pictures.py                    # a minute or two on two cores
    python demo/pictures.py schedules steps    # seconds: nothing is sampled
"""

import sys
from dataclasses import replace
from functools import cache, partial
from io import BytesIO
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
import jax

import noise2music as n2m
import sample
import train

FOLDER = Path(__file__).parent / "pictures"
PROMPT, SEED, SECONDS = "a medium Scottish jig on the guitar", 2, 3.84
STYLE = {"font.size": 8, "axes.titlesize": 8, "axes.spines.top": False, "axes.spines.right": False,
         "figure.facecolor": "white", "figure.constrained_layout.use": True}
SHORT = {name: name.replace("_", " ") for name in n2m.MODELS}


def save(figure, name: str):
    """A PNG of 128 colours: of spectrograms a third of the size, and looks the same."""
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(buffer := BytesIO(), dpi=144)
    pyplot.close(figure)
    image = Image.open(buffer).convert("RGB").quantize(128, dither=Image.Dither.NONE)
    image.save(path := FOLDER / f"{name}.png", optimize=True)
    print(f"{path}  {path.stat().st_size / 1e3:.0f} kB", flush=True)


# ---- What needs no model ----

def schedules():
    """App. A.1 as log-SNR, Eq. 5 beside what stands for it, and the steps that it comes from."""
    t = np.linspace(0, 1, 1001)
    figure, axes = pyplot.subplots(figsize=(8, 3.4))
    axes.plot(t, n2m.cosine(t, np), color="C0", label="cosine (Eq. 6)")
    axes.plot(t, n2m.linear(t, np), color="C1", label="linear: as the models use it")
    axes.plot(t, n2m.linear_eq5(t, np), "C3--", label="linear_eq5: Eq. 5 as printed")
    sigma_sq = 1 - np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))  # Ho et al. (2020)
    logsnr, shown = np.log1p(-sigma_sq) - np.log(sigma_sq), [*range(0, 50, 7), *range(50, 1000, 25)]
    axes.plot(np.linspace(0, 1, 1000)[shown], logsnr[shown], "k.", markersize=4,
              label="Ho et al. (2020), steps of their 1000")
    axes.axhline(0, color="0.8", zorder=0)
    axes.annotate("signal = noise", (1, 0), (0, 3), textcoords="offset points", ha="right",
                  color="0.5")
    axes.annotate("$x_1$ is nearly clean", (1, 3.9), (-4, 12), textcoords="offset points",
                  ha="right", color="C3")
    axes.set(xlabel="diffusion time $t$", ylabel=r"log-SNR $\lambda_t$ (nat)", xlim=(0, 1))
    axes.legend(frameon=False, loc="lower left")
    save(figure, "schedules")


def steps():
    """Fig. 4: the time reached after each step of inference, by every list of Table 8."""
    figure, grid = pyplot.subplots(2, 3, figsize=(8, 4.2), sharey=True)
    colours = dict(front_heavy="C0", uniform="0.6", back_heavy="C1", back_heavy_eval="C3")
    for name, axes in zip(n2m.TABLE_2, grid.flat):
        used = n2m.MODELS[name].inference.step_schedule  # Table 3
        for schedule, deltas in n2m.TABLE_8[name].items():
            times = n2m.denoising_times(deltas)[::-1]  # sampling begins at t = 1
            axes.plot(times, color=colours[schedule], lw=2.4 if schedule == used else 1)
        axes.set(title=SHORT[name], xlabel="step", xlim=0, ylim=(0, 1.02))
    for axes in grid[:, 0]:
        axes.set_ylabel("diffusion time $t$")
    for schedule, colour in colours.items():
        grid[1, 2].plot([], color=colour, label=schedule)
    grid[1, 2].plot([], color="black", lw=2.4, label="thick: that of Table 3")
    grid[1, 2].axis("off")
    grid[1, 2].legend(frameon=False, loc="center", title="the lists of Table 8")
    save(figure, "steps")


# ---- What the demo's models do ----

@cache
def demo(route: str):
    """The demo's {name: (Model, params)} of a route, and its text encoder."""
    args, mesh = sample.parse_args([PROMPT, "--route", route]), sample.serving_mesh(1, 1)
    weights, encoder, *_ = sample.load_weights(args, list(n2m.ROUTES[route]), mesh)
    return weights, encoder


def generator(route: str):
    """A route's first model, its parameters, what it is told of PROMPT, the key of its one clip,
    and the length of what it makes."""
    weights, encoder = demo(route)
    model, params = weights[n2m.ROUTES[route][0]]
    length = n2m.padded_length(model.unet, round(SECONDS * model.rate))
    keys = jax.random.split(jax.random.key(SEED), 1)
    return model, params, sample.encode(encoder, [PROMPT], model), keys, length


def to_mel(hertz):
    return 2595 * np.log10(1 + np.asarray(hertz) / 700)


def draw(axes, frames, title="", top=8_000, colours=(-0.8, 0.6), ceiling=8_000, labels=True):
    """A log-mel (F, 80), from -80 to -10 dB: its channels reach `top` Hz, the axis `ceiling` Hz."""
    hertz = 700 * (10 ** (np.linspace(0, to_mel(8_000), 81) / 2595) - 1) * top / 8_000
    times = np.linspace(0, SECONDS, len(frames) + 1)
    low, high = colours
    axes.pcolormesh(times, to_mel(hertz), np.asarray(frames).T, vmin=low, vmax=high, cmap="magma")
    ticks = [f for f in (500, 1_600, 4_000, 8_000, 12_000) if f <= ceiling] if labels else []
    axes.set(title=title, ylim=(0, to_mel(ceiling)), facecolor="black")
    axes.set_yticks(to_mel(ticks), [f"{f / 1000:g}" for f in ticks])
    axes.spines[:].set_visible(False)
    if not labels:
        axes.set_xticks([])


def draw_audio(axes, audio, title: str):
    """The log-mel of audio (T,) up to 12 kHz: resampled to 24 kHz, its channels reach 12 kHz."""
    frames = n2m.log_mel(n2m.fft_resample(audio[None], round(SECONDS * 24_000)))[0]
    draw(axes, frames, title, top=12_000, ceiling=12_000)


def routes():
    """Sec. 3.3: one prompt through both routes."""
    figure, grid = pyplot.subplots(2, 3, figsize=(8, 4), sharex=True, sharey=True)
    figure.suptitle(f"\"{PROMPT}\" through both routes", fontsize=9)
    for route, row in zip(n2m.ROUTES, grid):
        weights, encoder = demo(route)
        stages = n2m.generate([PROMPT], weights, partial(sample.encode, encoder), SECONDS, SEED)
        for (name, x), axes in zip(stages.items(), row):
            model = weights[name][0]
            if n2m.writes_log_mel(model):
                draw(axes, x[0], f"{SHORT[name]}: log-mel", ceiling=12_000)
            else:
                draw_audio(axes, x[0], f"{SHORT[name]}: {model.rate / 1000:g} kHz")
        row[0].set_ylabel("kHz")
    for axes in grid[1]:
        axes.set_xlabel("seconds")
    save(figure, "routes")


def denoising():
    """Eq. 4 at eight moments: above x_t, a log-mel itself, and below the clip that it implies."""
    model, params, condition, keys, length = generator("spectrogram")
    times = n2m.denoising_times(n2m.step_schedules(model)[model.inference.step_schedule],
                                model.inference.steps)
    updates = n2m.ddpm_updates(n2m.SCHEDULES[model.training.noise_schedule], times,
                               model.inference.gamma)
    step = partial(jax.jit(n2m._sample_chunk, static_argnums=1), params, model)
    N, x_t = len(updates.t), n2m.clip_noise(keys, 0, (length, model.unet.out_channels))
    figure, grid = pyplot.subplots(2, 8, figsize=(8, 2.5))
    shown = dict(zip(np.linspace(0, N - 1, 8).astype(int).tolist(), grid.T))
    for n in range(N):
        one = n2m.Update(*(a[n : n + 1] for a in updates))
        if n in shown:
            u = one._replace(keep=0 * one.keep, toward=1 + 0 * one.toward, noise=0 * one.noise)
            x0_hat = step(x_t + 0, condition, keys, n + 1, u)
            above, below = shown[n]
            draw(above, x_t[0], f"$t$ = {one.t[0]:.2f}", colours=(-1.2, 1.0), labels=False)
            draw(below, x0_hat[0], labels=False)
        x_t = step(x_t, condition, keys, n + 1, one)
    grid[0, 0].set_ylabel("$x_t$")
    grid[1, 0].set_ylabel(r"$\hat{x}_0$")
    save(figure, "denoising")


def guidance():
    """Sec. 3.1: the same noise at four scales of guidance."""
    figure, grid = pyplot.subplots(1, 4, figsize=(8, 2.2), sharey=True)
    model, params, *rest = generator("spectrogram")
    for w, axes in zip((1.0, 2.0, 5.0, 10.0), grid):
        guided = replace(model, inference=replace(model.inference, cfg_scale=w))
        draw(axes, n2m.sample(params, guided, *rest)[0], f"guidance {w:g}")
        axes.set_xlabel("seconds")
    grid[0].set_ylabel("kHz")
    save(figure, "guidance")


PICTURES = {f.__name__: f for f in (schedules, steps, routes, denoising, guidance)}


def main(argv=None):
    parser = train.new_parser("pictures.py", __doc__)
    parser.add_argument("names", nargs="*", default=list(PICTURES), metavar="PICTURE",
                        help="of " + ", ".join(PICTURES))
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(PICTURES):
        parser.error(f"no picture {', '.join(sorted(unknown))}; there are {', '.join(PICTURES)}")
    matplotlib.use("agg")
    pyplot.rcParams.update(STYLE)
    train.run_command(lambda args: [PICTURES[name]() for name in args.names], args)


if __name__ == "__main__":
    main()
