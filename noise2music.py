"""Noise2Music: Text-conditioned Music Generation with Diffusion Models, as code, in the paper's order.

    Tables 2, 3, 8, 9     the five models, their training and their inference parameters
    Eqs. 2, 3, 5, 6       forward process and noise schedules
    Eq. 1                 the loss
    Sec. 3.1              classifier-free guidance and dynamic clipping
    Eq. 4                 the ancestral (DDPM) sampler
    Figs. 5 and 1         the block and the 1D Efficient U-Net
    Secs. 3.3, 4.1        what the cascaded models are conditioned on, and how that is augmented
    Secs. 3.3, 4.2.1      both routes from prompts to 24 kHz audio
    Sec. 3.5              pseudo-labels
    Sec. 4.3.2            Frechet audio distance and similarity
    Sec. 4.2.2            how all of it is laid out on many devices

Comments point into the paper (`Eq. 4`, `Sec. 4.1`, `Table 9`, `Fig. 5`). Where it is silent they say `choice:`, where
we differ on purpose `departs:`, and where the same mathematics is written in a safer form `numerics:`.

Letters, in shapes:                         Symbols:
    B  clips in a batch                         x, x_t       a clip; the clip with the noise of time t
    T  length of a sequence in time             eps          the noise, N(0, I)
    C  channels                                 x0_hat       the clip that a noise prediction implies
    L  text tokens, E  width of a token         logsnr_t     the paper's lambda_t = ln(alpha_t^2 / sigma_t^2)
    H  attention heads, K  width of a head      gamma        stochasticity of the sampler (Eq. 4), nothing else
    D  depth of the U-Net, I  a depth in 1..D   cfg_scale, loss_weight   the two things the paper calls w
    S  stride of a down- or up-sampling layer   low_fi, aligned          the two ways to condition on audio
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Callable, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

# ---- The tables ----

MEL_CHANNELS = 80  # Sec. 3.3.2: a log-mel frame has 80 channels ...
HOP = 160  # ... and is 10 ms of 16 kHz audio; 160 is also the vocoder's compression rate
MEL_RATE = 16_000


@dataclass(frozen=True)
class UNetConfig:
    """A column of Table 9; below the line, what the table leaves to the text and the figures."""

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
    text_width: int = 2048  # choice: T5 v1.1 XL; Table 2's parameter counts single it out
    head_width: int = 128  # choice: 8 heads of 128, so q, k and v are 1024 wide at any C; Table 2 again
    groups: int = 8  # choice: groups of a GroupNorm
    segments: int = 1  # numerics: pieces that a clip is computed in, see `conv1d`; the same network for any number


@dataclass(frozen=True)
class TrainingConfig:
    """A row of Table 2; below the line, Sec. 4.1."""

    params: float  # as printed; `param_count` counts
    steps: int
    token_length: int  # 0 where the model reads no text
    loss_weight: str  # a key of LOSS_WEIGHTS
    noise_schedule: str  # a key of SCHEDULES
    # ---
    batch_size: int
    seconds: float  # whole clips for the generators, "3 to 4-second randomly sampled snippets" for the rest
    t_max: float = 0.0  # noise augmentation of the conditioning input, up to this diffusion time
    blur_taps: int = 0  # blur augmentation: size of the kernel ...
    blur_std: tuple[float, float] = (0.0, 0.0)  # ... and the range of its standard deviation
    learning_rate: float = 1e-4
    warmup_steps: int = 10_000
    decay_steps: int = 2_500_000
    beta1: float = 0.9
    beta2: float = 0.999
    ema: float = 0.9999
    occlusion: float = 0.1  # share of the batch whose text is hidden, for guidance


@dataclass(frozen=True)
class InferenceConfig:
    """A row of Table 3."""

    step_schedule: str  # a key of TABLE_8[model]
    gamma: float | None  # departs: None, in tiny models, draws x_s from x0_hat alone; see `ddpm_updates`
    cfg_scale: float | None
    # ---
    steps: int | None = None  # None: as many as Table 8 lists; N: that curve resampled to N steps (Fig. 3)


@dataclass(frozen=True)
class Model:
    """One of the five diffusion models: its network, its training, its inference, and what it reads and writes."""

    name: str
    unet: UNetConfig
    training: TrainingConfig
    inference: InferenceConfig
    rate: int  # elements of x per second: samples of audio, or log-mel frames
    audio_rate: int  # Hz of the audio it is trained on (Sec. 3.6)
    low_rate: int | None  # Hz of the low-fidelity audio stacked with x_t


NAMES = ("waveform_generator", "waveform_cascader", "spectrogram_generator", "spectrogram_vocoder", "superresolution_cascader")
T, F = True, False

# fmt: off
TABLE_9 = dict(  # waveform generator   waveform cascader  spectrogram generator  spectrogram vocoder  super-resolution cascader
    base_dimension= (256,                256,               256,                128,              256),
    kernel_size=    (7,                  7,                 9,                  5,                7),
    depth=          (6,                  5,                 5,                  4,                4),
    strides=        ((4, 4, 4, 4, 4, 4), (4, 4, 4, 4, 4),   (4, 3, 2, 2, 2),    (2, 4, 4, 5),     (4, 4, 4, 4)),
    channels=       ((1, 1, 2, 3, 4, 4), (1, 1, 2, 3, 4),   (1, 2, 2, 3, 4),    (1, 1, 2, 4),     (1, 1, 2, 2)),
    blocks=         ((3, 3, 3, 4, 4, 4), (3, 3, 4, 6, 6),   (6, 6, 6, 6, 6),    (4, 4, 4, 4),     (4, 4, 4, 4)),
    self_attention= ((F, F, F, T, T, T), (F, F, F, F, F),   (F, F, F, T, T),    (F, F, F, F),     (F, F, F, F)),
    cross_attention=((F, F, F, T, T, T), (F, F, F, T, T),   (F, F, F, T, T),    (F, F, F, F),     (F, F, F, F)),
    attention_heads=(8,                  8,                 8,                  0,                0),
    # Fig. 1 and Sec. 3.3: the entries and the exit.
    in_channels=    (1,                  2,                 MEL_CHANNELS,       1,                2),
    out_channels=   (1,                  1,                 MEL_CHANNELS,       1,                1),
    aligned_channels=(0,                 0,                 0,                  MEL_CHANNELS,     0),
)

TABLE_2 = {                       # params  steps      tokens  loss weight   schedule   Sec. 4.1
    "waveform_generator":         (724e6,   1_600_000, 64,     "simplified", "cosine",  2048, 30.0),
    "waveform_cascader":          (487e6,     460_000, 64,     "simplified", "linear",  2048, 3.2, 0.5, 10, (0.1, 5.0)),
    "spectrogram_generator":      (745e6,   1_800_000, 96,     "sigma",      "linear",  2048, 30.0),
    "spectrogram_vocoder":        (25.7e6,    840_000, 0,      "simplified", "linear",  2048, 3.2, 1.0, 5, (0.2, 1.0)),
    # choice: no blur for super-resolution; Sec. 4.1 gives a kernel to "the cascader" and to "the vocoder" only.
    "superresolution_cascader":   (81e6,      270_000, 0,      "simplified", "linear",  4096, 3.2, 1.0),
}

TABLE_3 = {                       # denoising steps   gamma  CFG scale
    "waveform_generator":         ("front_heavy",     0,     10.0),
    "waveform_cascader":          ("front_heavy",     1,     5.0),
    "spectrogram_generator":      ("back_heavy_eval", 0,     5.0),  # "modified further for evaluation" (App. A.2)
    "spectrogram_vocoder":        ("front_heavy",     0,     None),
    "superresolution_cascader":   ("front_heavy",     0,     None),
}

TABLE_4 = {  # Sec. 4.2.2: ms a step, for four clips of 30 s on four TPU v4
    "waveform_generator":         25.0,
    "waveform_cascader":          75.0,
    "spectrogram_generator":      8.3,
    "spectrogram_vocoder":        29.9,
    "superresolution_cascader":   71.7,
}

TABLE_8 = {  # time steps, from t = 0 to t = 1
    "waveform_generator": dict(
        front_heavy=(front_heavy := [0.01 / 200] * 200 + [0.04 / 400] * 400 + [0.15 / 200] * 200 + [0.3 / 150] * 150
                                    + [0.5 / 50] * 50),
        back_heavy=front_heavy[::-1],
        uniform=[1.0 / 1000] * 1000),
    "waveform_cascader": dict(
        front_heavy=(front_heavy := [0.05 / 400] * 400 + [0.15 / 200] * 200 + [0.3 / 150] * 150 + [0.5 / 50] * 50),
        back_heavy=front_heavy[::-1],
        uniform=[1.0 / 800] * 800),
    "spectrogram_generator": dict(  # the first two lists hold 2000 steps, as printed
        front_heavy=(front_heavy := [0.01 / 400] * 400 + [0.04 / 800] * 800 + [0.15 / 400] * 400 + [0.3 / 300] * 300
                                    + [0.5 / 100] * 100),
        back_heavy=front_heavy[::-1],
        uniform=[1.0 / 1000] * 1000,
        back_heavy_eval=[0.3 / 50] * 50 + [0.3 / 150] * 150 + [0.2 / 300] * 300 + [0.2 / 500] * 500),
    "spectrogram_vocoder": dict(
        front_heavy=(front_heavy := [0.05 / 50] * 50 + [0.15 / 30] * 30 + [0.3 / 15] * 15 + [0.5 / 5] * 5),
        back_heavy=front_heavy[::-1],
        uniform=[1.0 / 100] * 100),
    "superresolution_cascader": dict(
        front_heavy=[0.05 / 400] * 400 + [0.15 / 200] * 200 + [0.3 / 150] * 150 + [0.5 / 50] * 50),
}

SEC_3_3 = {                       # x per second  Hz of training audio  Hz of the stacked low-fidelity audio
    "waveform_generator":         (3_200,         3_200,                None),
    "waveform_cascader":          (16_000,        16_000,               3_200),
    "spectrogram_generator":      (100,           16_000,               None),
    "spectrogram_vocoder":        (16_000,        16_000,               None),
    "superresolution_cascader":   (24_000,        24_000,               16_000),
}
# fmt: on
del T, F

MODELS = {
    name: Model(
        name,
        UNetConfig(*column),
        TrainingConfig(*TABLE_2[name]),
        InferenceConfig(*TABLE_3[name]),
        *SEC_3_3[name],
    )
    for name, column in zip(NAMES, zip(*TABLE_9.values()))
}

ROUTES = {  # Sec. 3.3: from the prompt to 24 kHz
    "waveform": ("waveform_generator", "waveform_cascader", "superresolution_cascader"),
    "spectrogram": ("spectrogram_generator", "spectrogram_vocoder", "superresolution_cascader"),
}


def uses_text(model: Model) -> bool:
    return any(model.unet.cross_attention)  # departs: "all the models, except the vocoder" (Sec. 4.1); Tables 2, 3 and 9 win


def writes_log_mel(model: Model) -> bool:
    return model.unet.out_channels == MEL_CHANNELS


# fmt: off
TINY = {                          # base  kernel  strides             channels            blocks              t_max  steps
    "waveform_generator":         (32,    7,      (4, 4, 4, 4, 4, 4), (1, 1, 2, 3, 4, 4), (1, 1, 3, 3, 1, 0), 0.0,   64),
    "waveform_cascader":          (32,    7,      (4, 4, 4, 4, 4),    (1, 2, 3, 3, 2),    (1, 1, 1, 1, 1),    0.05,  24),
    "spectrogram_generator":      (96,    5,      (2, 4, 3, 2, 2),    (2, 3, 2, 1, 1),    (2, 1, 1, 1, 0),    0.0,   64),
    "spectrogram_vocoder":        (32,    5,      (5, 4, 4, 2),       (2, 4, 7, 8),       (1, 2, 2, 2),       0.06,  24),
    "superresolution_cascader":   (32,    7,      (4, 4, 4, 4),       (1, 1, 2, 2),       (1, 1, 1, 1),       0.02,  24),
}
# fmt: on


def tiny(model: Model) -> Model:
    """The same model small enough to train on a laptop: narrow, with few blocks, short clips, fewer steps.

    Where the spectrogram generator first strides by 2, Table 9 strides by 4: what is behind a stride S must be about as wide as
    the 80 S numbers of noise in S frames, or it cannot tell them from music. The vocoder strides by 2 last, not first: only the
    blocks above the bottom see the log-mel, so they are better many, wide and slow. The generators spend their blocks where a
    frame is the attack of a note, and none at the last depth, where a frame is a second.
    """
    base, kernel, strides, channels, blocks, t_max, steps = TINY[model.name]
    unet = replace(model.unet, base_dimension=base, kernel_size=kernel, strides=strides, channels=channels, blocks=blocks,
                   head_width=16, text_width=64)  # fmt: skip
    training = replace(
        model.training,
        steps=2_000,
        batch_size=8,
        seconds=5.12 if model.training.seconds == 30 else 1.28,
        learning_rate=1e-3,
        warmup_steps=100,
        decay_steps=20_000,
        # departs: under Table 2's linear schedule, and up to Sec. 4.1's t_max, noise is louder than the music most of the time,
        # in x_t and in the conditioning input, which a short run then learns to ignore. So less of it, and half the blur.
        noise_schedule="cosine" if writes_log_mel(model) else "cosine_quiet",
        t_max=t_max,
        blur_std=tuple(std / 2 for std in model.training.blur_std),
        # departs: without text, tones must be found in loud noise, of which there is little now, so the loss weighs that more.
        loss_weight=model.training.loss_weight if uses_text(model) else "velocity",
    )
    # choice: half the guidance and no extra noise, which suit a small model. Few steps, and even ones, where Table 8 has them: of
    # 64 back-heavy steps, three are left for the last third of t. departs: gamma, where the condition leaves little open.
    step_schedule = "uniform" if "uniform" in TABLE_8[model.name] else model.inference.step_schedule
    gamma = 0 if uses_text(model) else None
    inference = InferenceConfig(step_schedule, gamma, model.inference.cfg_scale and model.inference.cfg_scale / 2, steps)
    return replace(model, unet=unet, training=training, inference=inference)


# ---- Forward process and noise schedules (Appendix A) ----
# A schedule maps t in [0, 1] to logsnr_t. It is evaluated by jax in training, where t is drawn on the device, and by
# numpy in float64 (`xp=np`) for the sampler, whose coefficients are all known before the first step.


def cosine(t, xp=jnp):
    """Eq. 6: alpha_t = cos(a t + b), from logsnr_0 = 20 to logsnr_1 = -20."""
    b = math.atan(math.exp(-10))
    a = math.atan(math.exp(10)) - b
    # numerics: cos(a t + b) = sin(a (1 - t) + b) because a + 2 b = pi / 2, and a sine near 0 keeps its digits.
    return 2 * xp.log(xp.sin(a * (1 - t) + b) / xp.sin(a * t + b))


def linear(t, xp=jnp):
    """Eq. 5 as Ho et al. (2020) mean it: sigma_t^2 = 1 - exp(-(1e-4 + 10 t^2)), logsnr from 9.21 to -10.0.

    departs: the printed line ends at sigma_1^2 = 0.02, a nearly clean clip, while sampling starts from N(0, I). Its
    two constants are the range of Ho et al.'s beta; this is their schedule in continuous time, sigma_0^2 as printed.
    """
    return -xp.log(xp.expm1(1e-4 + 10 * t**2))


def linear_eq5(t, xp=jnp):
    """Eq. 5 as printed: sigma_t^2 = (0.02 - 0.0001) t + 0.0001. No model of ours uses it: it cannot sample from noise."""
    sigma_sq = (0.02 - 0.0001) * t + 0.0001
    return xp.log1p(-sigma_sq) - xp.log(sigma_sq)  # Eq. 3


def cosine_quiet(t, xp=jnp):
    """Eq. 6 moved to music of -15 dBFS: the same signal-to-noise ratios as a signal of unit variance has under Eq. 6.

    departs: for the tiny models. Under Eq. 6 itself, noise is louder than such music in nine tenths of t, where there is
    little to learn, and the last -40 dB of noise get a hundredth of t.
    """
    return cosine(t, xp) + 1.5 * math.log(10)


SCHEDULES = {"cosine": cosine, "linear": linear, "linear_eq5": linear_eq5, "cosine_quiet": cosine_quiet}


def alpha_sigma(logsnr_t):
    """Eq. 3, solved for alpha_t and sigma_t. numerics: by sigmoids, never sqrt(1 - sigma^2)."""
    return jnp.sqrt(jax.nn.sigmoid(logsnr_t)), jnp.sqrt(jax.nn.sigmoid(-logsnr_t))


def diffuse(x, eps, logsnr_t):
    """Eq. 2: a sample of q(x_t | x) = N(alpha_t x, sigma_t^2 I). x, eps (B, T, C); logsnr_t (B,)."""
    alpha_t, sigma_t = alpha_sigma(logsnr_t[:, None, None])
    return alpha_t * x + sigma_t * eps


# ---- The loss (Sec. 3.1) ----

LOSS_WEIGHTS = {  # Sec. 3.1, as functions of logsnr_t
    "simplified": lambda logsnr_t: jnp.ones_like(logsnr_t),  # w_t = 1
    "sigma": lambda logsnr_t: jax.nn.sigmoid(-logsnr_t),  # w_t = sigma_t^2
    # departs: for tiny models without text. In loud noise an error in x0_hat that is larger than x is next to nothing in eps: this
    # is w_t = 1 / alpha_t^2, which makes Eq. 1 the loss in v of Salimans & Ho (2022), up to 149.
    "velocity": lambda logsnr_t: 1 + jnp.exp(jnp.minimum(-logsnr_t, 5.0)),
}


class Condition(NamedTuple):
    """What a model is conditioned on, c in the paper: the entries of Fig. 1 besides x_t and t. None: not used."""

    low_fi: jax.Array | None = None  # (B, T, 1) stacked with x_t
    aligned: jax.Array | None = None  # (B, T / prod(strides), C) added at the bottom
    text: jax.Array | None = None  # (B, L, E) token embeddings
    text_mask: jax.Array | None = None  # (B, L) True on tokens, False on padding


def diffusion_loss(params, model: Model, key, audio, text=None, text_mask=None, dtype=jnp.float32, remat=False):
    """Eq. 1 for each clip of a batch.

    audio (B, samples) at `model.audio_rate`, in [-1, 1]; text (B, L, E) and text_mask (B, L) where the model uses text.
    Returns the weighted loss and the time t it was taken at, both (B,): the mean of the first is what is minimised.
    """
    key_t, key_eps, key_augment, key_occlude = jax.random.split(key, 4)
    x, low_fi, aligned = training_inputs(model, key_augment, audio)  # Sec. 3.3

    t = jax.random.uniform(key_t, x.shape[:1])  # "uniformly sampled during training"
    eps = jax.random.normal(key_eps, x.shape)
    logsnr_t = SCHEDULES[model.training.noise_schedule](t)
    x_t = diffuse(x, eps, logsnr_t)  # Eq. 2

    text_on = jax.random.bernoulli(key_occlude, 1 - model.training.occlusion, t.shape)  # Sec. 4.1: hidden for 10 %
    condition = Condition(low_fi, aligned, text, text_mask)
    eps_hat = unet(params, model.unet, x_t, t, condition, text_on, dtype, remat)

    loss_weight = LOSS_WEIGHTS[model.training.loss_weight](logsnr_t)
    return loss_weight * jnp.mean((eps_hat - eps) ** 2, axis=(1, 2)), t  # Eq. 1; choice: mean, not sum, over elements


# ---- Classifier-free guidance and dynamic clipping (Sec. 3.1) ----


def guided_eps(params, model: Model, x_t, t, condition: Condition, cfg_scale, dtype=jnp.float32):
    """w eps(x_t, c) + (1 - w) eps(x_t, .) with w = cfg_scale, as one call on a doubled batch. x_t (B, T, C), t scalar.

    None, for the models without text, and 1 both mean the conditional prediction alone.
    """
    b = x_t.shape[0]
    if cfg_scale in (None, 1) or not uses_text(model):
        return unet(params, model.unet, x_t, jnp.full(b, t), condition, jnp.ones(b), dtype)
    x2, condition2 = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), (x_t, condition))  # a clip's two on one device
    text_on = jnp.tile(jnp.array([1.0, 0.0]), b)  # only the text is hidden, not the low-fidelity audio
    eps = unet(params, model.unet, x2, jnp.full(2 * b, t), condition2, text_on, dtype)
    return cfg_scale * eps[::2] + (1 - cfg_scale) * eps[1::2]


def dynamic_clip(x0_hat, percentile=99.5):
    """Dynamic thresholding (Saharia et al., 2022b): clip at the percentile s of |x0_hat| of each clip, scale by 1 / s.

    Never below s = 1, the range of audio and log-mel. choice: 99.5 %, as there. x0_hat (B, T, C).
    """
    s = jnp.maximum(_percentile(jnp.abs(x0_hat).reshape(x0_hat.shape[0], -1), percentile), 1.0)[:, None, None]
    return jnp.clip(x0_hat, -s, s) / s


def _percentile(a, percentile):
    """np.percentile of each row of a (B, N), no element negative. (B,).

    numerics: a sort of 30 s takes longer than a small network. Floats above zero are ordered as their 31 bits are, so
    the bits of the element of rank k are found one by one, from the highest, by counting what lies below.
    """
    rank = percentile / 100 * (a.shape[1] - 1)
    k = math.floor(rank)
    bits = lax.bitcast_convert_type(a, jnp.int32)
    below = lambda v: jnp.sum(bits < v[:, None], axis=1)

    def try_bit(i, v):
        with_bit = v + (1 << (30 - i))
        return jnp.where(below(with_bit) <= k, with_bit, v)

    v = lax.fori_loop(0, 31, try_bit, jnp.zeros(a.shape[0], jnp.int32))
    following = jnp.min(jnp.where(bits > v[:, None], bits, jnp.int32(0x7F800000)), axis=1)
    following = jnp.where((below(v + 1) > k + 1) | (k + 1 == a.shape[1]), v, following)  # the element of rank k + 1
    low, high = (lax.bitcast_convert_type(b, jnp.float32) for b in (v, following))
    return low + (rank - k) * (high - low)


# ---- Ancestral sampling (Appendix A, Sec. 4.2.1) ----


def denoising_times(deltas, steps: int | None = None) -> np.ndarray:
    """Sec. 4.2.1: t_n = sum of the first n step sizes, so t_0 = 0 < ... < t_N = 1. float64 (N + 1,).

    `steps` resamples that curve to another N. Fig. 3 scales the step sizes "inverse-proportionally"; choice: by linear
    interpolation of the curve, since segments of 15 and 5 steps do not halve.
    """
    times = np.concatenate([[0.0], np.cumsum(deltas)])
    times /= times[-1]  # numerics: pins t_N = 1
    if steps is None:
        return times
    return np.interp(np.linspace(0, len(deltas), steps + 1), np.arange(len(deltas) + 1), times)


class Update(NamedTuple):
    """The coefficients of Eq. 4 for the step from t to s; arrays (N,) in the order of sampling, from t = 1 down."""

    t: np.ndarray
    alpha_t: np.ndarray
    sigma_t: np.ndarray
    keep: np.ndarray  # of x_t
    toward: np.ndarray  # of x0_hat
    noise: np.ndarray  # of the fresh noise


def ddpm_updates(schedule: Callable, times: np.ndarray, gamma: float | None) -> Update:
    """Eq. 4 for all steps of `times` (N + 1,), in float64, then float32.

    With x0_hat = (x_t - sigma_t eps) / alpha_t, the first two terms of Eq. 4 are, exactly,
        e^(logsnr_t - logsnr_s) (alpha_s / alpha_t) x_t  +  (1 - e^(logsnr_t - logsnr_s)) alpha_s x0_hat.
    numerics: this is where x0_hat can be clipped; at t = 1 of the cosine schedule the printed form multiplies an
    error in eps by 347.
    departs: gamma None draws x_s from q(x_s | x0_hat) (Eq. 2) instead, with noise that is all new. A small network takes some noise
    for music, and would hear it again in the part of x_t that Eq. 4 keeps. But every step then forgets what x0_hat has not
    settled, and what is never settled fades: this is for models whose condition leaves little open.
    """
    logsnr = schedule(np.asarray(times, np.float64), np)
    alpha, sigma = np.exp(-np.logaddexp(0, -logsnr) / 2), np.exp(-np.logaddexp(0, logsnr) / 2)  # Eq. 3 by sigmoids
    t, s = slice(None, 0, -1), slice(-2, None, -1)  # from t_N down to t_1, and each one's s
    c = -np.expm1(logsnr[t] - logsnr[s])  # 1 - e^(logsnr_t - logsnr_s)
    if gamma is None:
        c, gamma = np.ones_like(c), 0  # Eq. 4 at logsnr_t = -inf: as if x_t told nothing
    sigma_t_given_s = np.sqrt(c) * sigma[t]  # Eq. 3
    sigma_tilde = np.sqrt(c) * sigma[s]  # Eq. 3
    keep = (1 - c) * alpha[s] / alpha[t]
    toward = c * alpha[s]
    noise = sigma_tilde ** (1 - gamma) * sigma_t_given_s**gamma
    keep[-1], toward[-1], noise[-1] = 0, 1, 0  # choice: the last step returns x0_hat, with no noise at t = 0
    return Update(*(np.float32(a) for a in (times[t], alpha[t], sigma[t], keep, toward, noise)))


def clip_noise(keys, n, shape):
    """The n-th noise of each clip: standard normal (B, *shape) from keys (B,), so a clip never depends on its neighbours."""
    return jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, n), shape))(keys)


def ancestral_scan(eps_fn: Callable, x_t, keys, n, updates: Update):
    """Eq. 4 applied len(updates.t) times. eps_fn(x_t, t) -> eps; x_t (B, T, C); keys (B,); n counts the first step."""

    def step(x_t, n_and_update):
        n, u = n_and_update
        x0_hat = (x_t - u.sigma_t * eps_fn(x_t, u.t)) / u.alpha_t  # Eq. 2, solved for x
        x0_hat = dynamic_clip(x0_hat)
        x_s = u.keep * x_t + u.toward * x0_hat + u.noise * clip_noise(keys, n, x_t.shape[1:])  # Eq. 4
        return x_s, None

    return lax.scan(step, x_t, (n + jnp.arange(len(updates.t)), updates))[0]


@partial(jax.jit, static_argnames=("model", "cfg_scale", "dtype"), donate_argnames="x_t")
def _sample_chunk(params, model, x_t, condition, keys, n, updates, cfg_scale, dtype):
    eps_fn = lambda x_t, t: guided_eps(params, model, x_t, t, condition, cfg_scale, dtype)
    return ancestral_scan(eps_fn, x_t, keys, n, updates)


def sample(params, model: Model, condition: Condition, keys, length: int, dtype=jnp.float32, progress=None):
    """A batch of clips from one model, by its `inference` parameters: (B, length, C) in float32, about [-1, 1].

    keys (B,), one a clip. `length`, and the lengths in `condition`, are multiples of prod(strides). `progress(done, N)`
    is called between chunks of the scan.
    """
    inference = model.inference
    times = denoising_times(TABLE_8[model.name][inference.step_schedule], inference.steps)
    updates = ddpm_updates(SCHEDULES[model.training.noise_schedule], times, inference.gamma)
    N = len(updates.t)
    chunk = max(k for k in range(1, 51) if N % k == 0)  # equal chunks, so that one compilation serves them all
    shape = (length, model.unet.out_channels)
    x_t = clip_noise(keys, 0, shape)  # x_1 ~ N(0, I)
    for n in range(0, N, chunk):
        part = Update(*(a[n : n + chunk] for a in updates))
        x_t = _sample_chunk(params, model, x_t, condition, keys, n + 1, part, inference.cfg_scale, dtype)
        if progress:
            x_t.block_until_ready()
            progress(n + chunk, N)
    return x_t


# ---- Parameters: each declared once, as a shape, its logical axes and an initialiser ----


class Param(NamedTuple):
    shape: tuple[int, ...]
    axes: tuple[str, ...]  # keys of SHARDING
    init: Callable  # of standard normal noise of that shape


def _fan_in(noise):  # choice: normal of variance 1 / fan-in
    return noise / math.sqrt(math.prod(noise.shape[:-1]))


def _identity(noise):
    return jnp.eye(*noise.shape)


def linear_spec(c_in, c_out, init=_fan_in, axes=("channels", "channels")):
    return {"w": Param((c_in, c_out), axes, init), "b": Param((c_out,), axes[1:], jnp.zeros_like)}


def conv_spec(taps, c_in, c_out, init=_fan_in, axes=("channels", "channels")):
    return {"w": Param((taps, c_in, c_out), ("taps", *axes), init), "b": Param((c_out,), axes[1:], jnp.zeros_like)}


def norm_spec(c, axis="channels"):
    return {"scale": Param((c,), (axis,), jnp.ones_like), "bias": Param((c,), (axis,), jnp.zeros_like)}


def attention_spec(cfg: UNetConfig, c, c_kv):
    hk = cfg.attention_heads * cfg.head_width
    return {
        "norm": norm_spec(c),
        "q": linear_spec(c, hk, axes=("channels", "heads")),
        "k": linear_spec(c_kv, hk, axes=("channels", "heads")),
        "v": linear_spec(c_kv, hk, axes=("channels", "heads")),
        "out": linear_spec(hk, c, jnp.zeros_like, ("heads", "channels")),
        "feed_forward": {  # App. B.1: "a hidden layer of twice the dimension of C_I"
            "norm": norm_spec(c),
            "hidden": linear_spec(c, 2 * c, axes=("channels", "hidden")),
            "out": linear_spec(2 * c, c, jnp.zeros_like, ("hidden", "channels")),
        },
    }


def block_spec(cfg: UNetConfig, c, self_attention: bool, cross_attention: bool):
    """Fig. 5, top to bottom. choice: branches end in zeros and the skip starts as the identity, so a new block is x -> x."""
    k = cfg.kernel_size
    spec = {
        "combine": linear_spec(cfg.base_dimension, 2 * c, jnp.zeros_like),
        "norm1": norm_spec(c),
        "conv1": conv_spec(k, c, c, axes=("channels", "hidden")),
        "norm2": norm_spec(c, "hidden"),
        "conv2": conv_spec(k, c, c, jnp.zeros_like, ("hidden", "channels")),
        "skip": linear_spec(c, c, _identity),
    }
    if self_attention:
        spec["self_attention"] = attention_spec(cfg, c, c)
    if cross_attention:
        spec["cross_attention"] = attention_spec(cfg, c, cfg.text_width)
    return spec


def unet_spec(cfg: UNetConfig):
    """Fig. 1: the tree of all parameters of a U-Net, named after its boxes."""
    widths = [cfg.base_dimension] + [cfg.base_dimension * c for c in cfg.channels]  # C_0, C_1, ..., C_D
    depths = list(zip(cfg.strides, cfg.blocks, cfg.self_attention, cfg.cross_attention, widths, widths[1:]))
    spec = {
        "time": linear_spec(cfg.base_dimension, cfg.base_dimension),  # App. B.1: as wide as the base dimension
        "entry": conv_spec(3, cfg.in_channels, cfg.base_dimension),
        # C_{I-1} -> C_I, then blocks of width C_I
        "down": [
            {"resample": conv_spec(2, s * c_outer, c), "blocks": [block_spec(cfg, c, sa, ca) for _ in range(n)]}
            for s, n, sa, ca, c_outer, c in depths
        ],
        # C_I -> C_{I-1}, then blocks of width C_{I-1}
        "up": [
            {"resample": conv_spec(2, c, s * c_outer), "blocks": [block_spec(cfg, c_outer, sa, ca) for _ in range(n)]}
            for s, n, sa, ca, c_outer, c in depths
        ],
        "exit": conv_spec(3, cfg.base_dimension, cfg.out_channels, jnp.zeros_like),
    }
    if cfg.aligned_channels:
        spec["aligned"] = linear_spec(cfg.aligned_channels, widths[-1])
    return spec


def _is_param(node):
    return isinstance(node, Param)


@partial(jax.jit, static_argnames="cfg")
def init_params(key, cfg: UNetConfig):
    """Fresh parameters, nested dicts of float32 arrays shaped as `unet_spec(cfg)`."""
    leaves, tree = jax.tree.flatten(unet_spec(cfg), is_leaf=_is_param)
    ends = np.cumsum([math.prod(p.shape) for p in leaves])
    noise = jnp.split(jax.random.normal(key, ends[-1:]), ends[:-1])  # one draw for all: it compiles in a moment
    return jax.tree.unflatten(tree, [p.init(z.reshape(p.shape)) for p, z in zip(leaves, noise)])


def param_count(model: Model | str) -> int:
    """Number of parameters of a model, or of a name in MODELS, without allocating any (Table 2)."""
    cfg = (MODELS[model] if isinstance(model, str) else model).unet
    return sum(math.prod(p.shape) for p in jax.tree.leaves(unet_spec(cfg), is_leaf=_is_param))


# ---- The block (Fig. 5) ----


def linear_layer(p, x):
    return x @ p["w"] + p["b"]


def conv1d(p, x, segments=1, left=None):
    """1D convolution, (B, T, C_in) -> (B, T, C_out), padded with zeros: `left` of them before, k - 1 - left after.

    numerics: with segments > 1, each clip is `segments` pieces of T frames, one after another in the batch, and a piece
    is padded with its neighbours' frames. It is the same convolution; but a TPU wants 8 sequences or more, and folds
    time into the batch around every convolution of fewer: 3 times the time in copies, and in compilation.
    """
    taps, t = p["w"].shape[0], x.shape[1]
    left = (taps - 1) // 2 if left is None else left
    padding = (left, taps - 1 - left)
    if segments > 1:
        (before, after), padding = padding, (0, 0)
        x = x.reshape(-1, segments, *x.shape[1:])
        ends = jnp.pad(x[:, :-1, t - before :], [(0, 0), (1, 0), (0, 0), (0, 0)])  # each piece's predecessor's end
        starts = jnp.pad(x[:, 1:, :after], [(0, 0), (0, 1), (0, 0), (0, 0)])  # and successor's start
        x = jnp.concatenate([ends, x, starts], axis=2).reshape(-1, t + taps - 1, x.shape[3])
    if t < taps:  # numerics: as a matrix product; XLA's CPU convolution is 40 times slower where the kernel is the longer
        x = jnp.pad(x, [(0, 0), padding, (0, 0)])
        windows = jnp.concatenate([x[:, k : k + t] for k in range(taps)], axis=-1)
        return windows @ p["w"].reshape(windows.shape[-1], -1) + p["b"]
    return lax.conv_general_dilated(x, p["w"], (1,), [padding], dimension_numbers=("NWC", "WIO", "NWC")) + p["b"]


def group_norm(p, x, groups, segments=1):
    """Group normalisation over time and the channels of each group, (B, T, C) -> (B, T, C).

    numerics: moments over time first, then over each group, then one multiply-add: several times faster on a CPU than
    the 4-D reshape of the textbook. Statistics in float32; E[x^2] - E[x]^2 needs a mean below some 100 deviations.
    """
    c = x.shape[-1]
    moments = [jnp.mean(m, axis=1, dtype=jnp.float32) for m in (x, jnp.square(x.astype(jnp.float32)))]  # (B, C)
    moments = [m.reshape(-1, segments, groups, c // groups).mean((1, 3)) for m in moments]  # (clips, groups)
    mean, mean_sq = [jnp.repeat(jnp.repeat(m, segments, axis=0), c // groups, axis=1) for m in moments]  # (B, C)
    scale = p["scale"] * lax.rsqrt(jnp.maximum(mean_sq - mean**2, 0) + 1e-5)
    bias = p["bias"] - mean * scale
    return x * scale[:, None].astype(x.dtype) + bias[:, None].astype(x.dtype)


def combine_embedding(p, x, time):
    """Sec. 3.2: "a single vector is used to produce a channel-wise scaling and bias". x (B, T, C), time (B, base)."""
    scale, bias = jnp.split(linear_layer(p, time)[:, None], 2, axis=-1)  # (B, 1, C)
    return x * (1 + scale) + bias  # choice: 1 + scale, so that zero parameters change nothing


def attention(p, cfg: UNetConfig, x, kv, mask=None):
    """Multi-head attention of x (B, T, C) on kv (B, L, E), or on itself where kv is None. choice: no positions."""
    h = group_norm(p["norm"], x, cfg.groups, cfg.segments)  # choice: normalised before attention and feed-forward
    h = h.reshape(-1, cfg.segments * h.shape[1], h.shape[2])  # attention sees whole clips
    kv = h if kv is None else kv
    heads = lambda y: y.reshape(*y.shape[:2], cfg.attention_heads, cfg.head_width)  # (B, T, H K) -> (B, T, H, K)
    q, k, v = heads(linear_layer(p["q"], h)), heads(linear_layer(p["k"], kv)), heads(linear_layer(p["v"], kv))
    mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, L)
    y = jax.nn.dot_product_attention(q, k, v, mask=mask)  # (B, T, H, K)
    return linear_layer(p["out"], y.reshape(*x.shape[:2], -1))


def feed_forward(p, cfg: UNetConfig, x):
    """App. B.1: "the standard post-attention residual layer"."""
    h = linear_layer(p["hidden"], group_norm(p["norm"], x, cfg.groups, cfg.segments))
    return linear_layer(p["out"], jax.nn.silu(h))  # choice: Swish, as in the rest of the block


def block(p, cfg: UNetConfig, x, time, text, text_mask, text_on):
    """Fig. 5. x (B, T, C), time (B, base), text (B, L, E), text_mask (B, L), text_on (B,) -> (B, T, C)."""
    x = combine_embedding(p["combine"], x, time)

    h = conv1d(p["conv1"], jax.nn.silu(group_norm(p["norm1"], x, cfg.groups, cfg.segments)), cfg.segments)
    h = conv1d(p["conv2"], jax.nn.silu(group_norm(p["norm2"], h, cfg.groups, cfg.segments)), cfg.segments)
    x = linear_layer(p["skip"], x) + h

    if "self_attention" in p:
        x = x + attention(p["self_attention"], cfg, x, None)
        x = x + feed_forward(p["self_attention"]["feed_forward"], cfg, x)

    if "cross_attention" in p:
        # Sec. 4.1: for occluded prompts "the output of the cross attention layers are set to zero".
        x = x + text_on[:, None, None] * attention(p["cross_attention"], cfg, x, text, text_mask)
        x = x + feed_forward(p["cross_attention"]["feed_forward"], cfg, x)
    return x


# ---- The 1D Efficient U-Net (Fig. 1) ----


def downsample(p, x, stride, segments=1):
    """Convolution of stride S and kernel 2 S, (B, T, C_{I-1}) -> (B, T / S, C_I). choice: the kernel; Table 2's counts.

    numerics: S frames folded into the channels, then two taps. `upsample` is the same idea backwards: padded on the
    other side, each is the other's adjoint, and nothing drifts in time.
    """
    b, t, c = x.shape
    return conv1d(p, x.reshape(b, t // stride, stride * c), segments, left=0)


def upsample(p, x, stride, segments=1):
    """Transposed convolution of stride S and kernel 2 S, (B, T, C_I) -> (B, T S, C_{I-1}).

    choice: a bias for each of the S phases of the output, which is what the two-tap form has.
    """
    b, t, _ = x.shape
    return conv1d(p, x, segments, left=1).reshape(b, t * stride, -1)


def time_embedding(t, width):
    """App. B.1: the float t as a vector "via positional embedding". (B,) -> (B, width).

    choice: sines and cosines of 1000 t at width / 2 frequencies from 1 to 1e-4, in float32.
    """
    frequencies = jnp.exp(-math.log(1e4) * jnp.arange(width // 2) / (width // 2 - 1))
    angles = 1000 * t[:, None] * frequencies
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def unet(params, cfg: UNetConfig, x_t, t, condition: Condition, text_on, dtype=jnp.float32, remat=False):
    """The noise in x_t: (B, T, C) -> (B, T, C) in float32. T is a multiple of prod(strides).

    t (B,) diffusion times; text_on (B,) is 0 where the prompt is occluded. `dtype` is what the network computes in;
    `remat` recomputes each block in the backward pass instead of storing what is inside it.
    """
    cast = lambda tree: jax.tree.map(lambda a: a.astype(dtype), tree)
    pieces = lambda a: constrain(a.reshape(-1, a.shape[1] // cfg.segments, a.shape[2]), "batch")  # see `conv1d`
    time = linear_layer(params["time"], time_embedding(t, cfg.base_dimension))  # in float32
    time, text_on = (jnp.repeat(a, cfg.segments, axis=0) for a in (time, text_on))
    params, time, text, text_on = cast((params, time, condition.text, text_on))
    run = partial(block, cfg=cfg, time=time, text=text, text_mask=condition.text_mask, text_on=text_on)
    run = jax.checkpoint(run) if remat else run

    stacked = x_t if condition.low_fi is None else jnp.concatenate([x_t, condition.low_fi], axis=-1)  # Sec. 3.3.1
    h = conv1d(params["entry"], pieces(stacked.astype(dtype)), cfg.segments)
    skips = [h]
    for p, stride in zip(params["down"], cfg.strides):
        h = downsample(p["resample"], h, stride, cfg.segments)
        for p_block in p["blocks"]:
            h = run(p_block, x=h)
        skips.append(h)

    h = skips.pop()  # the bottom of the U
    if condition.aligned is not None:
        h = h + linear_layer(params["aligned"], pieces(condition.aligned.astype(dtype)))

    for p, stride in zip(reversed(params["up"]), reversed(cfg.strides)):
        h = upsample(p["resample"], h, stride, cfg.segments)
        # departs: Fig. 1 draws the blocks before the up-sampling layer; Sec. 3.2 has them after it, and Table 2's
        # counts agree with Sec. 3.2 to 2.2 %, with the drawing to no better than 8.2 %.
        for p_block in p["blocks"]:
            h = run(p_block, x=h)
        h = h + skips.pop()  # Fig. 1: added, never concatenated
    return conv1d(params["exit"], h, cfg.segments).reshape(*x_t.shape[:2], -1).astype(jnp.float32)


# ---- Inputs of the cascade: resampling and log-mel (Sec. 3.3) ----


def fft_resample(x, length: int, xp=jnp):
    """Sec. 3.3.1: the last axis of x, (..., T) -> (..., length), by cropping or zero-padding its Fourier coefficients.

    Exact for signals below both Nyquist frequencies; periodic, like the transform, at the ends.
    """
    T = x.shape[-1]
    n = min(T, length)
    X = xp.fft.rfft(x)[..., : n // 2 + 1]
    if n % 2 == 0 and T != length:  # the shorter signal's Nyquist bin stands for two bins of the longer one's
        X = X * xp.where(xp.arange(n // 2 + 1) == n // 2, 2.0 if length < T else 0.5, 1.0)
    return (xp.fft.irfft(X, length) * (length / T)).astype(x.dtype)


MEL_WINDOW, MEL_FFT = 640, 1024  # choice: a 40 ms Hann window in a 64 ms transform


def mel_filters() -> np.ndarray:
    """Triangular filters from 0 to 8 kHz, equally spaced in 2595 log10(1 + f / 700), peak 1. (513, 80). choice."""
    mels = np.linspace(0, 2595 * np.log10(1 + MEL_RATE / 2 / 700), MEL_CHANNELS + 2)
    edges = 700 * (10 ** (mels / 2595) - 1)  # Hz
    f = np.linspace(0, MEL_RATE / 2, MEL_FFT // 2 + 1)[:, None]
    rising = (f - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - f) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype(np.float32)


def _mel_window():
    """The Hann window, padded to the transform and scaled so that a full-scale sine has magnitude 1."""
    window = np.hanning(MEL_WINDOW + 1)[:-1]
    pad = (MEL_FFT - MEL_WINDOW) // 2
    return np.pad(2 * window / window.sum(), (pad, pad)).astype(np.float32)


def stft(audio):
    """(B, T) at 16 kHz -> complex (B, T / 160, 513); frame k is centred on samples [160 k, 160 k + 160)."""
    pad = (MEL_FFT - HOP) // 2
    starts = np.arange(audio.shape[-1] // HOP) * HOP
    frames = jnp.pad(audio, [(0, 0), (pad, pad)])[:, starts[:, None] + np.arange(MEL_FFT)]  # (B, T / 160, 1024)
    return jnp.fft.rfft(frames * _mel_window())


def log_mel(audio):
    """Sec. 3.3.2: log-mel spectrogram "normalized to lie within [-1, 1]". (B, T) at 16 kHz -> (B, T / 160, 80).

    choice: the mel magnitude in dB, from -90 (and all below, so silence) at -1 to +10 at 1: one fixed map, never per
    clip. A full-scale sine has 0 dB in the STFT and, summed over the bins of a filter, 3 to 9 dB here.
    """
    mel = jnp.abs(stft(audio)) @ mel_filters()
    decibel = 20 * jnp.log10(jnp.maximum(mel, 1e-9))
    return jnp.clip((decibel + 40) / 50, -1, 1)


def griffin_lim(log_mel_frames, iterations: int = 32):
    """A rough (B, F, 80) -> (B, 160 F) inverse of `log_mel`, to hear a spectrogram without the vocoder.

    Griffin & Lim (1984): alternate between the given magnitudes and the phases of a consistent signal. Not in the paper.
    """
    mel = 10 ** ((50 * log_mel_frames - 40) / 20) - 10 ** (-90 / 20)  # silence, at -1, becomes 0
    magnitude = jnp.maximum(mel @ np.linalg.pinv(mel_filters()), 0)
    window, pad = _mel_window(), (MEL_FFT - HOP) // 2
    F = mel.shape[1]
    index = np.arange(F)[:, None] * HOP + np.arange(MEL_FFT)  # (F, 1024)

    def overlap_add(frames):  # (..., F, 1024) -> (..., 160 F)
        total = jnp.zeros((*frames.shape[:-2], F * HOP + 2 * pad)).at[..., index].add(frames)
        return total[..., pad : pad + F * HOP]

    norm = overlap_add(jnp.broadcast_to(window**2, (F, MEL_FFT)))  # the least-squares inverse of `stft`
    inverse = lambda spectrum: overlap_add(jnp.fft.irfft(spectrum) * window) / jnp.maximum(norm, 1e-8)
    phase = jnp.exp(2j * jnp.pi * jax.random.uniform(jax.random.key(0), magnitude.shape))
    for _ in range(iterations):
        spectrum = stft(inverse(magnitude * phase))
        phase = spectrum / jnp.maximum(jnp.abs(spectrum), 1e-8)
    return inverse(magnitude * phase)


# ---- Training inputs and their augmentation (Sec. 4.1) ----


def noise_augment(key, x, t_max, schedule):
    """"A random diffusion time is chosen within [0, t_max] and applied to the intermediate representation." x (B, T, C).

    choice: under the model's own schedule, and the network is not told the time (Fig. 1 has no entry for it).
    """
    key_t, key_eps = jax.random.split(key)
    t = jax.random.uniform(key_t, x.shape[:1], maxval=t_max)
    return diffuse(x, jax.random.normal(key_eps, x.shape), schedule(t))


def gaussian_blur(x, std, taps, axis):
    """Blur x (B, T, C) along an axis by a Gaussian of std (B,), in elements. Edges are repeated.

    choice: an even number of taps has no centre; 10 of them are at -5..4, so that a small std is the identity.
    """
    offsets = np.arange(taps) - taps // 2
    kernel = jax.nn.softmax(-(offsets**2) / (2 * std[:, None] ** 2))  # (B, taps), sums to 1
    pad = [(0, 0)] * 3
    pad[axis] = (taps // 2, taps - 1 - taps // 2)
    padded = jnp.pad(x, pad, mode="edge")
    shifted = [lax.slice_in_dim(padded, j, j + x.shape[axis], axis=axis) for j in range(taps)]
    return sum(kernel[:, j, None, None] * shifted[j] for j in range(taps))


def augment(model: Model, key, x, blur_axes):
    """Blur, then noise (choice: in this order), on the up-sampled low-fidelity audio or on the log-mel. x (B, T, C)."""
    key_blur, key_noise = jax.random.split(key)
    training = model.training
    if training.blur_taps:
        std = jax.random.uniform(key_blur, x.shape[:1], minval=training.blur_std[0], maxval=training.blur_std[1])
        for axis in blur_axes:  # a 2D Gaussian is a 1D Gaussian along each axis
            x = gaussian_blur(x, std, training.blur_taps, axis)
    return noise_augment(key_noise, x, training.t_max, SCHEDULES[training.noise_schedule])


def pad_to(x, length, value):
    """Append `value` along axis 1 up to `length`: audio is padded with 0, log-mel with -1, both silence."""
    return jnp.pad(x, [(0, 0), (0, length - x.shape[1]), (0, 0)], constant_values=value)


def padded_length(cfg: UNetConfig, length: int) -> int:
    """`length` rounded up to a multiple of prod(strides), in each segment.

    departs: T_I = T_{I-1} / S_I (App. B.1) asks for whole numbers, and 30 s gives them to the vocoder alone; 30.72 s
    to all five.
    """
    multiple = cfg.segments * math.prod(cfg.strides)
    return -(-length // multiple) * multiple


def training_inputs(model: Model, key, audio):
    """Sec. 3.3: audio (B, samples) at `model.audio_rate` -> x (B, T, C), low_fi (B, T, 1) or None, aligned or None."""
    samples = audio.shape[1]
    low_fi = aligned = None
    if writes_log_mel(model):
        x = log_mel(audio)
    else:
        x = audio[:, :, None]
    T = padded_length(model.unet, x.shape[1])
    if model.low_rate:  # Sec. 3.3.1, 3.3.3: down to the lower rate, and up-sampled again
        low = fft_resample(audio, samples * model.low_rate // model.rate)
        low_fi = augment(model, key, fft_resample(low, samples)[:, :, None], blur_axes=(1,))
        low_fi = pad_to(low_fi, T, 0)
    if model.unet.aligned_channels:  # Sec. 3.3.2
        aligned = augment(model, key, log_mel(audio), blur_axes=(1, 2))
        aligned = pad_to(aligned, T // HOP, -1)
    return pad_to(x, T, -1 if writes_log_mel(model) else 0), low_fi, aligned


# ---- Both routes, from prompts to audio (Secs. 3.3 and 4.2.1) ----


def sampling_condition(model: Model, previous, seconds: float) -> Condition:
    """The output of the stage before, (B, T') audio or (B, F, 80) log-mel, as this model's conditioning input.

    Padded as in training, and clean: sampling corrupts nothing.
    """
    T = padded_length(model.unet, round(seconds * model.rate))
    if model.low_rate:
        low_fi = fft_resample(previous, round(seconds * model.rate))[:, :, None]
        return Condition(low_fi=pad_to(low_fi, T, 0))
    if model.unet.aligned_channels:
        return Condition(aligned=pad_to(previous, T // HOP, -1))
    return Condition()


def generate(prompts, weights, encode_text, route="waveform", seconds=30.0, seed=0, first_clip=0, superres=True,
             dtype=jnp.float32, progress=None):
    """Prompts to music, by one of ROUTES.

    prompts      B strings, one a clip
    weights      {name of a model: (Model, params)}, with the inference parameters that the Model holds
    encode_text  (prompts, token_length) -> token embeddings (B, L, E) and mask (B, L)   (Sec. 3.4)
    first_clip   clip i of a seed is the same whatever else is generated beside it: this batch is clips first_clip + 0..B-1
    progress     called as progress(name, done, N)
    Returns {name: output}: audio (B, seconds * rate), or log-mel (B, seconds * 100, 80), of every stage in order.
    """
    outputs, previous = {}, None
    for stage, name in enumerate(ROUTES[route][: 3 if superres else 2]):
        model, params = weights[name]
        condition = sampling_condition(model, previous, seconds)
        if uses_text(model):
            text, text_mask = encode_text(prompts, model.training.token_length)
            condition = condition._replace(text=jnp.asarray(text), text_mask=jnp.asarray(text_mask))
        stage_key = jax.random.fold_in(jax.random.key(seed), stage)
        keys = jax.vmap(partial(jax.random.fold_in, stage_key))(first_clip + jnp.arange(len(prompts)))
        length = round(seconds * model.rate)
        if writes_log_mel(model):
            length = -(-round(seconds * MEL_RATE) // HOP)  # as many frames as cover the audio
        report = progress and partial(progress, name)
        x = sample(params, model, condition, keys, padded_length(model.unet, length), dtype, report)[:, :length]
        outputs[name] = previous = x if writes_log_mel(model) else x[:, :, 0]
    return outputs


# ---- Pseudo-labels (Sec. 3.5) ----
# The joint embedding of the paper, MuLan, is not public: here are arrays that the user brings, and what is done with them.

CAPTION_BLOCK, CAPTION_GROUP = 16_384, 64  # captions read at a time; captions that share a maximum in `_merge_top`


def windows(audio) -> np.ndarray:
    """Sec. 3.5: "segmenting the clip into non-overlapping 10-second windows". audio (samples,) at 16 kHz -> (W, 160_000).

    choice: a rest of 5 s or more, like a clip under 10 s, is filled up with silence; a shorter rest is left out.
    """
    size = 10 * MEL_RATE
    n = max(1, (len(audio) + size // 2) // size)
    return np.pad(audio[: n * size], (0, max(0, n * size - len(audio)))).reshape(n, size)


def unit(x, xp=jnp):
    """x (..., E) divided by its length, so that a product is a cosine. numerics: 0 stays 0."""
    return x / xp.maximum(xp.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


@jax.jit
def _merge_top(best, index, clips, captions, start, end):
    """The top K so far, scores and indices (N, K), after one more block of captions (M, E), numbers start..start + M.

    numerics: none but the K groups of captions with the highest maxima can hold one of the top K, so few scores are ever
    sorted. Exact: of equal scores the lower index wins, among groups (which is why they are sorted) as among captions.
    """
    k, numbers = best.shape[1], start + jnp.arange(len(captions)).reshape(-1, CAPTION_GROUP)
    captions = unit(captions)

    def one_clip(best_index_clip):
        best, index, clip = best_index_clip
        scores = jnp.dot(captions, clip, precision="highest").reshape(numbers.shape)  # (M / 64, 64)
        scores = jnp.where(numbers < end, scores, -jnp.inf)  # beyond `end` is padding
        groups = jnp.sort(lax.top_k(scores.max(axis=1), k)[1])  # (K,)
        best, place = lax.top_k(jnp.concatenate([best, scores[groups].ravel()]), k)
        return best, jnp.concatenate([index, numbers[groups].ravel()])[place]

    return lax.map(one_clip, (best, index, unit(clips)), batch_size=256)


def top_captions(captions, clips, k: int = 10) -> np.ndarray:
    """Sec. 3.5: "the top K captions that are closest to the audio in the embedding space", by cosine. K = 10.

    captions (M, E), read in blocks, so that a np.memmap of any length will do; clips (N, E), each the average of the
    embeddings of its non-overlapping 10-second windows. Returns indices (N, k), closest first; of equals the first.
    Memory beside `clips`: about 20 MB of scores and 20 N k bytes.
    """
    assert clips.shape[1] == captions.shape[1] and k <= min(len(captions), CAPTION_BLOCK // CAPTION_GROUP)
    clips = jnp.asarray(clips, jnp.float32)
    best, index = jnp.full((len(clips), k), -jnp.inf), jnp.zeros((len(clips), k), jnp.int32)
    for start in range(0, len(captions), CAPTION_BLOCK):
        block = np.asarray(captions[start : start + CAPTION_BLOCK], np.float32)
        block = np.pad(block, [(0, CAPTION_BLOCK - len(block)), (0, 0)])  # one shape, one compilation
        best, index = _merge_top(best, index, clips, block, start, len(captions))
    return np.asarray(index)


def draw_captions(top, k_prime: int, seed) -> np.ndarray:
    """Sec. 3.5: "for each clip further sample K' out of the K captions with probabilities inverse to the frequency counts".

    top (N, K) of `top_captions` for all clips of the data set, over which the captions are counted. Returns (N, K'), of
    each clip's the closest first: a function of the seed, the counts and the number of the clip.
    choice: without replacement, one after the other. numerics: as a race: of exponential times with the rates 1 / count,
    the first K' are distributed as K' such draws.
    """
    counts = np.bincount(top.ravel())
    times = -np.log1p(-np.random.default_rng(seed).random(top.shape)) * counts[top]
    first = np.sort(np.argsort(times, axis=1)[:, :k_prime], axis=1)
    return np.take_along_axis(top, first, axis=1)


# ---- Metrics (Sec. 4.3.2) ----
# An embedder is any function of audio (B, samples), float32 at 16 kHz, to embeddings, clip-wise (B, E) or frame-wise
# (B, F, E). VGGish, Trill and MuLan, the paper's three, are not here.


@jax.jit
def log_mel_statistics(audio):
    """An embedder to try things with: the mean and the deviation of each log-mel channel in each second. -> (B, F, 160).

    Not in the paper. It knows loudness and spectrum and nothing of music: its FAD compares with no published one.
    """
    seconds = audio.shape[1] // MEL_RATE
    frames = log_mel(audio)[:, : 100 * seconds].reshape(len(audio), seconds, 100, MEL_CHANNELS)
    return jnp.concatenate([frames.mean(axis=2), frames.std(axis=2)], axis=-1)


class Gaussian(NamedTuple):
    mean: np.ndarray  # (E,)
    root: np.ndarray  # (E, E), with root @ root.T the covariance


def gaussian(x) -> Gaussian:
    """Sec. 4.3.2: "assuming that the distribution of the embeddings from each set are Gaussian". x (N, E), N > 1; float64.

    choice: the covariance, as in Kilgour et al. (2018), over N - 1; the text says "correlation matrix".
    """
    x = np.asarray(x, np.float64)
    values, vectors = np.linalg.eigh(np.atleast_2d(np.cov(x, rowvar=False)))
    return Gaussian(x.mean(axis=0), vectors * np.sqrt(np.maximum(values, 0)))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """FAD (Kilgour et al., 2018): |mu_a - mu_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). Not negative.

    numerics: the trace of the last root is the sum of the singular values of root_a^T root_b: nothing is squared and
    rooted again, so that covariances without full rank, fewer clips than dimensions, lose no digits.
    """
    shared = np.linalg.svd(a.root.T @ b.root, compute_uv=False).sum()
    return max(0.0, float(np.sum((a.mean - b.mean) ** 2) + np.sum(a.root**2) + np.sum(b.root**2) - 2 * shared))


def fad_infinity(x, reference: Gaussian, seed: int = 0, sizes: int = 15) -> float:
    """FAD extrapolated to infinitely many generated x (N, E): a line through FAD against 1 / n, read off at 0.

    Not in the paper (Chong & Forsyth, 2020; for FAD, Gui et al., 2023). The reference stays as it is. choice: 15 sizes
    from N / 4 to N, drawn without replacement (with it the limit is the FAD of these very N). Noise can make it negative.
    """
    n = np.linspace(len(x) // 4, len(x), sizes).astype(int)
    draw = np.random.default_rng(seed)
    fads = [frechet_distance(gaussian(draw.choice(x, size, replace=False)), reference) for size in n]
    return float(np.polyfit(1 / n, fads, 1)[1])


def similarity(a, b) -> float:
    """Sec. 4.3.2: the cosine of the embeddings of two entities, averaged over the pairs. a, b (N, E)."""
    return float(np.mean(np.sum(unit(np.asarray(a, np.float64), np) * unit(np.asarray(b, np.float64), np), axis=1)))


def table_6(generated, ground_truth, text=None, seed: int = 0) -> dict:
    """A part of Table 6 from the embeddings (N, E), N > 1, of pairs: {row: {column: average similarity}}.

    choice: the shuffle is one random cycle through all clips, so that none is paired with itself.
    """
    order = np.random.default_rng(seed).permutation(len(ground_truth))
    shuffled = np.empty_like(ground_truth)
    shuffled[order] = ground_truth[np.roll(order, 1)]
    rows = {"ground truth audio": ground_truth, "randomly shuffled audio": shuffled, "generated audio": generated}
    columns = {"gt-text": text, "gt-audio": ground_truth}
    return {row: {name: similarity(a, b) for name, b in columns.items() if b is not None} for row, a in rows.items()}


# ---- Sharding (Sec. 4.2.2) ----
# A mesh of devices has two axes: "data" splits the clips, "model" each matrix of the network. SHARDING says which of the
# two, if any, every logical axis of an array is laid along; GSPMD (Xu et al., 2021) derives the rest. To shard otherwise,
# change this table, nothing else.

SHARDING = {     # parameters and activations   the moving average, Adam's moments
    "batch":     ("data",                       None),
    "channels":  (None,                         "data"),   # between the boxes of Figs. 1 and 5; Rajbhandari et al. (2020)
    "hidden":    ("model",                      "model"),  # between the two convolutions of a block, inside a feed-forward
    "heads":     ("model",                      "model"),  # inside an attention
    "taps":      (None,                         None),
}  # fmt: skip


def make_mesh(model: int = 1, devices=None) -> jax.sharding.Mesh:
    """All devices as ("data", "model"), `model` of them along the second. ValueError where that does not divide."""
    devices = np.asarray(jax.devices() if devices is None else devices).ravel()
    if devices.size % model:
        raise ValueError(f"{devices.size} devices cannot be split {model} ways; the model axis must divide them")
    return jax.sharding.Mesh(devices.reshape(-1, model), ("data", "model"))


def in_pieces(model: Model, rows: int, length: int) -> Model:
    """The same model for a TPU on which `rows` clips of `length` share a device: in as many pieces as make 8 (`conv1d`).

    Fewer where the pieces, at the bottom of the U, would be shorter than what a convolution needs of its neighbours.
    """
    cfg, segments = model.unet, max(1, 8 // rows)
    while segments > 1 and length // (segments * math.prod(cfg.strides)) < cfg.kernel_size // 2:
        segments //= 2
    return replace(model, unet=replace(cfg, segments=segments))


def partition(mesh, shape, axes, column=0) -> PartitionSpec:
    """How SHARDING lays out an array. choice: a mesh axis goes to the first logical axis that wants it and that it divides."""
    spec = []
    for size, axis in zip(shape, axes):
        mesh_axis = SHARDING[axis][column]
        fits = mesh_axis and mesh_axis not in spec and size % mesh.shape[mesh_axis] == 0
        spec.append(mesh_axis if fits else None)
    return PartitionSpec(*spec)


def shardings(cfg: UNetConfig, mesh, column=0):
    """The tree of NamedShardings of a U-Net's parameters, or with column=1 of the state that only the update reads."""
    place = lambda p: NamedSharding(mesh, partition(mesh, p.shape, p.axes, column))
    return jax.tree.map(place, unet_spec(cfg), is_leaf=_is_param)


def constrain(x, *axes):
    """x, laid out as SHARDING says where a mesh is set (`jax.set_mesh`); axes name the first dimensions of x."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else lax.with_sharding_constraint(x, partition(mesh, x.shape, axes))
