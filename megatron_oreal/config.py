"""The config tree: every setting, its type, its default and its range.

Keys carry the names of ``algorithm.md`` (the released OREAL code's own names where it has one), Megatron's names for
parallel sizes, and SGLang's names for sampling. ``config_load.py`` reads YAML files and overrides into this tree and
turns every mistake into one line; ``config_check.py`` holds the cross-checks that need the model's shape.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]


class Section(BaseModel):
    """A group of keys. Unknown keys are errors; values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False, protected_namespaces=())


class ModelConfig(Section):
    """Which model is trained, and in what precision."""

    path: str = Field(description="Hugging Face model directory: the initial policy, and the reward model's backbone")
    reference_path: str | None = Field(None, description="frozen reference model; null: the initial policy")
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="parameters and activations; gradients are always fp32")
    reward_model: bool = Field(True, description="train a token-level reward model; false: all token weights are 1")
    chat_template: str | None = Field(
        None, description="Jinja file, or a packaged one: oreal, deepseek_r1_distill; null: the tokenizer's own"
    )
    system_prompt: str | None = Field(None, description="system message put before every question")
    stop_word: str = Field(description="the one token that ends a response")


class DataConfig(Section):
    """Where prompts come from and in which order they are drawn."""

    train: str = Field(description="JSON lines, parquet, or a Hugging Face data set 'name' or 'name:split'")
    resample_by_pass_rate: bool = Field(True, description="repeat or drop prompts by pass_rate_buckets")
    pass_rate_buckets: list[tuple[float, float, int]] = Field(
        [(0.0, 0.2, 6), (0.2, 0.6, 4), (0.6, 0.8, 2)], description="[low, high) -> repeats; outside all: dropped"
    )
    max_prompt_tokens: PositiveInt | None = Field(None, description="longer prompts are dropped, with a count")


class RolloutConfig(Section):
    """How responses are sampled, and by which engine."""

    engine: Literal["embedded"] = "embedded"
    prompts_per_step: PositiveInt = 64
    prompt_repeat_k: Annotated[int, Field(ge=2)] = 16
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    top_k: NonNegativeInt = 0
    gen_max_new: PositiveInt = 14000
    gen_max_length: PositiveInt = 16384
    max_running_requests: PositiveInt = Field(256, description="slots of the embedded engine, a rank")


class VerifierConfig(Section):
    """Rule checker and its worker processes."""

    thinking_finish_words: list[str] = ["<conclude>", "**Final Answer**", "</think>"]
    num_processes: PositiveInt = Field(2, description="worker processes a rank")
    deadline_s: PositiveFloat = Field(10.0, description="seconds one item may take before its worker is replaced")
    memory_limit_mb: PositiveInt = Field(1024, description="address space of a worker")
    max_unknown_share: Fraction = Field(0.5, description="a step with a larger share of unknown verdicts stops the run")


class AlgorithmConfig(Section):
    """OREAL itself; algorithm.md defines every key."""

    mode: Literal["released", "paper"] = "released"
    reward_shaping_type: Literal["rloo", "grpo"] = "rloo"
    filter: Literal["pair", "groups", "none"] = "pair"
    actor_freeze_steps: NonNegativeInt = 10
    positive_loss_factor: NonNegativeFloat = 1.0
    negative_loss_factor: NonNegativeFloat = 0.5
    pos_mult_adv: bool = True
    kl_coef: NonNegativeFloat = 0.01
    kl_type: Literal["k1", "k2", "k3"] = "k3"
    kl_anchor: Literal["reference", "old"] = "reference"
    rescale: Literal["threshold", "topk"] = "threshold"
    correct_threshold: OpenFraction = 0.5
    incorrect_threshold: OpenFraction = 0.5
    correct_topk_ratio: Fraction = 0.5
    incorrect_topk_ratio: Fraction = 0.5


class OptimizerConfig(Section):
    """AdamW and the learning-rate schedule of both models (algorithm.md, "Optimisation")."""

    actor_lr: NonNegativeFloat = 5e-7
    actor_min_lr: NonNegativeFloat = 1e-7
    token_level_rm_lr: NonNegativeFloat = 2e-6
    token_level_rm_lr_min: NonNegativeFloat = 4e-7
    warmup_steps: NonNegativeInt = 10
    warmup_after_freeze: bool = False
    wd: NonNegativeFloat = 0.01
    wd_on_norms_and_biases: bool = Field(True, description="false: Megatron's default, no decay on 1-D parameters")
    betas: tuple[OpenFraction, OpenFraction] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0


class ParallelConfig(Section):
    """Megatron-core's parallel sizes; data parallelism is what is left of the world."""

    tensor_model_parallel_size: PositiveInt = 1
    pipeline_model_parallel_size: PositiveInt = 1
    virtual_pipeline_model_parallel_size: PositiveInt | None = Field(None, description="model chunks a pipeline stage")
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = False
    max_tokens_per_microbatch: PositiveInt = Field(
        16384, description="packed tokens, prompt and response, a micro-batch"
    )
    make_vocab_size_divisible_by: PositiveInt = Field(1, description="padding of the vocabulary, before times TP")
    transformer_impl: Literal["auto", "transformer_engine", "local"] = Field(
        "auto", description="auto: TransformerEngine on a GPU where it is installed, else torch-native modules"
    )
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: PositiveInt | None = None
    distributed_timeout_s: PositiveInt = Field(1800, description="deadline of every collective")


class EvaluationConfig(Section):
    """Held-out problems, evaluated while training."""

    data: str | None = Field(None, description="same formats as data.train; null: no evaluation")
    every: NonNegativeInt = Field(10, description="steps between evaluations; 0: only before and after")
    num_samples: PositiveInt = Field(4, description="samples a problem at rollout.temperature, top-p off")
    max_problems: PositiveInt | None = None


class CheckpointConfig(Section):
    """When state is saved; a run that finds a checkpoint in its work_dir resumes from it."""

    every: NonNegativeInt = Field(10, description="steps between checkpoints; 0: none")
    keep: PositiveInt = Field(2, description="newest checkpoints kept")
    resume: bool = Field(True, description="continue from the newest checkpoint in work_dir, when there is one")
    export_hf: bool = Field(True, description="write a Hugging Face directory when the run ends")


class TelemetryConfig(Section):
    """JSON lines are always written."""

    tensorboard: bool = True
    wandb_project: str | None = Field(None, description="a project name switches Weights & Biases on")
    save_trajectories: bool = Field(False, description="write every step's trajectories as JSON lines")


class SftConfig(Section):
    """The supervised phase of ``megatron-oreal sft``, for models that cannot solve anything yet."""

    data: str | None = Field(None, description="JSON lines with question and solution")
    lr: PositiveFloat = 1e-3
    batch_size: PositiveInt = 128
    max_steps: PositiveInt = 400
    warmup_steps: NonNegativeInt = 20
    eval_every: PositiveInt = 25
    stop_at_pass_rate: Fraction = Field(1.0, description="stop when sampled pass@1 on evaluation.data reaches this")
    output: str | None = Field(None, description="Hugging Face directory that is written")


class Config(Section):
    """Everything a run needs."""

    work_dir: str
    seed: NonNegativeInt = 0
    total_steps: PositiveInt = 90
    device: Literal["auto", "cuda", "cpu"] = "auto"
    model: ModelConfig
    data: DataConfig
    rollout: RolloutConfig = RolloutConfig()
    verifier: VerifierConfig = VerifierConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    parallel: ParallelConfig = ParallelConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    telemetry: TelemetryConfig = TelemetryConfig()
    sft: SftConfig = SftConfig()

    @model_validator(mode="before")
    @classmethod
    def _no_null_sections(cls, values: Any) -> Any:
        """An empty section in YAML reads as None; it means the defaults."""
        if isinstance(values, dict):
            return {key: value for key, value in values.items() if value is not None}
        return values

    @property
    def work_path(self) -> Path:
        """``work_dir`` as a path."""
        return Path(self.work_dir)
