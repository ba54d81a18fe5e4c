"""The config tree: every setting, its type, its default and its range.

Keys carry the names of ``algorithm.md`` (the released OREAL code's own names where it has one), Megatron's names for
parallel sizes, and SGLang's names for sampling. ``config_load.py`` reads YAML files and overrides into this tree and
turns every mistake into one line; ``config_check.py`` holds the cross-checks that need the model's shape.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
OpenFraction = Annotated[float, Field(ge=0.0, lt=1.0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
Seconds = Annotated[float, Field(gt=0.0, le=86400.0)]


class Section(BaseModel):
    """A group of keys. Unknown keys are errors; values are checked on assignment too."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False, protected_namespaces=())


class ModelConfig(Section):
    """Which model is trained, and in what precision."""

    path: str = Field(description="Hugging Face model directory: the initial policy, and the reward model's backbone")
    megatron_checkpoint: str | None = Field(
        None, description="dist_checkpointing directory that the initial weights come from; null: from path"
    )
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


class ServerConfig(Section):
    """SGLang servers, and the dispatcher that spreads a step's requests over them. Times are in seconds."""

    host: str = Field("127.0.0.1", description="address that a server listens on and is reached at")
    requests_per_server: PositiveInt = Field(512, description="requests at a server at a time, waiting ones included")
    start_timeout_s: PositiveFloat = Field(600.0, description="from a server's start to its first token")
    control_timeout_s: PositiveFloat = Field(300.0, description="one call that pauses, loads, releases or resumes")
    step_deadline_s: PositiveFloat = Field(7200.0, description="all responses of a step")
    request_timeout_s: PositiveFloat = Field(3600.0, description="one response; past it: another attempt")
    max_attempts: PositiveInt = Field(4, description="attempts of one request, on another server when there is one")
    retry_delay_s: PositiveFloat = Field(0.5, description="pause before a second attempt; doubles, with jitter")
    health_interval_s: PositiveFloat = Field(10.0, description="between looks at a server that generates")
    health_timeout_s: PositiveFloat = Field(30.0, description="a server that has not answered by then counts as hung")
    recover_timeout_s: PositiveFloat = Field(900.0, description="the run stops when no server answers for so long")
    max_restarts: NonNegativeInt = Field(3, description="times a server that failed is started again, in a run")
    bucket_bytes: PositiveInt = Field(
        512 * 2**20,
        description="of an engine rank's weights that are staged at a time, twice; a larger parameter is staged whole",
    )
    keep_weights: bool = Field(
        True, description="keep every engine rank's weights in host memory, for a server that fails in a step"
    )


class RolloutConfig(Section):
    """How responses are sampled, and by which engine."""

    engine: Literal["embedded", "sglang"] = "embedded"
    engine_tp: PositiveInt = Field(1, description="neighbouring ranks of a node that share one SGLang server")
    sglang: dict[str, Any] = Field({}, description="SGLang's server arguments by its own names")
    server: ServerConfig = ServerConfig()
    prompts_per_step: PositiveInt = 64
    prompt_repeat_k: Annotated[int, Field(ge=2)] = 16
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    top_k: NonNegativeInt = 0
    gen_max_new: PositiveInt = 14000
    gen_max_length: PositiveInt = 16384
    max_running_requests: PositiveInt = Field(256, description="requests that an engine runs together")
    verify_weights: bool = Field(True, description="compare digests of trainer and engine weights at every publish")
    oversample_prompts: NonNegativeInt = Field(
        0, description="further prompts a step; drawing ends with the first prompts_per_step that are complete"
    )
    max_logp_difference: PositiveFloat | None = Field(
        0.2, description="nats; a larger mean |engine logp - trainer logp| of a step stops the run; null: never"
    )


class JudgeConfig(Section):
    """The language model behind ``verifier.hosts``; it judges what the rules do not call correct."""

    model: str | None = Field(None, description="model name in requests; null: the first one that /v1/models lists")
    api_key_env: str | None = Field(None, description="environment variable with the API key; null: none is sent")
    connect_timeout_s: Seconds = Field(5.0, description="to open a connection")
    timeout_s: Seconds = Field(60.0, description="one request, from its first byte to the last of the reply")
    deadline_s: Seconds = Field(300.0, description="one response: queue, retries and votes; past it: unknown")
    max_retries: NonNegativeInt = Field(4, description="further requests, on another host when there is one")
    retry_delay_s: Seconds = Field(0.5, description="first pause before a retry; doubles, with jitter, to 30 s")
    concurrency_per_host: PositiveInt | None = Field(
        None, description="requests in flight a host and rank; null: verifier.concurrency_per_proc shared by the hosts"
    )
    votes: PositiveInt = Field(1, description="odd; the majority of that many requests decides, no majority is unknown")
    temperature: NonNegativeFloat = Field(0.0, description="above 0 makes votes differ")
    max_tokens: PositiveInt = Field(64, description="of a reply, thinking included")
    thinking: bool = Field(False, description="true: let a thinking model think; give it max_tokens of 1024 or more")
    constrained: Literal["auto", "json_schema", "regex", "none"] = Field(
        "auto", description="constrained output; auto: what a host accepts, json_schema first"
    )
    max_answer_chars: PositiveInt = Field(2000, description="the last characters of an answer, which the judge sees")
    screen_answers: bool = Field(True, description="an answer that speaks to the judge is not sent; the rules decide")
    cache: str | None = Field("judge_cache.txt", description="file of verdicts, within work_dir; null: none")


def _stage_sizes(value: Any) -> Any:
    """The released code's rule: a single number is shared by the two stages of a process."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return max(1, value // 2), max(1, value - value // 2)
    return value


class VerifierConfig(Section):
    """Rules in processes, then the judge when there are ``hosts``. The released code's names where it has any."""

    hosts: list[str] = Field([], description="the judge's OpenAI-compatible servers, host:port or URL; empty: no judge")
    stop_word: str | None = Field(None, description="null: model.stop_word, and nothing else may stand here")
    thinking_finish_words: list[str] = ["<conclude>", "**Final Answer**", "</think>"]
    num_processes: PositiveInt = Field(2, description="worker processes a rank")
    concurrency_per_proc: Annotated[tuple[PositiveInt, PositiveInt], BeforeValidator(_stage_sizes)] = Field(
        (8, 8), description="num_processes x the first number = requests in flight to the judge, a rank"
    )
    deadline_s: Seconds = Field(10.0, description="seconds one item may take before its worker is replaced")
    memory_limit_mb: Annotated[int, Field(ge=256, le=1_048_576)] = Field(1024, description="address space of a worker")
    max_unknown_share: Fraction = Field(
        0.2,
        description="a step or evaluation with a larger share of unknown verdicts stops: they are no random sample, "
        "since what fails is what is long or odd",
    )
    checker: str = Field(
        "megatron_oreal.verifier.rules:judge_response", description="module:function that checks in the rules' place"
    )
    judge: JudgeConfig = JudgeConfig()

    @field_validator("judge", mode="before")
    @classmethod
    def _no_null_section(cls, value: Any) -> Any:
        """An empty section in YAML reads as None; it means the defaults."""
        return {} if value is None else value


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
    num_layers_in_first_pipeline_stage: PositiveInt | None = Field(
        None, description="layers on the first stage; null: as many as on the others"
    )
    num_layers_in_last_pipeline_stage: PositiveInt | None = Field(
        None, description="layers on the last stage; null: as many as on the others"
    )
    sequence_parallel: bool = False
    use_distributed_optimizer: bool = True
    overlap_grad_reduce: bool = Field(
        False, description="reduce gradients over data-parallel ranks, bucket by bucket, during the backward pass"
    )
    overlap_param_gather: bool = Field(
        False, description="gather the reward model's new weights during its next forward pass; the policy's: at once"
    )
    ddp_bucket_size: PositiveInt | None = Field(
        None, description="parameters a bucket of the two overlaps; null: 40 million, or 1 million a data-parallel rank"
    )
    tp_comm_overlap: bool = Field(
        False, description="tensor-parallel communication during GEMMs, by TransformerEngine's user buffers"
    )
    tp_comm_overlap_options: dict[str, bool | str] = Field(
        {}, description="Megatron's tp_comm_* settings by its own names, such as tp_comm_overlap_rs_dgrad: true"
    )
    tp_comm_overlap_cfg: dict[str, dict[str, Any]] = Field(
        {}, description="TransformerEngine's ub_cfgs by GEMM, such as qkv_fprop: {num_sm: 4}"
    )
    cuda_graph_impl: Literal["none", "local", "transformer_engine"] = Field(
        "none", description="CUDA graphs of layers; megatron-core has none for packed sequences, so: none"
    )
    attention_backend: Literal["auto", "flash", "fused", "unfused"] = Field(
        "auto", description="of TransformerEngine: flash-attn, cuDNN's fused, unfused; auto: its own choice"
    )
    gradient_accumulation_fusion: Literal["auto", True, False] = Field(
        "auto", description="weight gradients added to main_grad inside their GEMM; auto: where it is installed"
    )
    max_tokens_per_microbatch: PositiveInt = Field(
        16384, description="packed tokens, prompt and response, a micro-batch"
    )
    loss_chunk_tokens: NonNegativeInt = Field(
        0, description="response tokens whose logits live at once, 2048 or more; 0: as many as fit in 4 GiB"
    )
    make_vocab_size_divisible_by: PositiveInt = Field(1, description="padding of the vocabulary, before times TP")
    transformer_impl: Literal["auto", "transformer_engine", "local"] = Field(
        "auto", description="auto: TransformerEngine on a GPU where it is installed, else torch-native modules"
    )
    offload: list[Literal["optimizer", "reward_model", "reference", "policy"]] = Field(
        [], description="parts of the actor that wait in host memory while they are not in use"
    )
    optimizer_cpu_offload: bool = Field(
        False, description="Adam's state and its step on the CPU (Megatron's HybridDeviceOptimizer)"
    )
    optimizer_offload_fraction: Fraction = Field(1.0, description="share of the parameters that is so")
    overlap_cpu_optimizer_d2h_h2d: bool = Field(False, description="its copies while the CPU computes")
    use_precision_aware_optimizer: bool = Field(
        False, description="Adam's state in the three dtypes below (TransformerEngine's FusedAdam)"
    )
    main_params_dtype: Literal["fp32", "fp16"] = "fp32"
    exp_avg_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    exp_avg_sq_dtype: Literal["fp32", "bf16", "fp16", "fp8"] = "fp32"
    recompute_granularity: Literal["full", "selective"] | None = None
    recompute_method: Literal["uniform", "block"] | None = None
    recompute_num_layers: PositiveInt | None = None
    recompute_modules: list[Literal["core_attn", "mlp"]] | None = Field(
        None, description="what recompute_granularity=selective recomputes; null: core_attn"
    )
    cpu_offloading_num_layers: NonNegativeInt = Field(
        0, description="layers whose activations wait in host memory until the backward pass (TransformerEngine)"
    )
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
