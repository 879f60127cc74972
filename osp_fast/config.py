"""Every setting of training and sampling, declared once.

A field's metadata carries its help text (with its unit) and its bounds; `cli.py` turns each field into the flag of the
same name. Values that depend on each other are checked in `checks.py`.
"""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
WEIGHTING_SCHEMES = ("logit_normal", "uniform", "mode", "cosmap", "sigma_sqrt")
LR_SCHEDULERS = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
SAMPLE_METHODS = (
    "DDIM",
    "EulerDiscrete",
    "DDPM",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "PNDM",
    "HeunDiscrete",
    "EulerAncestralDiscrete",
    "DEISMultistep",
    "KDPM2AncestralDiscrete",
    "CogVideoX",
    "FlowMatchEulerDiscrete",
)
DIT_NAMES = ("OpenSoraT2V_v1_3-2B/122", "tiny")
MAX_TOKENS = 8192  # of text
MAX_SIDE = 16_384  # pixels; more is a slip of the keyboard
VAE_NAMES = ("WFVAEModel_D8_4x8x8", "tiny")
VAE_MEMORY_HELP = (
    "memory that the VAE may hold with its weights, inputs and results: bytes, or like 4GiB, 500MiB; it works in pieces"
    " of the clip that fit. auto: what is free on the device when it is first used, less a margin"
)
ACTIVATION_MEMORY_HELP = (
    "memory that forward and backward may take beside weights and gradients: bytes, or like 20GiB; what does not fit is"
    " recomputed, first what is cheap to recompute. auto: what is free on a GPU; on a CPU everything is kept"
)
SP_MODES = ("auto", "ulysses", "scope")
SP_GRID = r"([1-9]\d*)x([1-9]\d*)"
SP_MODE_HELP = (
    "how GPUs that share a clip divide attention; ulysses: by heads; scope: by skip sets, which sends less; 4x2: by"
    " skip sets among 4 groups of 2 GPUs, which divide the heads; auto: the fastest by prediction"
)
ATTENTION_NAMES = ("auto", "triton", "sdpa", "flash", "reference")
ATTENTION_HELP = (
    "what computes the DiT's attention; auto: the Triton kernel on a GPU, the reference elsewhere; sdpa: PyTorch's"
    " fused kernels; flash: the flash-attn package"
)


def flag(
    default: Any,
    help: str,
    *,
    choices: tuple = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    many: bool = False,
    memory: bool = False,
) -> Any:
    """A dataclass field with what the command line needs to know: help, allowed values, inclusive or open bounds.

    memory: bytes, which the command line takes with a unit; "auto" there is None here.
    """
    metadata = dict(help=help, choices=choices, at_least=at_least, above=above, at_most=at_most, below=below)
    metadata |= dict(many=many, memory=memory)
    if many and default is not None:
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataConfig:
    """Which clips are used, at which size and length (spec: data)."""

    dataset: str = flag("t2v", "kind of data set", choices=("t2v",))
    data: str | None = flag(None, "data.txt: one line DATA_ROOT,ANNOTATION (.json or .pkl) for each part of the data")
    num_frames: int = flag(93, "longest clip, in frames, 4n+1 (1 = images)", at_least=1, at_most=100_001)
    train_fps: float = flag(24.0, "frame rate that clips are resampled to, frames per second", above=0)
    sample_rate: int = flag(1, "kept for upstream's scripts; only 1: --train_fps sets the frame step", at_least=1)
    speed_factor: float = flag(1.0, "play long clips up to this many times faster", at_least=1)
    drop_short_ratio: float = flag(
        1.0, "probability that a clip shorter than --num_frames is dropped", at_least=0, at_most=1
    )
    max_height: int | None = flag(None, "greatest height, pixels", at_least=1, at_most=MAX_SIDE)
    max_width: int | None = flag(None, "greatest width, pixels", at_least=1, at_most=MAX_SIDE)
    min_height: int | None = flag(None, "least height, pixels (with --max_height)", at_least=1, at_most=MAX_SIDE)
    min_width: int | None = flag(None, "least width, pixels (with --max_width)", at_least=1, at_most=MAX_SIDE)
    max_hxw: int | None = flag(None, "greatest area, pixels; wins over --max_height and --max_width", at_least=1)
    min_hxw: int | None = flag(None, "least area, pixels; a quarter of --max_hxw if absent", at_least=1)
    force_resolution: bool = flag(False, "crop and resize every clip to exactly --max_height x --max_width")
    hw_stride: int = flag(32, "heights and widths are multiples of this, pixels", at_least=16)
    group_data: bool = flag(False, "each batch holds clips of one bucket (frames x height x width)")
    min_bucket_size: int = flag(1, "drop buckets with fewer clips than this", at_least=1)
    sp_frame_multiple: int = flag(1, "latent frames are a multiple of this (upstream's rule for its sp)", at_least=1)
    dataloader_num_workers: int = flag(4, "clips decoded at once, each in a process of its own", at_least=1)
    decode_timeout: float = flag(60.0, "seconds that the decoding of one clip may take", above=0, at_most=86_400)
    max_bad_samples: int = flag(100, "stop training when more files than this are broken", at_least=0)
    latent_cache: str | None = flag(None, "folder of latents and text states that osp_fast.encode makes for training")
    cache_variants: int = flag(1, "windows of frames and captions of each clip in --latent_cache", at_least=1)


@dataclass
class ModelConfig:
    """Which networks, where their weights are, and in which precision they run."""

    model: str = flag(DIT_NAMES[0], "the diffusion transformer's architecture", choices=DIT_NAMES)
    pretrained: str | None = flag(None, "folder of DiT weights to start from (strict on names and shapes)")
    text_encoder_name_1: str | None = flag(None, "transformers folder of the mT5/T5 encoder with its tokenizer")
    cache_dir: str | None = flag(None, "where relative model names are also looked for; nothing is downloaded")
    model_max_length: int = flag(512, "text tokens", at_least=1, at_most=MAX_TOKENS)
    ae: str = flag(VAE_NAMES[0], "the VAE's architecture", choices=VAE_NAMES)
    ae_path: str | None = flag(None, "folder of the VAE's weights")
    enable_tiling: bool = flag(False, "encode at most 8 latent frames at once: the same result in less memory")
    vae_memory: int | None = flag(None, VAE_MEMORY_HELP, memory=True)
    vae_fp32: bool = flag(False, "run the VAE in float32 whatever --mixed_precision says")
    interpolation_scale_t: float | None = flag(None, "RoPE position divisor in time (default: the model's)", above=0)
    interpolation_scale_h: float | None = flag(None, "RoPE position divisor for rows (default: the model's)", above=0)
    interpolation_scale_w: float | None = flag(
        None, "RoPE position divisor for columns (default: the model's)", above=0
    )
    sparse1d: bool | None = flag(None, "skiparse attention in the blocks 1 < i < 30 (default: the model's)")
    sparse_n: int | None = flag(None, "skiparse's k (default: the model's)", at_least=1)
    attention: str = flag("auto", ATTENTION_HELP, choices=ATTENTION_NAMES)
    gradient_checkpointing: bool = flag(False, "recompute each block in backward instead of keeping its activations")
    activation_memory: int | None = flag(None, ACTIVATION_MEMORY_HELP, memory=True)
    compile: bool | None = flag(None, "torch.compile each block of the DiT (default: on a GPU)")
    cuda_graphs: bool | None = flag(
        None, "replay forward and backward of a bucket as a CUDA graph (default: where it measures faster)"
    )
    lora_rank: int | None = flag(None, "train LoRA adapters of this rank instead of all weights", at_least=1)
    lora_alpha: float | None = flag(None, "LoRA's scale times its rank (default: the rank)", above=0)
    mixed_precision: str = flag("no", "no: float32; bf16: autocast with float32 weights", choices=("no", "bf16"))
    allow_tf32: bool = flag(False, "let float32 matrix products use TF32 on NVIDIA GPUs")


@dataclass
class DiffusionConfig:
    """Noise schedule, target and loss weight (spec: training)."""

    prediction_type: str = flag("epsilon", "what the model predicts", choices=PREDICTION_TYPES)
    rescale_betas_zero_snr: bool = flag(False, "rescale the schedule to zero terminal signal-to-noise ratio")
    snr_gamma: float | None = flag(None, "min-SNR loss weights with this gamma (usually 5.0)", above=0)
    noise_offset: float = flag(0.0, "strength of a noise offset per clip and channel", at_least=0)
    rf_scheduler: bool = flag(False, "train rectified flow instead of the discrete diffusion schedule")
    weighting_scheme: str = flag("logit_normal", "density of timesteps of rectified flow", choices=WEIGHTING_SCHEMES)
    cfg: float = flag(0.1, "probability that a caption is replaced by the empty string", at_least=0, at_most=1)


@dataclass
class OptimizerConfig:
    """AdamW and its learning rate."""

    optimizer: str = flag("adamw", "optimizer", choices=("adamw",))
    use_8bit_adam: bool = flag(False, "keep AdamW's state in 8 bits (needs torchao and a GPU)")
    offload_optimizer: bool = flag(False, "keep AdamW's state in CPU memory and update there (needs torchao and a GPU)")
    learning_rate: float = flag(1e-4, "peak learning rate", above=0)
    lr_scheduler: str = flag("constant", "learning-rate schedule, as in diffusers", choices=LR_SCHEDULERS)
    lr_warmup_steps: int = flag(500, "optimizer steps of linear warm-up (schedules that have one)", at_least=0)
    adam_beta1: float = flag(0.9, "AdamW beta 1", at_least=0, below=1)
    adam_beta2: float = flag(0.999, "AdamW beta 2", at_least=0, below=1)
    adam_epsilon: float = flag(1e-15, "AdamW epsilon", above=0)
    adam_weight_decay: float = flag(1e-2, "AdamW weight decay", at_least=0)
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm", above=0)
    gradient_accumulation_steps: int = flag(1, "micro-batches per optimizer step", at_least=1)
    train_batch_size: int = flag(1, "clips per micro-batch and GPU", at_least=1)
    tokens_per_batch: int | None = flag(
        None,
        "video tokens per micro-batch on each GPU, in place of --train_(sp_)batch_size (needs --group_data)",
        at_least=1,
    )
    max_skipped_steps: int = flag(10, "stop when this many gradients in a row are not finite", at_least=1)


@dataclass
class RunConfig:
    """How long to train, what to keep, where to write."""

    preset: str | None = flag(None, "tiny: the embedded model and its generated data set", choices=("tiny",))
    output_dir: str = flag("output", "folder for checkpoints, metrics.jsonl and rejects.jsonl")
    logging_dir: str = flag("logs", "TensorBoard folder, inside --output_dir unless absolute")
    report_to: str = flag(
        "tensorboard", "where metrics go beside metrics.jsonl", choices=("tensorboard", "wandb", "all", "none")
    )
    log_interval: int = flag(1, "optimizer steps between two log entries", at_least=1)
    seed: int = flag(42, "seed of everything that is drawn", at_least=0)
    deterministic: bool = flag(False, "add up in the same order each time, also on a GPU (slower)")
    max_train_steps: int | None = flag(None, "optimizer steps; wins over --num_train_epochs", at_least=1)
    num_train_epochs: int = flag(100, "epochs, when --max_train_steps is absent", at_least=1)
    checkpointing_steps: int = flag(500, "optimizer steps between checkpoints", at_least=1)
    checkpoints_total_limit: int | None = flag(None, "keep this many newest checkpoints", at_least=1)
    checkpoints_keep_every: int | None = flag(
        None, "never remove checkpoints whose step is a multiple of this", at_least=1
    )
    async_save: bool = flag(True, "write checkpoints while training goes on, from a copy in CPU memory")
    resume_from_checkpoint: str | None = flag(None, 'a checkpoint folder, or "latest" in --output_dir')
    use_ema: bool = flag(False, "keep an exponential moving average of the weights")
    ema_decay: float = flag(0.9999, "EMA decay per optimizer step", at_least=0, at_most=1)
    ema_start_step: int = flag(0, "optimizer step after which the average starts", at_least=0)
    offload_ema: bool = flag(False, "keep the average in CPU memory")
    validation_steps: int | None = flag(None, "sample videos whenever this many steps are done", at_least=1)
    validation_prompt: list[str] = flag(
        (), "prompts to sample for validation (default: captions of the data)", many=True
    )
    validation_sampling_steps: int = flag(20, "denoising steps of a validation sample", at_least=1)
    profile: int | None = flag(None, "write a trace of this many steps to --output_dir/profile", at_least=1)
    hang_factor: float = flag(10.0, "a step that takes this many times the median is a hang; 0: never", at_least=0)
    hang_seconds: float = flag(300.0, "no step shorter than this is a hang, seconds", above=0)
    start_timeout: float = flag(600.0, "seconds to wait for every rank at the start", above=0)
    shard_size: int | None = flag(
        None, "GPUs that share one copy of the weights; groups of them hold copies (default: all)", at_least=1
    )
    dry_run: list[int] | None = flag(
        None, "print memory and predicted step time on these numbers of GPUs, and exit", many=True, at_least=1
    )
    sp_size: int = flag(1, "GPUs that share one clip", at_least=1)
    sp_mode: str = flag(SP_MODES[0], SP_MODE_HELP)
    train_sp_batch_size: int = flag(1, "clips per micro-batch and sequence-parallel group", at_least=1)
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")


@dataclass
class TrainConfig:
    """All settings of a training run; each group is a dataclass, each field of a group a flag."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    run: RunConfig = field(default_factory=RunConfig)


@dataclass
class SampleConfig:
    """All settings of a sampling run."""

    preset: str | None = flag(None, "tiny: sizes and models of the embedded example", choices=("tiny",))
    model_path: str | None = flag(None, "folder of the DiT: a release or checkpoint-N/model_ema")
    version: str = flag("v1_3", "model family", choices=("v1_3",))
    text_encoder_name_1: str | None = flag(None, "transformers folder of the mT5/T5 encoder with its tokenizer")
    cache_dir: str | None = flag(None, "where relative model names are also looked for; nothing is downloaded")
    ae: str = flag(VAE_NAMES[0], "the VAE's architecture", choices=VAE_NAMES)
    ae_path: str | None = flag(None, "folder of the VAE's weights")
    text_prompt: list[str] = flag((), "prompts, or one .txt file with a prompt per line", many=True)
    negative_prompt: str | None = flag(None, "replaces the built-in negative prompt")
    num_frames: int | None = flag(
        None, "frames, 4n+1, 1 = an image (default: the checkpoint's recipe, else 93)", at_least=1, at_most=100_001
    )
    height: int | None = flag(None, "pixels (default: the checkpoint's recipe, else 480)", at_least=1, at_most=MAX_SIDE)
    width: int | None = flag(None, "pixels (default: the checkpoint's recipe, else 640)", at_least=1, at_most=MAX_SIDE)
    fps: float | None = flag(
        None,
        "frames per second of the written video (default: the checkpoint's recipe, else 24)",
        above=0,
        at_most=1000,
    )
    guidance_scale: float = flag(7.5, "classifier-free guidance; 1 turns it off", at_least=1)
    num_sampling_steps: int = flag(100, "denoising steps", at_least=1)
    max_sequence_length: int = flag(512, "text tokens", at_least=1, at_most=MAX_TOKENS)
    sample_method: str = flag("EulerAncestralDiscrete", "scheduler", choices=SAMPLE_METHODS)
    prediction_type: str | None = flag(
        None, "what the model predicts (default: the checkpoint's recipe, else epsilon)", choices=PREDICTION_TYPES
    )
    rescale_betas_zero_snr: bool | None = flag(
        None, "schedule with zero terminal SNR (default: the checkpoint's recipe, else off)"
    )
    seed: int = flag(42, "a sample's noise depends on this, its prompt's and its own number only", at_least=0)
    num_samples_per_prompt: int = flag(1, "videos per prompt", at_least=1)
    save_img_path: str = flag("samples", "folder for the videos, their sidecars and the grid")
    enable_tiling: bool = flag(False, "decode at most 4 latent frames at once: the same result in less memory")
    vae_memory: int | None = flag(None, VAE_MEMORY_HELP, memory=True)
    save_memory: bool = flag(False, "hold only the network in use on the GPU: no clip is decoded beside the next one")
    memory_budget: int | None = flag(
        None, "bytes that sampling may hold on the device (auto: what is free, less a margin)", memory=True
    )
    text_8bit: bool = flag(False, "weights of the text encoder and the refiner in 8 bits (needs torchao)")
    lora: str | None = flag(None, "folder or file of LoRA adapters to add to the DiT's weights")
    lora_scale: float = flag(1.0, "strength of --lora", at_least=0)
    attention: str = flag("auto", ATTENTION_HELP, choices=ATTENTION_NAMES)
    compile: bool = flag(False, "torch.compile each block of the DiT")
    cuda_graphs: bool | None = flag(None, "the DiT as a CUDA graph (default: where it measures faster)")
    step_cache: float | None = flag(
        None,
        "skip all blocks but the first in steps where its output changed less than this since the last full step, e.g. "
        "0.05; changes the result a little",
        above=0,
        at_most=1,
    )
    round_rope_angles: bool = flag(False, "round RoPE angles to the weights' 16-bit type, as upstream trained")
    dtype: str = flag("auto", "auto: bf16 on a GPU, float32 on a CPU", choices=("auto", "bf16", "fp32"))
    caption_refiner: str | None = flag(None, "transformers folder of a chat model that rewrites the prompts first")
    refiner_max_tokens: int = flag(256, "length of a rewritten prompt, in the refiner's tokens", at_least=1)
    refiner_temperature: float = flag(0.0, "of the refiner's choice of words; 0 takes the likeliest", at_least=0)
    overwrite: bool = flag(False, "sample clips again that are there already; without it they are skipped")
    sp: bool = flag(False, "under torchrun: all GPUs work on one clip, instead of each on its own")
    sp_mode: str = flag(SP_MODES[0], SP_MODE_HELP)
    start_timeout: float = flag(600, "seconds in which all ranks of --sp must be there and answer", above=0)
    dry_run: bool = flag(False, "print the plan of memory and the predicted seconds, and exit; reads no weights")
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")


@dataclass
class ServeConfig:
    """Where the web page of `osp_fast.serve` is; what it samples with are the flags of sampling."""

    host: str = flag("127.0.0.1", "address to listen at; 0.0.0.0 lets other machines in")
    port: int = flag(7860, "to listen at; 0 takes a free one", at_least=0, at_most=65535)


@dataclass
class ReconstructConfig:
    """All settings of a reconstruction."""

    ae_path: str | None = flag(None, "folder of the VAE's weights")
    cache_dir: str | None = flag(None, "where relative model names are also looked for; nothing is downloaded")
    output: str | None = flag(None, "the written video (default: VIDEO's name with .reconstruction.mp4, beside it)")
    overwrite: bool = flag(False, "replace the written video if it exists")
    vae_memory: int | None = flag(None, VAE_MEMORY_HELP, memory=True)
    dtype: str = flag("auto", "auto: bf16 on a GPU, float32 on a CPU", choices=("auto", "bf16", "fp32"))
    device: str = flag("auto", "auto, cpu, cuda or cuda:N")


TINY_FOLDER = "tiny"
EMBEDDED_MODEL = Path(__file__).parent / "assets" / "tiny"  # folders dit, vae, text_encoder

# What `--preset NAME` sets; a flag on the command line wins over it.
TRAIN_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        data=f"{TINY_FOLDER}/data/data.txt",
        num_frames=17,
        train_fps=12,
        max_height=64,
        max_width=64,
        force_resolution=True,
        hw_stride=16,
        group_data=True,
        dataloader_num_workers=2,
        model="tiny",
        text_encoder_name_1=str(EMBEDDED_MODEL / "text_encoder"),
        model_max_length=16,
        ae="tiny",
        ae_path=str(EMBEDDED_MODEL / "vae"),
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        learning_rate=2e-3,
        lr_warmup_steps=20,
        lr_scheduler="constant_with_warmup",
        train_batch_size=16,
        max_train_steps=800,
        checkpointing_steps=100,
        checkpoints_total_limit=2,
        use_ema=True,
        ema_decay=0.99,
        output_dir=f"{TINY_FOLDER}/run",
    )
}
SAMPLE_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": dict(
        model_path=str(EMBEDDED_MODEL / "dit"),
        text_encoder_name_1=str(EMBEDDED_MODEL / "text_encoder"),
        max_sequence_length=16,
        ae="tiny",
        ae_path=str(EMBEDDED_MODEL / "vae"),
        num_sampling_steps=20,
        guidance_scale=2.5,
        negative_prompt="",  # what the model has seen in place of dropped captions
        save_img_path=f"{TINY_FOLDER}/samples",
    )
}


@dataclass
class Recipe:
    """How a DiT was trained: what sampling must do the same way. Saved as recipe.json beside the weights."""

    prediction_type: str
    rescale_betas_zero_snr: bool
    rectified_flow: bool
    train_fps: float
    num_frames: int
    size: str  # the resolution rule in words, e.g. "480x640" or "area <= 262144"
    hw_stride: int


def as_dict(config: Any) -> dict[str, Any]:
    """The resolved settings as nested plain data, ready for JSON."""
    return dataclasses.asdict(config)
