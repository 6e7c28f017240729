"""Noise2Music: Text-conditioned Music Generation with Diffusion Models, as code to read beside it.

    Tables 9, 2, 3, 4, 8  the five models, their training and their inference parameters
    Appendix A            forward process and noise schedules (Eqs. 2, 3, 5, 6)
    Sec. 3.1              the loss (Eq. 1), classifier-free guidance, dynamic clipping
    Eq. 4, App. A.2       the ancestral (DDPM) sampler
    Figs. 5 and 1         the block and the 1D Efficient U-Net
    Secs. 3.3, 4.1        what the cascaded models are conditioned on, and how that is augmented
    Sec. 3.3              both routes from prompts to 24 kHz audio
    Sec. 3.5              pseudo-labels
    Sec. 4.3.2            Frechet audio distance and similarity
    Sec. 4.2.2            how all of it is laid out on many devices

What is not in the paper stands at the end, below a line that says so. Comments cite the paper
(`Eq. 4`, `Sec. 4.1`, `Table 9`, `Fig. 5`). `choice:` marks where it is silent, `departs:` where we
differ on purpose, `numerics:` the same mathematics in a safer or faster form.

Letters, in shapes:                         Symbols:
    B  clips in a batch                         x, x_t       a clip; the clip with noise of time t
    T  length of a sequence in time             eps          the noise, N(0, I)
    C  channels                                 x0_hat       the clip that a predicted eps implies
    L  text tokens, E  width of a token         logsnr_t     lambda_t = ln(alpha_t^2 / sigma_t^2)
    H  attention heads, K  width of a head      gamma        stochasticity of Eq. 4, nothing else
    D  depth of the U-Net, I  one of 1..D       cfg_scale, loss_weight    the two things called w
    S  stride of a down- or up-sampling layer   low_fi, aligned      two ways to condition on audio
"""

import math
from dataclasses import dataclass, replace
from functools import partial, wraps
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

# ---- The tables ----

MEL_CHANNELS = 80  # Sec. 3.3.2: a log-mel frame has 80 channels ...
HOP = 160  # ... every 10 ms, at 16 kHz (Sec. 3.6); 160 is also the vocoder's compression rate
MEL_RATE = 16_000


@dataclass(frozen=True)
class UNetConfig:
    """A column of Table 9; below `# ---`, what the table leaves to the text and the figures."""
    base_dimension: int
    kernel_size: int
    depth: int
    strides: tuple[int, ...]
    channels: tuple[int, ...]  # in units of base_dimension, as printed: "256 * [1, 1, 2, 3, 4, 4]"
    blocks: tuple[int, ...]
    self_attention: tuple[bool, ...]
    cross_attention: tuple[bool, ...]
    attention_heads: int
    # ---
    in_channels: int  # Fig. 1: x_t, with the up-sampled low-fidelity audio stacked on it
    out_channels: int  # the noise in x_t
    aligned_channels: int  # Fig. 1: the input added at the bottom of the U; 0 where there is none
    text_width: int = 2048  # choice: as T5 v1.1 XL; Table 2's counts single out the width
    head_width: int = 128  # choice: q, k, v are 8 x 128 wide at any C, by Table 2's counts
    groups: int = 8  # choice: in each GroupNorm of Fig. 5
    dtype: str = "float32"  # choice: what the network computes in; training keeps float32 weights
    remat: bool = False  # the backward pass recomputes each block, to save memory


@dataclass(frozen=True)
class TrainingConfig:
    """A row of Table 2; below `# ---`, Sec. 4.1."""
    params: float  # as printed; `param_count` counts
    steps: int
    token_length: int  # 0 where the model reads no text
    loss_weight: str  # a key of LOSS_WEIGHTS
    noise_schedule: str  # a key of SCHEDULES
    # ---
    batch_size: int
    seconds: float  # whole clips for the generators, snippets for the rest
    t_max: float = 0.0  # noise augmentation: the latest diffusion time of the conditioning input
    blur_taps: int = 0  # blur augmentation: size of the kernel ...
    blur_std: tuple[float, float] = (0.0, 0.0)  # ... and the range of its standard deviation
    learning_rate: float = 1e-4
    warmup_steps: int = 10_000
    decay_steps: int = 2_500_000
    beta1: float = 0.9
    beta2: float = 0.999
    ema: float = 0.9999
    occlusion: float = 0.1  # probability that a clip's text is hidden, for guidance
    clip_norm: float | None = None  # not the paper's: larger gradients are scaled to it


@dataclass(frozen=True)
class InferenceConfig:
    """A row of Table 3; below `# ---`, what it lacks: the paper's five keep the defaults."""
    step_schedule: str  # a key of TABLE_8[model], or of STEP_SCHEDULES
    gamma: float
    cfg_scale: float | None
    # ---
    steps: int | None = None  # None: those of Table 8; N: its curve in N steps (Sec. 4.6)
    sampler: str = "ddpm"  # a key of SAMPLERS; Sec. 3.1: "ancestral (or DDPM) sampling"
    hum: float | None = None  # Hz that the small models leave: see `without_hum`
    keep_input: bool = False  # small models again: see `with_input_band`


@dataclass(frozen=True)
class Model:
    """One diffusion model: its network, training, inference, and what it reads and writes."""
    name: str
    unet: UNetConfig
    training: TrainingConfig
    inference: InferenceConfig
    rate: int  # elements of x per second: samples of audio, or log-mel frames
    audio_rate: int  # Hz of the training audio, of which x and the conditioning input are made
    low_rate: int | None  # Hz of the low-fidelity audio, before it is up-sampled and stacked


T, F = True, False

# fmt: off
TABLE_9 = dict(     # waveform       waveform     spectrogram  spectrogram super-resolution
                    # generator      cascader     generator    vocoder     cascader
    base_dimension=  (256,           256,         256,         128,        256),
    kernel_size=     (7,             7,           9,           5,          7),
    depth=           (6,             5,           5,           4,          4),
    strides=         ((4,4,4,4,4,4), (4,4,4,4,4), (4,3,2,2,2), (2,4,4,5),  (4,4,4,4)),
    channels=        ((1,1,2,3,4,4), (1,1,2,3,4), (1,2,2,3,4), (1,1,2,4),  (1,1,2,2)),
    blocks=          ((3,3,3,4,4,4), (3,3,4,6,6), (6,6,6,6,6), (4,4,4,4),  (4,4,4,4)),
    self_attention=  ((F,F,F,T,T,T), (F,F,F,F,F), (F,F,F,T,T), (F,F,F,F),  (F,F,F,F)),
    cross_attention= ((F,F,F,T,T,T), (F,F,F,T,T), (F,F,F,T,T), (F,F,F,F),  (F,F,F,F)),
    attention_heads= (8,             8,           8,           0,          0),  # 0: printed "-"
    # Fig. 1 and Sec. 3.3: channels of the two audio entries and of the exit.
    in_channels=     (1,             2,           80,          1,          2),
    out_channels=    (1,             1,           80,          1,          1),
    aligned_channels=(0,             0,           0,           80,         0),
)

TABLE_2 = {                     # params  steps      tokens  loss weight   noise schedule
    "waveform_generator":       (724e6,   1_600_000, 64,     "simplified", "cosine"),
    "waveform_cascader":        (487e6,     460_000, 64,     "simplified", "linear"),
    "spectrogram_generator":    (745e6,   1_800_000, 96,     "sigma",      "linear"),
    "spectrogram_vocoder":      (25.7e6,    840_000, 0,      "simplified", "linear"),
    "superresolution_cascader": (81e6,      270_000, 0,      "simplified", "linear"),
}

SEC_4_1 = {                     # batch  seconds  t_max  blur: taps, range of the deviation
    "waveform_generator":       (2048,   30.0),
    # choice: 3.2 s of "3 to 4-second randomly sampled snippets"; the strides of all three divide it
    "waveform_cascader":        (2048,   3.2,     0.5,   10, (0.1, 5.0)),
    "spectrogram_generator":    (2048,   30.0),
    "spectrogram_vocoder":      (2048,   3.2,     1.0,   5, (0.2, 1.0)),
    # choice: no blur for super-resolution; "the cascader" and "the vocoder" alone have a kernel.
    "superresolution_cascader": (4096,   3.2,     1.0),
}

TABLE_3 = {                     # denoising steps   gamma  CFG scale
    "waveform_generator":       ("front_heavy",     0,     10.0),
    "waveform_cascader":        ("front_heavy",     1,     5.0),
    "spectrogram_generator":    ("back_heavy_eval", 0,     5.0),  # "modified further" (App. A.2)
    "spectrogram_vocoder":      ("front_heavy",     0,     None),
    "superresolution_cascader": ("front_heavy",     0,     None),
}

TABLE_4 = {  # Sec. 4.2.2: ms a step, for four clips of 30 s on four TPU v4
    "waveform_generator":       25.0,
    "waveform_cascader":        75.0,
    "spectrogram_generator":    8.3,
    "spectrogram_vocoder":      29.9,  # departs: 100 steps take 2.99 s, not the 0.3 s printed
    "superresolution_cascader": 71.7,
}

TABLE_8 = {  # sizes of the time steps, from t = 0 to t = 1
    "waveform_generator": dict(
        front_heavy=(front_heavy := [0.01 / 200] * 200 + [0.04 / 400] * 400 + [0.15 / 200] * 200
                                    + [0.3 / 150] * 150 + [0.5 / 50] * 50),
        back_heavy=front_heavy[::-1], uniform=[1.0 / 1000] * 1000),
    "waveform_cascader": dict(
        front_heavy=(front_heavy := [0.05 / 400] * 400 + [0.15 / 200] * 200 + [0.3 / 150] * 150
                                    + [0.5 / 50] * 50),
        back_heavy=front_heavy[::-1], uniform=[1.0 / 800] * 800),
    "spectrogram_generator": dict(  # choice: as printed, though the first two hold 2000 steps
        front_heavy=(front_heavy := [0.01 / 400] * 400 + [0.04 / 800] * 800 + [0.15 / 400] * 400
                                    + [0.3 / 300] * 300 + [0.5 / 100] * 100),
        back_heavy=front_heavy[::-1], uniform=[1.0 / 1000] * 1000,
        back_heavy_eval=[0.3 / 50] * 50 + [0.3 / 150] * 150 + [0.2 / 300] * 300
                        + [0.2 / 500] * 500),
    "spectrogram_vocoder": dict(
        front_heavy=(front_heavy := [0.05 / 50] * 50 + [0.15 / 30] * 30 + [0.3 / 15] * 15
                                    + [0.5 / 5] * 5),
        back_heavy=front_heavy[::-1], uniform=[1.0 / 100] * 100),
    "superresolution_cascader": dict(
        front_heavy=[0.05 / 400] * 400 + [0.15 / 200] * 200 + [0.3 / 150] * 150 + [0.5 / 50] * 50),
}

STEP_SCHEDULES = {"uniform": [1.0 / 1000] * 1000}  # beside Table 8, for any model

SEC_3_3 = {                     # x per second  Hz of training audio  Hz of low-fidelity audio
    # The training audio is Sec. 3.6's. departs: it has 16 kHz here too; we read it at 3.2 kHz.
    "waveform_generator":       (3_200,         3_200,                None),
    "waveform_cascader":        (16_000,        16_000,               3_200),
    "spectrogram_generator":    (100,           16_000,               None),
    "spectrogram_vocoder":      (16_000,        16_000,               None),
    "superresolution_cascader": (24_000,        24_000,               16_000),
}
# fmt: on
del T, F

MODELS = {  # Table 9's rows have the order of UNetConfig's fields: a column of it makes one
    name: Model(name, UNetConfig(*column), TrainingConfig(*TABLE_2[name], *SEC_4_1[name]),
                InferenceConfig(*TABLE_3[name]), *SEC_3_3[name])
    for name, column in zip(TABLE_2, zip(*TABLE_9.values()))
}

ROUTES = {  # Sec. 3.3: from the prompt to 24 kHz
    "waveform": ("waveform_generator", "waveform_cascader", "superresolution_cascader"),
    "spectrogram": ("spectrogram_generator", "spectrogram_vocoder", "superresolution_cascader"),
}


def uses_text(model: Model) -> bool:
    # departs: Sec. 4.1 trains all but the vocoder on text; Sec. 3.3.3 and the tables say that
    # super-resolution reads none either.
    return any(model.unet.cross_attention)


def writes_log_mel(model: Model) -> bool:
    return model.unet.out_channels == MEL_CHANNELS


def step_schedules(model: Model) -> dict:
    """{name: step sizes} of Table 8, and those that any model can take."""
    return STEP_SCHEDULES | TABLE_8.get(model.name, {})


# ---- Forward process and noise schedules (Appendix A) ----
# A schedule maps t in [0, 1] to logsnr_t; Eq. 3 gives alpha_t and sigma_t from that. Training
# evaluates it in JAX, the sampler once for all steps, in NumPy's float64 (`xp=np`).

def cosine(t, xp=jnp):
    """Eq. 6: alpha_t = cos(a t + b), from logsnr_0 = 20 to logsnr_1 = -20."""
    b = math.atan(math.exp(-10))
    a = math.atan(math.exp(10)) - b
    # numerics: cos(a t + b) = sin(a (1 - t) + b), as a + 2 b = pi / 2. Near its zero a cosine loses
    # digits in float32, a sine of a small angle does not.
    return 2 * xp.log(xp.sin(a * (1 - t) + b) / xp.sin(a * t + b))


def linear(t, xp=jnp):
    """The linear schedule of Ho et al. (2020) in continuous time: logsnr from 9.21 to -10.05.

    departs: Eq. 5 as printed ends at sigma_1^2 = 0.02, a nearly clean clip, while sampling starts
    from N(0, I). The constants 1e-4 and 0.02 are the first and the last of Ho et al.'s 1000 betas,
    which rise linearly. In continuous time (the VP SDE of Song et al., 2021) beta rises from 0.1 to
    20, and sigma_t^2 = 1 - e^-B with B = 1e-4 + the integral of beta from 0 to t, so that sigma_0^2
    is as printed. Eq. 3: logsnr_t = -ln(e^B - 1). Ho's step n of 1000 is t = (n - 1) / 999, to 0.07
    nat."""
    return -xp.log(xp.expm1(1e-4 + 0.1 * t + 9.95 * t**2))


def linear_eq5(t, xp=jnp):
    """Eq. 5 as printed. No model uses it, since x_1 is not noise under it: see `linear`."""
    sigma_sq = (0.02 - 0.0001) * t + 0.0001
    return xp.log1p(-sigma_sq) - xp.log(sigma_sq)  # Eq. 3


SCHEDULES = {"cosine": cosine, "linear": linear, "linear_eq5": linear_eq5}


def alpha_sigma(logsnr_t):
    """Eq. 3: (alpha_t, sigma_t). numerics: sqrt(1 - sigma_t^2) would lose a small alpha_t."""
    return jnp.sqrt(jax.nn.sigmoid(logsnr_t)), jnp.sqrt(jax.nn.sigmoid(-logsnr_t))


def diffuse(x, eps, logsnr_t):
    """Eq. 2: a sample of q(x_t | x) = N(alpha_t x, sigma_t^2 I). x, eps (B, T, C); logsnr_t (B,)"""
    alpha_t, sigma_t = alpha_sigma(logsnr_t[:, None, None])
    return alpha_t * x + sigma_t * eps


# ---- The loss (Sec. 3.1) ----

LOSS_WEIGHTS = {  # Sec. 3.1, as functions of logsnr_t
    "simplified": lambda logsnr_t: jnp.ones_like(logsnr_t),  # w_t = 1
    "sigma": lambda logsnr_t: jax.nn.sigmoid(-logsnr_t),  # w_t = sigma_t^2
}


class Condition(NamedTuple):
    """c in the paper: the entries of Fig. 1 besides x_t and t. None where there is none."""
    low_fi: jax.Array | None = None  # (B, T, 1) stacked with x_t
    aligned: jax.Array | None = None  # (B, T / prod(strides), 80) added at the bottom
    text: jax.Array | None = None  # (B, L, E) token embeddings
    # (B, L) True on tokens, False on padding. choice: attention sees no padding
    text_mask: jax.Array | None = None


class Batch(NamedTuple):
    """What training reads: clips, and what the data set says of them."""
    audio: jax.Array  # (B, samples) at the model's audio_rate. choice: in [-1, 1]
    condition: Condition  # with the text, where the model uses it


def diffusion_loss(params, model: Model, key, batch: Batch):
    """Eq. 1 for each clip (training minimises its mean), and the clip's time t. Both (B,)."""
    key_t, key_eps, key_augment, key_occlude = jax.random.split(key, 4)
    x, condition = training_inputs(model, key_augment, batch)  # Secs. 3.3, 4.1; x (B, T, C)

    t = jax.random.uniform(key_t, x.shape[:1])  # (B,) "uniformly sampled during training"
    eps = jax.random.normal(key_eps, x.shape)  # (B, T, C)
    logsnr_t = SCHEDULES[model.training.noise_schedule](t)
    x_t = diffuse(x, eps, logsnr_t)  # Eq. 2

    # Sec. 4.1: "we occlude the text prompts for 10% of the samples". choice: each by chance.
    text_on = jax.random.bernoulli(key_occlude, 1 - model.training.occlusion, t.shape)  # (B,)
    eps_hat = unet(params, model.unet, x_t, t, condition, text_on)

    loss_weight = LOSS_WEIGHTS[model.training.loss_weight](logsnr_t)
    # Eq. 1. choice: the mean over elements, not the sum; the padding of a clip counts too.
    return loss_weight * jnp.mean((eps_hat - eps) ** 2, axis=(1, 2)), t


# ---- Classifier-free guidance and dynamic clipping (Sec. 3.1) ----

def guided_eps(params, model: Model, x_t, t, condition: Condition):
    """Sec. 3.1: w eps(x_t, c) + (1 - w) eps(x_t, .), w of Table 3. x_t (B, T, C), t a scalar.

    Without text (w is None), and for w = 1, it is the conditional prediction. choice: text alone is
    hidden, as in Sec. 4.1; Sec. 3.1's "conditional input" is the cascader's audio too.
    numerics: one call on a doubled batch, the two rows of a clip adjacent."""
    b, w = x_t.shape[0], model.inference.cfg_scale
    if w in (None, 1) or not uses_text(model):
        return unet(params, model.unet, x_t, jnp.full(b, t), condition, jnp.ones(b))
    x_t, condition = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), (x_t, condition))  # (2B,...)
    text_on = jnp.tile(jnp.array([1.0, 0.0]), b)  # (2B,): with text, without, with, ...
    eps = unet(params, model.unet, x_t, jnp.full(2 * b, t), condition, text_on)
    return w * eps[::2] + (1 - w) * eps[1::2]


def dynamic_clip(x0_hat, q=0.995):
    """Sec. 3.1, Saharia et al. (2022b): x0_hat is clipped to [-s, s] and divided by s. (B, T, C).

    s, not Eq. 4's time s, is a percentile of |x0_hat| in each clip, and at least 1, the range of
    audio and log-mel. choice: the 99.5th. departs: Sec. 3.1 clips "due to CFG"; we clip the two
    models without CFG too, since what they make lies in that range as well."""
    s = percentile(jnp.abs(x0_hat).reshape(x0_hat.shape[0], -1), q)  # (B,)
    s = jnp.maximum(s, 1.0)[:, None, None]  # (B, 1, 1)
    return jnp.clip(x0_hat, -s, s) / s


# ---- Ancestral sampling (Appendix A, Sec. 4.2.1) ----

def denoising_times(deltas, steps: int | None = None) -> np.ndarray:
    """Sec. 4.2.1: t_n = sum of the first n step sizes, t_0 = 0 < ... < t_N = 1. float64 (N + 1,).

    `steps` resamples them to as many; Sec. 4.6 scales the step sizes "inverse-proportionally".
    choice: the cumulative curve is interpolated linearly, since half of the vocoder's 15 or 5 equal
    steps is no whole number."""
    times, N = np.concatenate([[0.0], np.cumsum(deltas)]), len(deltas)
    times /= times[-1]  # numerics: pins t_N = 1
    return np.interp(np.linspace(0, N, (steps or N) + 1), np.arange(N + 1), times)


class Update(NamedTuple):
    """The coefficients of N updates from t to s (Eq. 4), from t = 1 on: arrays (N,)."""
    t: np.ndarray
    alpha_t: np.ndarray
    sigma_t: np.ndarray
    keep: np.ndarray  # of x_t
    toward: np.ndarray  # of x0_hat
    noise: np.ndarray  # of the fresh noise


def ddpm_updates(schedule: Callable, times: np.ndarray, gamma: float) -> Update:
    """The N updates of Eq. 4 between `times` (N + 1,), computed in float64.

    numerics: with x0_hat = (x_t - sigma_t eps) / alpha_t, the first two terms of Eq. 4 equal
        (1 - r) (alpha_s / alpha_t) x_t + r alpha_s x0_hat,  r = 1 - e^(logsnr_t - logsnr_s).
    In this form x0_hat can be clipped. Unclipped, the waveform generator's first update multiplies
    an error in eps by 347. gamma = 0 is not DDIM: the noise of sigma_tilde remains."""
    logsnr = schedule(np.asarray(times, np.float64), np)
    alpha = np.exp(-np.logaddexp(0, -logsnr) / 2)  # `alpha_sigma` in float64
    sigma = np.exp(-np.logaddexp(0, logsnr) / 2)
    t, s = slice(None, 0, -1), slice(-2, None, -1)  # t_N..t_1, and their s: t_{N-1}..t_0
    r = -np.expm1(logsnr[t] - logsnr[s])
    sigma_t_given_s = np.sqrt(r) * sigma[t]  # Eq. 3
    sigma_tilde = np.sqrt(r) * sigma[s]  # Eq. 3
    keep = (1 - r) * alpha[s] / alpha[t]
    toward = r * alpha[s]
    noise = sigma_tilde ** (1 - gamma) * sigma_t_given_s**gamma
    keep[-1], toward[-1], noise[-1] = 0, 1, 0  # departs: the last x_s is x0_hat, no noise
    return Update(*(np.float32(a) for a in (times[t], alpha[t], sigma[t], keep, toward, noise)))


SAMPLERS = {"ddpm": ddpm_updates}


def clip_noise(keys, n, shape):
    """The n-th noise of each clip, N(0, I), (B, *shape): keys (B,) make clips independent."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, n), shape))(keys)


def ancestral_scan(eps_fn: Callable, x_t, keys, n, updates: Update):
    """Eq. 4 for each of `updates`, numbered n, n + 1, ... eps_fn(x_t, t) -> eps; x_t (B, T, C)."""

    def step(x_t, n_and_update):
        n, u = n_and_update
        x0_hat = dynamic_clip((x_t - u.sigma_t * eps_fn(x_t, u.t)) / u.alpha_t)  # Eq. 2, for x
        noise = clip_noise(keys, n, x_t.shape[1:])
        return u.keep * x_t + u.toward * x0_hat + u.noise * noise, None  # Eq. 4: x_s

    return lax.scan(step, x_t, (n + jnp.arange(len(updates.t)), updates))[0]


@partial(jax.jit, static_argnames="model", donate_argnames="x_t")
def _sample_chunk(params, model, x_t, condition, keys, n, updates):
    x_t, condition = jax.tree.map(lambda a: constrain(a, "batch"), (x_t, condition))  # Sec. 4.2.2
    eps_fn = lambda x_t, t: guided_eps(params, model, x_t, t, condition)
    return ancestral_scan(eps_fn, x_t, keys, n, updates)


def sample(params, model: Model, condition: Condition, keys, length: int, progress=None):
    """Clips (B, length, C) in [-1, 1], by `model.inference` (Table 3). keys (B,), one a clip.

    `length` is a multiple of prod(strides). progress(done, N) is called after each chunk."""
    inference = model.inference
    times = denoising_times(step_schedules(model)[inference.step_schedule], inference.steps)
    schedule = SCHEDULES[model.training.noise_schedule]
    updates = SAMPLERS[inference.sampler](schedule, times, inference.gamma)
    N = len(updates.t)
    chunk = max(k for k in range(1, 51) if N % k == 0)  # equal ones: compiled once
    x_t = clip_noise(keys, 0, (length, model.unet.out_channels))  # x_1 ~ N(0, I)
    for n in range(0, N, chunk):
        part = Update(*(a[n : n + chunk] for a in updates))
        x_t = _sample_chunk(params, model, x_t, condition, keys, n + 1, part)
        if progress:
            x_t.block_until_ready()
            progress(n + chunk, N)
    if inference.hum:
        x_t = without_hum(x_t, model.rate, inference.hum)
    if inference.keep_input:
        x_t = with_input_band(x_t, condition.low_fi, model.rate, model.low_rate)
    return x_t


# ---- Parameters and layers ----
# Each parameter is declared once, beside the layer that uses it: shape, logical axes (the rows of
# SHARDING), initialiser. Read (B, ..., T, C) as (B, T, C): only on a TPU, where clips are cut into
# pieces (`on_a_tpu_in_pieces`), is there an axis between.

@dataclass(frozen=True)  # not a NamedTuple: JAX would take that apart
class Param:
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # keys of SHARDING
    init: Callable  # standard normal noise of that shape -> initial value


def _fan_in(noise):  # choice: normal of variance 1 / fan-in
    return noise / math.sqrt(math.prod(noise.shape[:-1]))


def _identity(noise):
    return jnp.eye(*noise.shape)


def linear_spec(c_in, c_out, axes, init=_fan_in):
    return {"w": Param((c_in, c_out), axes, init), "b": Param((c_out,), axes[1:], jnp.zeros_like)}


def linear_layer(p, x):
    return x @ p["w"] + p["b"]  # (..., C_in) -> (..., C_out)


def conv_spec(taps, c_in, c_out, axes, init=_fan_in):
    return {"w": Param((taps, c_in, c_out), ("whole", *axes), init),
            "b": Param((c_out,), axes[1:], jnp.zeros_like)}


def conv1d(p, x, left=None):
    """1D convolution, (B, T, C_in) -> (B, T, C_out), padded with taps - 1 zeros, `left` of
    them in front (None: half, so that an odd kernel is centred)."""
    taps = p["w"].shape[0]
    left = (taps - 1) // 2 if left is None else left
    padding = (left, taps - 1 - left)
    if x.ndim > 3 or x.shape[1] < taps:
        return unusual_conv1d(p, x, padding)  # numerics: for clips in pieces, and for short ones
    axes = ("NWC", "WIO", "NWC")
    return lax.conv_general_dilated(x, p["w"], (1,), [padding], dimension_numbers=axes) + p["b"]


def norm_spec(c, axis="channels"):
    ones, zeros = jnp.ones_like, jnp.zeros_like
    return {"scale": Param((c,), (axis,), ones), "bias": Param((c,), (axis,), zeros)}


def per_clip(v, x):
    """v, (B,) or (B, C), shaped to broadcast against x (B, ..., T, C)."""
    return v.reshape(v.shape[0], *[1] * (x.ndim - 2), -1)


def group_norm(p, x, groups):
    """Normalises each clip over time and the channels of a group. x (B, ..., T, C) of any type.

    choice: all the time there is: 3.2 s in training, 30 s in sampling. numerics: moments over
    time, then over groups, then one multiply-add are several times faster on a CPU than a reshape
    to groups. It is done in float32, since a mean can be many deviations from 0."""
    c, x32, time_axes = x.shape[-1], x.astype(jnp.float32), tuple(range(1, x.ndim - 1))
    moments = jnp.mean(x32, time_axes), jnp.mean(jnp.square(x32), time_axes)  # each (B, C)
    moments = [m.reshape(-1, groups, c // groups).mean(2) for m in moments]  # (B, groups)
    mean, mean_sq = [jnp.repeat(m, c // groups, axis=1) for m in moments]  # (B, C)
    scale = p["scale"] * lax.rsqrt(jnp.maximum(mean_sq - mean**2, 0) + 1e-5)
    bias = p["bias"] - mean * scale
    return (x32 * per_clip(scale, x) + per_clip(bias, x)).astype(x.dtype)


# ---- The block (Fig. 5) ----

def combine_embedding(p, x, time):
    """Sec. 3.2: "the single vector is used to produce a channel-wise scaling and bias"."""
    scale, bias = jnp.split(linear_layer(p, time), 2, axis=-1)  # (B, C_0) -> twice (B, C)
    return x * (1 + per_clip(scale, x)) + per_clip(bias, x)  # choice: 1 +, so that zeros keep x


def attention_spec(cfg: UNetConfig, c, c_kv):
    hk = cfg.attention_heads * cfg.head_width  # H K
    return {
        "norm": norm_spec(c),
        "q": linear_spec(c, hk, ("channels", "heads")),
        "k": linear_spec(c_kv, hk, ("channels", "heads")),
        "v": linear_spec(c_kv, hk, ("channels", "heads")),
        "out": linear_spec(hk, c, ("heads", "channels"), jnp.zeros_like),
        "feed_forward": {  # App. B.1: "with a hidden layer of twice the dimension of C_I"
            "norm": norm_spec(c),
            "hidden": linear_spec(c, 2 * c, ("channels", "hidden")),
            "out": linear_spec(2 * c, c, ("hidden", "channels"), jnp.zeros_like),
        },
    }


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(K)) v of each head: q (B, H, T, K), k and v (B, H, L, K), mask (B, L).

    numerics: with the heads' axis before that of time, the products are two to three times as fast
    on a CPU. Scores and softmax are float32. A long clip's queries are taken a part at a time."""
    if q.shape[2] * k.shape[2] > 2**22:
        return long_attend(q, k, v, mask)
    q = q / math.sqrt(q.shape[3])
    scores = jnp.matmul(q, k.mT, preferred_element_type=jnp.float32)  # (B, H, T, L)
    scores = scores if mask is None else jnp.where(mask[:, None, None], scores, -1e30)
    return jax.nn.softmax(scores).astype(v.dtype) @ v


def attention(p, cfg: UNetConfig, x, kv=None, mask=None):
    """Multi-head attention of x (B, T, C) on kv (B, L, E), or on itself. choice: no positions."""
    h = group_norm(p["norm"], x, cfg.groups)  # choice: normalised before attention and feed-forward
    h = h.reshape(h.shape[0], -1, h.shape[-1])  # (B, T, C): pieces joined
    kv = h if kv is None else kv
    heads = lambda y: y.reshape(*y.shape[:2], cfg.attention_heads, -1).swapaxes(1, 2)
    q, k, v = (heads(linear_layer(p[name], y)) for name, y in (("q", h), ("k", kv), ("v", kv)))
    y = attend(q, k, v, mask).swapaxes(1, 2)  # (B, H, T, K) -> (B, T, H, K)
    return linear_layer(p["out"], y.reshape(*x.shape[:-1], -1))  # (B, T, H K) -> (B, T, C)


def feed_forward(p, cfg: UNetConfig, x):
    """App. B.1: "the standard post-attention residual layer". (B, T, C) -> (B, T, C)."""
    h = linear_layer(p["hidden"], group_norm(p["norm"], x, cfg.groups))  # (B, T, 2 C)
    return linear_layer(p["out"], jax.nn.silu(h))  # choice: Swish, as in the rest of the block


def block_spec(cfg: UNetConfig, c, self_attention: bool, cross_attention: bool):
    """Fig. 5. choice: branches end in zeros, the skip is the identity: a new block is x -> x."""
    k = cfg.kernel_size
    spec = {
        "combine": linear_spec(cfg.base_dimension, 2 * c, ("whole", "channels"), jnp.zeros_like),
        "norm1": norm_spec(c),
        "conv1": conv_spec(k, c, c, ("channels", "hidden")),
        "norm2": norm_spec(c, "hidden"),
        "conv2": conv_spec(k, c, c, ("hidden", "channels"), jnp.zeros_like),
        "skip": linear_spec(c, c, ("whole", "channels"), _identity),
    }
    if self_attention:
        spec["self_attention"] = attention_spec(cfg, c, c)
    if cross_attention:
        spec["cross_attention"] = attention_spec(cfg, c, cfg.text_width)
    return spec


def block(p, cfg: UNetConfig, x, time, text, text_mask, text_on):
    """Fig. 5. x (B, T, C), time (B, C_0), text (B, L, E) and its mask; text_on (B,): 0 occludes."""
    x = combine_embedding(p["combine"], x, time)

    h = conv1d(p["conv1"], jax.nn.silu(group_norm(p["norm1"], x, cfg.groups)))
    h = conv1d(p["conv2"], jax.nn.silu(group_norm(p["norm2"], h, cfg.groups)))
    x = linear_layer(p["skip"], x) + h

    if "self_attention" in p:
        x = x + attention(p["self_attention"], cfg, x)
        x = x + feed_forward(p["self_attention"]["feed_forward"], cfg, x)

    if "cross_attention" in p:
        # Sec. 4.1: for occluded prompts "the output of the cross attention layers are set to zero".
        # choice: that output is what attention adds to x; the feed-forward after it stays.
        x = x + per_clip(text_on, x) * attention(p["cross_attention"], cfg, x, text, text_mask)
        x = x + feed_forward(p["cross_attention"]["feed_forward"], cfg, x)
    return x


# ---- The 1D Efficient U-Net (Fig. 1) ----

def downsample(p, x, stride):
    """App. B.1: convolution of stride S, (B, T, C_{I-1}) -> (B, T / S, C_I).

    choice: a kernel of 2 S: all five of Table 2's counts agree to 2.2 %. By Table 9's the waveform
    models' are as printed, 724.0 and 487.1 M, but the spectrogram models' 4 % off. numerics: S
    frames are folded into the channels, then convolved with two taps. `upsample` does the reverse,
    and pads on the other side: so it undoes the shift in time."""
    *batch, t, c = x.shape
    return conv1d(p, x.reshape(*batch, t // stride, stride * c), left=0)


def upsample(p, x, stride):
    """App. B.1: "the mirror operation" of stride S, (B, T, C_I) -> (B, T S, C_{I-1}).

    choice: a transposed convolution, the same kernel, a bias for each of the output's S phases."""
    *batch, t, _ = x.shape
    return conv1d(p, x, left=1).reshape(*batch, t * stride, -1)


def time_embedding(t, width):
    """App. B.1: "converting the float into a vector via positional embedding". (B,) -> (B, width).

    choice: sines and cosines of 1000 t at width / 2 frequencies from 1 to 1e-4."""
    frequencies = jnp.exp(-math.log(1e4) * jnp.arange(width // 2) / (width // 2 - 1))
    angles = 1000 * t[:, None] * frequencies  # (B, width / 2)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def unet_spec(cfg: UNetConfig):
    """The parameters of Fig. 1, a tree named after its boxes."""
    widths = [cfg.base_dimension * c for c in (1, *cfg.channels)]  # C_0, C_1, ..., C_D
    depths = list(zip(cfg.strides, cfg.blocks, cfg.self_attention, cfg.cross_attention,
                      widths[:-1], widths[1:], strict=True))
    blocks = lambda n, c, sa, ca: [block_spec(cfg, c, sa, ca) for _ in range(n)]
    spec = {
        "time": linear_spec(widths[0], widths[0], ("whole", "channels")),  # App. B.1: also C_0 wide
        "entry": conv_spec(3, cfg.in_channels, widths[0], ("whole", "channels")),  # B.1: 3 taps
        "down": [{"resample": conv_spec(2, s * outer, c, ("whole", "channels")),  # C_{I-1} -> C_I
                  "blocks": blocks(n, c, sa, ca)} for s, n, sa, ca, outer, c in depths],
        "up": [{"resample": conv_spec(2, c, s * outer, ("channels", "whole")),  # and back
                "blocks": blocks(n, outer, sa, ca)} for s, n, sa, ca, outer, c in depths],
        # choice: the exit begins as zeros, as a block's branches do
        "exit": conv_spec(3, widths[0], cfg.out_channels, ("channels", "whole"), jnp.zeros_like),
    }
    if cfg.aligned_channels:  # choice: a 1x1 layer
        spec["aligned"] = linear_spec(cfg.aligned_channels, widths[-1], ("whole", "channels"))
    return spec


def unet(params, cfg: UNetConfig, x_t, t, condition: Condition, text_on):
    """Fig. 1: the noise in x_t, (B, T, C) -> (B, T, C) float32. T is a multiple of prod(strides).

    t (B,); text_on (B,) is 0 where the prompt is occluded. Where cfg.dtype is float32, a TPU or a
    GPU still rounds the factors of a product, unless jax.default_matmul_precision is "highest"."""
    time = linear_layer(params["time"], time_embedding(t, cfg.base_dimension))  # (B, C_0), float32
    cast = lambda a: a if a.dtype == bool else a.astype(cfg.dtype)
    inputs = params, x_t, condition, time, text_on
    params, x_t, condition, time, text_on = jax.tree.map(cast, inputs)
    run_block = partial(block, cfg=cfg, time=time, text=condition.text,
                        text_mask=condition.text_mask, text_on=text_on)
    run_block = jax.checkpoint(run_block) if cfg.remat else run_block

    if condition.low_fi is not None:  # Sec. 3.3.1: stacked
        x_t = jnp.concatenate([x_t, condition.low_fi], axis=-1)  # (B, T, 2)
    h = conv1d(params["entry"], x_t)  # (B, T, C_0)
    skips = [h]
    for p, stride in zip(params["down"], cfg.strides):
        h = downsample(p["resample"], h, stride)  # (B, T_{I-1}, C_{I-1}) -> (B, T_I, C_I)
        for p_block in p["blocks"]:
            h = run_block(p_block, x=h)
        skips.append(h)

    h = skips.pop()  # the bottom of the U: (B, T / prod(strides), C_D)
    if cfg.aligned_channels:  # Sec. 3.3.2: the vocoder's log-mel
        h = h + linear_layer(params["aligned"], condition.aligned)

    for p, stride in zip(reversed(params["up"]), reversed(cfg.strides)):
        h = upsample(p["resample"], h, stride)  # (B, T_I, C_I) -> (B, T_{I-1}, C_{I-1})
        # departs: Fig. 1, App. B.1 ("a mirror image of itself") and the Efficient U-Net have the
        # blocks before the up-sampling layer. Sec. 3.2 has them after it, as Table 2's counts have,
        # to 2.2 %. So the blocks of depth I on the way up, and their attention, have length T_{I-1}
        # and width C_{I-1}: those of depth 1 run at the full rate, and none at the bottom.
        for p_block in p["blocks"]:
            h = run_block(p_block, x=h)
        # Fig. 1: added, not concatenated. choice: unscaled; the Efficient U-Net has 1 / sqrt(2).
        h = h + skips.pop()
    return conv1d(params["exit"], h).astype(jnp.float32)  # (B, T, C_0) -> (B, T, C)


@partial(jax.jit, static_argnames="cfg")
def init_params(key, cfg: UNetConfig):
    """Initial parameters, the tree of `unet_spec(cfg)` with a float32 array for each Param."""
    leaves, tree = jax.tree.flatten(unet_spec(cfg))
    ends = np.cumsum([math.prod(p.shape) for p in leaves])
    noise = jax.random.normal(key, ends[-1:])  # numerics: one draw for all compiles faster
    noise = [z.reshape(p.shape) for p, z in zip(leaves, jnp.split(noise, ends[:-1]))]
    return jax.tree.unflatten(tree, [p.init(z) for p, z in zip(leaves, noise)])


def size_of(spec) -> int:
    return sum(math.prod(p.shape) for p in jax.tree.leaves(spec))


def param_count(model: Model | str) -> int:
    """Table 2's "# Params" of a Model, or of a name in MODELS."""
    return size_of(unet_spec((MODELS[model] if isinstance(model, str) else model).unet))


# ---- What a model is conditioned on: resampling and log-mel (Sec. 3.3) ----

def fft_resample(x, length: int, xp=jnp):
    """Sec. 3.3.1: (B, T) -> (B, length), up by zero-padding the Fourier coefficients.

    choice: down by cropping them; and super-resolution's input is up-sampled in the same way."""
    T = x.shape[-1]
    n = min(T, length)
    X = own_clips(xp.fft.rfft, x)[..., : n // 2 + 1]
    if n % 2 == 0 and T != length:  # the shorter signal's Nyquist bin is two bins of the longer
        X = X * xp.where(xp.arange(n // 2 + 1) == n // 2, 2.0 if length < T else 0.5, 1.0)
    return (own_clips(partial(xp.fft.irfft, n=length), X) * (length / T)).astype(x.dtype)


MEL_WINDOW, MEL_FFT = 640, 1024  # choice: a 40 ms Hann window in a 64 ms transform


def mel_filters() -> np.ndarray:
    """(513, 80). choice: triangles of height 1, evenly over 2595 log10(1 + f / 700), to 8 kHz."""
    mels = np.linspace(0, 2595 * np.log10(1 + MEL_RATE / 2 / 700), MEL_CHANNELS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)  # Hz
    f = np.linspace(0, MEL_RATE / 2, MEL_FFT // 2 + 1)
    # Each is 1 at an edge of its own, 0 at all others, and linear between.
    return np.float32([np.interp(f, edges, peak) for peak in np.eye(MEL_CHANNELS + 2)[1:-1]]).T


def mel_window() -> np.ndarray:
    """The Hann window, padded to (1024,), scaled so that a full-scale sine has magnitude 1."""
    window = np.hanning(MEL_WINDOW + 1)[:-1]
    return np.pad(2 * window / window.sum(), (MEL_FFT - MEL_WINDOW) // 2).astype(np.float32)


def stft(audio):
    """(B, T) at 16 kHz -> complex (B, T / 160, 513). Frame k is centred on its 160 samples."""
    pad = (MEL_FFT - HOP) // 2
    starts = np.arange(audio.shape[-1] // HOP) * HOP
    frames = jnp.pad(audio, [(0, 0), (pad, pad)])[:, starts[:, None] + np.arange(MEL_FFT)]
    return own_clips(jnp.fft.rfft, frames * mel_window())  # (B, T / 160, 1024) -> (B, T / 160, 513)


def log_mel(audio):
    """Sec. 3.3.2: log-mel "normalized to lie within [-1, 1]". (B, T) at 16 kHz -> (B, T / 160, 80).

    choice: the mel magnitude in dB, -90 and less at -1, +10 at 1, the same map for every clip. As a
    filter sums several bins, a full-scale sine of 50 Hz to 7.9 kHz has 1.7 to 9.9 dB."""
    mel = jnp.matmul(jnp.abs(stft(audio)), mel_filters(), precision="highest")
    decibel = 20 * jnp.log10(jnp.maximum(mel, 1e-9))
    return jnp.clip((decibel + 40) / 50, -1, 1)


# ---- Training inputs and their augmentation (Sec. 4.1) ----

def noise_augment(key, x, t_max, schedule):
    """Sec. 4.1: noise; its "random diffusion time is chosen within [0, t_max]". x (B, T, C).

    choice: by the model's own schedule; the network is not told t: Fig. 1 has no entry for it."""
    key_t, key_eps = jax.random.split(key)
    t = jax.random.uniform(key_t, x.shape[:1], maxval=t_max)  # (B,)
    return diffuse(x, jax.random.normal(key_eps, x.shape), schedule(t))


def gaussian_blur(x, std, taps, axis):
    """Sec. 4.1: Gaussian blur of x (B, T, C) along an axis, of std (B,) in elements.

    choice: 10 taps, which have no centre, are at -5..4. So a small std is the identity, and a large
    one delays x by up to 0.36 of an element. choice: the edges are repeated."""
    offsets = np.arange(taps) - taps // 2
    kernel = jax.nn.softmax(-(offsets**2) / (2 * std[:, None] ** 2))  # (B, taps), sums to 1
    pad = [(0, 0)] * 3
    pad[axis] = (taps // 2, taps - 1 - taps // 2)
    padded = jnp.pad(x, pad, mode="edge")
    shifted = [lax.slice_in_dim(padded, j, j + x.shape[axis], axis=axis) for j in range(taps)]
    return sum(kernel[:, j, None, None] * shifted[j] for j in range(taps))


def augment(model: Model, key, x, blur_axes):
    """Sec. 4.1: blur and noise on a conditioning input x (B, T, C). choice: blur first, and of the
    up-sampled audio, as the noise: its deviation counts samples at 16 kHz."""
    key_blur, key_noise = jax.random.split(key)
    training = model.training
    if training.blur_taps:
        low, high = training.blur_std  # choice: uniform between them
        std = jax.random.uniform(key_blur, x.shape[:1], minval=low, maxval=high)  # (B,)
        for axis in blur_axes:  # a 2D Gaussian is two 1D ones. choice: with the same std
            x = gaussian_blur(x, std, training.blur_taps, axis)
    return noise_augment(key_noise, x, training.t_max, SCHEDULES[training.noise_schedule])


def pad_to(x, length, value):
    """x (B, T, C) padded to `length` with silence: `value` is 0 for audio, -1 for log-mel."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1]), (0, 0)], constant_values=value)


def padded_length(cfg: UNetConfig, length: int) -> int:
    """`length` rounded up to a multiple of prod(strides).

    departs: App. B.1 has T_I = T_{I-1} / S_I, which for 30 s is whole in the vocoder alone."""
    multiple = math.prod(cfg.strides)
    return -(-length // multiple) * multiple


def training_inputs(model: Model, key, batch: Batch):
    """Sec. 3.3: x (B, T, C), and the condition it comes with.

    choice: low-fidelity audio and log-mel are made of the snippet, not of the clip that it is cut
    from. The FFT then takes the snippet for one period, the log-mel has silence around it."""
    audio, condition = batch
    samples = audio.shape[1]
    x = log_mel(audio) if writes_log_mel(model) else audio[:, :, None]  # (B, T, C)
    T = padded_length(model.unet, x.shape[1])
    if model.low_rate:  # Secs. 3.3.1, 3.3.3: the clip at the lower rate, up-sampled
        low = fft_resample(audio, samples * model.low_rate // model.rate)
        low_fi = augment(model, key, fft_resample(low, samples)[:, :, None], blur_axes=(1,))
        condition = condition._replace(low_fi=pad_to(low_fi, T, 0))  # (B, T, 1)
    if model.unet.aligned_channels:  # Sec. 3.3.2
        aligned = augment(model, key, log_mel(audio), blur_axes=(1, 2))
        condition = condition._replace(aligned=pad_to(aligned, T // HOP, -1))  # (B, T / 160, 80)
    return pad_to(x, T, -1 if writes_log_mel(model) else 0), condition


# ---- Both routes, from prompts to audio (Sec. 3.3) ----

def sampling_condition(model: Model, given: Condition, previous, seconds: float) -> Condition:
    """Sec. 3.3: `given`, with `previous`, the output of the stage before, as low_fi or aligned.

    previous is audio (B, samples) or log-mel (B, frames, 80). It is padded as in training, but not
    augmented: Sec. 4.1 augments "at training time"."""
    length = round(seconds * model.rate)
    T = padded_length(model.unet, length)
    if model.low_rate:
        low_fi = fft_resample(previous, length)[:, :, None]
        return given._replace(low_fi=pad_to(low_fi, T, 0))  # (B, T, 1)
    if model.unet.aligned_channels:
        return given._replace(aligned=pad_to(previous, T // HOP, -1))  # (B, T / 160, 80)
    return given


def generate(prompts, weights, encode, seconds=30.0, seed=0, progress=None):
    """Prompts to music, by one of ROUTES (Sec. 3.3).

    prompts    B strings, one a clip; clip i of a seed does not depend on the others
    weights    {name: (Model, params)} in the route's order, with the Model's inference
               parameters; without super-resolution it stops at 16 kHz, as in Sec. 4.3.1
    encode     (prompts, Model) -> Condition with their embeddings and mask (Sec. 3.4), where
               the model reads text
    progress   called as progress(name, done, N)
    Returns {name: its output}: audio (B, seconds * rate), log-mel (B, frames that cover it, 80)."""
    outputs, previous = {}, None
    for stage, (name, (model, params)) in enumerate(weights.items()):
        condition = sampling_condition(model, encode(prompts, model), previous, seconds)
        stage_key = jax.random.fold_in(jax.random.key(seed), stage)
        keys = jax.vmap(partial(jax.random.fold_in, stage_key))(jnp.arange(len(prompts)))  # (B,)
        length = round(seconds * model.rate)
        if writes_log_mel(model):
            length = -(-round(seconds * MEL_RATE) // HOP)  # frames that cover the audio
        report = progress and partial(progress, name)
        x = sample(params, model, condition, keys, padded_length(model.unet, length), report)
        x = x[:, :length]  # (B, T, C)
        outputs[name] = previous = x if writes_log_mel(model) else x[:, :, 0]
    return outputs


# ---- Pseudo-labels (Sec. 3.5) ----
# MuLan, the paper's joint embedding, is not public: the user brings embeddings, as arrays. In this
# section K and K' count captions, N clips and M the vocabulary.

CAPTION_BLOCK = 4_096  # captions compared at a time


def windows(audio) -> np.ndarray:
    """Sec. 3.5: "non-overlapping 10-second windows", (samples,) at 16 kHz -> (windows, 160_000).

    choice: a rest of 5 s or more, and a clip under 10 s, is filled up with silence; a shorter rest
    is cut off."""
    size = 10 * MEL_RATE
    n = max(1, (len(audio) + size // 2) // size)
    return np.pad(audio, (0, size))[: n * size].reshape(n, size)


def unit(x, xp=jnp):
    """x (..., E) divided by its norm, so that a product is a cosine. numerics: 0 stays 0."""
    return x / xp.maximum(xp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


def top_captions(captions, clips, k: int = 10) -> np.ndarray:
    """Sec. 3.5: "the top K captions that are closest to the audio in the embedding space".

    clips (N, E), each the average over its 10-second windows; captions (M, E). Returns indices
    (N, k), the highest cosine first, of equals the first. numerics: captions are read in blocks, so
    that 4 million may lie in a np.memmap."""
    assert clips.shape[1] == captions.shape[1] and k <= len(captions)
    clips = jnp.asarray(clips, jnp.float32)
    best, index = jnp.full((len(clips), k), -jnp.inf), jnp.zeros((len(clips), k), jnp.int32)
    for start in range(0, len(captions), CAPTION_BLOCK):
        part = np.asarray(captions[start : start + CAPTION_BLOCK], np.float32)
        part = np.pad(part, [(0, CAPTION_BLOCK - len(part)), (0, 0)])  # one shape: compiled once
        best, index = _merge_top(best, index, clips, part, start, len(captions))
    return np.asarray(index)


def draw_captions(top, k_prime: int, seed) -> np.ndarray:
    """Sec. 3.5: "K' out of the K captions with probabilities inverse to the frequency counts".

    top (N, K) of all clips of the data set, from `top_captions`. Returns (N, K'), closest first.
    choice: drawn one after the other, without replacement. numerics: the K' smallest of exponential
    times with rates 1 / count are distributed as K' such draws."""
    counts = np.bincount(top.ravel())
    times = -np.log1p(-np.random.default_rng(seed).random(top.shape)) * counts[top]  # (N, K)
    first = np.sort(np.argsort(times, axis=1)[:, :k_prime], axis=1)
    return np.take_along_axis(top, first, axis=1)


# ---- Metrics (Sec. 4.3.2) ----
# An embedder is any function of audio (B, samples), float32 at 16 kHz, to embeddings, clip-wise
# (B, E) or frame-wise (B, F frames, E). VGGish, Trill and MuLan, the paper's, are not here.

class Gaussian(NamedTuple):
    mean: np.ndarray  # (E,)
    root: np.ndarray  # (E, R), R = min(N, E): root @ root.T is the covariance


def gaussian(x) -> Gaussian:
    """Sec. 4.3.2: "the distribution of the embeddings from each set are Gaussian". x (N, E), N > 1.

    departs: the covariance, as in Kilgour et al. (2018), where the text has "correlation matrix".
    choice: over N - 1. numerics: its root by QR of the centred x, in float64, squares nothing."""
    x = np.asarray(x, np.float64)
    r = np.linalg.qr(x - x.mean(axis=0), mode="r")  # (R, E); r.T @ r is N - 1 times the covariance
    return Gaussian(x.mean(axis=0), r.T / math.sqrt(len(x) - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """FAD (Sec. 4.3.2; Kilgour et al., 2018): |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    numerics: the trace of the last root is the sum of the singular values of root_a^T root_b. So
    fewer clips than dimensions, whose covariance is singular, cost no digits."""
    shared = np.linalg.svd(a.root.T @ b.root, compute_uv=False).sum()
    traces = np.sum(a.root**2) + np.sum(b.root**2)
    return max(0.0, float(np.sum((a.mean - b.mean) ** 2) + traces - 2 * shared))


def similarity(a, b) -> float:
    """Sec. 4.3.2: the cosine of the embeddings of a pair, averaged over all pairs. a, b (N, E)."""
    a, b = (unit(np.asarray(x, np.float64), np) for x in (a, b))
    return float(np.mean(np.sum(a * b, axis=1)))


def table_6(generated, ground_truth, text=None, seed: int = 0) -> dict:
    """{row: {column: similarity}} of one data set in Table 6, from paired embeddings (N, E), N > 1.

    choice: the shuffle is one random cycle through all clips, so none is paired with itself."""
    order = np.random.default_rng(seed).permutation(len(ground_truth))
    shuffled = np.empty_like(ground_truth)
    shuffled[order] = ground_truth[np.roll(order, 1)]
    rows = {"ground truth audio": ground_truth, "randomly shuffled audio": shuffled,
            "generated audio": generated}
    columns = {"gt-text": text, "gt-audio": ground_truth}
    return {row: {name: similarity(a, b) for name, b in columns.items() if b is not None}
            for row, a in rows.items()}


# ---- Sharding (Sec. 4.2.2) ----
# A mesh of devices has two axes: "data" splits the clips, "model" each matrix of the network.
# SHARDING says along which of the two each logical axis of an array is split; GSPMD (Xu et al.,
# 2021) derives the rest. choice: all of the table; to split otherwise, change it alone.

SHARDING = {     # parameters, activations   gradients, EMA, moments (ZeRO: Rajbhandari et al. 2020)
    "batch":     ("data",                    None),
    "channels":  (None,                      "data"),   # between the boxes of Figs. 1 and 5
    "hidden":    ("model",                   "model"),  # within a block, a feed-forward
    "heads":     ("model",                   "model"),  # inside an attention
    "whole":     (None,                      None),     # taps, inputs, phases of a stride
}  # fmt: skip


def make_mesh(model: int = 1, devices=None) -> jax.sharding.Mesh:
    """All devices as ("data", "model"), `model` of them along the second, or a ValueError."""
    devices = np.asarray(jax.devices() if devices is None else devices).ravel()
    if devices.size % model:
        raise ValueError(f"{devices.size} devices cannot be split {model} ways; the model axis "
                         "must divide them")
    return jax.sharding.Mesh(devices.reshape(-1, model), ("data", "model"))


def partition(mesh, shape, axes, column=0) -> PartitionSpec:
    """How SHARDING splits an array. ValueError where an axis does not divide, or two share devices.

    The second column only saves memory: what does not divide there stays whole."""
    spec = [SHARDING[axis][column] for axis in axes]
    for i, (size, axis, over) in enumerate(zip(shape, axes, spec)):
        if over and over in spec[:i]:
            raise ValueError(f"{axes}: two axes of one array are laid along {over!r}; see SHARDING")
        if over and size % mesh.shape[over]:
            if column == 0:
                raise ValueError(f"{axis!r} of size {size} does not divide among the "
                                 f"{mesh.shape[over]} devices along {over!r}; see SHARDING")
            spec[i] = None
    return PartitionSpec(*spec)


def shardings(cfg: UNetConfig, mesh, column=0):
    """NamedShardings of a U-Net's parameters or (column=1) of gradients, EMA and moments."""
    place = lambda p: NamedSharding(mesh, partition(mesh, p.shape, p.axes, column))
    return jax.tree.map(place, unet_spec(cfg))


def constrain(x, *axes):
    """x split as SHARDING says, where a mesh is set. `axes` names the first axes of x."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else lax.with_sharding_constraint(x, partition(mesh, x.shape, axes))


# ================================================================================================
# Nothing below is in the paper: the same mathematics in other forms, each tested equal to the plain
# one; small models; and what helps to hear and to measure them.
# ================================================================================================

# ---- The same mathematics in other forms ----

def own_clips(f, x):
    """f(x) for x (B, ...), each device with its own clips.

    numerics: left to itself, the partitioner of CPU programs gathers the whole batch for an FFT."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or isinstance(x, np.ndarray):
        return f(x)
    spec = PartitionSpec(SHARDING["batch"][0])
    return jax.shard_map(f, in_specs=spec, out_specs=spec)(x)


def percentile(a, q):
    """The smallest v with a share q of a row at or below it, 0 < q <= 1. a (B, T C) >= 0; v (B,).

    numerics: by bisection, to 2^-32 of the largest; a sort costs more than a small network."""
    rank = math.ceil(q * a.shape[1])

    def halve(_, bounds):
        low, high = bounds
        middle = (low + high) / 2
        enough = jnp.sum(a <= middle[:, None], axis=1) >= rank
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    return lax.fori_loop(0, 32, halve, (jnp.zeros(a.shape[0]), a.max(axis=1)))[1]


def unusual_conv1d(p, x, padding):
    """`conv1d` where x is shorter than the kernel, (B, T, C), or in pieces, (B, P, T / P, C).

    As a matrix product in the first case: XLA's CPU convolution is 40 times slower there. In the
    second, a piece is padded with its neighbours' frames."""
    (before, after), taps, t = padding, p["w"].shape[0], x.shape[-2]
    if x.ndim == 3:
        x = jnp.pad(x, [(0, 0), padding, (0, 0)])  # (B, T + taps - 1, C_in)
        x = jnp.concatenate([x[:, k : k + t] for k in range(taps)], axis=-1)  # (B, T, taps C_in)
        return x @ p["w"].reshape(x.shape[-1], -1) + p["b"]
    ends = jnp.pad(x[:, :-1, t - before :], [(0, 0), (1, 0), (0, 0), (0, 0)])  # of the piece before
    starts = jnp.pad(x[:, 1:, :after], [(0, 0), (0, 1), (0, 0), (0, 0)])  # of the piece after
    x = jnp.concatenate([ends, x, starts], axis=2)  # (B, P, T / P + taps - 1, C_in)
    folded = x.reshape(-1, *x.shape[2:])  # (B P, T / P + taps - 1, C_in)
    axes = ("NWC", "WIO", "NWC")
    y = lax.conv_general_dilated(folded, p["w"], (1,), "VALID", dimension_numbers=axes)
    return y.reshape(*x.shape[:2], t, -1) + p["b"]  # (B, P, T / P, C_out)


def long_attend(q, k, v, mask):
    """`attend` of 2^19 / L queries at a time: memory grows with T, not with its square."""
    one = lambda q_t: attend(q_t[:, :, None], k, v, mask)[:, :, 0]  # (B, H, K)
    y = lax.map(one, jnp.moveaxis(q, 2, 0), batch_size=max(1, 2**19 // k.shape[2]))
    return jnp.moveaxis(y, 0, 2)


@jax.jit
def _merge_top(best, index, clips, captions, start, end):
    """One block of `top_captions`: cosines and indices (N, K) of the best so far, updated.

    captions (M, E) are number start, start + 1, ...; from number end on they are padding."""
    numbers, captions = start + jnp.arange(len(captions)), unit(captions)

    def one_clip(best_index_clip):
        best, index, clip = best_index_clip
        cosines = jnp.dot(captions, clip, precision="highest")  # (M,)
        cosines = jnp.where(numbers < end, cosines, -jnp.inf)
        best, place = lax.top_k(jnp.concatenate([best, cosines]), len(best))  # of equals the first
        return best, jnp.concatenate([index, numbers])[place]

    return lax.map(one_clip, (best, index, unit(clips)), batch_size=256)


def pieces_of(cfg: UNetConfig, rows: int, length: int) -> int:
    """Into how many pieces to cut a clip: the fewest that make 8 sequences or more of `rows` clips,
    else as many as fit. A piece is whole frames at the bottom, and as long as a kernel reaches."""
    bottom = length // math.prod(cfg.strides)
    fits = [p for p in range(1, bottom + 1)
            if bottom % p == 0 and bottom // p >= cfg.kernel_size // 2]
    return min((p for p in fits if p * rows >= 8), default=max(fits, default=1))


def on_a_tpu_in_pieces(unet):
    """`unet` for clips that enter it cut into pieces, (B, P, T / P, C), where it runs on a TPU.

    It is the same network: only a convolution looks beyond a piece. But around every convolution of
    fewer than 8 sequences a TPU's compiler folds time into the batch, which triples memory traffic
    and compilation."""

    @wraps(unet)
    def entered(params, cfg, x_t, t, condition, text_on):
        mesh, pieces = jax.sharding.get_abstract_mesh(), 1
        if "TPU" in (jax.devices()[0] if mesh.empty else mesh.abstract_device).device_kind:
            rows = len(x_t) // (1 if mesh.empty else mesh.shape[SHARDING["batch"][0]])
            pieces = pieces_of(cfg, rows, x_t.shape[1])
        if pieces == 1:
            return unet(params, cfg, x_t, t, condition, text_on)
        cut = lambda a: constrain(a.reshape(a.shape[0], pieces, -1, a.shape[2]), "batch")
        in_time = {"low_fi": condition.low_fi, "aligned": condition.aligned}
        condition = condition._replace(**jax.tree.map(cut, in_time))
        return unet(params, cfg, cut(x_t), t, condition, text_on).reshape(x_t.shape)

    return entered


unet = on_a_tpu_in_pieces(unet)


# ---- Small models, for a laptop ----

def cosine_quiet(t, xp=jnp):
    """Eq. 6 raised by 15 dB: music of -15 dBFS gets the signal-to-noise ratios that Eq. 6 gives to
    a clip of unit variance.

    Under Eq. 6 itself, noise is louder than such music in nine tenths of t, where there is little
    to learn, and noise below -40 dBFS gets less than a hundredth of t."""
    return cosine(t, xp) + 1.5 * math.log(10)


def renoise_updates(schedule: Callable, times: np.ndarray, gamma: float) -> Update:
    """`ddpm_updates` that draws x_s from q(x_s | x0_hat) (Eq. 2), with noise that is all new.

    It re-noises x0_hat instead of keeping part of x_t: errors of a small network do not accumulate,
    but undecided detail is lost. So it is for models whose condition leaves little open. gamma
    plays no part."""
    u = ddpm_updates(schedule, times, 0)
    alpha_s, sigma_s = np.float32([*u.alpha_t[1:], 1]), np.float32([*u.sigma_t[1:], 0])
    return u._replace(keep=0 * u.keep, toward=alpha_s, noise=sigma_s)


@partial(jax.jit, static_argnames=("rate", "low_rate"))
def with_input_band(x, low_fi, rate: int, low_rate: int):
    """Audio x (B, T, C) at `rate` with the Fourier coefficients of low_fi below low_rate / 2.

    `training_inputs` makes low_fi by cropping those of the clip, so below low_rate / 2 they are
    known, and what a network changes there is an error. Without that error, fewer steps will do."""
    given = (jnp.fft.rfftfreq(x.shape[1], 1 / rate) < low_rate / 2)[:, None]
    spectrum = jnp.where(given, jnp.fft.rfft(low_fi, axis=1), jnp.fft.rfft(x, axis=1))
    return jnp.clip(jnp.fft.irfft(spectrum, x.shape[1], axis=1), -1, 1)


@partial(jax.jit, static_argnames=("rate", "hz"))
def without_hum(x, rate: int, hz: float):
    """Audio (B, T, C) at `rate` without hz, 2 hz, 3 hz, ...: half is left 1.7 Hz away, all at 5.

    Up-sampling leaves a tone at the rate of the layer below (Pons et al., 2020). It is a fortieth
    of the error of eps, so no loss sees it; but it has the same phase at every step, and in a rest
    it stands up to 26 dB above the noise around it. Music has next to nothing in these hertz. The
    filter is soft: a sharp one rings, and puts what it takes from loud music into the rests."""
    frequency = jnp.fft.rfftfreq(x.shape[1], 1 / rate)
    nearest = hz * jnp.maximum(1, jnp.round(frequency / hz))
    kept = 1 - jnp.exp(-(((frequency - nearest) / 2) ** 2))
    spectrum = jnp.fft.rfft(x, axis=1) * kept[:, None]
    return jnp.clip(jnp.fft.irfft(spectrum, x.shape[1], axis=1), -1, 1)


SCHEDULES["cosine_quiet"] = cosine_quiet
STEP_SCHEDULES["quadratic"] = np.diff(np.linspace(0, 1, 1001) ** 2).tolist()  # t_n = (n / N)^2
SAMPLERS["renoise"] = renoise_updates
# In loud noise a large error in x0_hat is a small one in eps. So the weight is w_t = 1 / alpha_t^2,
# up to 149: Eq. 1 is then the loss in v of Salimans & Ho (2022).
LOSS_WEIGHTS["velocity"] = lambda logsnr_t: 1 + jnp.exp(jnp.minimum(-logsnr_t, 5.0))

# fmt: off
TINY = dict(              # base kernel strides     channels       blocks         t_max steps  hum
    waveform_generator=       (32, 7, (4,4,4,4,4,4), (1,1,2,3,4,4), (1,1,3,3,1,0), 0.0,  32,  200),
    waveform_cascader=        (32, 7, (4,4,4,4,4),   (1,2,3,3,2),   (1,1,1,1,1),   0.1,  12, 1000),
    spectrogram_generator=    (96, 5, (2,4,3,2,2),   (2,3,2,1,1),   (2,1,1,1,0),   0.0,  64, None),
    spectrogram_vocoder=      (32, 5, (5,4,4,2),     (2,4,7,8),     (1,2,2,2),     0.06, 24,  800),
    superresolution_cascader= (32, 7, (4,4,4,4),     (1,1,2,2),     (1,1,1,1),     0.02, 12, None),
)
# fmt: on


def tiny(model: Model) -> Model:
    """The same model small enough to train on a laptop: narrow, few blocks, short clips, few steps.

    A stride of S folds S frames of 80 channels into one vector; if that is much narrower than 80 S,
    noise and music cannot be told apart. So the spectrogram generator strides by 2 first, not by 4.
    The log-mel enters the vocoder at the bottom: only blocks on the way up see it. The vocoder's
    last stride is 2, so the first of those are 224 channels wide, at 200 Hz. The generators spend
    blocks where a frame is the attack of a note, and none at the last depth, where it is 1 s."""
    base, kernel, strides, channels, blocks, t_max, steps, hum = TINY[model.name]
    unet = replace(model.unet, base_dimension=base, kernel_size=kernel, strides=strides,
                   channels=channels, blocks=blocks, head_width=16, text_width=64)
    training = replace(
        model.training, steps=2_000, batch_size=8,
        seconds=5.12 if model.training.seconds == 30 else 1.28,
        learning_rate=1e-3, warmup_steps=100, decay_steps=20_000,
        # Under Table 2's schedules noise is louder than quiet music at most t (`cosine_quiet`).
        # With Sec. 4.1's t_max it also drowns the conditioning input, and a short run learns to
        # ignore that. So: quieter schedules, a smaller t_max, half the blur.
        noise_schedule="cosine" if writes_log_mel(model) else "cosine_quiet",
        t_max=t_max, blur_std=tuple(std / 2 for std in model.training.blur_std),
        # A model without text must learn to find tones in loud noise. The quiet schedules have
        # little of it, so it weighs more.
        loss_weight=model.training.loss_weight if uses_text(model) else "velocity")
    # Half the guidance and gamma = 0 suit a small model. So do even steps: 64 back-heavy ones
    # leave four for t < 1/3, where detail is made. Super-resolution, to which two thirds of x are
    # known from the start, takes larger steps at first and smaller ones at last.
    schedule = "quadratic" if model.rate > MEL_RATE else "uniform"
    cfg_scale = model.inference.cfg_scale and model.inference.cfg_scale / 2
    sampler = "ddpm" if uses_text(model) else "renoise"
    keep_input = model.low_rate is not None
    return replace(
        model, unet=unet, training=training,
        inference=InferenceConfig(schedule, 0, cfg_scale, steps, sampler, hum, keep_input))


# ---- To hear and to measure ----

def griffin_lim(log_mel_frames, iterations: int = 32):
    """A rough (B, F, 80) -> (B, 160 F) inverse of `log_mel`, to hear one without the vocoder.

    Griffin & Lim (1984): alternate between the magnitudes and the phases of a consistent signal."""
    mel = 10 ** ((50 * log_mel_frames - 40) / 20) - 10 ** (-90 / 20)  # silence, at -1, becomes 0
    magnitude = jnp.maximum(mel @ np.linalg.pinv(mel_filters()), 0)  # (B, F, 513)
    window, pad = mel_window(), (MEL_FFT - HOP) // 2

    def inverse(z):  # the least-squares inverse of `stft`: (B, F, 513) -> (B, 160 F)
        _, x = jax.scipy.signal.istft(z, window=window, nperseg=MEL_FFT, noverlap=MEL_FFT - HOP,
                                      boundary=False, time_axis=1, freq_axis=2)
        return x[:, pad : x.shape[1] - pad] / window.sum()

    phase = jnp.exp(2j * jnp.pi * jax.random.uniform(jax.random.key(0), magnitude.shape))
    for _ in range(iterations):
        spectrum = stft(inverse(magnitude * phase))
        phase = spectrum / jnp.maximum(jnp.abs(spectrum), 1e-8)
    return inverse(magnitude * phase)


@jax.jit
def log_mel_statistics(audio):
    """An embedder to try things with: mean and deviation of each log-mel channel in each second.

    (B, samples) -> (B, F, 160), F whole seconds. It knows loudness and spectrum, nothing of music:
    its FAD compares with no published one."""
    seconds = audio.shape[1] // MEL_RATE
    frames = log_mel(audio)[:, : 100 * seconds].reshape(len(audio), seconds, 100, MEL_CHANNELS)
    return jnp.concatenate([frames.mean(axis=2), frames.std(axis=2)], axis=-1)


def fad_infinity(x, reference: Gaussian, seed: int = 0, sizes: int = 15) -> float:
    """FAD of infinitely many generated x (N, E), N > 7: a line through FAD over 1 / n, read at 0.

    Chong & Forsyth (2020); for FAD, Gui et al. (2023). The reference stays as it is. Sizes n from
    N / 4 to N are drawn without replacement (with it the limit would be the FAD of these N clips,
    not of infinitely many). Noise can make it negative."""
    n = np.linspace(len(x) // 4, len(x), sizes).astype(int)
    draw = np.random.default_rng(seed)
    fads = [frechet_distance(gaussian(draw.choice(x, k, replace=False)), reference) for k in n]
    return float(np.polyfit(1 / n, fads, 1)[1])


# ---- `python noise2music.py`: a slide for each model ----

def describe(model: Model, seconds: float = 30.0) -> str:
    """A model in a few lines: Tables 2 and 3, and the tensor at every depth of its U-Net."""
    cfg, spec, i = model.unet, unet_spec(model.unet), model.inference
    length = padded_length(cfg, round(seconds * model.rate))
    steps = i.steps or len(step_schedules(model)[i.step_schedule])
    guidance = f"guidance {i.cfg_scale:g}" if i.cfg_scale is not None else "no guidance"
    lines = [f"{model.name}: {model.rate} x {cfg.out_channels} a second",
             f"  {size_of(spec) / 1e6:.1f} M params (Table 2: {model.training.params / 1e6:g} M), "
             f"{steps} steps {i.step_schedule}, gamma {i.gamma}, {guidance}",
             "  depth    padded  channels  stride  blocks  attention     parameters",
             f"  {0:5d} {length:9,d} {cfg.base_dimension:9d}"]
    for depth in range(cfg.depth):
        length //= cfg.strides[depth]
        kinds = ("self", cfg.self_attention), ("cross", cfg.cross_attention)
        attention = " + ".join(kind for kind, on in kinds if on[depth])
        size = size_of((spec["down"][depth], spec["up"][depth]))
        width = cfg.base_dimension * cfg.channels[depth]
        lines.append(f"  {depth + 1:5d} {length:9,d} {width:9d} {cfg.strides[depth]:7d} "
                     f"{cfg.blocks[depth]:7d}  {attention:12s} {size / 1e6:8.1f} M")
    return "\n".join(lines)


if __name__ == "__main__":
    for route, names in ROUTES.items():
        rates = (f"{name} ({MODELS[name].rate} Hz)" for name in names)
        print(f"{route} route: prompt -> {' -> '.join(rates)}")
    print("The way up repeats each depth's blocks, at the length and width of the row above.")
    for model in MODELS.values():
        print(f"\n{describe(model)}")
